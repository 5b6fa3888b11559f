// Package eventlog is the measured event log: every runtime fact that changes
// what is trusted is appended to a TCG Canonical Event Log (CEL, TLV form) and
// extended into the hardware register, PCR 14 of a TPM or RTMR3 of TDX.
//
// It promises that an event is on disk before it is in the register, that
// nothing is extended twice, whatever is interrupted, and that a log which does
// not replay to its register is refused. README.md is the contract: each event,
// when it is written and its exact bytes. It does not quote registers.
package eventlog

import (
	"crypto"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/google/go-eventlog/cel"
	"github.com/gowebpki/jcs"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// ContentType is the CEL content type of this project's records (the vendor
// range of TCG_IWG_CEL_v1_r0p37, section 5.1).
const ContentType uint8 = 167

// Bounds of a log that comes from outside.
const (
	MaxSize   = 1 << 20 // bytes of a whole log
	maxEvents = 4096
	maxEvent  = 16 << 10 // bytes of one event's JSON
)

// Kind is what happened.
type Kind string

// The kinds. Their numbers are the nested TLV types and never change.
const (
	KindPolicy       Kind = "policy"        // the launch policy was verified
	KindImage        Kind = "image"         // an image of the launch was verified, before its key is asked for
	KindPolicyStaged Kind = "policy-staged" // an upgrade's policy was verified
	KindImageStaged  Kind = "image-staged"  // an image of the upgrade was verified, before its key is asked for
	KindCommitted    Kind = "committed"     // the staged set is what runs from here
	KindRolledBack   Kind = "rolled-back"   // the staged or committed set is given up for the last good one
	KindDestroy      Kind = "destroy"       // the instance is being destroyed; nothing follows
	KindDebug        Kind = "debug"         // something that weakens the guest was switched on
)

var kindNumber = map[Kind]uint8{
	KindPolicy: 1, KindImage: 2, KindPolicyStaged: 3, KindImageStaged: 4,
	KindCommitted: 5, KindRolledBack: 6, KindDestroy: 7, KindDebug: 8,
}

// Event is the content of one record. Its wire form is the RFC 8785 JSON of
// these fields, absent when empty.
type Event struct {
	Kind          Kind     `json:"kind"`
	Policy        string   `json:"policy,omitempty"`        // name
	PolicyVersion uint64   `json:"policyVersion,omitempty"` // ≥ 1
	PolicyDigest  string   `json:"policyDigest,omitempty"`  // sha256:… over the signed payload
	Signers       []string `json:"signers,omitempty"`       // fingerprints, hex SHA-256 of SPKI
	Workload      string   `json:"workload,omitempty"`
	Image         string   `json:"image,omitempty"` // repository@sha256:… as signed
	Reason        string   `json:"reason,omitempty"`
}

// equal compares everything that is measured.
func (e Event) equal(o Event) bool {
	a, errA := e.json()
	b, errB := o.json()
	return errA == nil && errB == nil && string(a) == string(b)
}

func (e Event) json() ([]byte, error) {
	raw, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	return jcs.Transform(raw)
}

// check holds each kind to its fields.
func (e Event) check() error {
	policyFields := e.Policy != "" && e.PolicyVersion > 0 && strings.HasPrefix(e.PolicyDigest, "sha256:")
	noPolicy := e.Policy == "" && e.PolicyVersion == 0 && e.PolicyDigest == "" && len(e.Signers) == 0
	noImage := e.Workload == "" && e.Image == ""
	ok := false
	switch e.Kind {
	case KindPolicy, KindPolicyStaged:
		ok = policyFields && len(e.Signers) > 0 && noImage && e.Reason == ""
	case KindImage, KindImageStaged:
		ok = noPolicy && e.Workload != "" && strings.Contains(e.Image, "@sha256:") && e.Reason == ""
	case KindCommitted:
		ok = policyFields && len(e.Signers) == 0 && noImage && e.Reason == ""
	case KindRolledBack:
		ok = policyFields && len(e.Signers) == 0 && noImage
	case KindDestroy:
		ok = noImage
	case KindDebug:
		ok = noPolicy && noImage && e.Reason != ""
	default:
		return fmt.Errorf("unknown event %q", e.Kind)
	}
	if !ok {
		return fmt.Errorf("event %q does not have exactly the fields of its kind", e.Kind)
	}
	return nil
}

// TLV implements cel.Content: the vendor content type around one nested TLV
// whose type is the kind's number and whose value is the event's JSON.
func (e Event) TLV() (cel.TLV, error) {
	if err := e.check(); err != nil {
		return cel.TLV{}, err
	}
	value, err := e.json()
	if err != nil {
		return cel.TLV{}, err
	}
	if len(value) > maxEvent {
		return cel.TLV{}, fmt.Errorf("event %q is %d bytes, at most %d", e.Kind, len(value), maxEvent)
	}
	nested, err := cel.TLV{Type: kindNumber[e.Kind], Value: value}.MarshalBinary()
	if err != nil {
		return cel.TLV{}, err
	}
	return cel.TLV{Type: ContentType, Value: nested}, nil
}

// GenerateDigest implements cel.Content: the hash of the whole content TLV.
func (e Event) GenerateDigest(h crypto.Hash) ([]byte, error) {
	t, err := e.TLV()
	if err != nil {
		return nil, err
	}
	return contentDigest(t, h)
}

func contentDigest(t cel.TLV, h crypto.Hash) ([]byte, error) {
	if !h.Available() {
		return nil, fmt.Errorf("hash %v is not available", h)
	}
	raw, err := t.MarshalBinary()
	if err != nil {
		return nil, err
	}
	d := h.New()
	d.Write(raw)
	return d.Sum(nil), nil
}

// parseEvent reads a record's content back, strictly: the bytes must be the
// ones that this package would write.
func parseEvent(t cel.TLV) (Event, error) {
	var e Event
	if t.Type != ContentType {
		return e, fmt.Errorf("content type %d is not %d", t.Type, ContentType)
	}
	if len(t.Value) < tlvHeader {
		return e, fmt.Errorf("content of %d bytes is too short", len(t.Value))
	}
	var nested cel.TLV
	if err := nested.UnmarshalBinary(t.Value); err != nil {
		return e, err
	}
	if err := bounded.DecodeJSON(nested.Value, &e, bounded.Limits{Bytes: maxEvent, Depth: 3}); err != nil {
		return e, err
	}
	if err := e.check(); err != nil {
		return e, err
	}
	if kindNumber[e.Kind] != nested.Type {
		return e, fmt.Errorf("event %q in a record of type %d", e.Kind, nested.Type)
	}
	canonical, err := e.json()
	if err != nil {
		return e, err
	}
	if string(canonical) != string(nested.Value) {
		return e, fmt.Errorf("event %q is not in canonical form", e.Kind)
	}
	return e, nil
}
