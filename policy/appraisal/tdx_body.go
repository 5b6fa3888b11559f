package appraisal

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// TD attributes, Intel TDX Module 1.5 ABI, TD_PARAMS. The first byte is the
// TUD group: any bit of it opens the TD to the host, debug (bit 0) first.
const (
	tdxTUD        = 0xff
	tdxMigratable = 1 << 29
	// ICSSD, LASS, SEPT_VE_DISABLE, PKS, KL, TPA, PERFMON.
	tdxKnown = 1<<16 | 1<<27 | 1<<28 | 1<<30 | 1<<31 | 1<<62 | 1<<63

	// XFAM: x87 and SSE are always on, and the module allows no other bits.
	tdxXFAMFixed1 = 0x3
	tdxXFAMFixed0 = 0x6dbe7
)

var tdxAttributeNames = []struct {
	bit  int
	name string
}{{0, "DEBUG"}, {16, "ICSSD"}, {27, "LASS"}, {28, "SEPT_VE_DISABLE"}, {29, "MIGRATABLE"}, {30, "PKS"}, {31, "KL"}, {62, "TPA"}, {63, "PERFMON"}}

func describeAttributes(a uint64) string {
	var names []string
	for _, n := range tdxAttributeNames {
		if a>>n.bit&1 != 0 {
			names = append(names, n.name)
		}
	}
	return fmt.Sprintf("%#016x (%s)", a, orNone(names))
}

// checkBody fills the rows about what must never be so, whoever runs the TD
// and whatever a rule says.
func (q *tdxQuote) checkBody(t *Verdict) {
	a := binary.LittleEndian.Uint64(q.tdAttributes())
	found := describeAttributes(a)
	t.Check(a&tdxTUD == 0, CheckTDXDebug, "attribute bits 0 to 7 (TUD: DEBUG and what else opens the TD) are zero", found)

	// A service TD may be bound without the bit; it too could take the TD away.
	service := "no MRSERVICETD in this report"
	bound := false
	if q.serviceTD != nil {
		bound = !allZero(q.serviceTD)
		service = fmt.Sprintf("MRSERVICETD %x", q.serviceTD)
	}
	t.Check(a&tdxMigratable == 0 && !bound, CheckTDXMigratable, "attribute bit 29 (MIGRATABLE) and MRSERVICETD are zero", found+", "+service)

	t.Check(a&^(tdxTUD|tdxMigratable|tdxKnown) == 0, CheckTDXAttributes, "no reserved attribute bit", found)

	x := binary.LittleEndian.Uint64(q.xfam())
	t.Check(x&tdxXFAMFixed1 == tdxXFAMFixed1 && x&^tdxXFAMFixed0 == 0, CheckTDXXFAM,
		fmt.Sprintf("bits %#x set, none outside %#x", tdxXFAMFixed1, tdxXFAMFixed0), fmt.Sprintf("%#x", x))

	var wrong []string
	if !allZero(q.mrSignerSEAM()) {
		wrong = append(wrong, fmt.Sprintf("MRSIGNERSEAM %x", q.mrSignerSEAM()))
	}
	if !allZero(q.seamAttributes()) {
		wrong = append(wrong, fmt.Sprintf("SEAMATTRIBUTES %x", q.seamAttributes()))
	}
	if allZero(q.mrSEAM()) {
		wrong = append(wrong, "MRSEAM is zero")
	}
	moduleFound := strings.Join(wrong, ", ")
	if len(wrong) == 0 {
		moduleFound = fmt.Sprintf("MRSEAM %x", q.mrSEAM())
	}
	t.Check(len(wrong) == 0, CheckTDXModule, "a TDX module signed by Intel: MRSIGNERSEAM and SEAMATTRIBUTES zero, MRSEAM not", moduleFound)
}
