// Package trustee writes a reference document as an unchanged Trustee
// (confidential-containers/trustee) understands it: a resource policy for its
// key broker, a policy for its attestation service, and reference values.
//
// It promises that what Trustee then releases, our broker would release too,
// but for the conditions that Trustee cannot express, each of which has to be
// accepted by name. Where an exact translation does not exist it is stricter,
// and says so. It talks to no Trustee.
package trustee

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The conditions that Trustee cannot express, by the names that accept their
// loss. The first three are those of broker.accept in a launch policy.
const (
	NoEventLog    = policy.AcceptNoEventLog
	NoVersionMark = policy.AcceptNoVersionMark
	NoTombstone   = policy.AcceptNoTombstone
	NoPolicy      = "no-policy"      // rules that name a policy, where no initdata is given to pin instead
	NoEKBinding   = "no-ek-binding"  // tpm: the AK is in a TPM of a listed issuer
	NoSigningKey  = "no-signing-key" // snp: VCEK or VLEK
	NoProduct     = "no-product"     // snp: the processor's product, and with it its own minimum TCB
	NoFMC         = "no-fmc"         // snp: the minimum of the FMC, on Turin
	NoLaunchTCB   = "no-launch-tcb"  // snp: the TCB at launch
	NoRevocation  = "no-revocation"  // snp: a revocation list was consulted
	NoIDBlock     = "no-id-block"    // snp: ID and author key digests, family and image ID, guest SVN
)

// Names lists what can be accepted.
var Names = []string{NoEventLog, NoVersionMark, NoTombstone, NoPolicy, NoEKBinding, NoSigningKey, NoProduct, NoFMC, NoLaunchTCB, NoRevocation, NoIDBlock}

// Gap is a condition that the export leaves out.
type Gap struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Options are what an export needs beside the document.
type Options struct {
	Digest string   // of the document's signed bytes, to be named in the files
	Accept []string // names of conditions whose loss is accepted
	// Initdata are exact initdata documents. Where a rule names a policy, those
	// whose policy satisfies it are pinned by their digest.
	Initdata [][]byte
	Now      time.Time
}

// Export is the files, and what they do not say.
type Export struct {
	ResourcePolicy    []byte   `json:"-"` // Rego, for POST /kbs/v0/resource-policy
	AttestationPolicy []byte   `json:"-"` // Rego, for POST /kbs/v0/attestation-policy as default_cpu
	ReferenceValues   []byte   `json:"-"` // JSON, a list of {name, expiration?, value}
	Message           []byte   `json:"-"` // the same as a message for POST /kbs/v0/reference-value
	GivenUp           []Gap    `json:"givenUp"`
	Stricter          []string `json:"stricter"`
}

// New translates a valid document. It fails when a condition cannot be
// expressed and is not accepted, naming all of them, and when something is
// accepted that nobody has to give up.
func New(d *release.Reference, o Options) (*Export, error) {
	for i, a := range o.Accept {
		if !slices.Contains(Names, a) {
			return nil, cause.New(cause.Usage, "%q is nothing that can be accepted, expected one of %s", a, strings.Join(Names, ", "))
		}
		if slices.Contains(o.Accept[:i], a) {
			return nil, cause.New(cause.Usage, "%q is accepted twice", a)
		}
	}
	e := &Export{GivenUp: []Gap{}, Stricter: []string{}}
	rules, err := e.translate(d, o)
	if err != nil {
		return nil, err
	}
	var missing, why []string
	for _, g := range e.GivenUp {
		if !slices.Contains(o.Accept, g.Name) {
			missing, why = append(missing, g.Name), append(why, g.Name+" ("+g.Why+")")
		}
	}
	if len(missing) > 0 {
		return nil, cause.New(cause.PolicyInvalid, "Trustee cannot express %s: accept each by name (--accept)", strings.Join(why, ", "))
	}
	for _, a := range o.Accept {
		if !slices.ContainsFunc(e.GivenUp, func(g Gap) bool { return g.Name == a }) {
			return nil, cause.New(cause.Usage, "%q is accepted, but nothing of it has to be given up", a)
		}
	}
	return e, e.write(d, o, rules)
}

