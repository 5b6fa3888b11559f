package rig

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
)

// Keys is a signing key pair made by stock `cosign generate-key-pair`. All keys
// of a rig have one passphrase, so that a program can open several.
type Keys struct {
	Private string   // encrypted PEM file
	Public  string   // PEM file
	Env     []string // COSIGN_PASSWORD, which opens Private
}

// NewKeys makes a key pair, its files named name.key and name.pub.
func (r *Rig) NewKeys(ctx context.Context, name string) (*Keys, error) {
	dir := r.Path("keys")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	k := &Keys{Private: r.Path("keys", name+".key"), Public: r.Path("keys", name+".pub"), Env: []string{"COSIGN_PASSWORD=" + r.password}}
	_, err := r.Run(ctx, k.Env, r.Tool("cosign"), "generate-key-pair", "--output-key-prefix", r.Path("keys", name))
	return k, err
}

// Fingerprint is the lowercase hex SHA-256 of the public key's SPKI DER, as
// agent.yaml names trusted signers.
func (k *Keys) Fingerprint() (string, error) {
	der, err := firstPEM(k.Public)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// PEM is the public key.
func (k *Keys) PEM() (string, error) {
	data, err := os.ReadFile(k.Public)
	return string(data), err
}

// NewRecipient makes a P-256 key pair in PKCS #8 and SPKI PEM files, for what
// is encrypted to a public key (the JWE recipients of skopeo).
func (r *Rig) NewRecipient(name string) (private, public string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	priv, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", "", err
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", "", err
	}
	private, public = r.Path("keys", name+".pem"), r.Path("keys", name+".pub.pem")
	return private, public, errors.Join(
		os.MkdirAll(r.Path("keys"), 0o700),
		os.WriteFile(private, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: priv}), 0o600),
		os.WriteFile(public, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}), 0o600))
}

func firstPEM(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New(file + " holds no PEM")
	}
	return block.Bytes, nil
}
