package keyrelease

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// register is a PCR that counts.
type register struct {
	mu      sync.Mutex
	value   [32]byte
	extends int
}

func (*register) Name() string { return "pcr14" }
func (*register) Index() int   { return 14 }
func (r *register) Extend(_ context.Context, d map[crypto.Hash][]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.value = sha256.Sum256(append(r.value[:], d[crypto.SHA256]...))
	r.extends++
	return nil
}
func (r *register) Read(context.Context) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.value
	return v[:], nil
}

// measured is a log with a policy and an image in it.
func measured(t *testing.T) (*eventlog.Log, *register) {
	t.Helper()
	reg := &register{}
	l, err := eventlog.Open(context.Background(), t.TempDir(), reg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	for _, e := range []eventlog.Event{
		{Kind: eventlog.KindPolicy, Policy: "demo", PolicyVersion: 1, PolicyDigest: "sha256:" + strings.Repeat("ab", 32), Signers: []string{strings.Repeat("cd", 32)}},
		{Kind: eventlog.KindImage, Workload: "web", Image: "registry.example/web@sha256:" + strings.Repeat("1", 64)},
	} {
		if err := l.Append(context.Background(), e); err != nil {
			t.Fatal(err)
		}
	}
	return l, reg
}

// pair is two brokers of one policy: the same roots, the same token key.
func pair(t *testing.T) (one, two *trustee, change func(*Config)) {
	one, two = newTrustee(t), newTrustee(t)
	two.key = one.key
	return one, two, func(c *Config) { c.Broker.URLs = []string{two.server.URL} }
}

const webKey = "kbs:///default/key/1"

// Lesson 8: with one broker gone the other is asked, with a session of its own;
// nothing is measured again, and the log still replays to the register.
func TestLesson08_FailoverMeasuresNothingTwice(t *testing.T) {
	one, two, urls := pair(t)
	log, reg := measured(t)
	cl := one.client(func(c *Config) { urls(c); c.EventLog = log.Bytes })
	ctx := deadline(t, time.Minute)

	one.down = 1 << 30
	s, err := cl.Attest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := s.Resource(ctx, webKey); err != nil || string(data) != two.secret {
		t.Fatalf("%q, %v", data, err)
	}
	// The one that answered last is asked first.
	one.down = 0
	before := len(one.requests)
	if s, err = cl.Attest(ctx); err != nil {
		t.Fatal(err)
	}
	if n := len(one.requests) - before; n != 0 {
		t.Errorf("the broker that was down was asked %d times before the good one", n)
	}
	// Gone in the middle of a session: only a new session elsewhere helps, and
	// the old one's cookie is not taken there.
	two.down = 1 << 30
	if _, err := s.Resource(ctx, webKey); cause.Of(err) != cause.BrokerUnavailable || !errors.Is(err, errSessionGone) {
		t.Errorf("got %v", err)
	}
	if s, err = cl.Attest(ctx); err != nil {
		t.Fatal(err)
	}
	if data, err := s.Resource(ctx, webKey); err != nil || string(data) != one.secret {
		t.Fatalf("%q, %v", data, err)
	}
	if all := strings.Join(one.cookies, ","); strings.Contains(all, two.id) {
		t.Error("the cookie of one broker was sent to the other")
	}
	two.server.Close() // not only unwilling: not there
	if _, err := cl.Attest(ctx); err != nil {
		t.Error(err)
	}

	r, err := eventlog.Replay(log.Bytes())
	if err != nil || len(r.Events) != 2 || r.SHA256 != reg.value || reg.extends != 2 {
		t.Errorf("%d events, %d extends, replay %x, register %x, %v", len(r.Events), reg.extends, r.SHA256, reg.value, err)
	}
}

// A refusal is final wherever it comes from: no shopping for a yes.
func TestARefusalIsNotAskedForElsewhere(t *testing.T) {
	one, two, urls := pair(t)
	cl := one.client(urls)
	s, err := cl.Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resource(deadline(t, time.Minute), "kbs:///default/key/other"); cause.Of(err) != cause.KeyRefused || Variant(err) != "PolicyDeny" {
		t.Errorf("got %v", err)
	}
	one.refuse = func(w http.ResponseWriter, _ string) bool { deny(w, "AttestationError", "no"); return true }
	if _, err := cl.Attest(deadline(t, time.Minute)); cause.Of(err) != cause.AttestationRefused {
		t.Errorf("got %v", err)
	}
	if len(two.requests) != 0 {
		t.Errorf("the other broker was asked: %v", two.requests)
	}
}

// A URL whose certificate is not the policy's is passed over like one that does
// not answer; when no other is left that is what is said.
func TestAnUntrustedURLIsPassedOver(t *testing.T) {
	one, two, urls := pair(t)
	cl := one.client(urls)
	impostor := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("plain HTTP was spoken") }))
	defer impostor.Close()
	cl.route.bases[0].Host = strings.TrimPrefix(impostor.URL, "http://")
	if _, err := cl.Attest(deadline(t, time.Minute)); err != nil {
		t.Error(err)
	}
	if len(two.requests) != 2 {
		t.Errorf("the good broker got %v", two.requests)
	}
	for _, b := range cl.route.bases {
		b.Host = strings.TrimPrefix(impostor.URL, "http://")
	}
	if _, err := cl.Attest(deadline(t, time.Minute)); cause.Of(err) != cause.BrokerTLS || !strings.Contains(err.Error(), "none of 2 brokers") {
		t.Errorf("got %v", err)
	}
}

