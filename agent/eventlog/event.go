// Package eventlog is the measured event log: every runtime fact that changes
// what is trusted is written to a TCG Canonical Event Log (TLV form) and
// extended into one hardware register, vTPM PCR 14 or TDX RTMR3.
//
// It promises: the log of a running Log replays to the register, an event is
// never extended twice whatever was killed when, and events that this package
// does not know, or that come in an order that it does not know, make the
// replay fail. README.md is the contract: name, when, exact bytes, register.
// It talks to no TPM itself: a Register does.
package eventlog

import (
	"bytes"
	"crypto"
	_ "crypto/sha256" // crypto.SHA256
	_ "crypto/sha512" // crypto.SHA384, crypto.SHA512
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/google/go-eventlog/cel"
	"github.com/gowebpki/jcs"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// Kind names an event. The strings are on the wire and never change.
type Kind string

// The events, in the order in which a first launch, an upgrade and a destroy
// write them.
const (
	KindPolicy       Kind = "policy"        // first launch: the verified policy, before anything else
	KindImage        Kind = "image"         // first launch: one workload's image, before its key is asked for
	KindPolicyStaged Kind = "policy-staged" // upgrade: the verified next policy
	KindImageStaged  Kind = "image-staged"  // upgrade: one workload's image of the next policy, before its key is asked for
	KindCommitted    Kind = "committed"     // upgrade: the staged set is the running one from here
	KindRolledBack   Kind = "rolled-back"   // upgrade: the named policy is given up, the set before it runs
	KindDestroy      Kind = "destroy"       // destroy: the last event of an instance
	KindDebug        Kind = "debug"         // debugging was enabled; no event takes that back
)

// ContentType is the vendor CEL content type of every record of ours.
const ContentType = 0xC7

// Bounds on hostile logs.
const (
	MaxLog     = 1 << 20 // bytes of a log
	MaxRecords = 4096    // records of a log
	MaxEvent   = 4096    // bytes of one event's canonical JSON
	maxImages  = 64      // images of one set; a policy has at most 32 workloads
	maxSigners = 32
	maxText    = 512
)

// Event is the content of one record: canonical JSON (RFC 8785) with empty
// members left out. README.md says which members each kind has.
type Event struct {
	Kind          Kind     `json:"kind"`
	Policy        string   `json:"policy,omitempty"`        // policy name
	PolicyDigest  string   `json:"policyDigest,omitempty"`  // "sha256:" + 64 hex of the signed payload
	PolicyVersion uint64   `json:"policyVersion,omitempty"` // 1 … 2^53-1
	Signers       []string `json:"signers,omitempty"`       // SPKI fingerprints, 64 hex, ascending
	Workload      string   `json:"workload,omitempty"`      // workload name
	Image         string   `json:"image,omitempty"`         // repository@sha256:…
	Reason        string   `json:"reason,omitempty"`        // a cause code, or one short line without secrets
}

var (
	nameRE   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	digestRE = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	fpRE     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	imageRE  = regexp.MustCompile(`^[A-Za-z0-9._:/\[\]-]{1,400}@sha256:[0-9a-f]{64}$`)
)

// members says what each kind carries: p policy (name, version, digest),
// s signers, w workload and image, r reason allowed.
var members = map[Kind]string{
	KindPolicy: "ps", KindImage: "w",
	KindPolicyStaged: "ps", KindImageStaged: "w",
	KindCommitted: "p", KindRolledBack: "pr",
	KindDestroy: "r", KindDebug: "r",
}

// Validate checks the event by itself: known kind, exactly the members that
// the kind has, each well-formed.
func (e Event) Validate() error {
	has, ok := members[e.Kind]
	if !ok {
		return fmt.Errorf("unknown event %q", clip(string(e.Kind)))
	}
	if strings.Contains(has, "p") {
		switch {
		case !nameRE.MatchString(e.Policy):
			return fmt.Errorf("%s event: policy name %q is no DNS label", e.Kind, clip(e.Policy))
		case !digestRE.MatchString(e.PolicyDigest):
			return fmt.Errorf("%s event: policy digest %q is not sha256:<64 hex>", e.Kind, clip(e.PolicyDigest))
		case e.PolicyVersion == 0 || e.PolicyVersion >= 1<<53:
			return fmt.Errorf("%s event: policy version %d is outside 1…2^53-1", e.Kind, e.PolicyVersion)
		}
	} else if e.Policy != "" || e.PolicyDigest != "" || e.PolicyVersion != 0 {
		return fmt.Errorf("%s event: it names no policy, found %q", e.Kind, clip(e.Policy))
	}
	if strings.Contains(has, "s") {
		if len(e.Signers) == 0 || len(e.Signers) > maxSigners {
			return fmt.Errorf("%s event: %d signers, expected 1…%d", e.Kind, len(e.Signers), maxSigners)
		}
		for i, s := range e.Signers {
			if !fpRE.MatchString(s) {
				return fmt.Errorf("%s event: signer %q is not 64 hex digits", e.Kind, clip(s))
			}
			if i > 0 && e.Signers[i-1] >= s {
				return fmt.Errorf("%s event: signers are not in ascending order, each once", e.Kind)
			}
		}
	} else if len(e.Signers) != 0 {
		return fmt.Errorf("%s event: it has no signers, found %d", e.Kind, len(e.Signers))
	}
	if strings.Contains(has, "w") {
		switch {
		case !nameRE.MatchString(e.Workload):
			return fmt.Errorf("%s event: workload name %q is no DNS label", e.Kind, clip(e.Workload))
		case !imageRE.MatchString(e.Image):
			return fmt.Errorf("%s event: image %q is not repository@sha256:<64 hex>", e.Kind, clip(e.Image))
		}
	} else if e.Workload != "" || e.Image != "" {
		return fmt.Errorf("%s event: it names no workload, found %q", e.Kind, clip(e.Workload))
	}
	if e.Reason != "" && !strings.Contains(has, "r") {
		return fmt.Errorf("%s event: it has no reason", e.Kind)
	}
	if len(e.Reason) > maxText || !utf8.ValidString(e.Reason) || strings.ContainsAny(e.Reason, "\n\r\x00") {
		return fmt.Errorf("%s event: the reason is not one line of at most %d bytes", e.Kind, maxText)
	}
	return nil
}

// Canonical returns the exact bytes that are digested and extended.
func (e Event) Canonical() ([]byte, error) {
	if err := e.Validate(); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	b, err := jcs.Transform(raw)
	if err != nil {
		return nil, err
	}
	if len(b) > MaxEvent {
		return nil, fmt.Errorf("%s event has %d bytes, at most %d are allowed", e.Kind, len(b), MaxEvent)
	}
	return b, nil
}

// normal returns a copy whose signers are in ascending order.
func (e Event) normal() Event {
	if len(e.Signers) > 0 {
		e.Signers = slices.Clone(e.Signers)
		slices.Sort(e.Signers)
		e.Signers = slices.Compact(e.Signers)
	}
	return e
}

// decodeEvent reads one event strictly: any byte string but the canonical one
// is refused, so an event has one digest.
func decodeEvent(b []byte) (Event, error) {
	var e Event
	if err := bounded.DecodeJSON(b, &e, bounded.Limits{Bytes: MaxEvent, Depth: 4, Nodes: 64, String: maxText + 80}); err != nil {
		return Event{}, err
	}
	want, err := e.Canonical()
	if err != nil {
		return Event{}, err
	}
	if !bytes.Equal(b, want) {
		return Event{}, fmt.Errorf("%s event is not in canonical form (RFC 8785)", e.Kind)
	}
	return e, nil
}

// content implements cel.Content: the digest is over the canonical JSON.
type content []byte

var _ cel.Content = content(nil)

func (c content) GenerateDigest(h crypto.Hash) ([]byte, error) {
	if !h.Available() {
		return nil, fmt.Errorf("hash %v is not available", h)
	}
	d := h.New()
	d.Write(c)
	return d.Sum(nil), nil
}

func (c content) TLV() (cel.TLV, error) { return cel.TLV{Type: ContentType, Value: c}, nil }

func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}
