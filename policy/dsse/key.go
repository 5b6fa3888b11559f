package dsse

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

const (
	maxKeyPEM = 4096 // bytes of one PEM key; RSA 4096 has 800
	maxKeys   = 64
)

// CheckPublicKey refuses every key but ECDSA P-256, Ed25519 and RSA of 2048 to
// 4096 bits with exponent 65537. Errors are ErrKey.
func CheckPublicKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return fmt.Errorf("ECDSA key on %s, expected P-256: %w", k.Curve.Params().Name, ErrKey)
		}
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize {
			return fmt.Errorf("Ed25519 key of %d bytes, expected %d: %w", len(k), ed25519.PublicKeySize, ErrKey)
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("RSA key of %d bits, expected 2048 to 4096: %w", n, ErrKey)
		}
		if k.E != 65537 {
			return fmt.Errorf("RSA exponent %d, expected 65537: %w", k.E, ErrKey)
		}
	default:
		return fmt.Errorf("key of type %T, expected ECDSA P-256, Ed25519 or RSA: %w", pub, ErrKey)
	}
	return nil
}

// Fingerprint is the lowercase hexadecimal SHA-256 of the key's
// SubjectPublicKeyInfo in DER.
func Fingerprint(pub crypto.PublicKey) (string, error) {
	if err := CheckPublicKey(pub); err != nil {
		return "", err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrKey, err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// ParsePublicKeyPEM reads exactly one PEM block "PUBLIC KEY" (SPKI), with
// nothing around it but white space, holding a key of a kind that
// CheckPublicKey accepts.
func ParsePublicKeyPEM(data []byte) (crypto.PublicKey, error) {
	keys, err := ParsePublicKeysPEM(data)
	if err != nil {
		return nil, err
	}
	if len(keys) != 1 {
		return nil, fmt.Errorf("%d PEM blocks, expected one: %w", len(keys), ErrKey)
	}
	return keys[0], nil
}

// ParsePublicKeysPEM reads one or more concatenated PEM keys, as
// ParsePublicKeyPEM reads one.
func ParsePublicKeysPEM(data []byte) ([]crypto.PublicKey, error) {
	if len(data) > maxKeyPEM*maxKeys {
		return nil, fmt.Errorf("%d bytes of PEM keys, at most %d are accepted: %w", len(data), maxKeyPEM*maxKeys, bounded.ErrTooLarge)
	}
	var keys []crypto.PublicKey
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		// pem.Decode skips what it does not understand: require it to start here.
		if !bytes.HasPrefix(rest, []byte("-----BEGIN PUBLIC KEY-----")) {
			return nil, fmt.Errorf("expected a PEM block \"PUBLIC KEY\", found something else: %w", ErrKey)
		}
		block, after := pem.Decode(rest)
		if block == nil || block.Type != "PUBLIC KEY" || len(block.Headers) != 0 || bytes.Count(rest[:len(rest)-len(after)], []byte("-----BEGIN")) != 1 {
			return nil, fmt.Errorf("a PEM block \"PUBLIC KEY\" is damaged: %w", ErrKey)
		}
		pub, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrKey, err)
		}
		if err := CheckPublicKey(pub); err != nil {
			return nil, err
		}
		if keys = append(keys, pub); len(keys) > maxKeys {
			return nil, fmt.Errorf("more than %d keys: %w", maxKeys, bounded.ErrTooLarge)
		}
		rest = slices.Clone(after)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("no PEM key: %w", ErrKey)
	}
	return keys, nil
}

// MarshalPublicKeyPEM writes a key as ParsePublicKeyPEM reads it.
func MarshalPublicKeyPEM(pub crypto.PublicKey) ([]byte, error) {
	if err := CheckPublicKey(pub); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// verify checks one signature; pub has passed CheckPublicKey.
func verify(pub crypto.PublicKey, message, sig []byte) bool {
	sum := sha256.Sum256(message)
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, sum[:], sig)
	case ed25519.PublicKey:
		return ed25519.Verify(k, message, sig)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], sig) == nil
	}
	return false
}
