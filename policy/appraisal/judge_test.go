package appraisal

import (
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

var (
	signer = strings.Repeat("a", 64)
	image  = "sha256:" + strings.Repeat("b", 64)
	pcr    = strings.Repeat("c", 64)
)

func noMarks(string) uint64 { return 0 }

func runningSet() Set {
	return Set{Policy: "shop", Version: 3, Digest: "sha256:d", Signers: []string{signer}, Images: []string{"registry.example/shop@" + image}}
}

// judgeSet holds a set to the rule's policy; each condition alone refuses.
func TestJudgeSet(t *testing.T) {
	rule := release.Rule{Platforms: []string{"tpm"}, Images: []string{image}, Policy: &release.PolicyRule{Names: []string{"shop"}, Signers: []string{signer}, MinimumVersion: 3}}
	if err := judgeSet(runningSet(), "running", rule, noMarks).Refusal(); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		check  string
		change func(s *Set)
	}{
		"another name":         {CheckPolicyName, func(s *Set) { s.Policy = "other" }},
		"no name":              {CheckPolicyName, func(s *Set) { s.Policy = "" }},
		"another signer":       {CheckPolicySigners, func(s *Set) { s.Signers = []string{strings.Repeat("e", 64)} }},
		"no signer":            {CheckPolicySigners, func(s *Set) { s.Signers = nil }},
		"a lower version":      {CheckPolicyVersion, func(s *Set) { s.Version = 2 }},
		"another image":        {CheckImage, func(s *Set) { s.Images = []string{"registry.example/shop@sha256:" + strings.Repeat("e", 64)} }},
		"the digest as a name": {CheckImage, func(s *Set) { s.Images = []string{image} }},
		"no image":             {CheckImage, func(s *Set) { s.Images = nil }},
	} {
		s := runningSet()
		c.change(&s)
		v := judgeSet(s, "running", rule, noMarks)
		if v.Outcome(c.check) != Failed || v.Refusal() == nil {
			t.Errorf("%s: %+v", what, v.Checks)
		}
	}
	if v := judgeSet(runningSet(), "running", rule, func(string) uint64 { return 4 }); v.Outcome(CheckPolicyVersion) != Failed {
		t.Error("a version below the broker's mark passes")
	}
	two := rule
	two.Policy = &release.PolicyRule{Names: []string{"shop"}, Signers: []string{signer, strings.Repeat("e", 64)}, Threshold: 2}
	s := runningSet()
	s.Signers = []string{signer, signer}
	if judgeSet(s, "running", two, noMarks).Outcome(CheckPolicySigners) != Failed {
		t.Error("one signer twice counts as two")
	}
}

// Leaving out what dialect cvm-agent/1 adds is no downgrade: a rule that names
// a policy refuses facts without a log or a launch binding.
func TestLeavingOutIsNoDowngrade(t *testing.T) {
	rule := release.Rule{Platforms: []string{"tpm"}, Policy: &release.PolicyRule{Names: []string{"shop"}, Signers: []string{signer}}}
	log := &LogFacts{First: runningSet(), Running: runningSet()}
	for what, f := range map[string]Facts{
		"dialect kbs, nothing":  {TEE: "tpm", Dialect: kbs.DialectKBS},
		"a log without binding": {TEE: "tpm", Dialect: kbs.Dialect, Log: log},
		"a binding without log": {TEE: "tpm", Dialect: kbs.Dialect, Launch: &LaunchFacts{Digest: "00", Initdata: &policy.Initdata{Algorithm: "sha256"}}},
		"no policy in initdata": {TEE: "tpm", Dialect: kbs.Dialect, Log: log, Launch: &LaunchFacts{Digest: "00", Initdata: &policy.Initdata{Algorithm: "sha256"}}},
	} {
		if v := Judge(f, rule, noMarks, time.Now()); v.Refusal() == nil {
			t.Errorf("%s: released: %+v", what, v.Checks)
		}
	}
}

func TestJudgePlatformRootsAndPCRs(t *testing.T) {
	rule := release.Rule{Platforms: []string{"tpm"}, EKRoots: []string{"demo"}, AnyPolicy: true, PCRs: map[string][]string{"9": {pcr}, "12": {strings.Repeat("0", 64)}}}
	good := Facts{TEE: "tpm", Dialect: kbs.DialectKBS, EKRoots: []string{"demo"}, PCRs: map[int]string{9: pcr, 12: strings.Repeat("0", 64)}}
	if err := Judge(good, rule, noMarks, time.Now()).Refusal(); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		check  string
		change func(f *Facts)
	}{
		"another platform":   {CheckPlatform, func(f *Facts) { f.TEE = "snp" }},
		"no platform":        {CheckPlatform, func(f *Facts) { f.TEE = "" }},
		"another root set":   {CheckEKRoots, func(f *Facts) { f.EKRoots = []string{"other"} }},
		"no root set":        {CheckEKRoots, func(f *Facts) { f.EKRoots = nil }},
		"PCR 9 differs":      {"pcr-9", func(f *Facts) { f.PCRs = map[int]string{9: strings.Repeat("d", 64), 12: strings.Repeat("0", 64)} }},
		"PCR 12 not covered": {"pcr-12", func(f *Facts) { f.PCRs = map[int]string{9: pcr} }},
		"a destroy event":    {CheckDestroyed, func(f *Facts) { f.Log = &LogFacts{Destroyed: true} }},
		"a debug event":      {CheckDebug, func(f *Facts) { f.Log = &LogFacts{Debug: true} }},
	} {
		f := good
		c.change(&f)
		v := Judge(f, rule, noMarks, time.Now())
		if v.Outcome(c.check) != Failed || v.Refusal() == nil {
			t.Errorf("%s: %+v", what, v.Checks)
		}
	}
}
