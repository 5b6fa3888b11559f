// Package dssetest makes fresh signing keys for tests. No program imports it.
package dssetest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// Key is a key pair that implements dsse.Signer.
type Key struct {
	Private     crypto.Signer
	Fingerprint string
	PEM         string // SPKI
	PKCS8       []byte // PEM of the private key
}

// New makes a key of kind "ecdsa", "ed25519" or "rsa".
func New(t testing.TB, kind string) *Key {
	t.Helper()
	var priv crypto.Signer
	var err error
	switch kind {
	case "ecdsa":
		priv, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ed25519":
		_, priv, err = ed25519.GenerateKey(rand.Reader)
	case "rsa":
		priv, err = rsa.GenerateKey(rand.Reader, 2048)
	default:
		t.Fatalf("unknown kind of key %q", kind)
	}
	if err != nil {
		t.Fatal(err)
	}
	k := &Key{Private: priv}
	if k.Fingerprint, err = dsse.Fingerprint(priv.Public()); err != nil {
		t.Fatal(err)
	}
	spki, err := dsse.MarshalPublicKeyPEM(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	k.PEM = string(spki)
	k.PKCS8 = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return k
}

// PublicKey implements dsse.Signer.
func (k *Key) PublicKey() crypto.PublicKey { return k.Private.Public() }

// Sign implements dsse.Signer.
func (k *Key) Sign(message []byte) ([]byte, error) {
	if _, ok := k.Private.(ed25519.PrivateKey); ok {
		return k.Private.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return k.Private.Sign(rand.Reader, sum[:], crypto.SHA256)
}
