package appraisal

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/google/go-sev-guest/abi"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// More bits of the guest policy (SEV-SNP ABI 1.58, table 10).
const (
	snpPolicyOne   = 1 << 17 // must be one
	snpPolicyKnown = 1<<26 - 1
)

// snpAlgorithm is ECDSA P-384 with SHA-384, the only one of the ABI.
const snpAlgorithm = abi.SignEcdsaP384Sha384

// snpReport is a report whose form was checked.
type snpReport struct {
	*kbs.SNPReport
	raw    []byte
	signer abi.SignerInfo
	line   string // product line by CPUID; "" in version 2, which names no CPU
	known  bool   // line is of a CPU that is known here, or version is 2
}

// readSNPReport takes a report of a known version apart. What a version does
// not define must be zero: a bit that nobody here can read is refused.
func readSNPReport(t *Verdict, raw []byte, lowest uint32) *snpReport {
	version := binary.LittleEndian.Uint32(raw)
	versions := fmt.Sprintf("%d to %d", lowest, snpVersionMax)
	if !t.Check(version >= lowest && version <= snpVersionMax, CheckSNPVersion, versions, fmt.Sprint(version)) {
		return nil
	}
	const expected = "reserved bits are zero"
	p, err := kbs.SNPReportFromRaw(raw)
	if err != nil {
		t.Fail(CheckSNPReserved, expected, err.Error())
		return nil
	}
	r := &snpReport{SNPReport: p, raw: raw, known: true}
	if r.signer, err = abi.ParseSignerInfo(p.KeyInfo); err != nil {
		t.Fail(CheckSNPReserved, expected, "key_info: "+err.Error())
		return nil
	}
	if _, err := abi.ParseSnpPlatformInfo(p.PlatInfo); err != nil {
		t.Fail(CheckSNPReserved, expected, err.Error())
		return nil
	}
	t.Pass(CheckSNPReserved, expected, "zero")
	if p.CPUIDFamily != nil {
		r.line = productLine(*p.CPUIDFamily, *p.CPUIDModel)
		r.known = r.line != ""
	}
	return r
}

// checkContent fills the rows about fields that need no certificate.
func (r *snpReport) checkContent(t *Verdict) {
	t.Check(r.SigAlgo == snpAlgorithm, CheckSNPAlgorithm, "1 (ECDSA P-384 with SHA-384)", fmt.Sprint(r.SigAlgo))

	t.Check(r.Policy&snpPolicyOne != 0 && r.Policy&^uint64(snpPolicyKnown) == 0, CheckSNPPolicyForm,
		"bit 17 set, no bit above 25", fmt.Sprintf("%#x", r.Policy))
	t.Check(r.Policy&snpPolicyDebug == 0, CheckSNPDebug, "the host may not debug the guest (bit 19 clear)", fmt.Sprintf("%#x", r.Policy))
	noAgent := allOnes(r.ReportIDMA)
	t.Check(r.Policy&snpPolicyMigrate == 0 && noAgent, CheckSNPMigration, "no migration agent allowed (bit 18 clear) and none there (report_id_ma all ones)",
		fmt.Sprintf("%#x, %x", r.Policy, []byte(r.ReportIDMA)))

	// The firmware writes the digest with the flag or not at all.
	author := !allZero(r.AuthorKeyDigest)
	t.Check(r.signer.AuthorKeyEn == author && (!author || !allZero(r.IDKeyDigest)), CheckSNPAuthorKey,
		"an author key digest exactly when key_info says so, and beside an ID key's", fmt.Sprintf("key_info %#x, author_key_digest %x", r.KeyInfo, []byte(r.AuthorKeyDigest)))

	// A report that the host asked for has 0xffffffff here.
	t.Check(r.VMPL <= 3, CheckSNPVMPL, "0 to 3", fmt.Sprint(r.VMPL))

	current := snpTCB(r.CurrentTCB)
	ordered := current.AtLeast(snpTCB(r.CommittedTCB)) && current.AtLeast(snpTCB(r.ReportedTCB)) && firmwareAtLeast(r.Current, r.Committed)
	t.Check(ordered, CheckSNPTCBOrder, "committed and reported TCB and firmware not above the current ones",
		fmt.Sprintf("current %s, firmware %d.%d.%d; committed %s, firmware %d.%d.%d; reported %s", current, r.Current.Major, r.Current.Minor, r.Current.Build,
			snpTCB(r.CommittedTCB), r.Committed.Major, r.Committed.Minor, r.Committed.Build, snpTCB(r.ReportedTCB)))
}

// facts is what the report says, to be used once it is proven.
func (r *snpReport) facts() *SNPFacts {
	h := func(b kbs.Bytes) string { return hex.EncodeToString(b) }
	return &SNPFacts{
		Version: r.Version, Measurement: h(r.Measurement), HostData: h(r.HostData), ReportID: h(r.ReportID),
		IDKeyDigest: h(r.IDKeyDigest), AuthorKeyDigest: h(r.AuthorKeyDigest), FamilyID: h(r.FamilyID), ImageID: h(r.ImageID),
		ChipID: h(r.ChipID), VMPL: r.VMPL, GuestSVN: r.GuestSVN, Policy: r.Policy, PlatformInfo: r.PlatInfo,
		ReportedTCB: snpTCB(r.ReportedTCB), CommittedTCB: snpTCB(r.CommittedTCB), LaunchTCB: snpTCB(r.LaunchTCB),
	}
}

func snpTCB(t kbs.SNPTCB) SNPTCB {
	out := SNPTCB{Bootloader: t.Bootloader, TEE: t.TEE, SNP: t.SNP, Microcode: t.Microcode}
	if t.FMC != nil {
		out.FMC = *t.FMC
	}
	return out
}

// firmwareAtLeast says that a is not older than b.
func firmwareAtLeast(a, b kbs.SNPFirmware) bool {
	return bytes.Compare([]byte{a.Major, a.Minor, a.Build}, []byte{b.Major, b.Minor, b.Build}) >= 0
}

func allOnes(b []byte) bool { return len(bytes.Trim(b, "\xff")) == 0 }

// String is the TCB by its parts.
func (t SNPTCB) String() string {
	return fmt.Sprintf("fmc %d, bootloader %d, tee %d, snp %d, microcode %d", t.FMC, t.Bootloader, t.TEE, t.SNP, t.Microcode)
}
