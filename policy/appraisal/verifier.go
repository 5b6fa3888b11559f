package appraisal

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Verifier judges the evidence of one TEE. Another platform is another
// Verifier: nothing else here or in the broker knows what evidence looks like.
type Verifier interface {
	// TEE is the KBS name: "tpm", "snp", "tdx", "az-snp-vtpm", "az-tdx-vtpm".
	TEE() string
	// Challenge answers a session's opening under dialect cvm-agent/1. What it
	// returns as Pending stays in the session and comes back in Input. The
	// challenge is nil where the TEE needs none.
	Challenge(auth *kbs.CVMAgentAuth, random io.Reader) (*kbs.CVMAgentChallenge, *Pending, error)
	// Appraise judges. An error means that the evidence cannot be decoded; a
	// refusal is in the verdict.
	Appraise(in Input) (*Appraisal, error)
}

// Pending is what a session remembers between challenge and attestation. It
// holds a secret and must not be logged.
type Pending struct {
	EKCert   []byte // DER
	AKPublic []byte // TPMT_PUBLIC
	AKCert   []byte // DER; with it there is no credential and no Secret
	Secret   []byte // 32 bytes that only the EK's TPM can recover, for that AK alone
}

// Input is everything about one attestation.
type Input struct {
	Dialect    string                   // kbs.Dialect or kbs.DialectKBS
	Primary    json.RawMessage          // the TEE's own evidence
	Additional string                   // additional evidence as received
	ReportData [kbs.ReportDataSize]byte // computed from this session's nonce and key, never taken from the peer
	InitData   []byte                   // exact initdata text; nil when there was none
	Nonce      string                   // this session's, as the wire has it
	Pending    *Pending                 // nil under dialect kbs
	Time       time.Time                // the verifier's clock
	Offline    *Offline                 // nil in a broker
}

// Offline replaces what only a session knows. A broker never sets it: without
// it everything about a session is required.
type Offline struct {
	// ReportData is what the evidence's own field must hold: as many bytes as
	// given, zero bytes after them. Nil: not known, and listed as not checked.
	ReportData []byte
}

// Appraisal is a verdict and, for what passed, the facts that it proves.
type Appraisal struct {
	Verdict *Verdict
	Facts   Facts
}

// Facts are proven by the verdict beside them. A fact that the evidence does
// not prove is zero, and no rule accepts zero for anything.
type Facts struct {
	TEE     string `json:"tee"`
	Dialect string `json:"dialect"`
	// Identity is what an instance id is bound to; README.md has its forms.
	Identity string `json:"identity,omitempty"`
	// EKRoots are the names of the root sets that the EK certificate, or the
	// AK's own, chains to.
	EKRoots []string       `json:"ekRoots,omitempty"`
	PCRs    map[int]string `json:"pcrs,omitempty"` // SHA-256 bank, covered by the quote, lowercase hex
	SNP     *SNPFacts      `json:"snp,omitempty"`
	TDX     *TDXFacts      `json:"tdx,omitempty"`
	Launch  *LaunchFacts   `json:"launch,omitempty"`
	Log     *LogFacts      `json:"log,omitempty"`
	Not     []string       `json:"notChecked,omitempty"` // members of the evidence that nothing here looks at
}

// LaunchFacts are about initdata that is bound to the launch.
type LaunchFacts struct {
	Digest   string           `json:"digest"` // of the initdata by its own algorithm, lowercase hex
	Initdata *policy.Initdata `json:"-"`
}

// LogFacts are what the event log says, once it replays to the register.
type LogFacts struct {
	First   Set  `json:"first"`   // the launch policy of this boot
	Running Set  `json:"running"` // the last committed set
	Staged  *Set `json:"staged,omitempty"`
	// Policies are all the sets that the log ever named, oldest first: a rule is
	// matched against each, not only against the one that runs.
	Policies  []Set  `json:"policies,omitempty"`
	Destroyed bool   `json:"destroyed,omitempty"` // a destroy event is in the log
	Debug     bool   `json:"debug,omitempty"`     // a debug event is in the log
	Register  string `json:"register"`            // "PCR 14", "RTMR3", or "report_data" where there is no register
}

// Set is one policy with the images measured under it.
type Set struct {
	Policy  string   `json:"policy"`
	Version uint64   `json:"version"`
	Digest  string   `json:"digest"` // sha256:… of the signed payload
	Signers []string `json:"signers"`
	Images  []string `json:"images,omitempty"` // repository@sha256:…
}

// is compares what names a policy.
func (s Set) is(o Set) bool {
	return s.Policy == o.Policy && s.Version == o.Version && s.Digest == o.Digest
}

// String names the policy.
func (s Set) String() string { return fmt.Sprintf("%s version %d %s", s.Policy, s.Version, s.Digest) }
