package broker

import (
	"crypto/elliptic"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// freePort is a loopback address that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestMetrics(t *testing.T) {
	address := freePort(t)
	s := serve(t, func(c *Config) { c.MetricsListen = address })
	s.good(t, "first")
	g, _ := s.newGuest(t, elliptic.P256(), `""`)
	other, _ := s.newGuest(t, g.key.Curve, `""`)
	if status, _ := g.attest(t, "null", s.evidence(t, other), ""); status != 401 {
		t.Fatalf("evidence of another nonce: %d", status)
	}
	if status, _, _ := s.call(t, "GET", "/nothing/of-the-peers-own-making", "", "", ""); status != 404 {
		t.Fatal(status)
	}
	text := scrape(t, "http://"+address+"/metrics")
	for _, line := range []string{
		`cvm_broker_requests_total{endpoint="auth",outcome="ok"} 3`,
		`cvm_broker_requests_total{endpoint="attest",outcome="AttestationError"} 1`,
		`cvm_broker_requests_total{endpoint="other",outcome="InvalidRequestPath"} 1`,
		`cvm_broker_attestations_total{check="ok",tee="tpm"} 1`,
		`cvm_broker_attestations_total{check="report-data",tee="tpm"} 1`,
		`cvm_broker_releases_total{outcome="ok"} 1`,
		`cvm_broker_sessions 2`,
		`cvm_broker_rate_limited_total 0`,
		`cvm_broker_audit_write_seconds_count`,
		`cvm_broker_store_seconds_count{operation="insert"} 1`,
	} {
		if !strings.Contains(text, line) {
			t.Errorf("no %s in\n%s", line, text)
		}
	}
	for _, word := range []string{"making", g.nonce, "shop", "tpm:", "tpm-ak:"} {
		if strings.Contains(text, word) {
			t.Errorf("a metric names %q", word)
		}
	}
	// Guests do not get them, and nothing else is served there.
	if status, body, _ := s.call(t, "GET", "/metrics", "", "", ""); status != 404 || variant(t, status, body) != kbs.VariantInvalidRequestPath {
		t.Errorf("on the guests' side: %d %s", status, body)
	}
	for _, path := range []string{"/", "/healthz", "/kbs/v0/resource/a/b/c", "/debug/pprof/"} {
		resp, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
	s.stop()
	if c, err := net.DialTimeout("tcp", address, time.Second); err == nil {
		c.Close()
		t.Error("metrics are served after the stop")
	}
}

func scrape(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%d, %v", resp.StatusCode, err)
	}
	return string(b)
}
