package broker

import (
	"bytes"
	"crypto/elliptic"
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// A genuine TPM can have 2 MiB of initdata: attested sessions are bounded in
// what they keep, not only in number.
func TestSessionsAreBoundedInWhatTheyKeep(t *testing.T) {
	s := memory(t, 10000, time.Now)
	var last *session
	for i := range 1000 {
		last = opened(t, s)
		last.size = kbs.MaxBody
		attestedNow(t, s, last, strings.Repeat("t", i+1))
	}
	if s.held > maxHeld || s.held != len(s.byToken)*kbs.MaxBody || !s.has(last) {
		t.Errorf("%d bytes held by %d attested sessions, at most %d", s.held, len(s.byToken), maxHeld)
	}
	// What waits for its evidence holds nothing and is left alone.
	waiting := opened(t, s)
	last = opened(t, s)
	last.size = kbs.MaxBody
	attestedNow(t, s, last, "one more")
	if !s.has(waiting) {
		t.Error("a session without evidence had to go")
	}
	for _, n := range []*session{last, waiting, last, waiting} {
		if err := s.end(n); err != nil {
			t.Fatal(err)
		}
	}
	if s.held != len(s.byToken)*kbs.MaxBody {
		t.Errorf("%d bytes held by %d sessions", s.held, len(s.byToken))
	}
}

// Whatever a peer puts into its evidence, the attempt is on record.
func TestEveryAttemptIsOnRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := audit.Open(path, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	long := strings.Repeat("<\u2028", 1<<20)
	if err := l.Write(audit.Record{Op: "attest", Outcome: "refused", Verdict: long, Reason: long}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := audit.Verify(bytes.NewReader(text)); err != nil || h.Records != 1 {
		t.Errorf("%+v, %v", h, err)
	}
}

// HTTP/2 would put 250 bodies on each of the connections that are counted.
func TestOneRequestAtATimeOnAConnection(t *testing.T) {
	r := start(t, nil, nil)
	c, err := tls.Dial("tcp", strings.TrimPrefix(r.url, "https://"), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}}) //nolint:gosec // asks for the protocol alone
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if p := c.ConnectionState().NegotiatedProtocol; p != "http/1.1" {
		t.Errorf("protocol %q", p)
	}
}

// While all places for large bodies are taken, usual evidence is still read.
func TestLargeBodiesDoNotStopOthers(t *testing.T) {
	s := &Server{large: make(chan struct{}, 1)}
	read := func(n int) (int, func(), error) {
		req := httptest.NewRequest(http.MethodPost, kbs.PathAttest, bytes.NewReader(make([]byte, n)))
		b, done, err := s.evidenceBody(httptest.NewRecorder(), req)
		return len(b), done, err
	}
	n, done, err := read(kbs.MaxBody)
	if err != nil || n != kbs.MaxBody || len(s.large) != 1 {
		t.Fatalf("%d, %v", n, err)
	}
	if n, _, err := read(smallEvidence - 1); err != nil || n != smallEvidence-1 {
		t.Errorf("small evidence beside it: %d, %v", n, err)
	}
	done()
	done()
	if _, _, err := read(kbs.MaxBody + 1); err == nil || len(s.large) != 0 {
		t.Errorf("over the limit: %v, %d places taken", err, len(s.large))
	}
}

// A body that is too long is refused before anything is judged.
func TestABodyOverTheLimitLeavesTheSession(t *testing.T) {
	r := start(t, nil, nil)
	g, _ := r.newGuest(t, elliptic.P256(), `""`)
	status, body, _ := r.call(t, "POST", kbs.PathAttest, g.cookie, "", strings.Repeat(" ", kbs.MaxBody+1))
	if status != 401 || variant(t, status, body) != kbs.VariantSerdeError {
		t.Errorf("%d %s", status, body)
	}
	// Nothing was judged, so the nonce is still good: the next answer is about the evidence.
	if status, body := g.attest(t, "null", `{}`, ""); status != 401 || !strings.Contains(body, "tpm evidence") {
		t.Errorf("%d %s", status, body)
	}
}
