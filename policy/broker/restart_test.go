package broker

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// A graceful restart loses nothing: a session that is open, with the secret of
// its challenge, and one that is attested, with what its evidence proved, go on.
func TestSessionsSurviveAGracefulRestart(t *testing.T) {
	l := launch(t)
	r := start(t, l.ca.RootsPEM(t), nil)
	ctx := context.Background()
	key := []byte("the key of the web image, 32 b..")
	if err := r.admin.PutResource(ctx, webKey, key); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.PutRule(ctx, webKey, l.rule()); err != nil {
		t.Fatal(err)
	}
	attested, status, body := l.attest(t, r, nil)
	if status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	token := attested.token
	post, opened := l.begin(t, r)
	r.stop()
	text, err := os.ReadFile(filepath.Join(r.dir, "broker.db"))
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{token, strings.TrimPrefix(attested.cookie, "kbs-session-id="), attested.nonce, opened.nonce} {
		if bytes.Contains(text, []byte(secret)) {
			t.Error("a session is in the clear in the storage")
		}
	}

	again := run(t, r.dir, nil)
	attested.r, opened.r = again, again
	if status, body := attested.get(t); status != 200 || !bytes.Equal(attested.open(t, body), key) {
		t.Errorf("the attested session: %d %s", status, body)
	}
	if status, body, _ := again.call(t, "GET", "/kbs/v0/resource/shop/key/web", "", token, ""); status != 200 {
		t.Errorf("its token: %d %s", status, body)
	}
	if status, body := attested.attest(t, "null", "{}", ""); status != 200 || attested.token != token {
		t.Errorf("attested again: %d %s", status, body)
	}
	if status, body := post(); status != 200 {
		t.Errorf("the open session: %d %s", status, body)
	}
	if status, body := opened.get(t); status != 200 {
		t.Errorf("the open session's key: %d %s", status, body)
	}
	// Once read they are gone from the storage: a crash brings none back.
	again.stop()
	s, err := OpenStore(filepath.Join(r.dir, "broker.db"), fixed(readKEK(t, r.dir)))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for round, want := range []int{2, 0} {
		list, err := s.takeSessions()
		if err != nil || len(list) != want {
			t.Errorf("round %d: %d sessions, expected %d, %v", round, len(list), want, err)
		}
	}
}

// What was being attested at the stop, and what was refused, does not come back.
func TestSpentSessionsAreNotKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	store, err := openStore(t, path, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	s, err := newSessions(store, 10, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	open, busy, spent, done := opened(t, s), opened(t, s), opened(t, s), opened(t, s)
	attestedNow(t, s, done, "token")
	spent.mu.Lock()
	if won, err := s.claim(spent); !won || err != nil {
		t.Fatal(won, err)
	}
	spent.mu.Unlock()
	busy.mu.Lock()
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	// Too late: the session may be another process's by now.
	if won, _ := s.claim(busy); won {
		t.Error("a nonce was consumed after the stop")
	}
	busy.mu.Unlock()
	if err := s.open(newSession("tpm", kbs.DialectKBS, nil, time.Now())); err == nil {
		t.Error("a session was opened after the stop")
	}
	next, err := newSessions(store, 10, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		n    *session
		want bool
	}{"open": {open, true}, "done": {done, true}, "spent": {spent, false}, "busy": {busy, false}} {
		if n, _ := next.get(c.n.id); (n != nil) != c.want {
			t.Errorf("%s: there %v, expected %v", what, n != nil, c.want)
		}
	}
	if n, _ := next.get(done.id); n == nil || !n.spent || n.token != "token" {
		t.Errorf("the attested one: %+v", n)
	}
	if n, _ := next.getByToken("token"); n == nil || n.id != done.id {
		t.Error("the attested one is not found by its token")
	}
}

// A session at rest is whole: whatever facts hold, rules see after it was read
// back. A field that JSON leaves out would be a fact that is lost, silently.
func TestASessionAtRestIsWhole(t *testing.T) {
	left := map[string]bool{}
	var walk func(path string, typ reflect.Type)
	walk = func(path string, typ reflect.Type) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice || typ.Kind() == reflect.Map || typ.Kind() == reflect.Array {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct || typ == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range typ.NumField() {
			f := typ.Field(i)
			name := path + "." + f.Name
			if tag := f.Tag.Get("json"); tag == "-" || !f.IsExported() {
				left[name] = true
				continue
			}
			walk(name, f.Type)
		}
	}
	walk("Facts", reflect.TypeFor[appraisal.Facts]())
	walk("Pending", reflect.TypeFor[appraisal.Pending]())
	walk("Instance", reflect.TypeFor[Instance]())
	want := map[string]bool{"Facts.Launch.Initdata": true} // kept beside them
	if !reflect.DeepEqual(left, want) {
		t.Errorf("JSON leaves out %v, keptSession makes up for %v", left, want)
	}
	n := newSession("tpm", kbs.Dialect, &appraisal.Pending{EKCert: []byte{1}, AKPublic: []byte{2}, AKCert: []byte{3}, Secret: []byte{4}}, time.Now())
	n.token, n.size, n.key = "t", 7, kbs.TEEPubKey{Kty: "EC", Crv: "P-256", Alg: kbs.AlgECDH, X: "x", Y: "y"}
	n.instance = Instance{ID: "i", FirstSeen: time.Now().UTC().Truncate(0), Tombstone: true}
	n.facts = appraisal.Facts{TEE: "tpm", Identity: "tpm:1", PCRs: map[int]string{8: "a"}, EKRoots: []string{"r"},
		Launch: &appraisal.LaunchFacts{Digest: "d", Initdata: &policy.Initdata{Algorithm: "sha256", Data: map[string]string{"k": "v"}}}}
	b, err := n.encode()
	if err != nil {
		t.Fatal(err)
	}
	m, err := decodeSession(b)
	if err != nil {
		t.Fatal(err)
	}
	n.expires = n.expires.Truncate(0)
	if !reflect.DeepEqual(n, m) {
		t.Errorf("written %+v, read %+v", n, m)
	}
	if _, err := decodeSession(b[:len(b)/2]); err == nil {
		t.Error("half a session was read")
	}
}

// An embedded broker that is killed loses its sessions and nothing else.
func TestACrashLosesSessionsOnly(t *testing.T) {
	p := tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.ECC)
	r := start(t, nil, listedAK(p))
	if err := r.admin.PutResource(context.Background(), webKey, []byte("k")); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.PutRule(context.Background(), webKey, anyPolicy()); err != nil {
		t.Fatal(err)
	}
	g, _ := r.newGuest(t, elliptic.P256(), `""`)
	// The files as they are at this moment are what a crash leaves.
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(r.dir)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kek", "tls.key", "token.key"} {
		if err := os.Chmod(filepath.Join(dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	g.r = run(t, dir, listedAK(p))
	if status, body := g.attest(t, "null", "{}", ""); status != 401 || variant(t, status, body) != kbs.VariantAttestationError {
		t.Errorf("a session of before the crash: %d %s", status, body)
	}
	g, _ = g.r.newGuest(t, elliptic.P256(), `""`)
	if status, body := g.attest(t, "null", string(tpmtest.JSON(t, p.Evidence(g.reportData(t, ""), 0, 8, 14))), ""); status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	if status, body := g.get(t); status != 200 {
		t.Errorf("the resource of before the crash: %d %s", status, body)
	}
}
