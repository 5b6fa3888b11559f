package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// What the made guests run on and run, and what the broker has for them.
const (
	fleetLine     = "Milan"
	fleetPolicy   = "shop"
	fleetVersion  = 2
	fleetResource = "kbs:///shop/key/web"
)

var (
	fleetImage = "sha256:" + strings.Repeat("1", 64)
	fleetKey   = bytes.Repeat([]byte{0x5e}, 32)
	// fleetLaunch is the MEASUREMENT of all.
	fleetLaunch = bytes.Repeat([]byte{0x4d}, 48)
)

// sessionsPerGuest is how many sessions one REPORT_ID opens: a launch with one
// workload attests itself, and again for the key. The broker has every other
// session's guest in its storage already.
const sessionsPerGuest = 2

// fleet is SEV-SNP guests of one launch policy on one made chip. Nothing about
// it is easy for the broker: the whole dialect, a signed policy in the
// init-data, an event log, and the host's whole certificate table.
type fleet struct {
	chain    *snptest.Chain
	signer   string // fingerprint
	initdata []byte
	hostData []byte
	log      []byte // CEL-TLV
	// JSON of which nothing depends on a session: the host's certificates, a
	// report without report data, id and signature, the init-data's text.
	certs, report, body []byte
	additional          string
	opened              atomic.Uint64 // sessions
}

// made is a testing.TB for snptest: what fails there panics.
type made struct{ testing.TB }

func (made) Helper()           {}
func (made) Fatal(args ...any) { panic(fmt.Sprint(args...)) }

// policySigner signs launch policies with a made key.
type policySigner struct{ *ecdsa.PrivateKey }

func (s policySigner) PublicKey() crypto.PublicKey { return s.Public() }

func (s policySigner) Sign(message []byte) ([]byte, error) {
	sum := sha256.Sum256(message)
	return s.PrivateKey.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// newFleet makes chip, policy and event log. dir is for the log's file.
func newFleet(ctx context.Context, dir string) (*fleet, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	f := &fleet{chain: snptest.New(made{}, snptest.Config{Line: fleetLine})}
	if f.signer, err = dsse.Fingerprint(key.Public()); err != nil {
		return nil, err
	}
	spki, err := dsse.MarshalPublicKeyPEM(key.Public())
	if err != nil {
		return nil, err
	}
	p := &policy.Policy{
		APIVersion: policy.APIVersion, Name: fleetPolicy, Version: fleetVersion,
		Expires:   time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339),
		Platforms: []policy.Platform{policy.PlatformSNP},
		Workloads: []policy.Workload{{
			Name: "web", Image: "registry.example/shop@" + fleetImage, Encryption: "optional",
			Signatures: policy.Signatures{Required: []policy.Signer{{Key: string(spki)}}},
		}},
	}
	envelope, err := policy.Sign(p, policySigner{key})
	if err != nil {
		return nil, err
	}
	if f.initdata, err = policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: string(spki)}); err != nil {
		return nil, err
	}
	in, err := policy.ParseInitdata(f.initdata)
	if err != nil {
		return nil, err
	}
	f.hostData = in.HostData()
	payload, err := p.Canonical()
	if err != nil {
		return nil, err
	}
	if err := f.measure(ctx, dir, policy.Digest(payload)); err != nil {
		return nil, err
	}
	return f, f.prepare()
}

// measure writes the event log of a launch.
func (f *fleet) measure(ctx context.Context, dir, digest string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	log, err := eventlog.Open(ctx, dir, eventlog.NewHead(dir))
	if err != nil {
		return err
	}
	for _, e := range []eventlog.Event{
		{Kind: eventlog.KindPolicy, Policy: fleetPolicy, PolicyVersion: fleetVersion, PolicyDigest: digest, Signers: []string{f.signer}},
		{Kind: eventlog.KindImage, Workload: "web", Image: "registry.example/shop@" + fleetImage},
	} {
		if err := log.Append(ctx, e); err != nil {
			return err
		}
	}
	f.log = log.Bytes()
	return nil
}

