package keyrelease

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// A broker's answer is a JWE to this session's key, or a refusal: never a key.
func FuzzReleasedResource(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.ECDH_ES_A256KW, Key: &key.PublicKey}, nil)
	if err != nil {
		f.Fatal(err)
	}
	object, err := e.Encrypt([]byte("resource"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(object.FullSerialize()))
	f.Add([]byte("resource"))
	f.Add([]byte(`{"protected":"","encrypted_key":"","iv":"","ciphertext":"cmVzb3VyY2U","tag":""}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		data, err := decrypt(body, key)
		if err != nil && (data != nil || cause.Of(err) != cause.KeyMalformed) {
			t.Fatalf("%q beside %v", data, err)
		}
		if err == nil && string(data) != "resource" {
			t.Fatalf("%q was released", data)
		}
	})
}