func (e *Export) giveUp(name, format string, args ...any) {
	if !slices.ContainsFunc(e.GivenUp, func(g Gap) bool { return g.Name == name }) {
		e.GivenUp = append(e.GivenUp, Gap{name, fmt.Sprintf(format, args...)})
	}
}

func (e *Export) stricter(format string, args ...any) {
	if line := fmt.Sprintf(format, args...); !slices.Contains(e.Stricter, line) {
		e.Stricter = append(e.Stricter, line)
	}
}

// launch is a launch by the names of Trustee's claims.
type launch struct {
	Label    string            `json:"label"`
	Platform string            `json:"platform"`
	Want     map[string]string `json:"want"`
}

// rule is what the resource policy holds for one resource.
type rule struct {
	Launch []launch `json:"launch"`
	// InitData are the values of the claim init_data by platform; nil where the
	// rule names no policy.
	InitData map[string][]pinned `json:"init_data,omitempty"`
}

// pinned is one initdata: nothing is released to it once its policy expires.
type pinned struct {
	Value   string `json:"value"`
	Expires string `json:"expires"`
}

func (e *Export) translate(d *release.Reference, o Options) (map[string]rule, error) {
	e.giveUp(NoTombstone, "Trustee remembers no instances, so a destroyed one is not told from others")
	out := map[string]rule{}
	for i, r := range d.Resources {
		at := fmt.Sprintf("resources[%d]", i)
		for _, p := range r.Platforms {
			if err := e.platformGaps(d, p); err != nil {
				return nil, err
			}
		}
		x := rule{}
		for _, uri := range r.Resource {
			compiled := d.Rules()[uri]
			x.Launch = nil
			for _, l := range compiled.Launch {
				x.Launch = append(x.Launch, e.launch(l))
			}
		}
		if r.Policy != nil {
			e.giveUp(NoVersionMark, "%s names a policy: there is no mark below which its versions may not fall", at)
			e.giveUp(NoEventLog, "%s names a policy: upgrades, debugging and what really runs are in the event log alone", at)
			if len(o.Initdata) == 0 {
				e.giveUp(NoPolicy, "%s names a policy and no initdata is given that could be pinned instead", at)
			} else {
				pinned, err := pin(r, o)
				if err != nil {
					return nil, cause.New(cause.PolicyInvalid, "%s: %w", at, err)
				}
				x.InitData = pinned
			}
		}
		for _, uri := range r.Resource {
			out[strings.TrimPrefix(uri, "kbs:///")] = x
		}
	}
	return out, nil
}

// platformGaps says what of a platform's firmware conditions gets lost.
func (e *Export) platformGaps(d *release.Reference, platform string) error {
	if platform == release.PlatformTPM {
		e.giveUp(NoEKBinding, "tpm: Trustee knows no EK certificates, only the AKs that it is configured with")
	}
	if !release.HasSNP(platform) {
		return nil
	}
	s := d.TCB.SNP // there: the document is valid
	if len(s.Keys()) < 2 {
		e.giveUp(NoSigningKey, "%s: Trustee takes VCEK and VLEK and its claims do not tell them apart", platform)
	}
	e.giveUp(NoProduct, "%s: Trustee's claims do not name the product", platform)
	if len(s.Minimum) > 1 {
		e.stricter("tcb.snp.minimum: the highest of all products in each part is demanded of each product")
	}
	for _, m := range s.Minimum {
		if m.FMC != nil && *m.FMC > 0 {
			e.giveUp(NoFMC, "%s: Trustee's claims do not have the FMC's version", platform)
		}
	}
	e.giveUp(NoLaunchTCB, "%s: Trustee's claims have the reported TCB alone", platform)
	if s.RequireRevocation {
		e.giveUp(NoRevocation, "%s: Trustee consults no revocation list", platform)
	}
	if v := s.VMPL; v != nil {
		if v.Exact != nil && *v.Exact != 0 {
			return cause.New(cause.PolicyInvalid, "tcb.snp.vmpl: Trustee takes VMPL 0 alone, %d could never have a resource", *v.Exact)
		}
		if v.Max != nil && *v.Max > 0 {
			e.stricter("tcb.snp.vmpl: VMPL 0 is demanded, which Trustee does by itself")
		}
	}
	return nil
}

