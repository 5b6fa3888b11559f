package platform

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// InstanceKeyFile is the instance key's file in the run directory, a tmpfs: the
// key lives as long as the boot and is never on a disk.
const InstanceKeyFile = "instance.key"

const instanceKeyType = "PRIVATE KEY" // PKCS #8

// signInstance signs a session's nonce with the instance key of this boot:
// compact JWS, ES256, the public key in the header.
func signInstance(dir, nonce string) (string, error) {
	key, err := instanceKey(dir)
	if err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, &jose.SignerOptions{EmbedJWK: true})
	if err != nil {
		return "", cause.New(cause.Internal, "the instance key: %w", err)
	}
	jws, err := signer.Sign([]byte(nonce))
	if err != nil {
		return "", cause.New(cause.Internal, "sign with the instance key: %w", err)
	}
	return jws.CompactSerialize()
}

// instanceKey reads the key, or makes it: whole, and once, whoever else makes
// one at the same time.
func instanceKey(dir string) (*ecdsa.PrivateKey, error) {
	path := filepath.Join(dir, InstanceKeyFile)
	key, err := readInstanceKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if err := makeInstanceKey(dir, path); err != nil {
		return nil, cause.New(cause.StorageFailed, "make the instance key: %w", err)
	}
	return readInstanceKey(path)
}

func readInstanceKey(path string) (*ecdsa.PrivateKey, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, cause.New(cause.EvidenceFailed, "the instance key %s has mode %o, expected 0600", path, st.Mode().Perm())
	}
	data, err := bounded.ReadFile(path, 4<<10)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "the instance key: %w", err)
	}
	defer clear(data)
	block, rest := pem.Decode(data)
	if block == nil || block.Type != instanceKeyType || len(rest) > 0 {
		return nil, cause.New(cause.EvidenceFailed, "the instance key %s is not one PEM block %s", path, instanceKeyType)
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "the instance key %s cannot be parsed", path)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, cause.New(cause.EvidenceFailed, "the instance key %s is not ECDSA on P-256", path)
	}
	return key, nil
}

func makeInstanceKey(dir, path string) (err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: instanceKeyType, Bytes: der})
	defer func() { clear(der); clear(text) }()
	f, err := os.CreateTemp(dir, "."+InstanceKeyFile+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	// A link never replaces: of two that make a key, one wins for both.
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
