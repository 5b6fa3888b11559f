package broker

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func fingerprint(spki []byte) string {
	d := sha256.Sum256(spki)
	return hex.EncodeToString(d[:])
}

func parsePublic(t *testing.T, text []byte) crypto.PublicKey {
	t.Helper()
	b, _ := pem.Decode(text)
	if b == nil {
		t.Fatal("no PEM")
	}
	key, err := x509.ParsePKIXPublicKey(b.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// named is a verifier that accepts nothing.
type named string

func (n named) TEE() string { return string(n) }

func (named) Challenge(*kbs.CVMAgentAuth, io.Reader) (*kbs.CVMAgentChallenge, *appraisal.Pending, error) {
	return nil, nil, errors.New("never")
}

func (named) Appraise(appraisal.Input) (*appraisal.Appraisal, error) {
	return nil, errors.New("never")
}

func verifiers(name string) []appraisal.Verifier { return []appraisal.Verifier{named(name)} }

// opened is a new session in s.
func opened(t *testing.T, s *memorySessions) *session {
	t.Helper()
	n := newSession("tpm", kbs.DialectKBS, nil, s.now())
	if err := s.open(n); err != nil {
		t.Fatal(err)
	}
	return n
}

// attestedNow claims n, as an attestation does, and files it under token.
func attestedNow(t *testing.T, s sessions, n *session, token string) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if won, err := s.claim(n); !won || err != nil {
		t.Fatalf("claim: %v, %v", won, err)
	}
	n.token = token
	if err := s.attested(n); err != nil {
		t.Fatal(err)
	}
}

func memory(t *testing.T, most int, now func() time.Time) *memorySessions {
	t.Helper()
	s, err := newSessions(nil, most, now)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *memorySessions) has(n *session) bool {
	found, _ := s.get(n.id)
	return found == n
}

func TestSessionsAreBoundedInNumberAndTime(t *testing.T) {
	now := time.Unix(1000, 0)
	s := memory(t, 3, func() time.Time { return now })
	first := opened(t, s)
	attestedNow(t, s, first, "token")
	if n, _ := s.getByToken("token"); n != first || !s.has(first) {
		t.Fatal("the first session is not found")
	}
	seen := map[string]bool{}
	for range 10000 {
		n := opened(t, s)
		if seen[n.nonce] {
			t.Fatal("a nonce twice")
		}
		seen[n.nonce] = true
	}
	if s.live() != 3 || s.order.Len() != 3 || len(s.byToken) != 0 {
		t.Fatalf("%d sessions, %d in order, %d tokens; at most 3", s.live(), s.order.Len(), len(s.byToken))
	}
	last := opened(t, s)
	now = now.Add(SessionLife)
	if s.has(last) || s.live() != 0 {
		t.Error("a session outlives its time")
	}
}

// fixed is a KEK of the test's.
type fixed []byte

func (f fixed) DataKey([]byte) (key, keep []byte, err error) { return bytes.Clone(f), nil, nil }

func openStore(t *testing.T, path string, b byte) (*Store, error) {
	t.Helper()
	return OpenStore(path, fixed(bytes.Repeat([]byte{b}, kek.Size)))
}

func onRecord() error { return nil }

func TestStoreSealsValuesToTheirName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s, err := openStore(t, path, 1)
	if err != nil {
		t.Fatal(err)
	}
	a, b := kbs.ResourceURI{Repository: "a", Type: "k", Tag: "1"}, kbs.ResourceURI{Repository: "a", Type: "k", Tag: "2"}
	if err := s.PutResource(a, []byte("the secret of a"), onRecord); err != nil {
		t.Fatal(err)
	}
	// An attacker with the file moves a's value to b.
	err = s.backend.(*boltBackend).db.Update(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(bucketResources)
		return bucket.Put([]byte(b.Path()), bytes.Clone(bucket.Get([]byte(a.Path()))))
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resource(b); err == nil || errors.Is(err, errNotFound) {
		t.Errorf("a moved value was read: %v", err)
	}
	if v, err := s.Resource(a); err != nil || string(v) != "the secret of a" {
		t.Errorf("%q, %v", v, err)
	}
	i, err := s.Instance("tpm:00", time.Now())
	if err != nil || len(i.ID) != 32 || i.Tombstone {
		t.Fatalf("%+v, %v", i, err)
	}
	if j, err := s.Instance("tpm:00", time.Now()); err != nil || j.ID != i.ID {
		t.Errorf("the instance changed: %+v, %v", j, err)
	}
	if j, err := s.Instance("tpm:01", time.Now()); err != nil || j.ID == i.ID {
		t.Errorf("two keys, one instance: %+v, %v", j, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if _, err := openStore(t, path, 2); err == nil {
		t.Error("another KEK opened the storage")
	}
}

func TestAuditChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	now := func() time.Time { return time.Unix(1000, 0) }
	l, err := audit.Open(path, now)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := l.Write(audit.Record{Op: "release", Outcome: "ok"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Write(audit.Record{Op: "release", Outcome: "ok"}); err == nil {
		t.Error("a closed log was written")
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := audit.Verify(bytes.NewReader(whole)); err != nil || h.Records != 3 {
		t.Fatalf("%+v, %v", h, err)
	}
	lines := strings.SplitAfter(string(whole), "\n")
	for what, text := range map[string]string{
		"a changed outcome":  strings.Replace(string(whole), `"ok"`, `"no"`, 1),
		"a missing line":     lines[0] + lines[2],
		"a missing start":    lines[1] + lines[2],
		"swapped lines":      lines[1] + lines[0] + lines[2],
		"a cut last line":    string(whole[:len(whole)-5]),
		"an unknown field":   strings.Replace(string(whole), `{"seq"`, `{"more":1,"seq"`, 1),
		"a line that is not": string(whole) + "hello\n",
	} {
		if _, err := audit.Verify(strings.NewReader(text)); err == nil {
			t.Errorf("%s was not noticed", what)
		}
	}
	// A crash cut the last line: it is dropped, which is on record.
	if err := os.WriteFile(path, append(whole, `{"seq":4,`...), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err = audit.Open(path, now); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	again, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := audit.Verify(bytes.NewReader(again)); err != nil || h.Records != 4 || !strings.Contains(string(again), "recovered") {
		t.Errorf("%+v, %v", h, err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(whole), `"ok"`, `"no"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Open(path, now); err == nil {
		t.Error("a broken chain was continued")
	}
}

func TestInitFilesAndModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	o := InitOptions{Dir: dir, Hosts: []string{"broker.example"}, Listen: "127.0.0.1:0", Now: time.Now()}
	if err := Init(o); err != nil {
		t.Fatal(err)
	}
	if err := Init(o); err == nil {
		t.Error("a second init replaced the first")
	}
	for name, mode := range map[string]os.FileMode{"kek": 0o600, "tls.key": 0o600, "token.key": 0o600, "admin.token": 0o600, "config.yaml": 0o600, "ca.pem": 0o644} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
	c, err := LoadConfig(filepath.Join(dir, FileConfig))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.KEK.Open(""); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "kek"), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := c.KEK.Open(""); err == nil {
		t.Error("a KEK that others can read was used")
	}
	c.KEK = KEKSource{Credential: "kek"}
	if _, err := c.KEK.Open(""); err == nil {
		t.Error("a credential without a credentials directory")
	}
	text, err := os.ReadFile(filepath.Join(dir, FileConfig))
	if err != nil {
		t.Fatal(err)
	}
	for what, bad := range map[string]string{
		"an unknown key": string(text) + "anything: 1\n",
		"no storage":     strings.Replace(string(text), "storage:", "auditLog2:", 1),
		"two KEKs":       strings.Replace(string(text), "file: kek", "file: kek\n  credential: x", 1),
	} {
		p := filepath.Join(dir, "bad.yaml")
		if err := os.WriteFile(p, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadConfig(p); err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
}

// The README's table and what the policy demands to be accepted are one thing.
func TestREADMEAgreesWithGivenUp(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var platforms []string
	given := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if strings.Contains(cells[0], "`broker.accept`") {
			for _, c := range cells[1:] {
				platforms = append(platforms, strings.Trim(c, "` "))
			}
			continue
		}
		for _, name := range []string{policy.AcceptNoEventLog, policy.AcceptNoVersionMark, policy.AcceptNoTombstone} {
			if len(cells) != len(platforms)+1 || !strings.Contains(cells[0], "(`"+name+"`)") {
				continue
			}
			for i, p := range platforms {
				if strings.HasPrefix(strings.TrimSpace(cells[i+1]), "no") {
					given[p] = append(given[p], name)
				}
			}
		}
	}
	for _, p := range []policy.Platform{policy.PlatformTPM, policy.PlatformSNP, policy.PlatformTDX, policy.PlatformAzSNPvTPM, policy.PlatformAzTDXvTPM} {
		want := (&policy.Policy{Platforms: []policy.Platform{p}, Broker: &policy.Broker{Dialect: policy.DialectKBS}}).GivenUp()
		got := given[string(p)]
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: the table gives up %v, the policy %v", p, got, want)
		}
	}
}
