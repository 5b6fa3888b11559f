package release

import (
	"fmt"
	"regexp"
	"slices"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// ReferencePayloadType is the DSSE payload type of a reference document.
const ReferencePayloadType = "application/vnd.cvm-agent.release-rules.v1+json"

// ReferenceAPIVersion is the only version of it that this package reads.
const ReferenceAPIVersion = "cvm-agent.reference-values/v1"

// MaxReferenceSize bounds a reference document, in bytes; its envelope is
// bounded by dsse.MaxSize.
const MaxReferenceSize = 512 << 10

const (
	maxInteger = 1<<53 - 1 // the largest integer that RFC 8785 keeps exact
	maxList    = 256
)

var (
	nameRE     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	labelRE    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	advisoryRE = regexp.MustCompile(`^[A-Z]+-[A-Z]+-[0-9]{1,6}$`)
)

// Reference is a reference document: reference values and release rules, in
// one place and signed. Written as YAML, signed as JSON (RFC 8785). Every field
// is decoded strictly. It compiles to one Rule for each resource.
type Reference struct {
	APIVersion string     `json:"apiVersion" jsonschema:"enum=cvm-agent.reference-values/v1"`
	Name       string     `json:"name" jsonschema:"pattern=^[a-z0-9]([-a-z0-9]*[a-z0-9])?$,maxLength=63"` // what a broker keeps its mark for; DNS label, ≤ 63 bytes
	Version    uint64     `json:"version" jsonschema:"minimum=1"`                                         // ≥ 1; a broker never takes a lower one of this name
	Expires    string     `json:"expires,omitempty" jsonschema:"format=date-time"`                        // RFC 3339, UTC; nothing is released by it from then on
	Launch     []Launch   `json:"launch" jsonschema:"minItems=1"`                                         // known launches
	TCB        TCB        `json:"tcb,omitzero"`                                                           // tcb.snp.minimum is required once a resource names an SEV-SNP platform
	Resources  []Resource `json:"resources" jsonschema:"minItems=1"`                                      // who may have what
}

// Resource says to whom some resources are released. There is no wildcard.
type Resource struct {
	Resource  []string    `json:"resource" jsonschema:"minItems=1,uniqueItems=true"`                                                               // kbs:///repository/type/tag; each in one place of one document
	Platforms []string    `json:"platforms" jsonschema:"minItems=1,uniqueItems=true,enum=snp,enum=tdx,enum=az-snp-vtpm,enum=az-tdx-vtpm,enum=tpm"` // KBS TEE names
	Launch    []string    `json:"launch,omitempty" jsonschema:"uniqueItems=true"`                                                                  // labels of the launches that may have it; default all. Each platform needs one
	EKRoots   []string    `json:"ekRoots,omitempty" jsonschema:"uniqueItems=true"`                                                                 // for tpm: names of configured root sets; default any of them
	Policy    *PolicyRule `json:"policy,omitempty"`                                                                                                // launch policies that may have it
	AnyPolicy bool        `json:"anyPolicy,omitempty"`                                                                                             // exactly one of policy and anyPolicy: true
	Images    []string    `json:"images,omitempty" jsonschema:"uniqueItems=true"`                                                                  // manifest digests (sha256:…), one of which must run or be staged; needs policy
}

// Validate checks every rule on a decoded document. The error is a
// *bounded.FieldError that names the path.
func (d *Reference) Validate() error {
	if d.APIVersion != ReferenceAPIVersion {
		return field("apiVersion", "%q, expected %q", clip(d.APIVersion), ReferenceAPIVersion)
	}
	if !nameRE.MatchString(d.Name) {
		return field("name", "%q is not a DNS label (a-z, 0-9 and -, at most 63 bytes)", clip(d.Name))
	}
	if d.Version < 1 || d.Version > maxInteger {
		return field("version", "%d, expected 1 to 2^53-1", d.Version)
	}
	if d.Expires != "" {
		if _, err := utc(d.Expires); err != nil {
			return field("expires", "%s", err)
		}
	}
	if len(d.Launch) == 0 {
		return field("launch", "is missing, expected at least one")
	}
	if err := first(validateLaunches("launch", d.Launch), d.TCB.validate("tcb")); err != nil {
		return err
	}
	if len(d.Resources) == 0 {
		return field("resources", "is missing, expected at least one")
	}
	if len(d.Resources) > maxList {
		return field("resources", "%d entries, at most %d are accepted", len(d.Resources), maxList)
	}
	seen := map[string]string{}
	for i, r := range d.Resources {
		if err := d.validateResource(fmt.Sprintf("resources[%d]", i), r, seen); err != nil {
			return err
		}
	}
	return nil
}

func (d *Reference) validateResource(path string, r Resource, seen map[string]string) error {
	if len(r.Resource) == 0 {
		return field(path+".resource", "is missing, expected at least one")
	}
	if len(r.Resource) > maxList {
		return field(path+".resource", "%d entries, at most %d are accepted", len(r.Resource), maxList)
	}
	for i, uri := range r.Resource {
		at := fmt.Sprintf("%s.resource[%d]", path, i)
		u, err := kbs.ParseResourceURI(uri)
		if err != nil {
			return field(at, "%s", err)
		}
		if u.Host != "" || u.String() != uri {
			return field(at, "%q, expected %s", clip(uri), kbs.ResourceURI{Repository: u.Repository, Type: u.Type, Tag: u.Tag})
		}
		if have, ok := seen[uri]; ok {
			return field(at, "%q is a duplicate of %s", uri, have)
		}
		seen[uri] = at
	}
	if len(r.Platforms) == 0 {
		return field(path+".platforms", "is missing, expected at least one")
	}
	if err := first(distinct(path+".platforms", r.Platforms, len(Platforms)), distinct(path+".launch", r.Launch, maxList), distinct(path+".ekRoots", r.EKRoots, maxList)); err != nil {
		return err
	}
	for i, p := range r.Platforms {
		if err := oneOf(fmt.Sprintf("%s.platforms[%d]", path, i), p, Platforms); err != nil {
			return err
		}
		if HasSNP(p) && (d.TCB.SNP == nil || len(d.TCB.SNP.Minimum) == 0) {
			return field("tcb.snp.minimum", "is missing: %s names platform %s", path, p)
		}
	}
	for i, label := range r.Launch {
		if !slices.ContainsFunc(d.Launch, func(l Launch) bool { return l.Label == label && slices.Contains(r.Platforms, l.Platform) }) {
			return field(fmt.Sprintf("%s.launch[%d]", path, i), "%q is no launch of these platforms", clip(label))
		}
	}
	if len(r.EKRoots) > 0 && !slices.Contains(r.Platforms, PlatformTPM) {
		return field(path+".ekRoots", "is for platform tpm, which is not named")
	}
	compiled := d.compile(r)
	for i, p := range r.Platforms {
		if !slices.ContainsFunc(compiled.Launch, func(l Launch) bool { return l.Platform == p }) {
			return field(fmt.Sprintf("%s.platforms[%d]", path, i), "no launch of platform %s is allowed: it could never have the resource", p)
		}
	}
	if err := compiled.Validate(); err != nil {
		return field(path, "%s", err)
	}
	return nil
}

// compile is the rule that evidence is judged by.
func (d *Reference) compile(r Resource) Rule {
	rule := Rule{APIVersion: RuleAPIVersion, Platforms: r.Platforms, EKRoots: r.EKRoots, Policy: r.Policy, AnyPolicy: r.AnyPolicy, Images: r.Images, TCB: &d.TCB}
	for _, l := range d.Launch {
		if slices.Contains(r.Platforms, l.Platform) && (len(r.Launch) == 0 || slices.Contains(r.Launch, l.Label)) {
			rule.Launch = append(rule.Launch, l)
		}
	}
	return rule
}

// Rules are the rules of all resources, by their canonical URI. The document
// must be valid.
func (d *Reference) Rules() map[string]Rule {
	out := map[string]Rule{}
	for _, r := range d.Resources {
		rule := d.compile(r)
		for _, uri := range r.Resource {
			out[uri] = rule
		}
	}
	return out
}