// No key by a session that is older than the last extend, not even when the
// event comes while the broker answers.
func TestNoKeyByASessionOlderThanTheLastEvent(t *testing.T) {
	b := newTrustee(t)
	log, _ := measured(t)
	staged := eventlog.Event{Kind: eventlog.KindPolicyStaged, Policy: "demo", PolicyVersion: 2, PolicyDigest: "sha256:" + strings.Repeat("ef", 32), Signers: []string{strings.Repeat("cd", 32)}}
	image := eventlog.Event{Kind: eventlog.KindImageStaged, Workload: "web", Image: "registry.example/web@sha256:" + strings.Repeat("2", 64)}
	cl := b.client(func(c *Config) { c.EventLog = log.Bytes })
	ctx := deadline(t, time.Minute)
	s, err := cl.Attest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resource(ctx, webKey); err != nil {
		t.Fatal(err)
	}
	if err := log.Append(ctx, staged); err != nil {
		t.Fatal(err)
	}
	asked := len(b.requests)
	if data, err := s.Resource(ctx, webKey); cause.Of(err) != cause.KeyRefused || data != nil {
		t.Errorf("an old session gave %d bytes, %v", len(data), err)
	}
	if len(b.requests) != asked {
		t.Error("the broker was asked all the same")
	}
	if s, err = cl.Attest(ctx); err != nil {
		t.Fatal(err)
	}
	b.resource = func(w http.ResponseWriter, jwe string) {
		if err := log.AppendOnce(ctx, image); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(w, jwe)
	}
	if data, err := s.Resource(ctx, webKey); cause.Of(err) != cause.KeyRefused || data != nil {
		t.Errorf("a session that an event overtook gave %d bytes, %v", len(data), err)
	}
	if s, err = cl.Attest(ctx); err != nil {
		t.Fatal(err)
	}
	if data, err := s.Resource(ctx, webKey); err != nil || string(data) != b.secret {
		t.Errorf("a new session: %q, %v", data, err)
	}
}

// inMemory serves requests without a network, so that time is the bubble's.
type inMemory struct {
	t *testing.T
	b *trustee
}

func (m inMemory) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	m.b.serve(w, r)
	return w.Result(), nil
}

// Lesson 20: down for a minute at boot, the broker is waited for, each wait is
// told with its reason, and the session comes about.
func TestLesson20_ABrokerThatIsDownForAMinute(t *testing.T) {
	b := newTrustee(t)
	config := b.config()
	synctest.Test(t, func(t *testing.T) {
		up := time.Now().Add(time.Minute)
		b.refuse = func(w http.ResponseWriter, _ string) bool {
			if time.Now().Before(up) {
				w.WriteHeader(http.StatusServiceUnavailable)
				return true
			}
			return false
		}
		var waits []string
		config.FirstWait = 0 // the product's
		config.OnWait = func(err error, next time.Duration) {
			if next <= 0 || next > 30*time.Second {
				t.Errorf("the next try is in %s", next)
			}
			waits = append(waits, err.Error())
		}
		cl, err := New(config)
		if err != nil {
			t.Fatal(err)
		}
		cl.http.Transport = inMemory{t, b}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		start := time.Now()
		if _, err := cl.Attest(ctx); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d < time.Minute || d > 90*time.Second {
			t.Errorf("attested after %s", d)
		}
		if len(waits) < 3 || !strings.Contains(waits[0], "503") {
			t.Errorf("waits %q", waits)
		}
	})
}

// Lesson 33: the names that the policy resolves come from the broker alone.
// What the host can set (environment, files, a packet's host) neither wins nor
// fills in for a refusal.
func TestLesson33_ValuesComeFromTheBrokerAlone(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{"default/key/1", "default/key/other", "run/secrets/1"} {
		file := filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("the host's value"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	asked := make(chan string, 8)
	host := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.String()
		_, _ = io.WriteString(w, "the host's value")
	}))
	defer host.Close()
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "KBS_URL", "AA_KBC_PARAMS", "SSL_CERT_FILE", "OCICRYPT_KEYPROVIDER_CONFIG"} {
		t.Setenv(name, host.URL)
	}
	b := newTrustee(t)
	s, err := b.client(nil).Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	for _, uri := range []string{webKey, "kbs://" + strings.TrimPrefix(host.URL, "http://") + "/default/key/1"} {
		if data, err := s.Resource(deadline(t, time.Minute), uri); err != nil || string(data) != b.secret {
			t.Errorf("%s: %q, %v", uri, data, err)
		}
	}
	if data, err := s.Resource(deadline(t, time.Minute), "kbs:///default/key/other"); cause.Of(err) != cause.KeyRefused || data != nil {
		t.Errorf("a refusal gave %q, %v", data, err)
	}
	select {
	case u := <-asked:
		t.Errorf("the host was asked for %s", u)
	default:
	}
}
