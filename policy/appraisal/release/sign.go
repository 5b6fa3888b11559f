package release

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"time"

	"github.com/gowebpki/jcs"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// Opened is a reference document whose signatures hold.
type Opened struct {
	Reference *Reference
	Payload   []byte   // the exact signed bytes
	Digest    string   // "sha256:…" of Payload
	Signers   []string // fingerprints of the keys that signed, sorted

	rules map[string]Rule
}

// DecodeReferenceYAML reads the form that people write, validated. Errors name
// path, line and column.
func DecodeReferenceYAML(data []byte) (*Reference, error) {
	var d Reference
	where, err := bounded.DecodeYAML(data, &d, bounded.Limits{Bytes: MaxReferenceSize, Depth: 12})
	if err != nil {
		return nil, decodeCause(err)
	}
	if err := d.Validate(); err != nil {
		where.Locate(err)
		return nil, cause.New(cause.PolicyInvalid, "reference values: %w", err)
	}
	return &d, nil
}

// DecodeReferenceJSON reads the form that is signed: JSON that is canonical
// (RFC 8785) to the byte, validated.
func DecodeReferenceJSON(data []byte) (*Reference, error) {
	var d Reference
	if err := bounded.DecodeJSON(data, &d, bounded.Limits{Bytes: MaxReferenceSize, Depth: 12}); err != nil {
		return nil, decodeCause(err)
	}
	canonical, err := jcs.Transform(data)
	if err != nil {
		return nil, cause.New(cause.PolicyMalformed, "reference values: %w", err)
	}
	if !bytes.Equal(canonical, data) {
		return nil, cause.New(cause.PolicyMalformed, "reference values: the signed JSON is not in canonical form (RFC 8785)")
	}
	if err := d.Validate(); err != nil {
		return nil, cause.New(cause.PolicyInvalid, "reference values: %w", err)
	}
	return &d, nil
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
	return cause.New(code, "reference values: %w", err)
}

// Canonical writes the document as it is signed: JSON by RFC 8785. It is
// validated first.
func (d *Reference) Canonical() ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, cause.New(cause.PolicyInvalid, "reference values: %w", err)
	}
	plain, err := json.Marshal(d)
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	out, err := jcs.Transform(plain)
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	if len(out) > MaxReferenceSize {
		return nil, cause.New(cause.PolicyTooLarge, "reference values: %d bytes, at most %d are accepted", len(out), MaxReferenceSize)
	}
	return out, nil
}

// SignReference validates the document and puts its canonical form into an
// envelope.
func SignReference(d *Reference, signers ...dsse.Signer) ([]byte, error) {
	payload, err := d.Canonical()
	if err != nil {
		return nil, err
	}
	out, err := dsse.Sign(ReferencePayloadType, payload, signers...)
	if errors.Is(err, bounded.ErrTooLarge) {
		return nil, cause.Wrap(cause.PolicyTooLarge, err)
	}
	return out, err
}

// OpenReference judges a signed document from outside: signatures by at least
// threshold distinct keys of keys come first, and only then is it decoded. Its
// expiry is the caller's to check, by CheckExpiry, whenever it is used.
func OpenReference(envelope []byte, keys []crypto.PublicKey, threshold int) (*Opened, error) {
	e, err := dsse.Parse(envelope)
	if err != nil {
		return nil, cause.New(cause.PolicyMalformed, "reference values: %w", err)
	}
	signers, err := e.Verify(ReferencePayloadType, keys, threshold)
	switch {
	case errors.Is(err, dsse.ErrUnsigned):
		return nil, cause.New(cause.PolicyUnsigned, "reference values: %w", err)
	case errors.Is(err, dsse.ErrPayloadType):
		return nil, cause.New(cause.PolicyMalformed, "reference values: %w", err)
	case err != nil:
		return nil, cause.New(cause.PolicySignature, "reference values: %w", err)
	}
	d, err := DecodeReferenceJSON(e.Payload)
	if err != nil {
		return nil, err
	}
	return &Opened{Reference: d, Payload: e.Payload, Digest: Digest(e.Payload), Signers: signers, rules: d.Rules()}, nil
}

// Digest is how marks and logs name a document: "sha256:" and the lowercase hex
// digest of its signed bytes.
func Digest(payload []byte) string {
	sum := sha256.Sum256(payload)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// CheckExpiry refuses a document whose expiry, if it has one, is not after now.
func (o *Opened) CheckExpiry(now time.Time) error {
	d := o.Reference
	if d.Expires == "" {
		return nil
	}
	expires, err := utc(d.Expires)
	if err != nil {
		return cause.New(cause.PolicyInvalid, "reference values: expires: %w", err)
	}
	if !now.Before(expires) {
		return cause.New(cause.PolicyExpired, "reference values %s version %d expired at %s, now is %s", d.Name, d.Version, d.Expires, now.UTC().Format(time.RFC3339))
	}
	return nil
}

// Rule returns the rule of a resource by its canonical URI; nil: the document
// does not name it.
func (o *Opened) Rule(uri string) *Rule {
	r, ok := o.rules[uri]
	if !ok {
		return nil
	}
	return &r
}
