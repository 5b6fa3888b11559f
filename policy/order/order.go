// Package order is the signed order: upgrade or destroy, to exactly one boot of
// one instance, once.
//
// An order is an RFC 8785 JSON payload in a DSSE envelope, signed by a key that
// the running policy names for its operation. It says to whom it goes (policy
// name, instance id, boot id), answers a challenge that the agent gave out, ends
// at a time, and holds the digest of what it carries. The package promises that
// Verify accepts nothing that differs in any of these, and that each refusal has
// a cause code of its own. It gives out no challenges and redeems none: that is
// the agent's (package control), since only the agent knows what it gave out.
//
// The expiry is compared with the guest's clock, which the host may turn: what
// keeps an old order out is the challenge, whose age the agent measures by its
// monotonic clock.
package order

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"regexp"
	"time"

	"github.com/gowebpki/jcs"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// PayloadType is the DSSE payload type of an order, and the media type of a
// Document that is sent to an agent.
const PayloadType = "application/vnd.cvm-agent.order.v1+json"

// APIVersion is the only version that this package reads.
const APIVersion = "cvm-agent.order/v1"

// Operations.
const (
	Upgrade = "upgrade"
	Destroy = "destroy"
)

// Bounds. MaxAhead is how far in the future an order may end by the guest's
// clock; DefaultTTL leaves room for a maker's clock that is ahead.
const (
	MaxAhead    = 15 * time.Minute
	DefaultTTL  = 10 * time.Minute
	MaxCarried  = policy.MaxInitdata // bytes of what an order carries
	MaxDocument = 4 << 20            // bytes of a Document: MaxCarried in base64, with the envelope
	maxEnvelope = 64 << 10
	maxPayload  = 4 << 10
)

// Order is the payload. Every member is always there.
type Order struct {
	APIVersion string `json:"apiVersion"`
	Operation  string `json:"operation"`  // upgrade or destroy
	Policy     string `json:"policy"`     // name of the running policy
	InstanceID string `json:"instanceID"` // the broker's; "" when no broker gave one
	BootID     string `json:"bootID"`     // the kernel's, of this boot
	Challenge  string `json:"challenge"`  // the agent's, 64 hex digits
	Expires    string `json:"expires"`    // RFC 3339, UTC, whole seconds
	Carries    string `json:"carries"`    // "sha256:HEX" of the signed policy, "" for destroy
}

// Challenge is what an agent answers to GET /v1/challenge: whom an order has to
// name, and what it has to repeat.
type Challenge struct {
	Challenge  string    `json:"challenge"`
	InstanceID string    `json:"instanceID"`
	BootID     string    `json:"bootID"`
	Policy     string    `json:"policy"`
	Expires    time.Time `json:"expires"` // of the challenge, by the guest's clock
}

// Document is an order on its way: the envelope, and what it carries beside it.
type Document struct {
	Order   json.RawMessage `json:"order"`             // DSSE envelope
	Carries []byte          `json:"carries,omitempty"` // the signed policy of an upgrade: envelope or initdata
}