// rule is the fleet's release rule: everything that a rule can ask of SNP.
func (f *fleet) rule() release.Rule {
	tcb := snptest.DefaultTCB(fleetLine)
	return release.Rule{
		APIVersion: release.RuleAPIVersion, Platforms: []string{"snp"},
		Policy: &release.PolicyRule{Names: []string{fleetPolicy}, Signers: []string{f.signer}, MinimumVersion: fleetVersion},
		Images: []string{fleetImage},
		Launch: []release.Launch{{Label: "bench", Platform: "snp", SNP: &release.SNPLaunch{Measurement: hex.EncodeToString(fleetLaunch)}}},
		TCB: &release.TCB{SNP: &release.SNPTCB{
			Minimum:     map[string]release.SNPMinimum{fleetLine: {Bootloader: &tcb.Bootloader, TEE: &tcb.TEE, SNP: &tcb.SNP, Microcode: &tcb.Microcode}},
			SigningKeys: []string{"vcek"}, VMPL: &release.VMPL{Exact: new(uint32)}, RequireRevocation: true,
		}},
	}
}

// guest names the guest that opens the next session.
func (f *fleet) guest() [32]byte {
	n := f.opened.Add(1) - 1
	return sha256.Sum256(fmt.Appendf(nil, "%p %d", f, n/sessionsPerGuest))
}

// quote is what the hardware does: it signs a report over the report data.
func (f *fleet) quote(reportData [kbs.ReportDataSize]byte, guest [32]byte) ([]byte, error) {
	var padded [64]byte
	copy(padded[:], reportData[:])
	raw, err := f.chain.SNPReport(padded, f.options(guest[:])).Raw()
	if err != nil {
		return nil, err
	}
	return raw, f.chain.Sign(raw)
}

// evidence is the primary evidence with a quote in it. encoding/json would
// take as long for it as the broker for a session's cryptography, so only what
// differs between quotes is written afresh: report data, report id, signature.
func (f *fleet) evidence(quote []byte) []byte {
	report := f.report
	for _, part := range []struct {
		name     string
		from, to int
	}{{"report_data", 0x50, 0x90}, {"report_id", 0x140, 0x160}, {"r", kbs.SNPSignedSize, kbs.SNPSignedSize + 72}, {"s", kbs.SNPSignedSize + 72, kbs.SNPSignedSize + 144}} {
		was, is := member(part.name, make(kbs.Bytes, part.to-part.from)), member(part.name, quote[part.from:part.to])
		report = bytes.Replace(report, was, is, 1)
	}
	return slices.Concat([]byte(`{"attestation_report":`), report, []byte(`,"cert_chain":`), f.certs, []byte(`}`))
}

// member is a member of bytes as the report's JSON has it.
func member(name string, value kbs.Bytes) []byte {
	text, _ := value.MarshalJSON() // never fails
	return append([]byte(`"`+name+`":`), text...)
}

// prepare makes what all evidence has in common, and sees that evidence with a
// quote says what the quote says.
func (f *fleet) prepare() error {
	var err error
	if f.certs, err = json.Marshal(f.chain.Certs(false)); err != nil {
		return err
	}
	if f.report, err = json.Marshal(f.chain.SNPReport([64]byte{}, f.options(make([]byte, 32)))); err != nil {
		return err
	}
	if f.body, err = json.Marshal(string(f.initdata)); err != nil {
		return err
	}
	if f.additional, err = (kbs.AdditionalCVMAgent{EventLog: f.log}).Encode(); err != nil {
		return err
	}
	quote, err := f.quote([48]byte{1, 2, 3}, f.guest())
	if err != nil {
		return err
	}
	back, err := kbs.DecodeSNPEvidence(f.evidence(quote))
	if err != nil {
		return err
	}
	raw, err := back.Report.Raw()
	if err == nil && !bytes.Equal(raw, quote) {
		err = errors.New("the made evidence does not hold its quote")
	}
	return err
}

func (f *fleet) options(guest []byte) snptest.Options {
	return snptest.Options{Measurement: fleetLaunch, HostData: f.hostData, ReportID: guest}
}

