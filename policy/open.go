package policy

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/gowebpki/jcs"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// maxRotation bounds the links of a rotation chain.
const maxRotation = 16

// Trust is what the measured image says about policies.
type Trust struct {
	Fingerprints []string // of trusted signers: lowercase hexadecimal SHA-256 of SPKI DER
	Threshold    int      // distinct signatures, at least 1
	VersionFloor uint64   // lowest version that may run
}

// Verified is a policy that passed every check that needs no hardware, and who
// answers for it.
type Verified struct {
	Policy  *Policy
	Payload []byte   // the exact signed bytes
	Digest  string   // "sha256:…" of Payload
	Signers []string // fingerprints of those of Keys that signed, sorted

	// The signer set in force: of the measured image, or of the last link of
	// the rotation chain.
	Keys      []crypto.PublicKey
	Threshold int

	envelope *dsse.Envelope
}

// Digest is "sha256:" and the lowercase hexadecimal digest of the exact signed
// bytes: how logs, rules and brokers name a policy.
func Digest(payload []byte) string {
	sum := sha256.Sum256(payload)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// DecodeYAML reads the form that people write: one document of at most MaxSize
// bytes, validated. Errors name the path, line and column.
func DecodeYAML(data []byte) (*Policy, error) {
	var p Policy
	where, err := bounded.DecodeYAML(data, &p, bounded.Limits{Bytes: MaxSize})
	if err != nil {
		return nil, decodeCause(err)
	}
	if err := p.Validate(); err != nil {
		var f *bounded.FieldError
		if where.Locate(err); errors.As(err, &f) {
			err = cause.New(cause.Of(err), "policy: %w", f) // its text, now with the line
		}
		return nil, err
	}
	return &p, nil
}

// DecodeJSON reads the form that is signed: JSON of at most MaxSize bytes that
// is canonical (RFC 8785) to the byte, validated.
func DecodeJSON(data []byte) (*Policy, error) {
	var p Policy
	if err := bounded.DecodeJSON(data, &p, bounded.Limits{Bytes: MaxSize}); err != nil {
		return nil, decodeCause(err)
	}
	canonical, err := jcs.Transform(data)
	if err != nil {
		return nil, cause.New(cause.PolicyMalformed, "policy: %w", err)
	}
	if !bytes.Equal(canonical, data) {
		return nil, cause.New(cause.PolicyMalformed, "policy: the signed JSON is not in canonical form (RFC 8785)")
	}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	return &p, nil
}

func decodeCause(err error) error {
	code := cause.PolicyMalformed
	var f *bounded.FieldError
	switch {
	case errors.Is(err, bounded.ErrUnknownField):
		code = cause.PolicyUnknownField
	case errors.Is(err, bounded.ErrTooLarge) && errors.As(err, &f) && f.Path == "":
		code = cause.PolicyTooLarge
	}
	return cause.New(code, "policy: %w", err)
}

// Canonical writes the policy as it is signed: JSON by RFC 8785. The policy is
// validated first.
func (p *Policy) Canonical() ([]byte, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	plain, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	out, err := jcs.Transform(plain)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if len(out) > MaxSize {
		return nil, cause.New(cause.PolicyTooLarge, "policy: %d bytes, at most %d are accepted", len(out), MaxSize)
	}
	return out, nil
}

// Sign validates the policy and puts its canonical form into an envelope.
func Sign(p *Policy, signers ...dsse.Signer) ([]byte, error) {
	payload, err := p.Canonical()
	if err != nil {
		return nil, err
	}
	out, err := dsse.Sign(PayloadType, payload, signers...)
	if errors.Is(err, bounded.ErrTooLarge) {
		return nil, cause.Wrap(cause.PolicyTooLarge, err)
	}
	return out, err
}

// Open judges a signed policy from outside. In this order: the envelope is
// decoded; keysPEM (which nobody vouches for) is reduced to the keys whose
// fingerprint t trusts; the rotation chain, oldest link first, moves trust to
// the set that its last link names; the policy must be signed by that set, and
// if it names next signers, by those as well; only then is it decoded and
// validated; its version must reach the floor and its expiry must lie after
// now. Nothing of a policy is looked at before its signatures hold.
func Open(envelope, keysPEM []byte, rotation [][]byte, t Trust, now time.Time) (*Verified, error) {
	set, err := trustedSet(keysPEM, t)
	if err != nil {
		return nil, err
	}
	if len(rotation) > maxRotation {
		return nil, cause.New(cause.PolicyRotation, "%d links in the rotation chain, at most %d are accepted", len(rotation), maxRotation)
	}
	var last *Verified
	for i, link := range rotation {
		v, err := openSigned(link, set)
		if err != nil {
			return nil, cause.New(cause.PolicyRotation, "link %d of the rotation chain: %w", i, err)
		}
		if err := follows(last, v); err != nil {
			return nil, cause.New(cause.PolicyRotation, "link %d of the rotation chain: %w", i, err)
		}
		if v.Policy.NextSigners == nil {
			return nil, cause.New(cause.PolicyRotation, "link %d of the rotation chain names no next signers", i)
		}
		if set, err = v.Policy.NextSigners.parse(); err != nil {
			return nil, err
		}
		last = v
	}
	v, err := openSigned(envelope, set)
	if err != nil {
		return nil, err
	}
	if err := follows(last, v); err != nil {
		return nil, cause.New(cause.PolicyRotation, "the policy does not follow its rotation chain: %w", err)
	}
	if v.Policy.Version < t.VersionFloor {
		return nil, cause.New(cause.PolicyBelowFloor, "policy %s has version %d, the floor is %d", v.Policy.Name, v.Policy.Version, t.VersionFloor)
	}
	if err := v.CheckExpiry(now); err != nil {
		return nil, err
	}
	return v, nil
}

// CheckExpiry refuses a policy whose expiry is not after now. A guest calls it
// again with the broker's time: until then the host's clock is all there is.
func (v *Verified) CheckExpiry(now time.Time) error {
	expires, err := v.Policy.expiry()
	if err != nil {
		return err
	}
	if !now.Before(expires) {
		return cause.New(cause.PolicyExpired, "policy %s version %d expired at %s, now is %s", v.Policy.Name, v.Policy.Version, v.Policy.Expires, now.UTC().Format(time.RFC3339))
	}
	return nil
}

// CheckUpgrade judges next as the successor of v: the same name, a higher
// version that is at least v's minimum version, signed by the set in force or
// by the next signers that v names. next comes from OpenUpgrade or Open.
func (v *Verified) CheckUpgrade(next *Verified) error {
	if next.Policy.Name != v.Policy.Name {
		return cause.New(cause.PolicyOtherName, "the new policy's name is %s, the running one's is %s", next.Policy.Name, v.Policy.Name)
	}
	if next.Policy.Version <= v.Policy.Version {
		return cause.New(cause.PolicyNotNewer, "the new policy has version %d, the running one %d", next.Policy.Version, v.Policy.Version)
	}
	if next.Policy.Version < v.Policy.MinimumVersion {
		return cause.New(cause.PolicyBelowFloor, "the new policy has version %d, the running one's minimum is %d", next.Policy.Version, v.Policy.MinimumVersion)
	}
	_, err := v.successorSet(next.envelope)
	return err
}

// OpenUpgrade opens an envelope under the signers that may follow v, and checks
// that it may: what `upgrade` needs, whose caller brings no keys.
func (v *Verified) OpenUpgrade(envelope []byte, now time.Time) (*Verified, error) {
	e, err := parseEnvelope(envelope)
	if err != nil {
		return nil, err
	}
	set, err := v.successorSet(e)
	if err != nil {
		return nil, err
	}
	next, err := openSigned(envelope, set)
	if err != nil {
		return nil, err
	}
	if err := v.CheckUpgrade(next); err != nil {
		return nil, err
	}
	if err := next.CheckExpiry(now); err != nil {
		return nil, err
	}
	return next, nil
}

// signerSet is a parsed threshold of keys.
type signerSet struct {
	keys      []crypto.PublicKey
	threshold int
}

// successorSet is the set by which e, the successor of v, is signed: the next
// signers once v names some and they signed, else the set in force.
func (v *Verified) successorSet(e *dsse.Envelope) (signerSet, error) {
	current := signerSet{v.Keys, v.Threshold}
	if v.Policy.NextSigners != nil {
		next, err := v.Policy.NextSigners.parse()
		if err != nil {
			return signerSet{}, err
		}
		if _, err := e.Verify(PayloadType, next.keys, next.threshold); err == nil {
			return next, nil
		}
	}
	_, err := e.Verify(PayloadType, current.keys, current.threshold)
	return current, signatureCause(err)
}

func trustedSet(keysPEM []byte, t Trust) (signerSet, error) {
	if t.Threshold < 1 || len(t.Fingerprints) < t.Threshold {
		return signerSet{}, cause.New(cause.Config, "trusted signers: threshold %d of %d fingerprints, expected at least 1 and at most all", t.Threshold, len(t.Fingerprints))
	}
	trusted := map[string]bool{}
	for _, f := range t.Fingerprints {
		if b, err := hex.DecodeString(f); err != nil || len(b) != sha256.Size || hex.EncodeToString(b) != f {
			return signerSet{}, cause.New(cause.Config, "trusted signers: %q is not a SHA-256 in lowercase hexadecimal", f)
		}
		trusted[f] = true
	}
	set := signerSet{threshold: t.Threshold}
	if len(bytes.TrimSpace(keysPEM)) == 0 {
		return set, cause.New(cause.PolicySignature, "no public key comes with the policy: %s is empty", KeySigners)
	}
	keys, err := dsse.ParsePublicKeysPEM(keysPEM)
	if err != nil {
		return set, cause.New(cause.PolicyMalformed, "the policy's public keys: %w", err)
	}
	for _, k := range keys {
		if id, err := dsse.Fingerprint(k); err == nil && trusted[id] {
			set.keys = append(set.keys, k)
		}
	}
	return set, nil
}

func parseEnvelope(data []byte) (*dsse.Envelope, error) {
	if len(data) > MaxSize {
		return nil, cause.New(cause.PolicyTooLarge, "the policy envelope has %d bytes, at most %d are accepted", len(data), MaxSize)
	}
	e, err := dsse.Parse(data)
	if err != nil {
		return nil, cause.New(cause.PolicyMalformed, "policy: %w", err)
	}
	return e, nil
}

// openSigned verifies an envelope by set, then decodes it, then requires the
// next signers' own signatures where it names some: nobody can hand trust to
// keys whose holders have not shown that they hold them.
func openSigned(envelope []byte, set signerSet) (*Verified, error) {
	e, err := parseEnvelope(envelope)
	if err != nil {
		return nil, err
	}
	signers, err := e.Verify(PayloadType, set.keys, set.threshold)
	if err != nil {
		return nil, signatureCause(err)
	}
	p, err := DecodeJSON(e.Payload)
	if err != nil {
		return nil, err
	}
	if p.NextSigners != nil {
		next, err := p.NextSigners.parse()
		if err != nil {
			return nil, err
		}
		if _, err := e.Verify(PayloadType, next.keys, next.threshold); err != nil {
			return nil, cause.New(cause.PolicyRotation, "the policy names next signers that have not signed it: %w", err)
		}
	}
	return &Verified{Policy: p, Payload: e.Payload, Digest: Digest(e.Payload), Signers: signers,
		Keys: set.keys, Threshold: set.threshold, envelope: e}, nil
}

// follows requires one name and ascending versions along a chain.
func follows(older, newer *Verified) error {
	if older == nil {
		return nil
	}
	if older.Policy.Name != newer.Policy.Name {
		return cause.New(cause.PolicyOtherName, "name %s after %s", newer.Policy.Name, older.Policy.Name)
	}
	if newer.Policy.Version <= older.Policy.Version {
		return cause.New(cause.PolicyNotNewer, "version %d after %d", newer.Policy.Version, older.Policy.Version)
	}
	return nil
}

func signatureCause(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, dsse.ErrUnsigned):
		return cause.New(cause.PolicyUnsigned, "policy: %w", err)
	case errors.Is(err, dsse.ErrPayloadType):
		return cause.New(cause.PolicyMalformed, "policy: %w", err)
	}
	return cause.New(cause.PolicySignature, "policy: %w", err)
}
