package appraisal

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
)

// The checks of a release, beside "pcr-N" for each pinned register.
const (
	CheckPlatform      = "platform"
	CheckEKRoots       = "ek-roots"
	CheckDestroyed     = "not-destroyed"
	CheckDebug         = "not-debug"
	CheckLaunchPolicy  = "launch-policy"
	CheckFirstEvent    = "launch-policy-measured"
	CheckPolicyName    = "policy-name"
	CheckPolicySigners = "policy-signers"
	CheckPolicyVersion = "policy-version"
	CheckPolicyHistory = "policy-history"
	CheckImage         = "image"
)

// Judge says whether proven facts satisfy a rule. marks returns the version
// mark of a policy name, 0 for none. The facts must be those of an appraisal
// that was accepted.
func Judge(f Facts, r release.Rule, marks func(policy string) uint64, now time.Time) *Verdict {
	v := NewVerdict(CheckPlatform)
	v.Check(slices.Contains(r.Platforms, f.TEE), CheckPlatform, strings.Join(r.Platforms, ", "), f.TEE)
	switch {
	case len(r.EKRoots) > 0 && f.TEE != release.PlatformTPM && slices.Contains(r.Platforms, f.TEE):
		v.Skip(CheckEKRoots, "", "for platform tpm alone")
	case len(r.EKRoots) > 0:
		v.Require(CheckEKRoots)
		v.Check(slices.ContainsFunc(f.EKRoots, func(n string) bool { return slices.Contains(r.EKRoots, n) }),
			CheckEKRoots, strings.Join(r.EKRoots, ", "), orNone(f.EKRoots))
	}
	judgePCRs(v, f, r)
	judgeLaunch(v, f, r)
	judgeSNP(v, f, r)
	judgeTDX(v, f, r)
	if f.Log != nil {
		v.Check(!f.Log.Destroyed, CheckDestroyed, "no destroy event", found(f.Log.Destroyed))
		v.Check(!f.Log.Debug, CheckDebug, "no debug event", found(f.Log.Debug))
	} else {
		v.Skip(CheckDestroyed, "", "no event log in dialect "+f.Dialect)
		v.Skip(CheckDebug, "", "no event log in dialect "+f.Dialect)
	}
	if r.Policy != nil {
		judgePolicy(v, f, r, marks, now)
	} else {
		v.Skip(CheckPolicyName, "", "the rule allows any policy")
	}
	return v
}

func found(there bool) string {
	if there {
		return "one"
	}
	return "none"
}

func judgePCRs(v *Verdict, f Facts, r release.Rule) {
	for i := range 24 {
		allowed, ok := r.PCRs[strconv.Itoa(i)]
		if !ok {
			continue
		}
		name := "pcr-" + strconv.Itoa(i)
		v.Require(name)
		value, ok := f.PCRs[i]
		if !ok {
			value = "not covered by the quote"
		}
		v.Check(ok && slices.Contains(allowed, value), name, strings.Join(allowed, " or "), value)
	}
}

// judgePolicy holds what names a policy, image or version. All of it needs the
// launch-bound initdata and the event log: evidence that left either out, as
// dialect kbs does, fails here, so leaving out is no downgrade.
func judgePolicy(v *Verdict, f Facts, r release.Rule, marks func(string) uint64, now time.Time) {
	v.Require(CheckLaunch, CheckEventLog, CheckLaunchPolicy, CheckFirstEvent, CheckPolicyHistory, CheckPolicyName, CheckPolicySigners, CheckPolicyVersion)
	if len(r.Images) > 0 {
		v.Require(CheckImage)
	}
	v.Check(f.Launch != nil, CheckLaunch, "init-data bound to the launch", thereOrNot(f.Launch != nil))
	v.Check(f.Log != nil, CheckEventLog, "an event log that replays", thereOrNot(f.Log != nil))
	if f.Launch == nil || f.Log == nil {
		return
	}
	upgraded := f.Log.Running.Digest != f.Log.First.Digest
	launched, err := launchPolicy(f.Launch.Initdata, *r.Policy, now)
	expected := fmt.Sprintf("signed by %d of the rule's signers, not expired", r.Policy.Need())
	if err != nil {
		v.Fail(CheckLaunchPolicy, expected, err.Error())
		return
	}
	v.Pass(CheckLaunchPolicy, expected, launched.Digest)
	// Name and version are what marks and rules compare: they are the signed
	// document's, not only what the log calls it.
	signed := Set{Policy: launched.Policy.Name, Version: launched.Policy.Version, Digest: launched.Digest}
	v.Check(f.Log.First.is(signed), CheckFirstEvent, signed.String(), f.Log.First.String())
	if !upgraded {
		v.Check(f.Log.Running.is(signed), CheckFirstEvent, signed.String(), f.Log.Running.String())
	}
	if upgraded {
		v.Skip("running-policy-document", "", "after an upgrade the running document is not in the evidence; the log names its digest and signers")
	}

	judgeHistory(v, f.Log, *r.Policy)
	// A staged set may have its keys while the old one still runs. The set that
	// satisfies more is shown; one set has to satisfy everything.
	best := judgeSet(f.Log.Running, "running", r, marks)
	if f.Log.Staged != nil && best.Refusal() != nil {
		if staged := judgeSet(*f.Log.Staged, "staged", r, marks); staged.Refusal() == nil {
			best = staged
		}
	}
	v.Checks = append(v.Checks, best.Checks...)
}

func judgeSet(s Set, which string, r release.Rule, marks func(string) uint64) *Verdict {
	p := r.Policy
	v := NewVerdict(CheckPolicyName, CheckPolicySigners, CheckPolicyVersion)
	v.Check(s.Policy != "" && slices.Contains(p.Names, s.Policy), CheckPolicyName, strings.Join(p.Names, ", "), s.Policy+" ("+which+")")

	v.Check(len(signedBy(s, *p)) >= p.Need(), CheckPolicySigners, fmt.Sprintf("%d of %s", p.Need(), strings.Join(p.Signers, ", ")), orNone(s.Signers))

	lowest := max(1, p.MinimumVersion, marks(s.Policy))
	v.Check(s.Version >= lowest, CheckPolicyVersion, fmt.Sprintf("at least %d", lowest), fmt.Sprint(s.Version))

	if len(r.Images) > 0 {
		v.Require(CheckImage)
		ok := slices.ContainsFunc(s.Images, func(ref string) bool {
			_, digest, cut := strings.Cut(ref, "@")
			return cut && slices.Contains(r.Images, digest)
		})
		v.Check(ok, CheckImage, strings.Join(r.Images, " or "), orNone(s.Images))
	}
	return v
}

func thereOrNot(there bool) string {
	if there {
		return "there"
	}
	return "not in the evidence, or not accepted"
}

// launchPolicy opens the policy in the initdata under the rule's signers.
func launchPolicy(in *policy.Initdata, p release.PolicyRule, now time.Time) (*policy.Verified, error) {
	v, err := policy.OpenInitdata(in, policy.Trust{Fingerprints: p.Signers, Threshold: p.Need()}, now)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(p.Names, v.Policy.Name) {
		return nil, fmt.Errorf("policy %q, expected %s", v.Policy.Name, strings.Join(p.Names, ", "))
	}
	return v, nil
}