// session attests a guest over c and gets the resource, as a guest does: a
// fresh key, a report over this session's nonce, and every answer looked at.
func (f *fleet) session(c *connection) error {
	var request kbs.AuthRequest
	request.Version, request.TEE = kbs.Version, "snp"
	request.ExtraParams.CVMAgent = &kbs.CVMAgentAuth{Version: kbs.Dialect}
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	answer, cookie, err := c.do(http.MethodPost, kbs.PathAuth, "", body)
	if err != nil {
		return err
	}
	challenge, err := kbs.DecodeChallenge(answer)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if body, err = f.attest(challenge.Nonce, key); err != nil {
		return err
	}
	if answer, _, err = c.do(http.MethodPost, kbs.PathAttest, cookie, body); err != nil {
		return err
	}
	if _, err := kbs.DecodeAttestResponse(answer); err != nil {
		return err
	}
	answer, _, err = c.do(http.MethodGet, kbs.PathResource+strings.TrimPrefix(fleetResource, "kbs:///"), cookie, nil)
	if err != nil {
		return err
	}
	jwe, err := jose.ParseEncryptedJSON(string(answer), []jose.KeyAlgorithm{jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		return err
	}
	released, err := jwe.Decrypt(key)
	if err == nil && !bytes.Equal(released, fleetKey) {
		err = errors.New("the released resource is not the one that was stored")
	}
	return err
}

// attest answers a nonce: the body of POST attest.
func (f *fleet) attest(nonce string, key *ecdsa.PrivateKey) ([]byte, error) {
	public, err := kbs.NewTEEPubKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	reportData, err := kbs.ReportData(f.additional, nonce, public)
	if err != nil {
		return nil, err
	}
	quote, err := f.quote(reportData, f.guest())
	if err != nil {
		return nil, err
	}
	runtime, err := json.Marshal(kbs.RuntimeData{Nonce: nonce, TEEPubKey: public})
	if err != nil {
		return nil, err
	}
	additional, err := json.Marshal(f.additional)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, `{"init-data":{"format":"toml","body":%s},"runtime-data":%s,"tee-evidence":{"primary_evidence":%s,"additional_evidence":%s}}`,
		f.body, runtime, f.evidence(quote), additional), nil
}

// connection is one TLS connection that is kept alive. net/http's client would
// take as much processor time as the broker: its transport passes each answer
// through three goroutines.
type connection struct {
	tls *tls.Conn
	in  *bufio.Reader
}

// connect dials host:port.
func connect(ctx context.Context, address string, config *tls.Config) (*connection, error) {
	c, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &connection{tls: c.(*tls.Conn), in: bufio.NewReader(c)}, nil
}

func (c *connection) close() { _ = c.tls.Close() }

// answerWithin bounds one request.
const answerWithin = 30 * time.Second

// do sends one request and returns the body of a 200 answer and the session
// cookie that came with it, or else the one that was given.
func (c *connection) do(method, path, cookie string, body []byte) ([]byte, string, error) {
	if err := c.tls.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return nil, "", err
	}
	request, err := http.NewRequest(method, "https://"+c.tls.RemoteAddr().String()+path, bytes.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	if cookie != "" {
		request.AddCookie(&http.Cookie{Name: kbs.CookieName, Value: cookie})
	}
	var out bytes.Buffer
	if err := request.Write(&out); err != nil {
		return nil, "", err
	}
	if _, err := c.tls.Write(out.Bytes()); err != nil {
		return nil, "", err
	}
	response, err := http.ReadResponse(c.in, request)
	if err != nil {
		return nil, "", fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(response.Body, kbs.MaxBody))
	if err != nil {
		return nil, "", err
	}
	if response.StatusCode != http.StatusOK {
		return nil, "", fmt.Errorf("%s %s: %d: %s", method, path, response.StatusCode, answer)
	}
	if response.Close {
		return nil, "", errors.New("the broker closes a connection that was to be kept alive")
	}
	for _, have := range response.Cookies() {
		if have.Name == kbs.CookieName {
			cookie = have.Value
		}
	}
	return answer, cookie, nil
}
