package appraisal

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
)

// The rows of a launch, beside "pcr-N".
const (
	CheckMeasurement   = "launch-measurement" // one label of the rule matches entirely
	CheckSNPMeasured   = "snp-measurement"
	CheckIDKey         = "id-key-digest"
	CheckAuthorKey     = "author-key-digest"
	CheckFamilyID      = "family-id"
	CheckImageID       = "image-id"
	CheckGuestSVN      = "guest-svn"
	CheckMRTD          = "mrtd"
	CheckMROwner       = "mr-owner"
	CheckMROwnerConfig = "mr-owner-config"
	CheckMRSEAM        = "mr-seam"
)

// judgeLaunch compares the evidence with each launch that the rule allows on
// its platform. One of them has to match in every part: the best one's parts
// are shown, so that a refusal says what differs.
func judgeLaunch(v *Verdict, f Facts, r release.Rule) {
	if len(r.Launch) == 0 && !r.AnyLaunch && f.TEE != release.PlatformTPM {
		v.Require(CheckMeasurement)
		v.Fail(CheckMeasurement, "one of the rule's launches, or anyLaunch", "the rule names none")
		return
	}
	if len(r.Launch) == 0 {
		v.Skip(CheckMeasurement, "", "the rule allows any launch")
		return
	}
	v.Require(CheckMeasurement)
	var labels []string
	for _, l := range r.Launch {
		if l.Platform == f.TEE {
			labels = append(labels, l.Label)
		}
	}
	var best *Verdict
	fewest := 0
	for _, l := range r.Launch {
		if l.Platform != f.TEE {
			continue
		}
		t := compareLaunch(f, l)
		if t.Refusal() == nil {
			v.Checks = append(v.Checks, t.Checks...)
			v.Pass(CheckMeasurement, strings.Join(labels, " or "), l.Label)
			return
		}
		if n := failures(t); best == nil || n < fewest {
			best, fewest = t, n
		}
	}
	if best != nil {
		v.Checks = append(v.Checks, best.Checks...)
	}
	v.Fail(CheckMeasurement, orNone(labels)+" in every part", "no launch that the rule allows")
}

func failures(v *Verdict) (n int) {
	for _, c := range v.Checks {
		if c.Outcome == Failed {
			n++
		}
	}
	return n
}

// compareLaunch is the table of one launch, every part of which is required.
func compareLaunch(f Facts, l release.Launch) *Verdict {
	v := NewVerdict()
	same := func(name, want, got string) {
		v.Require(name)
		v.Check(want != "" && want == got, name, fmt.Sprintf("%s (%s)", want, l.Label), orNot(got))
	}
	pinned := func(name, want, got string) {
		if want != "" {
			same(name, want, got)
		}
	}
	if s := l.SNP; s != nil {
		var got SNPFacts
		if f.SNP != nil {
			got = *f.SNP
		}
		same(CheckSNPMeasured, s.Measurement, got.Measurement)
		pinned(CheckIDKey, s.IDKeyDigest, got.IDKeyDigest)
		pinned(CheckAuthorKey, s.AuthorKeyDigest, got.AuthorKeyDigest)
		pinned(CheckFamilyID, s.FamilyID, got.FamilyID)
		pinned(CheckImageID, s.ImageID, got.ImageID)
		if s.MinimumGuestSVN > 0 {
			v.Require(CheckGuestSVN)
			v.Check(got.GuestSVN >= s.MinimumGuestSVN, CheckGuestSVN, fmt.Sprintf("at least %d (%s)", s.MinimumGuestSVN, l.Label), fmt.Sprint(got.GuestSVN))
		}
	}
	if d := l.TDX; d != nil {
		var got TDXFacts
		if f.TDX != nil {
			got = *f.TDX
		}
		same(CheckMRTD, d.MRTD, got.MRTD)
		for i, want := range []string{d.RTMR0, d.RTMR1, d.RTMR2} {
			value := ""
			if len(got.RTMRs) == 4 {
				value = got.RTMRs[i]
			}
			same("rtmr-"+strconv.Itoa(i), want, value)
		}
		pinned(CheckMROwner, d.MROwner, got.MROwner)
		pinned(CheckMROwnerConfig, d.MROwnerConfig, got.MROwnerConfig)
		pinned(CheckMRSEAM, d.MRSEAM, got.MRSEAM)
	}
	for i := range 24 {
		if want, ok := l.PCRs[strconv.Itoa(i)]; ok {
			same("pcr-"+strconv.Itoa(i), want, f.PCRs[i])
		}
	}
	return v
}

func orNot(value string) string {
	if value == "" {
		return "not shown by the evidence"
	}
	return value
}

// judgeHistory holds every policy that the log ever named to the rule: a guest
// that once ran a policy of another name or of other signers was not ours for a
// while, whatever runs now. Versions are no part of it: an upgrade leaves a
// lower one behind. While signers rotate, the rule lists old and new.
func judgeHistory(v *Verdict, log *LogFacts, p release.PolicyRule) {
	v.Require(CheckPolicyHistory)
	sets := append([]Set{log.First, log.Running}, log.Policies...)
	if log.Staged != nil {
		sets = append(sets, *log.Staged)
	}
	expected := fmt.Sprintf("only policies named %s, signed by %d of the rule's signers", strings.Join(p.Names, ", "), p.Need())
	for _, s := range sets {
		if !slices.Contains(p.Names, s.Policy) || len(signedBy(s, p)) < p.Need() {
			v.Fail(CheckPolicyHistory, expected, fmt.Sprintf("%s signed by %s", s, orNone(s.Signers)))
			return
		}
	}
	v.Pass(CheckPolicyHistory, expected, fmt.Sprintf("%d in the log", max(1, len(log.Policies))))
}

// signedBy are the rule's signers that signed a set.
func signedBy(s Set, p release.PolicyRule) []string {
	var by []string
	for _, fp := range slices.Compact(slices.Sorted(slices.Values(s.Signers))) {
		if slices.Contains(p.Signers, fp) {
			by = append(by, fp)
		}
	}
	return by
}
