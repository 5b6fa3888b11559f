// Package release holds release rules: to whom a resource may be given. It
// decodes them strictly; the appraisal package judges by them.
package release

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// RuleAPIVersion is the only rule document version that this package reads.
const RuleAPIVersion = "cvm-agent.release-rule/v1"

// MaxRuleSize bounds a rule document, in bytes.
const MaxRuleSize = 256 << 10

// Rule says to whom one resource is released. Every condition that is set
// must hold; a condition that the evidence cannot show does not hold. There is
// no rule by prefix or wildcard, and a resource without a rule is never
// released.
type Rule struct {
	APIVersion string   `json:"apiVersion" jsonschema:"const=cvm-agent.release-rule/v1"`
	Platforms  []string `json:"platforms"`         // KBS TEE names, at least one
	EKRoots    []string `json:"ekRoots,omitempty"` // for tpm: names of configured root sets; empty: any of them
	// Policy names the launch policies. Exactly one of Policy and AnyPolicy is
	// set: forgetting the policy is not a way to allow every policy.
	Policy    *PolicyRule `json:"policy,omitempty"`
	AnyPolicy bool        `json:"anyPolicy,omitempty"`
	// Images are manifest digests (sha256:…): one of them must be in the
	// running or the staged set of the event log. Needs Policy.
	Images []string `json:"images,omitempty"`
	// PCRs pins SHA-256 PCRs by index ("0" to "23"): each value must be one of
	// those listed, 64 lowercase hex digits.
	PCRs map[string][]string `json:"pcrs,omitempty"`
	// Launch are the known launches, of which the evidence must match one
	// entirely. On a TEE exactly one of Launch and AnyLaunch is set: whoever
	// launches a guest chooses what HOST_DATA and MRCONFIGID say, and an unknown
	// guest what its event log and Azure's PCRs say. With tpm alone it may be
	// left out: any launch, which PCRs may narrow.
	Launch    []Launch `json:"launch,omitempty"`
	AnyLaunch bool     `json:"anyLaunch,omitempty"`
	// TCB says which firmware is good enough. Left out, its defaults hold. Beside
	// launches of SEV-SNP tcb.snp.minimum is needed: the signing key of old
	// firmware can be another's by now, and signs any measurement.
	TCB *TCB `json:"tcb,omitempty"`
}

// PolicyRule says which launch policies may have the resource.
type PolicyRule struct {
	Names          []string `json:"names"`               // at least one
	Signers        []string `json:"signers"`             // SHA-256 of SPKI, lowercase hex; at least one
	Threshold      int      `json:"threshold,omitempty"` // distinct signers needed; default 1
	MinimumVersion uint64   `json:"minimumVersion,omitempty"`
}

// DecodeRule reads a rule document, YAML or JSON, strictly.
func DecodeRule(data []byte) (*Rule, error) {
	var r Rule
	if _, err := bounded.DecodeYAML(data, &r, bounded.Limits{Bytes: MaxRuleSize, Depth: 10}); err != nil {
		return nil, cause.New(cause.Config, "release rule: %w", err)
	}
	if err := r.Validate(); err != nil {
		return nil, cause.New(cause.Config, "release rule: %w", err)
	}
	return &r, nil
}

// DecodeRuleJSON reads the JSON form alone, as it is stored and sent.
func DecodeRuleJSON(data []byte) (*Rule, error) {
	var r Rule
	if err := bounded.DecodeJSON(data, &r, bounded.Limits{Bytes: MaxRuleSize, Depth: 10}); err != nil {
		return nil, cause.New(cause.Config, "release rule: %w", err)
	}
	if err := r.Validate(); err != nil {
		return nil, cause.New(cause.Config, "release rule: %w", err)
	}
	return &r, nil
}

// Encode writes the JSON form.
func (r Rule) Encode() ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, cause.New(cause.Config, "release rule: %w", err)
	}
	return json.Marshal(r)
}

