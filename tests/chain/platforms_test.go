package chain

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/keyrelease"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/platformtest"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	sealing "github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

// bench is a broker in this process whose verifiers trust made roots: no
// configuration file can name any, so they are given to the server itself.
type bench struct {
	admin  *adminclient.Client
	policy policy.Broker
}

func newBench(t *testing.T, verifiers ...appraisal.Verifier) *bench {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(filepath.Join(dir, "kek"), bytes.Repeat([]byte("k"), 32), 0o600))
	source, err := sealing.Config{File: filepath.Join(dir, "kek")}.Open("")
	must(err)
	store, err := broker.OpenStore(filepath.Join(dir, "db"), source)
	must(err)
	log, err := audit.Open(filepath.Join(dir, "audit"), time.Now)
	must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	must(err)
	const token = "token-of-the-admin-of-this-test-and-of-nobody-else"
	server, err := broker.New(broker.Options{Store: store, Audit: log, TokenKey: key, Verifiers: verifiers, AdminHashes: [][32]byte{sha256.Sum256([]byte(token))},
		MaxSessions: 100, Logger: slog.New(slog.DiscardHandler), Now: time.Now})
	must(err)
	http := httptest.NewTLSServer(server)
	t.Cleanup(func() { http.Close(); _ = server.Close(); _ = log.Close(); _ = store.Close() })
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: http.Certificate().Raw})
	b := &bench{policy: policy.Broker{URL: http.URL, TLSRoots: []string{string(ca)}, TokenKeys: []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))}}}
	b.admin, err = adminclient.New(http.URL, ca, token)
	must(err)
	must(b.admin.PutResource(context.Background(), webKey, bytes.Repeat([]byte("k"), 32)))
	return b
}

// tee is a guest in a TEE: launched with a signed policy, its log written.
type tee struct {
	attester platform.Attester
	log      *eventlog.Log
	signer   *dssetest.Key
	initdata []byte
	digest   string
}

// event names the guest's policy.
func (g *tee) events() []eventlog.Event {
	return []eventlog.Event{
		{Kind: eventlog.KindPolicy, Policy: "shop", PolicyVersion: 2, PolicyDigest: g.digest, Signers: []string{g.signer.Fingerprint}},
		{Kind: eventlog.KindImage, Workload: "web", Image: imageOne},
	}
}

// boot does what the agent does: look for the platform, hold the launch against
// the initdata, choose by the policy, open the log and write the first events.
func (g *tee) boot(t *testing.T, h platform.Hardware, runDir string, on policy.Platform) {
	t.Helper()
	ctx := context.Background()
	doc, err := policy.ParseInitdata(g.initdata)
	if err != nil {
		t.Fatal(err)
	}
	guest, err := platform.Open(ctx, h, platform.Options{RunDir: runDir})
	if err != nil {
		t.Fatal(err)
	}
	if checked, err := guest.CheckLaunch(ctx, doc); !checked || err != nil {
		t.Fatalf("launch: %t, %v", checked, err)
	}
	if g.attester, err = guest.Choose([]policy.Platform{on}, 0); err != nil {
		t.Fatal(err)
	}
	register := g.attester.Register()
	if register == nil {
		register = eventlog.NewHead(runDir)
	}
	if g.log, err = eventlog.Open(ctx, runDir, register); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.log.Close() })
	for _, e := range g.events() {
		if err := g.log.AppendOnce(ctx, e); err != nil {
			t.Fatal(err)
		}
	}
}

