package signkey_test

import (
	"crypto"
	"errors"
	"strings"
	"testing"

	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/sigstore/pkg/signature"
	sigdsse "github.com/sigstore/sigstore/pkg/signature/dsse"

	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/dsse/signkey"
)

const payloadType = "application/vnd.test+json"

func TestCosignKeysAndPKCS8SignWhatSigstoreVerifies(t *testing.T) {
	pass := func(bool) ([]byte, error) { return []byte("correct horse"), nil }
	pair, err := cosign.GenerateKeyPair(pass)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string][]byte{
		"cosign generate-key-pair": pair.PrivateBytes,
		"PKCS #8 ECDSA":            dssetest.New(t, "ecdsa").PKCS8,
		"PKCS #8 Ed25519":          dssetest.New(t, "ed25519").PKCS8,
		"PKCS #8 RSA":              dssetest.New(t, "rsa").PKCS8,
	} {
		t.Run(name, func(t *testing.T) {
			s, err := signkey.Load(key, []byte("correct horse"))
			if err != nil {
				t.Fatal(err)
			}
			out, err := dsse.Sign(payloadType, []byte(`{"a":1}`), s)
			if err != nil {
				t.Fatal(err)
			}
			e, err := dsse.Parse(out)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := e.Verify(payloadType, []crypto.PublicKey{s.PublicKey()}, 1); err != nil {
				t.Fatal(err)
			}
			// The same by sigstore's own code, which shares no line with ours.
			v, err := signature.LoadVerifier(s.PublicKey(), crypto.SHA256)
			if err != nil {
				t.Fatal(err)
			}
			if err := sigdsse.WrapVerifier(v).VerifySignature(strings.NewReader(string(out)), nil); err != nil {
				t.Fatalf("sigstore refuses our envelope: %v", err)
			}
		})
	}
	if !signkey.Encrypted(pair.PrivateBytes) {
		t.Error("cosign's key is not seen as encrypted")
	}
	if _, err := signkey.Load(pair.PrivateBytes, []byte("wrong")); !errors.Is(err, dsse.ErrKey) || strings.Contains(err.Error(), "wrong\"") {
		t.Errorf("wrong passphrase: %v", err)
	}
	if _, err := signkey.Load(pair.PublicBytes, nil); !errors.Is(err, dsse.ErrKey) {
		t.Errorf("a public key: %v", err)
	}
	if _, err := signkey.Load(append(pair.PrivateBytes, "x"...), nil); !errors.Is(err, dsse.ErrKey) {
		t.Errorf("text after the key: %v", err)
	}
}
