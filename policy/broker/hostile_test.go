package broker

import (
	"context"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// served is a broker with one key, and a guest that can have it.
type served struct {
	*running
	tpm *tpmtest.TPM
}

func serve(t *testing.T, change func(c *Config)) *served {
	t.Helper()
	p := tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.ECC)
	r := start(t, nil, func(c *Config) {
		listedAK(p)(c)
		if change != nil {
			change(c)
		}
	})
	if err := r.admin.PutResource(context.Background(), webKey, []byte("k")); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.PutRule(context.Background(), webKey, anyPolicy()); err != nil {
		t.Fatal(err)
	}
	return &served{r, p}
}

func (s *served) evidence(t *testing.T, g *guest) string {
	t.Helper()
	return string(tpmtest.JSON(t, s.tpm.Evidence(g.reportData(t, ""), 0, 8, 14)))
}

// good is a whole run by a guest that has done nothing wrong.
func (s *served) good(t *testing.T, when string) {
	t.Helper()
	g, _ := s.newGuest(t, elliptic.P256(), `""`)
	if status, body := g.attest(t, "null", s.evidence(t, g), ""); status != 200 {
		t.Errorf("%s: attest: %d %s", when, status, body)
		return
	}
	if status, body := g.get(t); status != 200 {
		t.Errorf("%s: resource: %d %s", when, status, body)
	}
}

// Whatever the body of POST attest is: refused in the protocol's form, by what
// is wrong with it, and the next guest is served.
func TestHostileBodies(t *testing.T) {
	s := serve(t, nil)
	ones := strings.Repeat("1,", 1_000_000)
	for what, c := range map[string]struct {
		want string
		body func(whole string) string
	}{
		"a duplicate key at the top": {"duplicate key", func(w string) string { return `{"init-data":null,` + w[1:] }},
		"a duplicate nonce": {"duplicate key", func(w string) string {
			return strings.Replace(w, `"runtime-data":{`, `"runtime-data":{"nonce":"x",`, 1)
		}},
		"a duplicate key in the quote": {"duplicate key", func(w string) string {
			return strings.Replace(w, `"tpm_quote":{`, `"tpm_quote":{"message":"AA==",`, 1)
		}},
		"a duplicate by escape": {"duplicate key", func(w string) string { return `{"init-dat\u0061":null,` + w[1:] }},
		"a million numbers":     {"values", func(w string) string { return `{"x":[` + ones + `1],` + w[1:] }},
		"a million numbers in the evidence": {"values", func(w string) string {
			return strings.Replace(w, `"primary_evidence":{`, `"primary_evidence":{"x":[`+ones+`1],`, 1)
		}},
		"nested a thousand deep": {"nested", func(w string) string {
			return `{"x":` + strings.Repeat("[", 1000) + strings.Repeat("]", 1000) + `,` + w[1:]
		}},
		"more than two megabytes": {"request body", func(w string) string { return w + strings.Repeat(" ", kbs.MaxBody) }},
		"cut in the middle":       {"JSON", func(w string) string { return w[:len(w)/2] }},
		"two documents":           {"JSON", func(w string) string { return w + w }},
		"nothing":                 {"JSON", func(string) string { return "" }},
		"null":                    {"primary_evidence", func(string) string { return "null" }},
		"an array":                {"attest request", func(string) string { return "[]" }},
		"invalid UTF-8":           {"UTF-8", func(w string) string { return "{\"x\":\"\xff\"," + w[1:] }},
		"a lone surrogate":        {"surrogate", func(w string) string { return `{"x":"\ud800",` + w[1:] }},
		"a list as nonce":         {"attest request", func(w string) string { return strings.Replace(w, `"nonce":"`, `"nonce":["`, 1) }},
		"names in another case":   {"primary_evidence", func(w string) string { return strings.Replace(w, `"tee-evidence"`, `"TEE-evidence"`, 1) }},
	} {
		g, _ := s.newGuest(t, elliptic.P256(), `""`)
		whole := `{"init-data":null,"runtime-data":{"nonce":"` + g.nonce + `","tee-pubkey":` + g.jwk + `},"tee-evidence":{"primary_evidence":` + s.evidence(t, g) + `,"additional_evidence":""}}`
		status, body, _ := s.call(t, "POST", kbs.PathAttest, g.cookie, "", c.body(whole))
		if status != 401 || variant(t, status, body) != kbs.VariantSerdeError || !strings.Contains(body, c.want) {
			t.Errorf("%s: %d %s", what, status, body)
		}
		if len(body) > 6<<10 {
			t.Errorf("%s: an answer of %d bytes", what, len(body))
		}
		if status, _ := g.get(t); status != 401 {
			t.Errorf("%s: a resource: %d", what, status)
		}
		s.good(t, "after "+what)
	}
}

