//go:build !pkcs11

package kek

import (
	"path/filepath"
	"strings"
	"testing"
)

// Fails closed, and says what to use.
func TestATokenNeedsItsBuild(t *testing.T) {
	pin := filepath.Join(t.TempDir(), "pin")
	write(t, pin, "1234", 0o600)
	_, err := Config{PKCS11: &PKCS11{Module: "/m.so", Token: "t", Key: "k", PINFile: pin}}.Open("")
	if err == nil || !strings.Contains(err.Error(), "make broker-pkcs11") {
		t.Errorf("%v", err)
	}
}
