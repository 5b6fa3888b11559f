package broker

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

var keyOne = kbs.ResourceURI{Repository: "a", Type: "key", Tag: "1"}

// An admin tightens a rule and then replaces the resource: a release that was
// judged by the old rule must not carry the new bytes.
func TestRuleAndResourceAreOfOneMoment(t *testing.T) {
	s, err := openStore(t, filepath.Join(t.TempDir(), "db"), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Instance("tpm:00", time.Now()); err != nil {
		t.Fatal(err)
	}
	// The file is grown first: bbolt cannot grow it beneath a reader.
	if err := errors.Join(s.PutResource(keyOne, make([]byte, MaxResource), onRecord), s.PutResource(keyOne, []byte("old"), onRecord), s.PutRule(keyOne, anyPolicy(), onRecord)); err != nil {
		t.Fatal(err)
	}
	data, err := s.Release("tpm:00", keyOne, func(g Grounds) error {
		if g.Rule == nil || !g.Rule.AnyPolicy {
			t.Errorf("rule %+v", g.Rule)
		}
		done := make(chan error)
		go func() {
			done <- errors.Join(s.DeleteRule(keyOne, onRecord), s.PutResource(keyOne, []byte("new"), onRecord))
		}()
		return <-done
	})
	if err != nil || string(data) != "old" {
		t.Errorf("released %q, %v", data, err)
	}
	if _, err := s.Release("tpm:01", keyOne, func(Grounds) error { return nil }); err == nil || errors.Is(err, errNotFound) {
		t.Errorf("an identity that was never attested: %v", err)
	}
}

// What cannot be put on record does not happen.
func TestAdminChangeWithoutARecordIsNoChange(t *testing.T) {
	dir := t.TempDir()
	s, err := openStore(t, filepath.Join(dir, "db"), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	log, err := audit.Open(filepath.Join(dir, "audit"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const token = "an admin's token"
	server, err := New(Options{Store: s, Audit: log, TokenKey: key, Logger: slog.New(slog.DiscardHandler), Now: time.Now, MaxSessions: 1, AdminHashes: [][32]byte{sha256.Sum256([]byte(token))}})
	if err != nil {
		t.Fatal(err)
	}
	put := func(method, path, body string) int {
		req := httptest.NewRequest(method, path, strings.NewReader(body))
		req.Header.Set("Authorization", "Bearer "+token)
		w := httptest.NewRecorder()
		server.ServeHTTP(w, req)
		return w.Code
	}
	if status := put("POST", kbs.PathResource+keyOne.Path(), "before"); status != 200 {
		t.Fatalf("with a log: %d", status)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	rule, err := anyPolicy().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range [][3]string{
		{"POST", kbs.PathResource + keyOne.Path(), "after"}, {"DELETE", kbs.PathResource + keyOne.Path(), ""},
		{"PUT", adminclient.PathRule + keyOne.Path(), string(rule)}, {"PUT", adminclient.PathMark + "shop", `{"version":3}`},
	} {
		if status := put(c[0], c[1], c[2]); status == 200 {
			t.Errorf("%s %s without a log: %d", c[0], c[1], status)
		}
	}
	if data, err := s.Resource(keyOne); err != nil || !bytes.Equal(data, []byte("before")) {
		t.Errorf("the resource is %q, %v", data, err)
	}
	if _, err := s.Rule(keyOne); !errors.Is(err, errNotFound) {
		t.Errorf("a rule: %v", err)
	}
	if m, err := s.Mark("shop"); err != nil || m.Version != 0 {
		t.Errorf("a mark: %+v, %v", m, err)
	}
}
