// Package dsse reads, signs and verifies DSSE envelopes
// (github.com/secure-systems-lab/dsse, version 1.0.0): launch policies, orders
// and receipts travel in them.
//
// It promises: an envelope is bounded and strictly decoded before a signature
// is looked at, and a threshold counts distinct keys. It knows three kinds of
// keys, each with the one algorithm that sigstore uses for it, so that there is
// nothing to negotiate: ECDSA P-256 with SHA-256 (ASN.1), Ed25519 (pure), and
// RSA of 2048 to 4096 bits with PKCS #1 v1.5 and SHA-256. Loading private keys
// is in the package signkey, which is heavy; this one is light.
package dsse

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	securesystems "github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// MaxSize bounds an envelope, in bytes. MaxSignatures bounds their number, and
// with it the work that a hostile envelope can cause.
const (
	MaxSize       = 1 << 20
	MaxSignatures = 16
	maxSignature  = 1024 // bytes of one signature; RSA 4096 has 512
)

// Sentinels for errors.Is. Bounds and syntax errors are those of bounded.
var (
	ErrUnsigned    = errors.New("no signature")
	ErrThreshold   = errors.New("too few valid signatures")
	ErrPayloadType = errors.New("another payload type")
	ErrKey         = errors.New("unusable key")
)

// Envelope is a decoded envelope; Payload is the exact bytes that are signed.
type Envelope struct {
	PayloadType string
	Payload     []byte
	Signatures  []Signature
}

// Signature is one signature. KeyID is a hint that nothing here relies on.
type Signature struct {
	KeyID string
	Sig   []byte
}

type wireEnvelope struct {
	PayloadType string          `json:"payloadType"`
	Payload     string          `json:"payload"`
	Signatures  []wireSignature `json:"signatures"`
}

type wireSignature struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

// Parse decodes an envelope of at most MaxSize bytes. Unlike the specification
// it refuses members that it does not know: two readers must not see different
// things in one file. It verifies nothing.
func Parse(data []byte) (*Envelope, error) {
	var w wireEnvelope
	if err := bounded.DecodeJSON(data, &w, bounded.Limits{Bytes: MaxSize, Depth: 4, Nodes: 128}); err != nil {
		return nil, fmt.Errorf("DSSE envelope: %w", err)
	}
	if w.PayloadType == "" || len(w.PayloadType) > 256 {
		return nil, fmt.Errorf("DSSE envelope: payloadType has %d bytes, expected 1 to 256", len(w.PayloadType))
	}
	if len(w.Signatures) > MaxSignatures {
		return nil, fmt.Errorf("DSSE envelope: %d signatures, at most %d are accepted: %w", len(w.Signatures), MaxSignatures, bounded.ErrTooLarge)
	}
	payload, err := unbase64(w.Payload)
	if err != nil {
		return nil, fmt.Errorf("DSSE envelope: payload: %w", err)
	}
	e := &Envelope{PayloadType: w.PayloadType, Payload: payload}
	for i, s := range w.Signatures {
		sig, err := unbase64(s.Sig)
		if err != nil {
			return nil, fmt.Errorf("DSSE envelope: signatures[%d].sig: %w", i, err)
		}
		if len(sig) == 0 || len(sig) > maxSignature || len(s.KeyID) > 256 {
			return nil, fmt.Errorf("DSSE envelope: signatures[%d]: %d bytes with a keyid of %d, expected 1 to %d and at most 256", i, len(sig), len(s.KeyID), maxSignature)
		}
		e.Signatures = append(e.Signatures, Signature{KeyID: s.KeyID, Sig: sig})
	}
	return e, nil
}

// unbase64 reads standard or URL-safe base64, as the specification demands of
// verifiers, without line breaks and without stray bits at the end.
func unbase64(s string) ([]byte, error) {
	for i := range len(s) {
		if s[i] == '\n' || s[i] == '\r' { // which encoding/base64 would skip
			return nil, fmt.Errorf("line break at byte %d of base64", i)
		}
	}
	if b, err := base64.StdEncoding.Strict().DecodeString(s); err == nil {
		return b, nil
	}
	b, err := base64.URLEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, errors.New("not base64")
	}
	return b, nil
}

// Marshal writes the envelope in the JSON form, with standard base64.
func (e *Envelope) Marshal() ([]byte, error) {
	w := wireEnvelope{PayloadType: e.PayloadType, Payload: base64.StdEncoding.EncodeToString(e.Payload), Signatures: []wireSignature{}}
	for _, s := range e.Signatures {
		w.Signatures = append(w.Signatures, wireSignature{KeyID: s.KeyID, Sig: base64.StdEncoding.EncodeToString(s.Sig)})
	}
	out, err := json.Marshal(w)
	if err != nil {
		return nil, err
	}
	if len(out) > MaxSize {
		return nil, fmt.Errorf("DSSE envelope of %d bytes, at most %d are accepted: %w", len(out), MaxSize, bounded.ErrTooLarge)
	}
	return out, nil
}

// PAE is the pre-authentication encoding: the bytes that a signature covers.
func PAE(payloadType string, payload []byte) []byte {
	return securesystems.PAE(payloadType, payload)
}