var (
	hex64  = regexp.MustCompile(`^[0-9a-f]{64}$`)
	bootID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	name   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	id     = regexp.MustCompile(`^[\x21-\x7e]{0,256}$`)
	digest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// Digest of what an order carries; "" for nothing.
func Digest(carried []byte) string {
	if len(carried) == 0 {
		return ""
	}
	sum := sha256.Sum256(carried)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func malformed(format string, args ...any) error {
	return cause.New(cause.OrderMalformed, "order: "+format, args...)
}

// Validate checks the shape of every member: a challenge comes by way of the host.
func (c *Challenge) Validate() error {
	switch {
	case !hex64.MatchString(c.Challenge):
		return malformed("challenge is not 64 lowercase hex digits")
	case !name.MatchString(c.Policy):
		return malformed("policy of the challenge is %.80q, expected a policy's name", c.Policy)
	case !id.MatchString(c.InstanceID):
		return malformed("instanceID of the challenge is not at most 256 printable characters")
	case !bootID.MatchString(c.BootID):
		return malformed("bootID of the challenge is %.80q, expected a boot id of Linux", c.BootID)
	}
	return nil
}

// validate checks the shape of every member; it compares nothing.
func (o *Order) validate() error {
	switch {
	case o.APIVersion != APIVersion:
		return malformed("apiVersion is %.40q, expected %q", o.APIVersion, APIVersion)
	case o.Operation != Upgrade && o.Operation != Destroy:
		return malformed("operation is %.40q, expected upgrade or destroy", o.Operation)
	case !name.MatchString(o.Policy):
		return malformed("policy is %.80q, expected a policy's name", o.Policy)
	case !id.MatchString(o.InstanceID):
		return malformed("instanceID is not at most 256 printable characters")
	case !bootID.MatchString(o.BootID):
		return malformed("bootID is %.80q, expected a boot id of Linux", o.BootID)
	case !hex64.MatchString(o.Challenge):
		return malformed("challenge is not 64 lowercase hex digits")
	case o.Operation == Upgrade && !digest.MatchString(o.Carries):
		return malformed("carries is %.80q, expected sha256:HEX of the signed policy", o.Carries)
	case o.Operation == Destroy && o.Carries != "":
		return malformed("carries is not empty, destroy carries nothing")
	}
	_, err := o.expiry()
	return err
}

func (o *Order) expiry() (time.Time, error) {
	t, err := time.Parse(time.RFC3339, o.Expires)
	if err != nil || t.UTC().Format(time.RFC3339) != o.Expires {
		return time.Time{}, malformed("expires is %.40q, expected RFC 3339 in UTC with whole seconds", o.Expires)
	}
	return t, nil
}

// Decode reads a payload: JSON that is canonical to the byte, every member
// known and in shape.
func Decode(payload []byte) (*Order, error) {
	var o Order
	if err := bounded.DecodeJSON(payload, &o, bounded.Limits{Bytes: maxPayload, Depth: 2, Nodes: 32}); err != nil {
		return nil, malformed("%w", err)
	}
	if canonical, err := canonical(&o); err != nil {
		return nil, err
	} else if !bytes.Equal(canonical, payload) {
		return nil, malformed("the signed JSON is not in canonical form (RFC 8785), or a member is missing")
	}
	return &o, o.validate()
}

func canonical(o *Order) ([]byte, error) {
	plain, err := json.Marshal(o)
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	out, err := jcs.Transform(plain)
	return out, cause.Wrap(cause.OrderMalformed, err)
}

// Sign makes the order's document. carried is the signed policy of an upgrade,
// nil for destroy; o.Carries and o.APIVersion are set from it.
func Sign(o Order, carried []byte, signers ...dsse.Signer) ([]byte, error) {
	if len(carried) > MaxCarried {
		return nil, cause.New(cause.PolicyTooLarge, "the order would carry %d bytes, at most %d are accepted", len(carried), MaxCarried)
	}
	o.APIVersion, o.Carries = APIVersion, Digest(carried)
	if err := o.validate(); err != nil {
		return nil, err
	}
	payload, err := canonical(&o)
	if err != nil {
		return nil, err
	}
	envelope, err := dsse.Sign(PayloadType, payload, signers...)
	if err != nil {
		return nil, cause.Wrap(cause.KeyMalformed, err)
	}
	return json.Marshal(Document{Order: envelope, Carries: carried})
}

// Parse reads a document. It verifies nothing.
func Parse(data []byte) (*Document, error) {
	var d Document
	if err := bounded.DecodeJSON(data, &d, bounded.Limits{Bytes: MaxDocument, Depth: 8, Nodes: 256}); err != nil {
		return nil, malformed("%w", err)
	}
	switch {
	case len(d.Order) == 0:
		return nil, cause.New(cause.OrderUnsigned, "order: the envelope is missing")
	case len(d.Order) > maxEnvelope:
		return nil, malformed("the envelope has %d bytes, at most %d are accepted", len(d.Order), maxEnvelope)
	case len(d.Carries) > MaxCarried:
		return nil, malformed("it carries %d bytes, at most %d are accepted", len(d.Carries), MaxCarried)
	}
	return &d, nil
}

// Peek decodes the order without looking at its signature: for showing it, and
// to know where to send it.
func (d *Document) Peek() (*Order, error) {
	e, err := dsse.Parse(d.Order)
	if err != nil {
		return nil, malformed("%w", err)
	}
	if e.PayloadType != PayloadType {
		return nil, malformed("payload type is %.80q, expected %q", e.PayloadType, PayloadType)
	}
	return Decode(e.Payload)
}

// Receiver is the agent that an order came to.
type Receiver struct {
	Policy, InstanceID, BootID string
	Keys                       []policy.OrderKey // of the running policy
}

// Verify checks that the document orders operation of this receiver now, signed
// by a key that may order it. The challenge is left to be redeemed, after
// everything else holds: nobody but a signer can use one up.
func (d *Document) Verify(operation string, r Receiver, now time.Time) (*Order, error) {
	e, err := dsse.Parse(d.Order)
	if err != nil {
		return nil, malformed("%w", err)
	}
	if len(e.Signatures) == 0 {
		return nil, cause.New(cause.OrderUnsigned, "the order carries no signature")
	}
	keys, err := keysFor(operation, r.Keys)
	if err != nil {
		return nil, err
	}
	if _, err := e.Verify(PayloadType, keys, 1); err != nil {
		if errors.Is(err, dsse.ErrPayloadType) {
			return nil, malformed("%w", err)
		}
		return nil, cause.New(cause.OrderSignature, "no signature by a key that the policy names for %s: %w", operation, err)
	}
	o, err := Decode(e.Payload)
	if err != nil {
		return nil, err
	}
	switch {
	case o.Operation != operation:
		return nil, cause.New(cause.OrderOperation, "the order is for %s, it was sent as %s", o.Operation, operation)
	case o.Policy != r.Policy:
		return nil, cause.New(cause.OrderOtherPolicy, "the order is for policy %s, %s is running", o.Policy, r.Policy)
	case o.InstanceID != r.InstanceID:
		return nil, cause.New(cause.OrderOtherInstance, "the order is for instance %q, this is %q", o.InstanceID, r.InstanceID)
	case o.BootID != r.BootID:
		return nil, cause.New(cause.OrderOtherBoot, "the order is for boot %s, this is %s", o.BootID, r.BootID)
	case o.Carries != Digest(d.Carries):
		return nil, cause.New(cause.OrderCarries, "the order names %s, what came with it has %s", orNothing(o.Carries), orNothing(Digest(d.Carries)))
	}
	return o, checkExpiry(o, now)
}

func checkExpiry(o *Order, now time.Time) error {
	end, err := o.expiry()
	if err != nil {
		return err
	}
	switch ahead := end.Sub(now); {
	case ahead <= 0:
		return cause.New(cause.OrderExpired, "the order ended at %s, it is %s here", o.Expires, now.UTC().Format(time.RFC3339))
	case ahead > MaxAhead:
		return cause.New(cause.OrderTooLong, "the order ends at %s, more than %s ahead of %s here", o.Expires, MaxAhead, now.UTC().Format(time.RFC3339))
	}
	return nil
}

func keysFor(operation string, named []policy.OrderKey) (keys []crypto.PublicKey, err error) {
	for _, k := range named {
		for _, may := range k.Orders {
			if may != operation {
				continue
			}
			key, err := dsse.ParsePublicKeyPEM([]byte(k.Key))
			if err != nil {
				return nil, cause.New(cause.Internal, "a key of the policy's control.orderKeys: %w", err)
			}
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, cause.New(cause.OrderSignature, "the policy names no key for %s", operation)
	}
	return keys, nil
}

func orNothing(s string) string {
	if s == "" {
		return "nothing"
	}
	return s
}
