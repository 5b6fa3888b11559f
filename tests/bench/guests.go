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
	log      []byte          // CEL-TLV
	certs    json.RawMessage // cert_chain; nothing in it depends on a session
	opened   atomic.Uint64   // sessions
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
	if f.certs, err = json.Marshal(f.chain.Certs(false)); err != nil {
		return nil, err
	}
	return f, f.measure(ctx, dir, policy.Digest(payload))
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
	raw, err := f.chain.SNPReport(padded, snptest.Options{Measurement: fleetLaunch, HostData: f.hostData, ReportID: guest[:]}).Raw()
	if err != nil {
		return nil, err
	}
	return raw, f.chain.Sign(raw)
}

// evidence is the primary evidence with a quote in it.
func (f *fleet) evidence(quote []byte) (json.RawMessage, error) {
	report, err := kbs.SNPReportFromRaw(quote)
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		Report *kbs.SNPReport  `json:"attestation_report"`
		Certs  json.RawMessage `json:"cert_chain"`
	}{report, f.certs})
}

// session attests a guest over c and gets the resource, as a guest does: a
// fresh key, a report over this session's nonce, and every answer looked at.
func (f *fleet) session(c *connection) error {
	var request kbs.AuthRequest
	request.Version, request.TEE = kbs.Version, "snp"
	request.ExtraParams.CVMAgent = &kbs.CVMAgentAuth{Version: kbs.Dialect}
	answer, cookie, err := c.post(kbs.PathAuth, "", request)
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
	attest, err := f.attest(challenge.Nonce, key)
	if err != nil {
		return err
	}
	if answer, _, err = c.post(kbs.PathAttest, cookie, attest); err != nil {
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

// attest answers a nonce.
func (f *fleet) attest(nonce string, key *ecdsa.PrivateKey) (*kbs.AttestRequest, error) {
	public, err := kbs.NewTEEPubKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	additional, err := kbs.AdditionalCVMAgent{EventLog: f.log}.Encode()
	if err != nil {
		return nil, err
	}
	reportData, err := kbs.ReportData(additional, nonce, public)
	if err != nil {
		return nil, err
	}
	quote, err := f.quote(reportData, f.guest())
	if err != nil {
		return nil, err
	}
	primary, err := f.evidence(quote)
	if err != nil {
		return nil, err
	}
	return &kbs.AttestRequest{
		InitData:    &kbs.InitData{Format: "toml", Body: string(f.initdata)},
		RuntimeData: kbs.RuntimeData{Nonce: nonce, TEEPubKey: public},
		TEEEvidence: kbs.CompositeEvidence{PrimaryEvidence: primary, AdditionalEvidence: additional},
	}, nil
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

func (c *connection) post(path, cookie string, message any) ([]byte, string, error) {
	body, err := json.Marshal(message)
	if err != nil {
		return nil, "", err
	}
	return c.do(http.MethodPost, path, cookie, body)
}

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
