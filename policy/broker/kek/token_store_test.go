//go:build pkcs11

package kek_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// A storage that was made under a token's key opens with that key alone, and
// holds nothing that would open it without the token.
func TestStorageUnderAToken(t *testing.T) {
	c := kek.SoftHSM(t)
	if err := kek.CreateTokenKey(c, ""); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "db")
	open := func(c kek.Config) (*broker.Store, error) {
		k, err := c.Open("")
		if err != nil {
			return nil, err
		}
		return broker.OpenStore(path, k)
	}
	u := kbs.ResourceURI{Repository: "a", Type: "key", Tag: "1"}
	for round := range 3 {
		s, err := open(c)
		if err != nil {
			t.Fatal(err)
		}
		if round == 0 {
			if err := s.PutResource(u, []byte("the secret"), func() error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		if b, err := s.Resource(u); err != nil || string(b) != "the secret" {
			t.Errorf("round %d: %q, %v", round, b, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	other := *c.PKCS11
	other.Key = "other"
	if err := kek.CreateTokenKey(kek.Config{PKCS11: &other}, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := open(kek.Config{PKCS11: &other}); err == nil || !strings.Contains(err.Error(), "not of this key") {
		t.Errorf("another key of the token: %v", err)
	}
	file := filepath.Join(t.TempDir(), "kek")
	if err := os.WriteFile(file, bytes.Repeat([]byte{1}, kek.Size), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := open(kek.Config{File: file}); err == nil || !strings.Contains(err.Error(), "PKCS #11") {
		t.Errorf("a file in place of the token: %v", err)
	}
}
