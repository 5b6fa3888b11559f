package launch

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// world is a World in memory. It writes down what it is asked, in order, and
// fails where fail says so: a key is "CALL" or "CALL NAME".
type world struct {
	mu       sync.Mutex
	trace    []string
	fail     map[string]func() error // nil result: no failure this time
	policies map[string]*policy.Policy
	claims   Claims
	plain    bool
	log      *fakeLog
	logDir   string
	register register
	podman   *fakePodman
	images   map[string]bool // in storage
	sessions int             // open
}

func newWorld() *world {
	w := &world{fail: map[string]func() error{}, policies: map[string]*policy.Policy{}, images: map[string]bool{},
		claims: Claims{HasMark: true, PolicyName: "shop", VersionMark: 1, IssuedAt: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), InstanceID: "i-1"}}
	w.log = &fakeLog{w: w}
	w.podman = &fakePodman{w: w, containers: map[string]*fakeContainer{}}
	return w
}

func (w *world) call(format string, args ...any) error {
	name := fmt.Sprintf(format, args...)
	w.mu.Lock()
	w.trace = append(w.trace, name)
	fail := w.fail[name]
	if fail == nil {
		fail = w.fail[strings.Fields(name)[0]]
	}
	w.mu.Unlock()
	if fail != nil {
		return fail()
	}
	return nil
}

func (w *world) calls() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.trace)
}

func (w *world) Platform(context.Context, []byte) (Platform, error) {
	return fakePlatform{w}, w.call("platform")
}

func (w *world) Policy(initdata []byte, _ time.Time) (*policy.Verified, error) {
	if err := w.call("policy"); err != nil {
		return nil, err
	}
	p := w.policies[string(initdata)]
	if p == nil {
		return nil, cause.New(cause.PolicySignature, "unknown policy")
	}
	return &policy.Verified{Policy: p, Digest: digestOf(string(initdata)), Signers: []string{strings.Repeat("a", 64)}}, nil
}

func (w *world) Order(order []byte, _ *policy.Verified, _ []byte, now time.Time) (*policy.Verified, []byte, error) {
	v, err := w.Policy(order, now)
	return v, order, err
}

func (w *world) Broker(*policy.Verified, []byte, Platform, Log) (Broker, error) {
	return fakeBroker{w}, nil
}
func (w *world) Images(*policy.Verified, func(error, time.Duration)) (Images, error) {
	return fakeImages{w}, nil
}
func (w *world) Secrets() (Secrets, error) { return fakeSecrets{w}, nil }

func (w *world) Podman(context.Context, func(error, time.Duration)) (Podman, error) {
	return w.podman, w.call("podman")
}

func (w *world) Scanner(context.Context, bool) Scanner { return fakeScanner{w} }

type fakeScanner struct{ w *world }

func (fakeScanner) Expect([]byte) {}
func (s fakeScanner) Compare(_ context.Context, _ Stored, root string, _ policy.SBOM) (string, error) {
	return "equal", s.w.call("sbom %s", root)
}
func (fakeScanner) Close() {}

type fakePlatform struct{ w *world }

func (fakePlatform) Allow(_ context.Context, p *policy.Policy) (policy.Platform, error) {
	if !slices.Contains(p.Platforms, policy.PlatformTPM) {
		return "", cause.New(cause.PlatformNotAllowed, "this is tpm")
	}
	return policy.PlatformTPM, nil
}

func (p fakePlatform) Log(ctx context.Context) (Log, error) {
	if err := p.w.call("log"); err != nil {
		return nil, err
	}
	if p.w.log.Log != nil {
		_ = p.w.log.Close() // the former daemon is gone
	}
	l, err := eventlog.Open(ctx, p.w.logDir, &p.w.register)
	if err != nil {
		return nil, err
	}
	p.w.log.Log = l
	return p.w.log, nil
}
func (fakePlatform) Register() string { return "pcr14" }
func (fakePlatform) Close() error     { return nil }

// register is a PCR.
type register struct{ value [32]byte }

func (*register) Name() string { return "pcr14" }
func (*register) Index() int   { return 14 }
func (r *register) Extend(_ context.Context, digests map[crypto.Hash][]byte) error {
	r.value = sha256.Sum256(append(r.value[:], digests[crypto.SHA256]...))
	return nil
}
func (r *register) Read(context.Context) ([]byte, error) { return r.value[:], nil }

// fakeLog is the real log, watched.
type fakeLog struct {
	w *world
	*eventlog.Log
}

