package broker

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// snpServer is a server that trusts a made AMD chain, with one key to release.
func snpServer(t testing.TB, s *Store, chain *snptest.Chain) *Server {
	t.Helper()
	log, err := audit.Open(filepath.Join(t.TempDir(), "audit"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	server, err := New(Options{Store: s, Audit: log, TokenKey: key, Logger: slog.New(slog.DiscardHandler), Now: time.Now, MaxSessions: 10000,
		Verifiers: []appraisal.Verifier{&appraisal.SNP{Roots: chain.Roots(), Collateral: chain.Collateral(t)}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	rule := release.Rule{APIVersion: release.RuleAPIVersion, Platforms: []string{"snp"}, AnyPolicy: true, AnyLaunch: true}
	if err := s.PutResource(keyOne, []byte("0123456789abcdef0123456789abcdef"), onRecord); err != nil {
		t.Fatal(err)
	}
	if err := s.PutRule(keyOne, rule, onRecord); err != nil {
		t.Fatal(err)
	}
	return server
}

// snpSession is one run of the protocol without a network.
func snpSession(t testing.TB, s *Server, chain *snptest.Chain, key kbs.TEEPubKey, o snptest.Options) error {
	ask := func(method, path, cookie, body string) (*httptest.ResponseRecorder, error) {
		req := httptest.NewRequest(method, path, strings.NewReader(body))
		if cookie != "" {
			req.Header.Set("Cookie", cookie)
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		if w.Code != 200 {
			return nil, fmt.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
		return w, nil
	}
	w, err := ask("POST", kbs.PathAuth, "", `{"version":"0.4.0","tee":"snp","extra-params":""}`)
	if err != nil {
		return err
	}
	c, err := kbs.DecodeChallenge(w.Body.Bytes())
	if err != nil {
		return err
	}
	cookie := w.Header().Get("Set-Cookie")
	rd, err := kbs.ReportData("", c.Nonce, key)
	if err != nil {
		return err
	}
	body, err := json.Marshal(kbs.AttestRequest{RuntimeData: kbs.RuntimeData{Nonce: c.Nonce, TEEPubKey: key},
		TEEEvidence: kbs.CompositeEvidence{PrimaryEvidence: chain.Evidence(t, rd, o)}})
	if err != nil {
		return err
	}
	if _, err := ask("POST", kbs.PathAttest, cookie, string(body)); err != nil {
		return err
	}
	_, err = ask("GET", kbs.PathResource+keyOne.Path(), cookie, "")
	return err
}

func teeKey(t testing.TB) kbs.TEEPubKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	j, err := kbs.NewTEEPubKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// BenchmarkSession is auth, attest and resource with SNP evidence, the guest's
// own work included. "new" guests are each seen for the first time.
// tests/bench measures the same over TLS, beside its bars.
func BenchmarkSession(b *testing.B) {
	chain := snptest.New(b, snptest.Config{})
	key := teeKey(b)
	for name, open := range map[string]func(b *testing.B) *Store{
		"bbolt": func(b *testing.B) *Store {
			s, err := OpenStore(filepath.Join(b.TempDir(), "db"), fixed(make([]byte, 32)))
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = s.Close() })
			return s
		},
		"PostgreSQL": func(b *testing.B) *Store { return openDatabase(b, database(b), 1) },
	} {
		for guests, o := range map[string]snptest.Options{"known": {ReportID: make([]byte, 32)}, "new": {}} {
			o.Change = func(r *kbs.SNPReport) {
				if guests == "known" {
					r.ReportID[0] = 1
				}
			}
			b.Run(name+"/"+guests, func(b *testing.B) {
				s := snpServer(b, open(b), chain)
				b.SetParallelism(8)
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := snpSession(b, s, chain, key, o); err != nil {
							b.Error(err)
							return
						}
					}
				})
			})
		}
	}
}
