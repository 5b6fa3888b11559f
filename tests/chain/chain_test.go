// Package chain tests the guest side of key release against the broker.
package chain

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/keyrelease"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/swtpmtest"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

// rootName is what the brokers of these tests call the TPM's maker.
const rootName = "maker"

// webKey is the resource that the tests ask for.
const webKey = "kbs:///shop/key/web"

var (
	imageOne = "registry.example/shop@sha256:" + strings.Repeat("1", 64)
	imageTwo = "registry.example/shop@sha256:" + strings.Repeat("2", 64)
	kek      = bytes.Repeat([]byte("k"), 32)
)

// shelf is a broker's directory and the broker that runs over it.
type shelf struct {
	dir, address string
	admin        *adminclient.Client
	stop         func() // graceful, and waits; may be called twice
}

// newShelf makes a broker that trusts the TPM makers in roots (PEM) and starts
// it.
func newShelf(t *testing.T, roots []byte) *shelf {
	t.Helper()
	// A fixed port, so that it comes back where the policy says.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &shelf{dir: t.TempDir(), address: l.Addr().String()}
	l.Close()
	file := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(file, roots, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := broker.Init(broker.InitOptions{Dir: s.dir, Hosts: []string{"127.0.0.1"}, Listen: s.address, Now: time.Now(),
		EKRoots: []broker.RootConfig{{Name: rootName, Paths: []string{file}}}}); err != nil {
		t.Fatal(err)
	}
	s.start(t)
	if s.admin, err = adminclient.New("https://"+s.address, []byte(s.read(t, broker.FileCA)), s.read(t, broker.FileAdminToken)); err != nil {
		t.Fatal(err)
	}
	return s
}

// start starts the broker over its directory, again if need be. It may be
// called from another goroutine than the test's.
func (s *shelf) start(t *testing.T) {
	t.Helper()
	c, err := broker.LoadConfig(filepath.Join(s.dir, broker.FileConfig))
	if err != nil {
		t.Error(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	out, in := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- broker.Run(ctx, c, "", slog.New(slog.DiscardHandler), in)
		in.Close()
	}()
	var url string
	if _, err := fmt.Fscanf(out, "listening on %s\n", &url); err != nil {
		cancel()
		t.Errorf("the broker does not start: %v, %v", err, <-done)
		return
	}
	var once sync.Once
	s.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("the broker ended with %v", err)
			}
		})
	}
	t.Cleanup(s.stop)
}

// blip stops the broker and starts it again after a while, during which the
// caller goes on. It is back, or the test over, when the returned function is.
func (s *shelf) blip(t *testing.T) (wait func()) {
	t.Helper()
	s.stop()
	back := make(chan struct{})
	go func() {
		defer close(back)
		time.Sleep(500 * time.Millisecond)
		s.start(t)
	}()
	return func() { <-back }
}

func (s *shelf) read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// policyBroker is what a policy says of this broker.
func (s *shelf) policyBroker(t *testing.T) policy.Broker {
	t.Helper()
	return policy.Broker{URL: "https://" + s.address, TLSRoots: []string{s.read(t, broker.FileCA)}, TokenKeys: []string{s.read(t, broker.FileTokenPub)}}
}

// put keeps the tests' key under a rule.
func (s *shelf) put(t *testing.T, rule release.Rule) {
	t.Helper()
	ctx := context.Background()
	if err := s.admin.PutResource(ctx, webKey, kek); err != nil {
		t.Fatal(err)
	}
	if err := s.admin.PutRule(ctx, webKey, rule); err != nil {
		t.Fatal(err)
	}
}

// vm is a guest that was launched with a signed policy: its TPM with PCR 8
// measured, and its event log.
type vm struct {
	soft     *swtpmtest.TPM
	tpm      *platform.TPM
	log      *eventlog.Log
	logDir   string
	signer   *dssetest.Key
	initdata []byte
	digest   string // of the policy
	earlier  []byte // the log of before its last event
}

// makers are TPMs of two makers, manufactured once: that takes longer than any
// test. Each guest is a reboot.
var makers [2]*swtpmtest.TPM

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	// Short: sockets are in it.
	dir, err := os.MkdirTemp("", "cvm-c")
	if err != nil {
		fmt.Fprintln(os.Stderr, "chain:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	for i := range makers {
		if makers[i], err = swtpmtest.Start(filepath.Join(dir, fmt.Sprint(i))); err != nil {
			fmt.Fprintln(os.Stderr, "chain:", err)
			return 1
		}
		defer func() { _ = makers[i].Stop() }()
	}
	return m.Run()
}