func (l *fakeLog) AppendOnce(ctx context.Context, e eventlog.Event) error {
	l.w.mu.Lock()
	open := l.w.sessions
	l.w.mu.Unlock()
	if open > 0 {
		return fmt.Errorf("%s extended while %d sessions are open", e.Kind, open)
	}
	if err := l.w.call("append %s %s", e.Kind, e.Workload); err != nil {
		return err
	}
	return l.Log.AppendOnce(ctx, e)
}

func (l *fakeLog) kinds() string {
	var out []string
	for _, e := range l.Events() {
		out = append(out, string(e.Kind))
	}
	return strings.Join(out, " ")
}

type fakeBroker struct{ w *world }

func (b fakeBroker) Attest(context.Context, func(error, time.Duration)) (Session, error) {
	if err := b.w.call("attest"); err != nil {
		return nil, err
	}
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	b.w.sessions++
	return &fakeSession{w: b.w, extends: len(b.w.log.Events())}, nil
}

type fakeSession struct {
	w       *world
	extends int // events at the time of its quote
	closed  bool
}

func (s *fakeSession) Claims() Claims { return s.w.claims }

func (s *fakeSession) Resource(_ context.Context, uri string) ([]byte, error) {
	if s.closed || s.extends != len(s.w.log.Events()) {
		return nil, errors.New("session older than the last extend")
	}
	return []byte("value of " + uri), s.w.call("resource %s", uri)
}

func (s *fakeSession) Close() {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.closed = true
	s.w.sessions--
}

type fakeImages struct{ w *world }

func (f fakeImages) Resolve(_ context.Context, rule policy.Workload) (Image, error) {
	return fakeImage{f.w, rule}, f.w.call("resolve %s", rule.Name)
}

func (f fakeImages) Remove(_ context.Context, id string) error {
	err := f.w.call("rmi %s", id)
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	delete(f.w.images, id)
	return err
}
func (f fakeImages) RemoveAll(context.Context) error {
	err := f.w.call("rmi-all")
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	if err == nil {
		clear(f.w.images)
	}
	return err
}
func (f fakeImages) PruneUncommitted(context.Context) error { return f.w.call("prune") }
func (fakeImages) Close() error                             { return nil }

type fakeImage struct {
	w    *world
	rule policy.Workload
}

func (i fakeImage) VerifySignatures(context.Context, KeyFunc) error {
	return i.w.call("signature %s", i.rule.Name)
}
func (i fakeImage) SBOM(context.Context, KeyFunc) ([]byte, error) {
	return []byte("sbom"), i.w.call("attestation %s", i.rule.Name)
}
func (i fakeImage) Encrypted() bool        { return !i.w.plain }
func (i fakeImage) CheckEncryption() error { return i.w.call("encryption %s", i.rule.Name) }
func (i fakeImage) Unwrap(ctx context.Context, keys KeyFunc) (LayerKeys, error) {
	k, err := keys(ctx, "kbs:///default/key/"+i.rule.Name)
	return LayerKeys{"sha256:layer": k}, err
}
func (i fakeImage) Fetch(_ context.Context, _ LayerKeys, progress func(string)) (Stored, error) {
	if err := i.w.call("fetch %s", i.rule.Name); err != nil {
		return nil, err
	}
	progress("100%")
	i.w.mu.Lock()
	defer i.w.mu.Unlock()
	i.w.images[i.rule.Image] = true
	return fakeStored{i}, nil
}

type fakeStored struct{ i fakeImage }

func (s fakeStored) ImageID() string { return s.i.rule.Image }
func (s fakeStored) Detail() string  { return "fetched" }
func (s fakeStored) Mount(context.Context) (string, func() error, error) {
	return "/root-of-" + s.i.rule.Name, func() error { return nil }, s.i.w.call("mount %s", s.i.rule.Name)
}

type fakeContainer struct {
	c       workload.Container
	running bool
}

type fakePodman struct {
	w          *world
	mu         sync.Mutex
	containers map[string]*fakeContainer
}

