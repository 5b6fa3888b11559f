package dsse

import (
	"crypto"
	"errors"
	"fmt"
	"slices"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// Signer signs with one private key, by the algorithm that the package comment
// gives for its kind.
type Signer interface {
	PublicKey() crypto.PublicKey
	Sign(message []byte) (signature []byte, err error)
}

// Sign makes an envelope with one signature per signer. Two signers with the
// same key are refused. The keyid stays empty, as cosign leaves it: sigstore's
// verifier skips a signature whose keyid is not its own kind of fingerprint.
func Sign(payloadType string, payload []byte, signers ...Signer) ([]byte, error) {
	e := &Envelope{PayloadType: payloadType, Payload: payload}
	if err := e.Add(signers...); err != nil {
		return nil, err
	}
	return e.Marshal()
}

// Add signs the envelope's payload with further keys, for signers who are not
// in the same place. A key that has signed already is refused.
func (e *Envelope) Add(signers ...Signer) error {
	if len(signers) == 0 {
		return errors.New("no key to sign with")
	}
	if len(e.Signatures)+len(signers) > MaxSignatures {
		return fmt.Errorf("%d signatures, at most %d are accepted: %w", len(e.Signatures)+len(signers), MaxSignatures, bounded.ErrTooLarge)
	}
	message := PAE(e.PayloadType, e.Payload)
	for _, s := range signers {
		id, err := Fingerprint(s.PublicKey())
		if err != nil {
			return err
		}
		if slices.ContainsFunc(e.Signatures, func(have Signature) bool { return verify(s.PublicKey(), message, have.Sig) }) {
			return fmt.Errorf("key %s signs twice: %w", id, ErrKey)
		}
		sig, err := s.Sign(message)
		if err != nil {
			return fmt.Errorf("sign with %s: %w", id, err)
		}
		// A signer that signs by another algorithm would be found out only in
		// the guest: find out here.
		if !verify(s.PublicKey(), message, sig) {
			return fmt.Errorf("the signature by %s does not verify by this package's algorithm: %w", id, ErrKey)
		}
		e.Signatures = append(e.Signatures, Signature{Sig: sig})
	}
	return nil
}

// Verify requires payloadType and valid signatures by at least threshold
// distinct keys of keys. It returns the fingerprints of all keys that signed,
// sorted. ErrUnsigned, ErrPayloadType and ErrThreshold say what is wrong.
func (e *Envelope) Verify(payloadType string, keys []crypto.PublicKey, threshold int) (matched []string, err error) {
	if e.PayloadType != payloadType {
		return nil, fmt.Errorf("payload type is %q, expected %q: %w", e.PayloadType, payloadType, ErrPayloadType)
	}
	if threshold < 1 {
		return nil, fmt.Errorf("threshold is %d, expected at least 1: %w", threshold, ErrThreshold)
	}
	if len(e.Signatures) == 0 {
		return nil, fmt.Errorf("the envelope has %w", ErrUnsigned)
	}
	distinct := map[string]crypto.PublicKey{}
	for _, k := range keys {
		id, err := Fingerprint(k)
		if err != nil {
			return nil, err
		}
		distinct[id] = k
	}
	message := PAE(e.PayloadType, e.Payload)
	for id, k := range distinct {
		if slices.ContainsFunc(e.Signatures, func(s Signature) bool { return verify(k, message, s.Sig) }) {
			matched = append(matched, id)
		}
	}
	slices.Sort(matched)
	if len(matched) < threshold {
		return matched, fmt.Errorf("valid signatures by %d distinct trusted keys, expected at least %d: %w", len(matched), threshold, ErrThreshold)
	}
	return matched, nil
}