// launch names a launch's parts as Trustee's claims do (parsed_claims.md).
func (e *Export) launch(l release.Launch) launch {
	out := launch{Label: l.Label, Platform: l.Platform, Want: map[string]string{}}
	if s := l.SNP; s != nil {
		out.Want["measurement"] = s.Measurement
		if s.IDKeyDigest+s.AuthorKeyDigest+s.FamilyID+s.ImageID != "" || s.MinimumGuestSVN > 0 {
			e.giveUp(NoIDBlock, "launch %s: Trustee's claims do not have the ID block's fields", l.Label)
		}
	}
	if t := l.TDX; t != nil {
		for name, v := range map[string]string{"mr_td": t.MRTD, "rtmr_0": t.RTMR0, "rtmr_1": t.RTMR1, "rtmr_2": t.RTMR2,
			"mr_owner": t.MROwner, "mr_owner_config": t.MROwnerConfig, "mr_seam": t.MRSEAM} {
			if v != "" {
				out.Want[name] = v
			}
		}
	}
	for i, v := range l.PCRs {
		n, _ := strconv.Atoi(i) // the document is valid
		out.Want[fmt.Sprintf("pcr%02d", n)] = v
	}
	return out
}

// pin judges each initdata by the rule's policy part, and returns what Trustee
// shows of those that satisfy it, by platform.
func pin(r release.Resource, o Options) (map[string][]pinned, error) {
	out := map[string][]pinned{}
	var why []string
	for n, text := range o.Initdata {
		in, err := policy.ParseInitdata(text)
		var expires string
		if err == nil {
			expires, err = satisfies(in, r, o.Now)
		}
		if err != nil {
			why = append(why, fmt.Sprintf("initdata %d: %v", n+1, err))
			continue
		}
		for _, p := range r.Platforms {
			value, err := claim(in, p)
			if err != nil {
				why = append(why, fmt.Sprintf("initdata %d, %s: %v", n+1, p, err))
				continue
			}
			if entry := (pinned{value, expires}); !slices.Contains(out[p], entry) {
				out[p] = append(out[p], entry)
			}
		}
	}
	for _, p := range r.Platforms {
		if len(out[p]) == 0 {
			return nil, fmt.Errorf("no initdata satisfies its policy on platform %s: %s", p, strings.Join(why, "; "))
		}
	}
	return out, nil
}

// satisfies holds the launch policy in an initdata to the rule, and returns
// when it expires.
func satisfies(in *policy.Initdata, r release.Resource, now time.Time) (expires string, err error) {
	v, err := policy.OpenInitdata(in, policy.Trust{Fingerprints: r.Policy.Signers, Threshold: r.Policy.Need(), VersionFloor: r.Policy.MinimumVersion}, now)
	if err != nil {
		return "", err
	}
	if !slices.Contains(r.Policy.Names, v.Policy.Name) {
		return "", fmt.Errorf("policy %q, expected %s", v.Policy.Name, strings.Join(r.Policy.Names, " or "))
	}
	if len(r.Images) > 0 && !slices.ContainsFunc(v.Policy.Workloads, func(w policy.Workload) bool {
		_, digest, ok := strings.Cut(w.Image, "@")
		return ok && slices.Contains(r.Images, digest)
	}) {
		return "", fmt.Errorf("policy %q has none of the rule's images", v.Policy.Name)
	}
	return v.Policy.Expires, nil
}

// claim is the value of Trustee's claim init_data on a platform: the register
// itself, in hex.
func claim(in *policy.Initdata, platform string) (string, error) {
	switch platform {
	case release.PlatformSNP:
		return hex.EncodeToString(in.HostData()), nil
	case release.PlatformTDX:
		return hex.EncodeToString(in.MRConfigID()), nil
	}
	v, err := in.PCR8()
	return hex.EncodeToString(v), err
}