// newVM launches a guest on the TPM of a maker, 0 or 1.
func newVM(t *testing.T, maker int) *vm {
	t.Helper()
	v := &vm{logDir: t.TempDir(), signer: dssetest.New(t, "ecdsa"), soft: makers[maker]}
	if err := v.soft.Reboot(); err != nil {
		t.Fatal(err)
	}
	var err error
	if v.tpm, err = platform.OpenTPM(v.soft.Spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.tpm.Close() })

	v.initdata, v.digest = v.sign(t, 2)
	doc, err := policy.ParseInitdata(v.initdata)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := v.tpm.ExtendPCR(ctx, platform.PCRLaunch, doc.Digest()); err != nil {
		t.Fatal(err)
	}
	v.open(t, v.tpm.PCR14())
	v.append(t, v.event(eventlog.KindPolicy, 2))
	v.earlier = v.log.Bytes()
	v.append(t, eventlog.Event{Kind: eventlog.KindImage, Workload: "web", Image: imageOne})
	return v
}

// sign makes the initdata of one version of the guest's policy.
func (v *vm) sign(t *testing.T, version uint64) (initdata []byte, digest string) {
	t.Helper()
	return signed(t, v.signer, version, policy.PlatformTPM)
}

// signed makes the initdata of a policy for one platform.
func signed(t *testing.T, signer *dssetest.Key, version uint64, on policy.Platform) (initdata []byte, digest string) {
	t.Helper()
	p := &policy.Policy{
		APIVersion: policy.APIVersion, Name: "shop", Version: version, Expires: time.Now().Add(time.Hour).UTC().Format(time.RFC3339),
		Platforms: []policy.Platform{on},
		Workloads: []policy.Workload{{Name: "web", Image: imageOne, Encryption: "optional",
			Signatures: policy.Signatures{Required: []policy.Signer{{Key: signer.PEM}}}}},
	}
	envelope, err := policy.Sign(p, signer)
	if err != nil {
		t.Fatal(err)
	}
	if initdata, err = policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: signer.PEM}); err != nil {
		t.Fatal(err)
	}
	payload, err := p.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	return initdata, policy.Digest(payload)
}

// event names a version of the guest's policy, the launched one by its digest.
func (v *vm) event(kind eventlog.Kind, version uint64) eventlog.Event {
	e := eventlog.Event{Kind: kind, Policy: "shop", PolicyVersion: version, PolicyDigest: v.digest}
	if version != 2 {
		e.PolicyDigest = "sha256:" + strings.Repeat(fmt.Sprint(version), 64)
	}
	if kind == eventlog.KindPolicy || kind == eventlog.KindPolicyStaged {
		e.Signers = []string{v.signer.Fingerprint}
	}
	return e
}

// open opens the guest's log over a register.
func (v *vm) open(t *testing.T, register eventlog.Register) {
	t.Helper()
	var err error
	if v.log, err = eventlog.Open(context.Background(), v.logDir, register); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.log.Close() })
}

func (v *vm) append(t *testing.T, events ...eventlog.Event) {
	t.Helper()
	for _, e := range events {
		if err := v.log.AppendOnce(context.Background(), e); err != nil {
			t.Fatal(err)
		}
	}
}

// rule is the rule that the guest satisfies.
func (v *vm) rule() release.Rule {
	_, image, _ := strings.Cut(imageOne, "@")
	return release.Rule{APIVersion: release.RuleAPIVersion, Platforms: []string{"tpm"}, EKRoots: []string{rootName},
		Policy: &release.PolicyRule{Names: []string{"shop"}, Signers: []string{v.signer.Fingerprint}}, Images: []string{image}}
}

// client is the guest's client of a broker. change (may be nil) alters what the
// agent would configure.
func (v *vm) client(t *testing.T, b policy.Broker, change func(*keyrelease.Config)) *keyrelease.Client {
	t.Helper()
	c := keyrelease.Config{Broker: b, Initdata: v.initdata, EventLog: v.log.Bytes, Attester: v.tpm, FirstWait: 50 * time.Millisecond}
	if change != nil {
		change(&c)
	}
	client, err := keyrelease.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// get attests and asks for the tests' key.
func get(client *keyrelease.Client) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	s, err := client.Attest(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s.Resource(ctx, webKey)
}

// released checks that the key comes.
func released(t *testing.T, client *keyrelease.Client) {
	t.Helper()
	if got, err := get(client); err != nil || !bytes.Equal(got, kek) {
		t.Fatalf("got %d bytes and %v, expected the key", len(got), err)
	}
}

// refused checks that the key does not come, and why.
func refused(t *testing.T, client *keyrelease.Client, code cause.Code, says string) {
	t.Helper()
	if got, err := get(client); err == nil || cause.Of(err) != code || !strings.Contains(err.Error(), says) || got != nil {
		t.Errorf("got %d bytes and %v, expected %s about %q", len(got), err, code, says)
	}
}

// replays checks that the register holds what the log replays to, and that the
// log holds n events.
func (v *vm) replays(t *testing.T, n int) {
	t.Helper()
	r, err := eventlog.Replay(v.log.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.tpm.PCR14().Read(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, r.SHA256[:]) || len(r.Events) != n {
		t.Errorf("PCR 14 is %x, %d events replay to %x, expected %d events", got, len(r.Events), r.SHA256, n)
	}
}
