package appraisal

import (
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
)

// The rows about TDX firmware and configuration.
const (
	CheckTDAttributes = "td-attributes"
	CheckTCBStatus    = "tcb-status"
	CheckQEStatus     = "qe-status"
	CheckTCBDate      = "tcb-date"
	CheckAdvisories   = "advisories"
)

// Bits of TD_ATTRIBUTES (Intel TDX module base architecture, "TD attributes"):
// the low byte is debugging, bit 29 says that the TD can be migrated.
const (
	tdDebug      = 0xff
	tdMigratable = 1 << 29
)

// judgeTDX is what a rule says about the platform below a TD. Its defaults hold
// for a rule that says nothing.
func judgeTDX(v *Verdict, f Facts, r release.Rule) {
	if !release.HasTDX(f.TEE) {
		return
	}
	var c *release.TDXTCB
	if r.TCB != nil {
		c = r.TCB.TDX
	}
	if c == nil {
		c = &release.TDXTCB{}
	}
	v.Require(CheckTDAttributes, CheckTCBStatus, CheckQEStatus, CheckAdvisories)
	d := f.TDX
	if d == nil {
		for _, name := range []string{CheckTDAttributes, CheckTCBStatus, CheckQEStatus, CheckAdvisories} {
			v.Fail(name, "a verified quote", "none")
		}
		return
	}
	bits, err := hex.DecodeString(d.TDAttributes)
	safe := err == nil && len(bits) == 8 && binary.LittleEndian.Uint64(bits)&(tdDebug|tdMigratable) == 0
	v.Check(safe, CheckTDAttributes, "neither debug nor migration", orNot(d.TDAttributes))

	allowed := c.Statuses()
	v.Check(slices.Contains(allowed, d.TCBStatus), CheckTCBStatus, strings.Join(allowed, " or "), orNot(d.TCBStatus))
	v.Check(slices.Contains(allowed, d.QEStatus), CheckQEStatus, strings.Join(allowed, " or "), orNot(d.QEStatus))
	open := slices.DeleteFunc(slices.Clone(d.Advisories), func(a string) bool { return slices.Contains(c.Advisories, a) })
	v.Check(len(open) == 0, CheckAdvisories, "none but "+orNone(c.Advisories), orNone(d.Advisories))
	if c.MinimumTCBDate != "" {
		v.Require(CheckTCBDate)
		lowest, err1 := time.Parse(time.RFC3339, c.MinimumTCBDate)
		date, err2 := time.Parse(time.RFC3339, d.TCBDate)
		v.Check(err1 == nil && err2 == nil && !date.Before(lowest), CheckTCBDate, "not before "+c.MinimumTCBDate, orNot(d.TCBDate))
	}
	judgeRevocation(v, c.RequireRevocation, d.NotRevoked)
}
