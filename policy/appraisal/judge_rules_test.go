package appraisal

import (
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// rulesOf compiles the example document, whose rules use every field, without
// the policy part: that needs real initdata and is held in the broker's tests.
func rulesOf(t testing.TB, resource string) release.Rule {
	t.Helper()
	b, err := os.ReadFile("../examples/reference/reference.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d, err := release.DecodeReferenceYAML(b)
	if err != nil {
		t.Fatal(err)
	}
	r, ok := d.Rules()[resource]
	if !ok {
		t.Fatalf("no %s", resource)
	}
	r.Policy, r.Images, r.AnyPolicy = nil, nil, true
	return r
}

func hexes(digits string, bytes int) string { return strings.Repeat(digits, bytes) }

func goodSNP() *SNPFacts {
	tcb := SNPTCB{Bootloader: 4, SNP: 22, Microcode: 213}
	return &SNPFacts{
		Measurement: hexes("a1", 48), IDKeyDigest: hexes("a2", 48), AuthorKeyDigest: hexes("a3", 48), FamilyID: hexes("a4", 16), ImageID: hexes("a5", 16),
		GuestSVN: 2, Policy: 0x30000, Product: "Milan", SigningKey: "vcek", ReportedTCB: tcb, CommittedTCB: tcb, LaunchTCB: tcb, NotRevoked: true,
	}
}

func goodTDX(digit string) *TDXFacts {
	h := func(n string) string { return hexes(digit+n, 48) }
	return &TDXFacts{
		MRTD: h("1"), RTMRs: []string{h("2"), h("3"), h("4"), hexes("00", 48)}, MROwner: hexes("00", 48), MROwnerConfig: hexes("00", 48), MRSEAM: h("5"),
		TDAttributes: "0000001000000000", TCBStatus: "UpToDate", TCBDate: "2025-01-01T00:00:00Z", QEStatus: "UpToDate", NotRevoked: true,
	}
}

func goodPCRs(digit string) map[int]string {
	h := func(n string) string { return hexes(digit+n, 32) }
	return map[int]string{2: "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969", 4: h("4"), 7: h("7"), 9: h("9"), 11: h("b"), 12: release.ZeroPCR, 13: release.ZeroPCR}
}

// goodFacts are what the example document accepts on a platform.
func goodFacts(platform string) Facts {
	f := Facts{TEE: platform, Dialect: kbs.DialectKBS}
	switch platform {
	case "snp":
		f.SNP = goodSNP()
	case "tdx":
		f.TDX = goodTDX("c")
	case "az-snp-vtpm":
		f.SNP, f.PCRs = goodSNP(), goodPCRs("d")
		f.SNP.Measurement = hexes("d1", 48)
	case "az-tdx-vtpm":
		f.TDX, f.PCRs = goodTDX("e"), goodPCRs("e")
	case "tpm":
		f.EKRoots, f.PCRs = []string{"lab"}, goodPCRs("f")
	}
	return f
}

func resourceOf(platform string) string {
	if platform == "tpm" {
		return "kbs:///staging/layer-key/api"
	}
	return "kbs:///payments/layer-key/api"
}

func judged(t *testing.T, f Facts) *Verdict {
	t.Helper()
	return Judge(f, rulesOf(t, resourceOf(f.TEE)), noMarks, time.Now())
}

// turin is a report of another product, with one part of its TCB changed.
func turin(change func(t *SNPTCB)) func(s *SNPFacts) {
	return func(s *SNPFacts) {
		t := SNPTCB{FMC: 1, Bootloader: 1, TEE: 1, SNP: 4, Microcode: 75}
		s.Product, s.LaunchTCB = "Turin", t
		change(&t)
		s.ReportedTCB = t
	}
}

type mutation struct {
	platform, check string
	change          func(f *Facts)
}

func snp(platform, check string, change func(s *SNPFacts)) mutation {
	return mutation{platform, check, func(f *Facts) { change(f.SNP) }}
}

func tdx(platform, check string, change func(d *TDXFacts)) mutation {
	return mutation{platform, check, func(f *Facts) { change(f.TDX) }}
}

// Lesson 10: each expected value of a rule, mutated alone in the evidence, is
// refused by the row that is named after it; a value that the evidence does
// not show is no value.
func TestLesson10_EveryExpectedValue(t *testing.T) {
	for _, p := range release.Platforms {
		if v := judged(t, goodFacts(p)); v.Refusal() != nil {
			t.Fatalf("%s: %v", p, v.Refusal())
		}
	}
	cases := map[string]mutation{
		"another measurement": snp("snp", CheckSNPMeasured, func(s *SNPFacts) { s.Measurement = hexes("a0", 48) }),
		"no measurement":      snp("snp", CheckSNPMeasured, func(s *SNPFacts) { s.Measurement = "" }),
		"another ID key":      snp("snp", CheckIDKey, func(s *SNPFacts) { s.IDKeyDigest = hexes("a0", 48) }),
		"another author key":  snp("snp", CheckAuthorKey, func(s *SNPFacts) { s.AuthorKeyDigest = hexes("a0", 48) }),
		"another family":      snp("snp", CheckFamilyID, func(s *SNPFacts) { s.FamilyID = hexes("a0", 16) }),
		"another image ID":    snp("snp", CheckImageID, func(s *SNPFacts) { s.ImageID = hexes("a0", 16) }),
		"a lower guest SVN":   snp("snp", CheckGuestSVN, func(s *SNPFacts) { s.GuestSVN = 1 }),
		"the other label's measurement with this label's keys gone": snp("snp", CheckMeasurement, func(s *SNPFacts) { s.Measurement = hexes("d1", 48) }),
		"a VLEK":                      snp("snp", CheckSigningKey, func(s *SNPFacts) { s.SigningKey = "vlek" }),
		"no signing key":              snp("snp", CheckSigningKey, func(s *SNPFacts) { s.SigningKey = "" }),
		"VMPL 1":                      snp("snp", CheckVMPL, func(s *SNPFacts) { s.VMPL = 1 }),
		"the debug bit":               snp("snp", CheckGuestPolicy, func(s *SNPFacts) { s.Policy |= 1 << 19 }),
		"the migration bit":           snp("snp", CheckGuestPolicy, func(s *SNPFacts) { s.Policy |= 1 << 18 }),
		"no revocation list":          snp("snp", CheckRevocation, func(s *SNPFacts) { s.NotRevoked = false }),
		"another product":             snp("snp", CheckProduct, func(s *SNPFacts) { s.Product = "Rome" }),
		"no product":                  snp("snp", CheckProduct, func(s *SNPFacts) { s.Product = "" }),
		"a lower bootloader":          snp("snp", "tcb-bootloader", func(s *SNPFacts) { s.ReportedTCB.Bootloader-- }),
		"a lower SNP firmware":        snp("snp", "tcb-snp", func(s *SNPFacts) { s.ReportedTCB.SNP-- }),
		"a lower microcode":           snp("snp", "tcb-microcode", func(s *SNPFacts) { s.ReportedTCB.Microcode-- }),
		"a lower TEE on Turin":        snp("snp", "tcb-tee", turin(func(t *SNPTCB) { t.TEE-- })),
		"a lower FMC on Turin":        snp("snp", "tcb-fmc", turin(func(t *SNPTCB) { t.FMC-- })),
		"launched below the minimum":  snp("snp", CheckLaunchTCB, func(s *SNPFacts) { s.LaunchTCB.Microcode-- }),
		"another paravisor":           snp("az-snp-vtpm", CheckSNPMeasured, func(s *SNPFacts) { s.Measurement = hexes("a1", 48) }),
		"no report":                   {"snp", CheckSigningKey, func(f *Facts) { f.SNP = nil }},
		"no report behind a vTPM":     {"az-snp-vtpm", CheckSNPMeasured, func(f *Facts) { f.SNP = nil }},
		"another MRTD":                tdx("tdx", CheckMRTD, func(d *TDXFacts) { d.MRTD = hexes("c0", 48) }),
		"another RTMR 0":              tdx("tdx", "rtmr-0", func(d *TDXFacts) { d.RTMRs[0] = hexes("c0", 48) }),
		"another RTMR 1":              tdx("tdx", "rtmr-1", func(d *TDXFacts) { d.RTMRs[1] = hexes("c0", 48) }),
		"another RTMR 2":              tdx("tdx", "rtmr-2", func(d *TDXFacts) { d.RTMRs[2] = hexes("c0", 48) }),
		"swapped RTMRs":               tdx("tdx", "rtmr-1", func(d *TDXFacts) { d.RTMRs[0], d.RTMRs[1] = d.RTMRs[1], d.RTMRs[0] }),
		"no RTMRs":                    tdx("tdx", "rtmr-0", func(d *TDXFacts) { d.RTMRs = nil }),
		"an owner":                    tdx("tdx", CheckMROwner, func(d *TDXFacts) { d.MROwner = hexes("c0", 48) }),
		"an owner's configuration":    tdx("tdx", CheckMROwnerConfig, func(d *TDXFacts) { d.MROwnerConfig = hexes("c0", 48) }),
		"another SEAM module":         tdx("tdx", CheckMRSEAM, func(d *TDXFacts) { d.MRSEAM = hexes("c0", 48) }),
		"a debug TD":                  tdx("tdx", CheckTDAttributes, func(d *TDXFacts) { d.TDAttributes = "0100001000000000" }),
		"a TD that migrates":          tdx("tdx", CheckTDAttributes, func(d *TDXFacts) { d.TDAttributes = "0000002000000000" }),
		"no attributes":               tdx("tdx", CheckTDAttributes, func(d *TDXFacts) { d.TDAttributes = "" }),
		"an old platform":             tdx("tdx", CheckTCBStatus, func(d *TDXFacts) { d.TCBStatus = "OutOfDate" }),
		"no status":                   tdx("tdx", CheckTCBStatus, func(d *TDXFacts) { d.TCBStatus = "" }),
		"an old quoting enclave":      tdx("tdx", CheckQEStatus, func(d *TDXFacts) { d.QEStatus = "OutOfDate" }),
		"an old TCB level":            tdx("tdx", CheckTCBDate, func(d *TDXFacts) { d.TCBDate = "2024-11-12T23:59:59Z" }),
		"no TCB date":                 tdx("tdx", CheckTCBDate, func(d *TDXFacts) { d.TCBDate = "" }),
		"an open advisory":            tdx("tdx", CheckAdvisories, func(d *TDXFacts) { d.Advisories = []string{"INTEL-SA-00837", "INTEL-SA-01192"} }),
		"no TDX revocation list":      tdx("tdx", CheckRevocation, func(d *TDXFacts) { d.NotRevoked = false }),
		"no quote":                    {"tdx", CheckTCBStatus, func(f *Facts) { f.TDX = nil }},
		"no quote behind a vTPM":      {"az-tdx-vtpm", CheckMRTD, func(f *Facts) { f.TDX = nil }},
		"another root set":            {"tpm", CheckEKRoots, func(f *Facts) { f.EKRoots = []string{"demo"} }},
		"no root set":                 {"tpm", CheckEKRoots, func(f *Facts) { f.EKRoots = nil }},
		"TPM evidence for an SNP key": {"tpm", CheckPlatform, func(f *Facts) { f.TEE = "other" }},
	}
	for _, p := range []string{"az-snp-vtpm", "az-tdx-vtpm", "tpm"} {
		for i := range goodFacts(p).PCRs {
			if i == 7 && p != "tpm" {
				continue // the example pins it for tpm alone
			}
			name := "pcr-" + strconv.Itoa(i)
			cases[p+" with another "+name] = mutation{p, name, func(f *Facts) { f.PCRs[i] = hexes("77", 32) }}
			cases[p+" without "+name] = mutation{p, name, func(f *Facts) { delete(f.PCRs, i) }}
		}
	}
	for what, c := range cases {
		f := goodFacts(c.platform)
		c.change(&f)
		v := judged(t, f)
		if f.TEE == "other" {
			v = Judge(f, rulesOf(t, resourceOf("tpm")), noMarks, time.Now())
		}
		if v.Outcome(c.check) != Failed || v.Refusal() == nil || !strings.Contains(v.Refusal().Error(), c.check+":") {
			t.Errorf("%s: %s is %s: %v", what, c.check, v.Outcome(c.check), v.Refusal())
		}
	}
	// What is better than the rule demands is accepted.
	for what, f := range map[string]Facts{"better SNP": goodFacts("snp"), "better TDX": goodFacts("tdx")} {
		if s := f.SNP; s != nil {
			s.GuestSVN, s.ReportedTCB.Microcode, s.LaunchTCB.SNP = 3, 255, 255
		}
		if d := f.TDX; d != nil {
			d.TCBDate, d.TCBStatus, d.Advisories = "2026-01-01T00:00:00Z", "SWHardeningNeeded", []string{"INTEL-SA-00837"}
		}
		if err := judged(t, f).Refusal(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// One label matches in every part, or none does: parts of two allowed launches
// are no launch, and a launch of one platform is none of another.
func TestLaunchLabelsDoNotMix(t *testing.T) {
	rule := rulesOf(t, resourceOf("tpm"))
	other := rule.Launch[0]
	other.Label, other.PCRs = "guest-1.3", maps.Clone(other.PCRs)
	other.PCRs["9"], other.PCRs["11"] = hexes("99", 32), hexes("bb", 32)
	rule.Launch = append(slices.Clone(rule.Launch), other)
	judge := func(f Facts) *Verdict { return Judge(f, rule, noMarks, time.Now()) }
	f := goodFacts("tpm")
	if v := judge(f); v.Refusal() != nil || !matched(v, "guest-1.4") {
		t.Fatalf("%+v", v.Checks)
	}
	f.PCRs[9] = hexes("99", 32)
	if v := judge(f); v.Outcome(CheckMeasurement) != Failed || v.Refusal() == nil {
		t.Errorf("PCR 9 of one label and PCR 11 of another: %+v", v.Checks)
	}
	f.PCRs[11] = hexes("bb", 32)
	if v := judge(f); v.Refusal() != nil || !matched(v, "guest-1.3") {
		t.Errorf("the other label: %+v", v.Checks)
	}
	// The paravisor's measurement proves nothing about a plain SNP guest.
	plain := goodFacts("snp")
	plain.SNP.Measurement = hexes("d1", 48)
	if v := judged(t, plain); v.Outcome(CheckMeasurement) != Failed {
		t.Errorf("a paravisor as a plain guest: %+v", v.Checks)
	}
	// A rule with launches for another platform alone.
	snp := rulesOf(t, resourceOf("snp"))
	snp.Launch = slices.DeleteFunc(snp.Launch, func(l release.Launch) bool { return l.Platform == "snp" })
	if v := Judge(goodFacts("snp"), snp, noMarks, time.Now()); v.Outcome(CheckMeasurement) != Failed {
		t.Errorf("no launch of the platform: %+v", v.Checks)
	}
}

func matched(v *Verdict, label string) bool {
	return slices.ContainsFunc(v.Checks, func(c Check) bool {
		return c.Name == CheckMeasurement && c.Outcome == Passed && c.Found == label
	})
}

// A rule that says nothing about firmware has the strict defaults, and no rule
// can allow debug.
func TestDefaultsAreStrict(t *testing.T) {
	for what, m := range map[string]mutation{
		"a VLEK":          snp("snp", CheckSigningKey, func(s *SNPFacts) { s.SigningKey = "vlek" }),
		"VMPL 1":          snp("snp", CheckVMPL, func(s *SNPFacts) { s.VMPL = 1 }),
		"debug":           snp("snp", CheckGuestPolicy, func(s *SNPFacts) { s.Policy |= 1 << 19 }),
		"an old platform": tdx("tdx", CheckTCBStatus, func(d *TDXFacts) { d.TCBStatus = "SWHardeningNeeded" }),
		"an advisory":     tdx("tdx", CheckAdvisories, func(d *TDXFacts) { d.Advisories = []string{"INTEL-SA-00837"} }),
	} {
		rule := release.Rule{Platforms: []string{"snp", "tdx"}, AnyPolicy: true, AnyLaunch: true}
		f := goodFacts(m.platform)
		if err := Judge(f, rule, noMarks, time.Now()).Refusal(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		m.change(&f)
		if v := Judge(f, rule, noMarks, time.Now()); v.Outcome(m.check) != Failed {
			t.Errorf("%s: %+v", what, v.Checks)
		}
	}
	max := uint32(2)
	rule := release.Rule{Platforms: []string{"snp"}, AnyPolicy: true, AnyLaunch: true, TCB: &release.TCB{SNP: &release.SNPTCB{VMPL: &release.VMPL{Max: &max}, SigningKeys: []string{"vlek"}}}}
	f := goodFacts("snp")
	for vmpl, want := range map[uint32]Outcome{0: Passed, 2: Passed, 3: Failed} {
		f.SNP.VMPL, f.SNP.SigningKey = vmpl, "vlek"
		if got := Judge(f, rule, noMarks, time.Now()).Outcome(CheckVMPL); got != want {
			t.Errorf("VMPL %d with at most 2: %s", vmpl, got)
		}
	}
}

// Every policy that the log ever named is matched, not only the one that runs.
func TestPolicyHistory(t *testing.T) {
	rotated := strings.Repeat("e", 64)
	p := release.PolicyRule{Names: []string{"shop"}, Signers: []string{signer, rotated}}
	first := Set{Policy: "shop", Version: 1, Digest: "sha256:1", Signers: []string{signer}}
	second := Set{Policy: "shop", Version: 2, Digest: "sha256:2", Signers: []string{rotated}}
	stray := Set{Policy: "other", Version: 2, Digest: "sha256:3", Signers: []string{signer}}
	foreign := Set{Policy: "shop", Version: 2, Digest: "sha256:4", Signers: []string{strings.Repeat("f", 64)}}
	for what, c := range map[string]struct {
		log  LogFacts
		want Outcome
	}{
		"one policy":                        {LogFacts{First: first, Running: first, Policies: []Set{first}}, Passed},
		"an upgrade by rotated signers":     {LogFacts{First: first, Running: second, Policies: []Set{first, second}}, Passed},
		"a staged one by rotated signers":   {LogFacts{First: first, Running: first, Staged: &second, Policies: []Set{first, second}}, Passed},
		"a policy of another name, gone":    {LogFacts{First: first, Running: second, Policies: []Set{first, stray, second}}, Failed},
		"a policy of other signers, gone":   {LogFacts{First: first, Running: second, Policies: []Set{first, foreign, second}}, Failed},
		"a staged one of other signers":     {LogFacts{First: first, Running: first, Staged: &foreign, Policies: []Set{first, foreign}}, Failed},
		"a staged one that no list has":     {LogFacts{First: first, Running: first, Staged: &stray}, Failed},
		"a running one that no list has":    {LogFacts{First: first, Running: foreign}, Failed},
		"one without signers in the middle": {LogFacts{First: first, Running: first, Policies: []Set{first, {Policy: "shop", Version: 3}}}, Failed},
	} {
		v := NewVerdict()
		judgeHistory(v, &c.log, p)
		if got := v.Outcome(CheckPolicyHistory); got != c.want || (v.Refusal() == nil) != (c.want == Passed) {
			t.Errorf("%s: %s, %+v", what, got, v.Checks)
		}
	}
	if v := NewVerdict(); true {
		judgeHistory(v, &LogFacts{First: first, Running: second, Policies: []Set{first, second}}, release.PolicyRule{Names: p.Names, Signers: []string{signer}})
		if v.Outcome(CheckPolicyHistory) != Failed {
			t.Error("a rule that lists the old signer alone took the new one's policy")
		}
	}
}

// What a rule costs beside the appraisal: every condition of the example.
func BenchmarkJudge(b *testing.B) {
	rule := rulesOf(b, resourceOf("az-snp-vtpm"))
	f := goodFacts("az-snp-vtpm")
	for b.Loop() {
		if err := Judge(f, rule, noMarks, time.Now()).Refusal(); err != nil {
			b.Fatal(err)
		}
	}
}
