package dsse_test

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"testing"
)

// spki writes any key as PEM, also one that the package refuses.
func spki(t *testing.T, pub crypto.PublicKey) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}