func (p *fakePodman) Start(_ context.Context, c workload.Container) (string, error) {
	if err := p.w.call("start %s-v%d", c.Workload, c.Version); err != nil {
		return "", err
	}
	p.w.mu.Lock()
	there := p.w.images[c.ImageID]
	p.w.mu.Unlock()
	if !there {
		return "", cause.New(cause.WorkloadStart, "no such image")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.containers[c.Name()] = &fakeContainer{c: c, running: true}
	return c.Name(), nil
}

func (p *fakePodman) Resume(_ context.Context, id string, c workload.Container) error {
	if err := p.w.call("resume %s-v%d", c.Workload, c.Version); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.containers[id] == nil {
		return cause.New(cause.WorkloadStart, "no such container")
	}
	p.containers[id].running = true
	return nil
}

func (p *fakePodman) WaitHealthy(_ context.Context, _ string, c workload.Container, _ func(error)) error {
	return p.w.call("healthy %s-v%d", c.Workload, c.Version)
}
func (p *fakePodman) Probe(context.Context, string, workload.Container) error { return nil }
func (p *fakePodman) Stop(_ context.Context, id string, _ time.Duration) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.containers[id]; c != nil {
		c.running = false
	}
	return p.w.call("stop %s", id)
}
func (p *fakePodman) Remove(_ context.Context, id string) error {
	err := p.w.call("rm %s", id)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.containers, id)
	return err
}
func (p *fakePodman) List(context.Context, string) (out []workload.Owned, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, c := range p.containers {
		out = append(out, workload.Owned{ID: id, Name: id, Workload: c.c.Workload})
	}
	return out, nil
}
func (p *fakePodman) RemoveVolumes(context.Context, string) ([]string, error) {
	return []string{"v"}, p.w.call("volumes")
}
func (p *fakePodman) User(context.Context, string) (string, error) { return "", nil }

func (p *fakePodman) running() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for id, c := range p.containers {
		if c.running {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

type fakeSecrets struct{ w *world }

func (s fakeSecrets) Write(container, _ string, _ []policy.Secret, _ map[string][]byte) (string, error) {
	return "/secrets/" + container, s.w.call("write-secrets %s", container)
}
func (s fakeSecrets) Wipe(container string) error { return s.w.call("wipe %s", container) }
func (s fakeSecrets) WipeAll() error              { return s.w.call("wipe-all") }

func digestOf(text string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(text))) }

func imageOf(name string, version uint64) string {
	return "r.example/" + name + "@" + digestOf(fmt.Sprint(name, version))
}

// testPolicy has an encrypted workload with a secret.
func testPolicy(version uint64, workloads ...string) *policy.Policy {
	p := &policy.Policy{Name: "shop", Version: version, Expires: "2030-01-01T00:00:00Z", Platforms: []policy.Platform{policy.PlatformTPM},
		Broker: &policy.Broker{URL: "https://broker.example"},
		Upgrade: policy.Upgrade{Deadlines: policy.Deadlines{Registry: policy.Duration(time.Minute), Broker: policy.Duration(time.Minute),
			Fetch: policy.Duration(time.Minute), SBOM: policy.Duration(time.Minute), Start: policy.Duration(time.Minute)}}}
	for _, name := range workloads {
		p.Workloads = append(p.Workloads, policy.Workload{Name: name, Image: imageOf(name, version),
			SBOM: policy.SBOM{Required: true}, Run: policy.Run{Secrets: []policy.Secret{{Name: "token", Resource: "kbs:///default/secret/token"}}}})
	}
	return p
}

// quiet is a service manager that remembers.
type quiet struct {
	mu    sync.Mutex
	lines []string
}

func (q *quiet) notify(s string) { q.mu.Lock(); defer q.mu.Unlock(); q.lines = append(q.lines, s) }

func (q *quiet) powerOff(context.Context) error { q.notify("POWEROFF"); return nil }

func (q *quiet) has(s string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.ContainsFunc(q.lines, func(l string) bool { return strings.Contains(l, s) })
}

func newTestAgent(t *testing.T, w *world, dir string) (*Agent, *quiet) {
	t.Helper()
	c := DefaultConfig()
	c.StateDir, c.RunDir, c.Initdata = filepath.Join(dir, "state"), filepath.Join(dir, "run"), filepath.Join(dir, "initdata.toml")
	c.SocketGroup = "no-such-group"
	if err := prepare(c); err != nil {
		t.Fatal(err)
	}
	w.logDir = c.RunDir
	if _, err := os.Stat(c.Initdata); err != nil {
		if err := os.WriteFile(c.Initdata, []byte("v1"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a := New(Options{Config: c, World: w, Logger: slog.New(slog.DiscardHandler), Version: "test", BootID: "0f1e2d3c-0000-4000-8000-0123456789ab"})
	q := &quiet{}
	a.manager, a.retryFirst = q, time.Millisecond
	return a, q
}

// launched returns an agent that is ready with version 1.
func launched(t *testing.T) (*Agent, *world, *quiet) {
	t.Helper()
	w := newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	w.policies["v2"] = testPolicy(2, "web")
	a, q := newTestAgent(t, w, t.TempDir())
	if err := a.launch(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a.Status().State != control.StateReady {
		t.Fatalf("state %s", a.Status().State)
	}
	return a, w, q
}
