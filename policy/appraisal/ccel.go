package appraisal

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
)

// Bounds of a CCEL. The library's own parser takes time that grows with the
// product of a hostile log's algorithms, digests and events.
const (
	ccelMaxEvents = 16384
	ccelMaxAlgs   = 8
	ccelMRs       = 5 // CC measurement registers: MRTD, then RTMR0 to RTMR3
	evNoAction    = 3
	ccelPadding   = 0xffffffff
)

// checkCCEL replays the CC event log to all four RTMRs. Where the log holds
// nothing of RTMR3, that register may be explained by the event log of ours
// instead, if logPassed says that it replays to it.
func checkCCEL(t *Verdict, log []byte, rtmrs []string, logPassed bool) {
	const expected = "a log that replays to RTMR0, RTMR1, RTMR2 and RTMR3"
	if len(log) == 0 {
		t.Skip(CheckCCEL, expected, "no cc_eventlog in the evidence")
		return
	}
	t.Require(CheckCCEL)
	if len(rtmrs) != 4 {
		t.Fail(CheckCCEL, expected, "no quote that counts covers it")
		return
	}
	n, err := replayCCEL(log, rtmrs, logPassed)
	found := fmt.Sprintf("%d events", n)
	if err != nil {
		found = err.Error()
	}
	t.Check(err == nil, CheckCCEL, expected, found)
}

func replayCCEL(log []byte, rtmrs []string, rtmr3Explained bool) (int, error) {
	if err := checkCCELShape(log); err != nil {
		return 0, err
	}
	bank := register.RTMRBank{}
	for i, s := range rtmrs {
		b, err := hex.DecodeString(s)
		if err != nil {
			return 0, err
		}
		bank.RTMRs = append(bank.RTMRs, register.RTMR{Index: i, Digest: b})
	}
	parsed, err := tcg.ParseEventLog(log, tcg.ParseOpts{AllowPadding: true})
	if err != nil {
		return 0, err
	}
	// A register of which the log has no event passes the library's replay
	// whatever its value.
	var has [ccelMRs]bool
	for _, e := range parsed.Events(register.HashSHA384) {
		if e.Type == evNoAction {
			continue
		}
		if e.Index < 1 || e.Index >= ccelMRs {
			return 0, fmt.Errorf("an event of measurement register %d, which nothing extends", e.Index)
		}
		has[e.Index] = true
	}
	for i, r := range bank.RTMRs {
		if !has[i+1] && !allZero(r.Digest) && (i != 3 || !rtmr3Explained) {
			return 0, fmt.Errorf("RTMR%d is %x, the log has no event of it", i, r.Digest)
		}
	}
	events, err := parsed.Verify(bank.MRs())
	if err != nil {
		return 0, err
	}
	return len(events), nil
}

// checkCCELShape walks a TCG2 crypto-agile log: a Spec ID event that declares
// few algorithms, SHA-384 among them, each once; events with at most one
// digest of each; padding of 0xff bytes alone.
func checkCCELShape(log []byte) error {
	c := &cutter{b: log}
	c.u32() // register of the Spec ID event, which extends nothing
	kind := c.u32()
	c.take(20) // SHA-1 digest
	spec := &cutter{b: c.take(c.u32())}
	if c.short || kind != evNoAction || !bytes.HasPrefix(spec.b, []byte("Spec ID Event03\x00")) {
		return fmt.Errorf("the log does not begin with a Spec ID Event03")
	}
	spec.take(24)
	n := spec.u32()
	if n == 0 || n > ccelMaxAlgs {
		return fmt.Errorf("the log declares %d algorithms, expected 1 to %d", n, ccelMaxAlgs)
	}
	sizes := map[uint16]uint16{}
	for range n {
		alg, size := spec.u16(), spec.u16()
		if _, twice := sizes[alg]; twice || size == 0 || size > 64 {
			return fmt.Errorf("the log declares algorithm %#x twice or with digests of %d bytes", alg, size)
		}
		sizes[alg] = size
	}
	if spec.short || sizes[uint16(register.HashSHA384)] != sha512.Size384 {
		return fmt.Errorf("the log declares no SHA-384 digests")
	}
	for events := 0; len(c.b) > 0; events++ {
		if events > ccelMaxEvents {
			return fmt.Errorf("the log has more than %d events", ccelMaxEvents)
		}
		if len(c.b) >= 4 && binary.LittleEndian.Uint32(c.b) == ccelPadding {
			if len(bytes.TrimLeft(c.b, "\xff")) != 0 {
				return fmt.Errorf("the log has bytes after its end that are not padding")
			}
			return nil
		}
		c.take(8) // register, type
		digests := c.u32()
		if c.short || digests > ccelMaxAlgs {
			return fmt.Errorf("event %d has %d digests, or is cut short", events, digests)
		}
		seen := map[uint16]bool{}
		for range digests {
			alg := c.u16()
			size, known := sizes[alg]
			if !known || seen[alg] {
				return fmt.Errorf("event %d has a digest of algorithm %#x, which is not declared or there twice", events, alg)
			}
			seen[alg] = true
			c.take(uint32(size))
		}
		c.take(c.u32())
		if c.short {
			return fmt.Errorf("event %d is cut short", events)
		}
	}
	return nil
}