func (g *tee) client(t *testing.T, b policy.Broker, change func(*keyrelease.Config)) *keyrelease.Client {
	t.Helper()
	c := keyrelease.Config{Broker: b, Initdata: g.initdata, EventLog: g.log.Bytes, Attester: g.attester, FirstWait: 10 * time.Millisecond}
	if change != nil {
		change(&c)
	}
	client, err := keyrelease.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// newTEE signs the guest's policy; its digest is what the launch must bind.
func newTEE(t *testing.T, on policy.Platform) (*tee, *policy.Initdata) {
	t.Helper()
	g := &tee{signer: dssetest.New(t, "ecdsa")}
	g.initdata, g.digest = signed(t, g.signer, 2, on)
	doc, err := policy.ParseInitdata(g.initdata)
	if err != nil {
		t.Fatal(err)
	}
	return g, doc
}

// The guest side of each TEE against the broker, through every step from
// detection to the opened key; then each thing changed that should refuse it.
func TestTEEsEndToEnd(t *testing.T) {
	chain := snptest.New(t, snptest.Config{})
	host := tdxtest.New(t, tdxtest.Config{})
	b := newBench(t, &appraisal.SNP{Roots: chain.Roots(), Collateral: chain.Collateral(t)},
		&appraisal.TDX{Roots: host.Roots(), Collateral: host.Source(t)})
	snpGuest := func(o snptest.Options, by func(*snptest.Device) platform.Hardware) func(*testing.T, *policy.Initdata) platform.Hardware {
		return func(_ *testing.T, doc *policy.Initdata) platform.Hardware {
			o.HostData, o.ReportID = doc.HostData(), bytes.Repeat([]byte{7}, 32)
			return by(&snptest.Device{Chain: chain, Options: o})
		}
	}
	tdxGuest := func(by func(*platformtest.TD) platform.Hardware) func(*testing.T, *policy.Initdata) platform.Hardware {
		return func(t *testing.T, doc *policy.Initdata) platform.Hardware {
			log, rtmrs := platformtest.EventLog()
			td := platformtest.NewTD(t, host, tdxtest.Report{MRConfigID: [48]byte(doc.MRConfigID()), RTMR: rtmrs})
			td.Files.Set(platformtest.CCEL, log)
			return by(td)
		}
	}
	tsm := func(d *snptest.Device) platform.Hardware { return platformtest.SNPByTSM(d, 0) }
	device := func(d *snptest.Device) platform.Hardware { return platformtest.SNPByDevice(d) }
	for name, c := range map[string]struct {
		on       policy.Platform
		hardware func(*testing.T, *policy.Initdata) platform.Hardware
	}{
		"SEV-SNP by configfs":   {policy.PlatformSNP, snpGuest(snptest.Options{}, tsm)},
		"SEV-SNP by the device": {policy.PlatformSNP, snpGuest(snptest.Options{}, device)},
		"TDX by configfs":       {policy.PlatformTDX, tdxGuest((*platformtest.TD).ByTSM)},
		"TDX by the device":     {policy.PlatformTDX, tdxGuest((*platformtest.TD).ByDevice)},
	} {
		t.Run(name, func(t *testing.T) {
			g, doc := newTEE(t, c.on)
			runDir := t.TempDir()
			h := c.hardware(t, doc)
			g.boot(t, h, runDir, c.on)
			rule := release.Rule{APIVersion: release.RuleAPIVersion, Platforms: []string{string(c.on)}, AnyLaunch: true,
				Policy: &release.PolicyRule{Names: []string{"shop"}, Signers: []string{g.signer.Fingerprint}, MinimumVersion: 2},
				Images: []string{imageOne[strings.Index(imageOne, "@")+1:]}}
			put := func(r release.Rule) {
				t.Helper()
				if err := b.admin.PutRule(context.Background(), webKey, r); err != nil {
					t.Fatal(err)
				}
			}
			put(rule)
			released(t, g.client(t, b.policy, nil))
			instance := func() string {
				t.Helper()
				s, err := g.client(t, b.policy, nil).Attest(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				return s.Token().InstanceID
			}
			first := instance()

			// The daemon restarts: the log replays, the instance is the same.
			if err := g.log.Close(); err != nil {
				t.Fatal(err)
			}
			g.boot(t, h, runDir, c.on)
			released(t, g.client(t, b.policy, nil))
			if again := instance(); again != first || len(first) != 32 {
				t.Errorf("instance %q, after a restart %q", first, again)
			}

			// Under dialect kbs nothing names the policy: a rule that does is not met.
			refused(t, g.client(t, b.policy, func(c *keyrelease.Config) { c.Broker.Dialect = "kbs" }), cause.KeyRefused, "")
			put(release.Rule{APIVersion: release.RuleAPIVersion, Platforms: []string{string(c.on)}, AnyPolicy: true, AnyLaunch: true})
			released(t, g.client(t, b.policy, func(c *keyrelease.Config) { c.Broker.Dialect = "kbs" }))

			other := rule
			other.Images = []string{imageTwo[strings.Index(imageTwo, "@")+1:]}
			put(other)
			refused(t, g.client(t, b.policy, nil), cause.KeyRefused, appraisal.CheckImage+":")
			other = rule
			other.Platforms = []string{"tpm"}
			put(other)
			refused(t, g.client(t, b.policy, nil), cause.KeyRefused, appraisal.CheckPlatform+":")
			put(rule)

			newer, _ := signed(t, g.signer, 3, c.on)
			log := g.log.Bytes()
			for what, c := range map[string]struct {
				check  string
				change func(*keyrelease.Config)
			}{
				"the initdata of a newer policy": {appraisal.CheckLaunch, func(c *keyrelease.Config) { c.Initdata = newer }},
				"no log":                         {appraisal.CheckEventLog, func(c *keyrelease.Config) { c.EventLog = func() []byte { return nil } }},
				"a changed event": {appraisal.CheckEventLog, func(c *keyrelease.Config) {
					c.EventLog = func() []byte { return bytes.Replace(log, []byte("shop"), []byte("shoq"), 1) }
				}},
			} {
				t.Run(what, func(t *testing.T) { refused(t, g.client(t, b.policy, c.change), cause.AttestationRefused, c.check+":") })
			}
			released(t, g.client(t, b.policy, nil))
		})
	}
}

// A TEE under roots that are not the broker's does not get as far as a token,
// and neither does one that its owner can look into.
func TestTEEsOfOthersAreRefused(t *testing.T) {
	ours := snptest.New(t, snptest.Config{})
	intel, impostor := tdxtest.New(t, tdxtest.Config{}), tdxtest.New(t, tdxtest.Config{})
	b := newBench(t, &appraisal.SNP{Roots: ours.Roots(), Collateral: ours.Collateral(t)}, &appraisal.TDX{Roots: intel.Roots(), Collateral: intel.Source(t)})
	vendor := newBench(t, &appraisal.SNP{Collateral: ours.Collateral(t)}) // AMD's own roots
	snpBy := func(chain *snptest.Chain, o snptest.Options) func(*testing.T, *policy.Initdata) platform.Hardware {
		return func(_ *testing.T, doc *policy.Initdata) platform.Hardware {
			o.HostData = doc.HostData()
			return platformtest.SNPByTSM(&snptest.Device{Chain: chain, Options: o}, 0)
		}
	}
	tdxBy := func(host *tdxtest.Platform, r tdxtest.Report) func(*testing.T, *policy.Initdata) platform.Hardware {
		return func(t *testing.T, doc *policy.Initdata) platform.Hardware {
			r.MRConfigID = [48]byte(doc.MRConfigID())
			return platformtest.NewTD(t, host, r).ByTSM()
		}
	}
	for name, c := range map[string]struct {
		on       policy.Platform
		hardware func(*testing.T, *policy.Initdata) platform.Hardware
		at       *bench
	}{
		"a chip that AMD did not make": {policy.PlatformSNP, snpBy(ours, snptest.Options{}), vendor},
		"a guest that is debugged":     {policy.PlatformSNP, snpBy(ours, snptest.Options{Policy: 0x30000 | 1<<19}), b},
		"a guest that may migrate":     {policy.PlatformSNP, snpBy(ours, snptest.Options{Policy: 0x30000 | 1<<18}), b},
		"a TDX host of another":        {policy.PlatformTDX, tdxBy(impostor, tdxtest.Report{}), b},
		"a TD that is debugged":        {policy.PlatformTDX, tdxBy(intel, tdxtest.Report{Attributes: 1<<28 | 1}), b},
	} {
		t.Run(name, func(t *testing.T) {
			g, doc := newTEE(t, c.on)
			g.boot(t, c.hardware(t, doc), t.TempDir(), c.on)
			refused(t, g.client(t, c.at.policy, nil), cause.AttestationRefused, ":")
		})
	}
}

// Several URLs of the policy, the real broker behind one of them: the agent
// finds it, and what it has measured is as it was.
func TestFailoverToTheRealBroker(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	dead := httptest.NewTLSServer(nil)
	dead.Close()
	b := s.policyBroker(t)
	b.URL, b.URLs = dead.URL, []string{b.URL}
	client := v.client(t, b, nil)
	for range 2 {
		released(t, client)
	}
	v.replays(t, 2)
	if !slices.Contains(b.URLs, "https://"+s.address) {
		t.Error("the policy was changed")
	}
}
