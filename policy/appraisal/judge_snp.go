package appraisal

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
)

// The rows about SEV-SNP firmware and configuration, beside "tcb-bootloader",
// "tcb-tee", "tcb-snp", "tcb-microcode" and "tcb-fmc".
const (
	CheckGuestPolicy = "guest-policy"
	CheckSigningKey  = "signing-key"
	CheckVMPL        = "vmpl"
	CheckProduct     = "tcb-product"
	CheckLaunchTCB   = "tcb-launch"
	CheckRevocation  = "revocation"
)

// Bits of the guest policy (SEV-SNP ABI 1.58, table 10) that nothing may set.
const (
	snpPolicyMigrate = 1 << 18
	snpPolicyDebug   = 1 << 19
)

// judgeSNP is what a rule says about the firmware below an SEV-SNP guest. Its
// defaults hold for a rule that says nothing.
func judgeSNP(v *Verdict, f Facts, r release.Rule) {
	if !release.HasSNP(f.TEE) {
		return
	}
	var c *release.SNPTCB
	if r.TCB != nil {
		c = r.TCB.SNP
	}
	if c == nil {
		c = &release.SNPTCB{}
	}
	v.Require(CheckGuestPolicy, CheckSigningKey, CheckVMPL)
	s := f.SNP
	if s == nil {
		for _, name := range []string{CheckGuestPolicy, CheckSigningKey, CheckVMPL} {
			v.Fail(name, "a verified report", "none")
		}
		return
	}
	// The verifier refused these already: no rule can be made to allow them.
	v.Check(s.Policy&(snpPolicyMigrate|snpPolicyDebug) == 0, CheckGuestPolicy, "neither debug nor migration", fmt.Sprintf("%#x", s.Policy))
	v.Check(slices.Contains(c.Keys(), s.SigningKey), CheckSigningKey, strings.Join(c.Keys(), " or "), orNot(s.SigningKey))
	switch {
	case c.VMPL == nil:
		v.Check(s.VMPL == 0, CheckVMPL, "0", fmt.Sprint(s.VMPL))
	case c.VMPL.Exact != nil:
		v.Check(s.VMPL == *c.VMPL.Exact, CheckVMPL, fmt.Sprint(*c.VMPL.Exact), fmt.Sprint(s.VMPL))
	default:
		v.Check(c.VMPL.Max != nil && s.VMPL <= *c.VMPL.Max, CheckVMPL, "at most "+fmt.Sprint(deref(c.VMPL.Max)), fmt.Sprint(s.VMPL))
	}
	judgeRevocation(v, c.RequireRevocation, s.NotRevoked)
	judgeSNPTCB(v, s, c.Minimum)
}

func judgeRevocation(v *Verdict, required, shown bool) {
	const expected = "a valid revocation list was consulted"
	switch {
	case required:
		v.Require(CheckRevocation)
		v.Check(shown, CheckRevocation, expected, yesOrNo(shown))
	case shown:
		v.Pass(CheckRevocation, expected, "yes")
	default:
		v.Skip(CheckRevocation, "", "the rule does not require it")
	}
}

func yesOrNo(ok bool) string {
	if ok {
		return "yes"
	}
	return "no"
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// judgeSNPTCB holds the reported TCB, which the signing key is derived from,
// to the minimum in each part; and the TCB at launch as well, because firmware
// that was updated since cannot vouch for what was launched under the old one.
func judgeSNPTCB(v *Verdict, s *SNPFacts, minimum map[string]release.SNPMinimum) {
	if len(minimum) == 0 {
		v.Skip(CheckProduct, "", "the rule has no minimum TCB")
		return
	}
	v.Require(CheckProduct)
	var products []string
	for p := range minimum {
		products = append(products, p)
	}
	slices.Sort(products)
	m, ok := minimum[s.Product]
	if !v.Check(ok, CheckProduct, strings.Join(products, " or "), orNot(s.Product)) {
		return
	}
	min := SNPTCB{FMC: deref(m.FMC), Bootloader: deref(m.Bootloader), TEE: deref(m.TEE), SNP: deref(m.SNP), Microcode: deref(m.Microcode)}
	got := s.ReportedTCB
	for _, part := range []struct {
		name        string
		lowest, got uint8
		judged      bool
	}{
		{"tcb-bootloader", min.Bootloader, got.Bootloader, true},
		{"tcb-tee", min.TEE, got.TEE, true},
		{"tcb-snp", min.SNP, got.SNP, true},
		{"tcb-microcode", min.Microcode, got.Microcode, true},
		{"tcb-fmc", min.FMC, got.FMC, m.FMC != nil},
	} {
		if part.judged {
			v.Require(part.name)
			v.Check(part.got >= part.lowest, part.name, fmt.Sprintf("at least %d", part.lowest), fmt.Sprint(part.got))
		}
	}
	v.Require(CheckLaunchTCB)
	v.Check(s.LaunchTCB.AtLeast(min), CheckLaunchTCB, fmt.Sprintf("at least %+v", min), fmt.Sprintf("%+v", s.LaunchTCB))
}
