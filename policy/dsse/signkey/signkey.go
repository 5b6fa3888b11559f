// Package signkey loads private keys for signing envelopes: those of
// `cosign generate-key-pair` (encrypted, PEM type "ENCRYPTED SIGSTORE PRIVATE
// KEY" or the older "ENCRYPTED COSIGN PRIVATE KEY") as they are, and plain
// PKCS #8. It uses cosign's own loader and sigstore's signers, so it links
// both: programs that only verify import dsse alone.
package signkey

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

const maxKeyFile = 64 << 10

// Encrypted tells whether a PEM private key needs a passphrase.
func Encrypted(pemKey []byte) bool {
	block, _ := pem.Decode(pemKey)
	return block != nil && (block.Type == cosign.SigstorePrivateKeyPemType || block.Type == cosign.CosignPrivateKeyPemType)
}

// Load reads one PEM private key: ECDSA P-256, Ed25519 or RSA of 2048 to 4096
// bits. The passphrase is used only where Encrypted says so; one that does not
// fit is an error that names neither key nor passphrase.
func Load(pemKey, passphrase []byte) (dsse.Signer, error) {
	if len(pemKey) > maxKeyFile {
		return nil, fmt.Errorf("private key of %d bytes, at most %d are accepted: %w", len(pemKey), maxKeyFile, bounded.ErrTooLarge)
	}
	block, rest := pem.Decode(pemKey)
	if block == nil || len(bytes.TrimSpace(rest)) != 0 {
		return nil, fmt.Errorf("expected exactly one PEM block with a private key: %w", dsse.ErrKey)
	}
	var sv signature.SignerVerifier
	var err error
	switch {
	case Encrypted(pemKey):
		// No load options: cosign's default would sign with Ed25519ph, which
		// DSSE verifiers do not expect.
		sv, err = cosign.LoadPrivateKey(pemKey, passphrase, &[]signature.LoadOption{})
		if err != nil {
			return nil, fmt.Errorf("%w: the passphrase does not open it, or it is damaged (%w)", dsse.ErrKey, err)
		}
	case block.Type == cosign.PrivateKeyPemType:
		key, perr := x509.ParsePKCS8PrivateKey(block.Bytes)
		if perr != nil {
			return nil, fmt.Errorf("%w: not PKCS #8", dsse.ErrKey)
		}
		sv, err = signature.LoadSignerVerifier(key, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", dsse.ErrKey, err)
		}
	default:
		return nil, fmt.Errorf("PEM type %q, expected %q (cosign) or %q (PKCS #8): %w", block.Type, cosign.SigstorePrivateKeyPemType, cosign.PrivateKeyPemType, dsse.ErrKey)
	}
	pub, err := sv.PublicKey()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dsse.ErrKey, err)
	}
	if err := dsse.CheckPublicKey(pub); err != nil {
		return nil, err
	}
	return &signer{sv: sv, pub: pub}, nil
}

type signer struct {
	sv  signature.SignerVerifier
	pub crypto.PublicKey
}

func (s *signer) PublicKey() crypto.PublicKey { return s.pub }

func (s *signer) Sign(message []byte) ([]byte, error) {
	return s.sv.SignMessage(bytes.NewReader(message))
}