// A cookie, a nonce, evidence and a token are each good where they belong alone.
func TestReplays(t *testing.T) {
	s := serve(t, nil)
	one, _ := s.newGuest(t, elliptic.P256(), `""`)
	two, _ := s.newGuest(t, elliptic.P256(), `""`)
	ev := s.evidence(t, one)
	// The first session's evidence in the second, by its own nonce and by the second's.
	stolen := *one
	stolen.cookie = two.cookie
	if status, body := stolen.attest(t, "null", ev, ""); status != 401 || !strings.Contains(body, "not this session's") {
		t.Errorf("a foreign nonce: %d %s", status, body)
	}
	three, _ := s.newGuest(t, elliptic.P256(), `""`)
	stolen = *one
	stolen.cookie, stolen.nonce = three.cookie, three.nonce
	if status, body := stolen.attest(t, "null", ev, ""); status != 401 || !strings.Contains(body, "report-data") {
		t.Errorf("evidence of another nonce: %d %s", status, body)
	}
	// What was refused is over, also with evidence that would have been good.
	if status, body := three.attest(t, "null", s.evidence(t, three), ""); status != 401 || variant(t, status, body) != kbs.VariantAttestationError {
		t.Errorf("a spent session: %d %s", status, body)
	}
	if status, body := one.attest(t, "null", ev, ""); status != 200 {
		t.Fatalf("the session itself: %d %s", status, body)
	}
	token := one.token
	if status, body := one.attest(t, "null", ev, ""); status != 200 || one.token != token {
		t.Errorf("again: %d %s", status, body)
	}
	for what, bearer := range map[string]string{"a changed token": token[:len(token)-4] + "AAAA", "half a token": token[:len(token)/2], "a cookie as token": strings.TrimPrefix(one.cookie, "kbs-session-id=")} {
		if status, body, _ := s.call(t, "GET", "/kbs/v0/resource/shop/key/web", "", bearer, ""); status != 401 || variant(t, status, body) != kbs.VariantTokenVerifierError {
			t.Errorf("%s: %d %s", what, status, body)
		}
	}
}

// The same evidence sixteen times at once: one judgement, one token.
func TestOneNonceAtOnce(t *testing.T) {
	s := serve(t, nil)
	for range 5 {
		g, _ := s.newGuest(t, elliptic.P256(), `""`)
		ev := s.evidence(t, g)
		var tokens sync.Map
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				own := *g
				if status, body := own.attest(t, "null", ev, ""); status != 200 {
					t.Errorf("%d %s", status, body)
				}
				tokens.Store(own.token, true)
			})
		}
		wg.Wait()
		n := 0
		tokens.Range(func(any, any) bool { n++; return true })
		if n != 1 {
			t.Errorf("%d tokens for one nonce", n)
		}
	}
	s.stop()
	text, err := os.ReadFile(filepath.Join(s.dir, "audit.ndjson"))
	if err != nil {
		t.Fatal(err)
	}
	accepted := map[string]int{}
	for line := range strings.Lines(string(text)) {
		var r audit.Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		if r.Op == "attest" {
			accepted[r.Session]++
		}
	}
	if len(accepted) != 5 {
		t.Errorf("attestations on record: %v", accepted)
	}
	for session, n := range accepted {
		if n != 1 {
			t.Errorf("session %s was judged %d times", session, n)
		}
	}
}

// from is a client whose requests come from a loopback address of its own.
func (r *running) from(t *testing.T, address string) *running {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(r.ca)
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	transport := &http.Transport{DialContext: d.DialContext, TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(transport.CloseIdleConnections)
	other := *r
	other.http = &http.Client{Transport: transport, Timeout: 30 * time.Second}
	return &other
}

// One peer that opens sessions as fast as it can is held to its rate, its own
// sessions push out no other's, and another peer does not notice.
func TestManySessionsOfOnePeer(t *testing.T) {
	s := serve(t, func(c *Config) { c.Limits.PeerRate, c.Limits.PeerBurst = 20, 60 })
	flood := s.from(t, "127.0.0.2")
	other := &served{s.from(t, "127.0.0.3"), s.tpm}
	g, _ := other.newGuest(t, elliptic.P256(), `""`)

	var limited, opened atomic.Int32
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				switch status, body, _ := flood.call(t, "POST", kbs.PathAuth, "", "", `{"version":"0.4.0","tee":"tpm","extra-params":""}`); status {
				case 200:
					opened.Add(1)
				case http.StatusTooManyRequests:
					limited.Add(1)
				default:
					t.Errorf("%d %s", status, body)
				}
			}
		})
	}
	for i := range 3 {
		other.good(t, fmt.Sprintf("beside the flood, round %d", i))
	}
	for limited.Load() < 50 {
		time.Sleep(10 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
	if status, body := g.attest(t, "null", other.evidence(t, g), ""); status != 200 {
		t.Errorf("a session of before the flood: %d %s", status, body)
	}
	t.Logf("%d sessions opened, %d requests limited", opened.Load(), limited.Load())
}

// Clients that open a connection and say nothing, half a head or half a body
// hold what is theirs and nobody else's.
func TestSlowClients(t *testing.T) {
	s := serve(t, func(c *Config) { c.Limits.Connections, c.Limits.PeerConnections = 64, 16 })
	address := strings.TrimPrefix(s.url, "https://")
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.ca)
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.2")}, Timeout: 10 * time.Second}
	held := 0
	for i := range 64 {
		c, err := d.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if i%4 == 0 {
			continue // not even TLS
		}
		secure := tls.Client(c, &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"})
		if err := secure.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		text := []string{"", "POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\n", "POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", "GET /healthz HTTP/1.1\r\nX: "}[i%4]
		if _, err := secure.Write([]byte(text)); err == nil {
			held++
		}
	}
	if held > 16 {
		t.Errorf("one peer holds %d connections, at most 16", held)
	}
	start := time.Now()
	for i := range 3 {
		s.good(t, fmt.Sprintf("beside slow clients, round %d", i))
	}
	if d := time.Since(start); d > 20*time.Second {
		t.Errorf("others had to wait: %s", d)
	}
}