// Validate checks what the types cannot say.
func (r Rule) Validate() error {
	if r.APIVersion != RuleAPIVersion {
		return fmt.Errorf("apiVersion is %q, expected %q", r.APIVersion, RuleAPIVersion)
	}
	if len(r.Platforms) == 0 {
		return fmt.Errorf("platforms is empty: name at least one")
	}
	for _, p := range r.Platforms {
		if !slices.Contains(Platforms, p) {
			return fmt.Errorf("platforms: %q is none of %s", p, strings.Join(Platforms, ", "))
		}
		if len(r.Launch) > 0 && !slices.ContainsFunc(r.Launch, func(l Launch) bool { return l.Platform == p }) {
			return fmt.Errorf("launch: no launch of platform %s: it could never have the resource", p)
		}
	}
	if err := first(validateLaunches("launch", r.Launch), r.TCB.validate("tcb")); err != nil {
		return err
	}
	for i, l := range r.Launch {
		if !slices.Contains(r.Platforms, l.Platform) {
			return fmt.Errorf("launch[%d]: platform %s is not among platforms", i, l.Platform)
		}
	}
	if len(r.Launch) > 0 && r.AnyLaunch {
		return fmt.Errorf("set one of launch and anyLaunch: true")
	}
	for _, p := range r.Platforms {
		if r.launchNeeded(p) {
			return fmt.Errorf("launch is missing: without it any guest on %s can say that it is the one meant; set launch, or anyLaunch: true", p)
		}
		if HasSNP(p) && !r.AnyLaunch && (r.TCB == nil || r.TCB.SNP == nil || len(r.TCB.SNP.Minimum) == 0) {
			return fmt.Errorf("tcb.snp.minimum is missing: %s is among platforms", p)
		}
	}
	if (r.Policy != nil) == r.AnyPolicy {
		return fmt.Errorf("set exactly one of policy and anyPolicy: true")
	}
	if p := r.Policy; p != nil {
		if err := p.validate(); err != nil {
			return fmt.Errorf("policy: %w", err)
		}
	}
	if len(r.Images) > 0 && r.Policy == nil {
		return fmt.Errorf("images needs policy: without trusted signers an image list proves nothing")
	}
	for _, d := range r.Images {
		if h, ok := strings.CutPrefix(d, "sha256:"); !ok || !isHex(h, 32) {
			return fmt.Errorf("images: %q is not sha256: and 64 lowercase hex digits", d)
		}
	}
	for i, values := range r.PCRs {
		n, err := strconv.Atoi(i)
		if err != nil || n < 0 || n > 23 || strconv.Itoa(n) != i {
			return fmt.Errorf("pcrs: %q is not an index of 0 to 23", i)
		}
		if len(values) == 0 {
			return fmt.Errorf("pcrs: %s has no allowed value", i)
		}
		for _, v := range values {
			if !isHex(v, 32) {
				return fmt.Errorf("pcrs: %s: %q is not 64 lowercase hex digits", i, v)
			}
		}
	}
	return nil
}

// launchNeeded says whether a rule says too little about who may be launched on
// a platform. A bare TPM is worth what whoever runs it says in any case.
func (r Rule) launchNeeded(platform string) bool {
	return platform != PlatformTPM && len(r.Launch) == 0 && !r.AnyLaunch
}

func (p PolicyRule) validate() error {
	if len(p.Names) == 0 || slices.Contains(p.Names, "") {
		return fmt.Errorf("names is empty or has an empty name")
	}
	if len(p.Signers) == 0 {
		return fmt.Errorf("signers is empty: name at least one")
	}
	for _, s := range p.Signers {
		if !isHex(s, 32) {
			return fmt.Errorf("signers: %q is not 64 lowercase hex digits", s)
		}
	}
	if p.MinimumVersion > maxInteger {
		return fmt.Errorf("minimumVersion is %d, at most 2^53-1 is exact in JSON", p.MinimumVersion)
	}
	distinct := slices.Compact(slices.Sorted(slices.Values(p.Signers)))
	if p.Threshold < 0 || p.Need() > len(distinct) {
		return fmt.Errorf("threshold %d, expected 1 to %d", p.Threshold, len(distinct))
	}
	return nil
}

// Need is the number of distinct signers that must have signed.
func (p PolicyRule) Need() int {
	if p.Threshold == 0 {
		return 1
	}
	return p.Threshold
}

// isHex says whether s is n bytes in lowercase hex.
func isHex(s string, n int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == n && strings.ToLower(s) == s
}
