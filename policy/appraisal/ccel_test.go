package appraisal

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// What the recorded boot leaves in its registers, computed apart from the code
// under test.
var ovmfRTMRs = []string{
	"8566f998798db09443b244c62de9a3041fb02e2e6936c4396d784bba2e90177329ec5aba3bb484404f2ab9cc90abe193",
	"775b9f6bfe99f8a31396f0d0218e67ffa796d3b96ccf961cbb0deba48c79c00f082cda1a5567c1c16305f1fc210c13c6",
	"94eaf7a7bf398ed8d888c91057ae0261802e4f3df084213a76ca7f0b5055ac9d2241de43cd58d9e8b49c503bbf25f34a",
	"000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000",
}

// ovmfEnd is where the recorded CCEL ends and its padding begins.
const ovmfEnd = 2120

func withOVMF(t testing.TB) *tdxCase {
	t.Helper()
	c := newTDX(t, tdxtest.Config{})
	c.ccel = testFile(t, "ccel-ovmf.bin")
	for i, s := range ovmfRTMRs {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		copy(c.report.RTMR[i][:], b)
	}
	return c
}

// ccelEvent is a TCG2 record with one SHA-384 digest.
func ccelEvent(index, kind uint32, data string) []byte {
	digest := sha512.Sum384([]byte(data))
	b := binary.LittleEndian.AppendUint32(nil, index)
	b = binary.LittleEndian.AppendUint32(b, kind)
	b = append(b, 1, 0, 0, 0, 0x0c, 0)
	b = append(b, digest[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func extended(register [48]byte, data string) [48]byte {
	digest := sha512.Sum384([]byte(data))
	return sha512.Sum384(append(register[:], digest[:]...))
}

func TestVectorCCELReplays(t *testing.T) {
	a := withOVMF(t).sign(t).appraise(t)
	accepted(t, a)
	if a.Verdict.Outcome(CheckCCEL) != Passed {
		t.Fatalf("%+v", a.Verdict.Checks)
	}
}

// A real quote and the log of that very boot.
func TestRealQuoteWithItsCCEL(t *testing.T) {
	in := Input{Dialect: kbs.DialectKBS, Time: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), Offline: &Offline{}}
	quote, log := testFile(t, "tdx-cos113-quote.bin"), testFile(t, "tdx-cos113-ccel.bin")
	v := &TDX{}
	a, err := v.AppraiseRaw(quote, log, in)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{CheckTDXChain, CheckTDXSignature, CheckTDXQESignature, CheckTDXQEData, CheckTDXLibrary, CheckTDXDebug, CheckTDXMigratable, CheckTDXAttributes, CheckTDXXFAM, CheckTDXModule, CheckCCEL} {
		if a.Verdict.Outcome(name) != Passed {
			t.Errorf("%s: %v", name, a.Verdict.Refusal())
		}
	}
	// The log of another boot.
	if a, err = v.AppraiseRaw(quote, testFile(t, "ccel-ovmf.bin"), in); err != nil {
		t.Fatal(err)
	}
	refused(t, a, CheckCCEL)
}

func TestCCELNull(t *testing.T) {
	c := withOVMF(t)
	c.ccel = nil
	a := c.sign(t).appraise(t)
	accepted(t, a)
	if a.Verdict.Outcome(CheckCCEL) != NotChecked {
		t.Fatal("a log that is not there was checked")
	}
}

// The log agrees with all four registers or is refused.
func TestCCELMustReplayToAllFour(t *testing.T) {
	for i, name := range []string{"RTMR0", "RTMR1", "RTMR2", "RTMR3"} {
		t.Run(name, func(t *testing.T) {
			c := withOVMF(t)
			c.report.RTMR[i][0] ^= 1
			refused(t, c.sign(t).appraise(t), CheckCCEL)
		})
	}
	// Our events follow the firmware's as TCG2 records.
	for what, r := range map[string]struct {
		event string
		ok    bool
	}{"the event that was extended": {"ours", true}, "another event": {"theirs", false}} {
		c := withOVMF(t)
		c.report.RTMR[3] = extended(c.report.RTMR[3], "ours")
		c.ccel = append(slices.Clone(c.ccel[:ovmfEnd]), ccelEvent(4, 6, r.event)...)
		a := c.sign(t).appraise(t)
		if (a.Verdict.Refusal() == nil) != r.ok {
			t.Errorf("%s: %v", what, a.Verdict.Refusal())
		}
	}
}

// Under our dialect the firmware's log may stop at RTMR2: RTMR3 is the event
// log's, which replays to it.
func TestCCELWithOurLogBeside(t *testing.T) {
	log, register := measured(t)
	c := withOVMF(t).ours(t, log)
	c.report.RTMR[3] = register
	a := c.sign(t).appraise(t)
	accepted(t, a)
	if a.Verdict.Outcome(CheckCCEL) != Passed {
		t.Fatalf("%+v", a.Verdict.Checks)
	}
	c.ours(t, nil)
	refused(t, c.sign(t).appraise(t), CheckCCEL, CheckEventLog)
	// What it does say of RTMR3 has to be so.
	c.ours(t, log)
	c.ccel = append(slices.Clone(c.ccel[:ovmfEnd]), ccelEvent(4, 6, "x")...)
	refused(t, c.sign(t).appraise(t), CheckCCEL)
}

func TestCCELChanged(t *testing.T) {
	whole := testFile(t, "ccel-ovmf.bin")
	log := whole[:ovmfEnd]
	first := 32 + 33 // after the Spec ID event
	spec := func(change func([]byte)) []byte { b := slices.Clone(log); change(b); return b }
	// The second and third event change places.
	e1, e2 := ccelLength(log[first:]), 0
	e2 = ccelLength(log[first+e1:])
	swapped := slices.Concat(log[:first], log[first+e1:first+e1+e2], log[first:first+e1], log[first+e1+e2:])
	for what, b := range map[string][]byte{
		"one event left out":            slices.Concat(log[:first], log[first+e1:]),
		"one event twice":               slices.Concat(log[:first+e1], log[first:]),
		"two events swapped":            swapped,
		"an event more":                 append(slices.Clone(log), ccelEvent(1, 6, "x")...),
		"an event of RTMR3":             append(slices.Clone(log), ccelEvent(4, 6, "x")...),
		"an event of MRTD":              append(slices.Clone(log), ccelEvent(0, 6, "x")...),
		"an event of register 5":        append(slices.Clone(log), ccelEvent(5, 6, "x")...),
		"an event of register 2^31":     append(slices.Clone(log), ccelEvent(1<<31, 6, "x")...),
		"a digest changed":              spec(func(b []byte) { b[first+20] ^= 1 }),
		"the Spec ID event alone":       log[:first],
		"no Spec ID event":              log[first:],
		"another signature":             spec(func(b []byte) { b[32] = 's' }),
		"Spec ID of another type":       spec(func(b []byte) { b[4] = 4 }),
		"no algorithm":                  spec(func(b []byte) { b[56] = 0 }),
		"2^24 algorithms":               spec(func(b []byte) { b[59] = 1 }),
		"SHA-384 of 32 bytes":           spec(func(b []byte) { b[62] = 32 }),
		"SHA-384 of no bytes":           spec(func(b []byte) { b[62] = 0 }),
		"SHA-256 alone":                 spec(func(b []byte) { b[60] = 0x0b }),
		"a digest of SHA-256":           spec(func(b []byte) { b[first+12] = 0x0b }),
		"2^24 digests":                  spec(func(b []byte) { b[first+11] = 1 }),
		"no digests":                    spec(func(b []byte) { b[first+8] = 0 }),
		"bytes after the padding":       append(slices.Clone(whole[:4096]), 1),
		"bytes in the padding":          spec2(whole[:4096], 3000),
		"zeros for padding":             append(slices.Clone(log), make([]byte, 64)...),
		"two digests of one algorithm":  twoDigests(log, first),
		"nothing but padding":           bytes.Repeat([]byte{0xff}, 64),
		"an event that resets to 0…4":   slices.Concat(log[:first], ccelEvent(1, 0x80000010, "x"), log[first:]),
		"an event with a size too long": spec(func(b []byte) { b[first+62+3] = 1 }),
	} {
		t.Run(what, func(t *testing.T) {
			c := withOVMF(t)
			c.ccel = b
			refused(t, c.sign(t).appraise(t), CheckCCEL)
		})
	}
	for n := 1; n < len(log); n++ {
		if _, err := replayCCEL(log[:n], ovmfRTMRs, true); err == nil {
			t.Errorf("cut to %d bytes it replays", n)
		}
	}
}

func spec2(b []byte, at int) []byte {
	b = slices.Clone(b)
	b[at] = 0
	return b
}

// ccelLength is the length of the record with one SHA-384 digest that b begins
// with.
func ccelLength(b []byte) int { return 66 + int(binary.LittleEndian.Uint32(b[62:])) }

// twoDigests repeats the digest of the record at from.
func twoDigests(log []byte, from int) []byte {
	b := slices.Clone(log)
	b[from+8] = 2
	return slices.Concat(b[:from+62], b[from+12:from+62], b[from+62:])
}

// A log that is built to cost is refused before the library sees it.
func TestCCELHostileCost(t *testing.T) {
	b := slices.Clone(testFile(t, "ccel-ovmf.bin")[:65])
	many := slices.Clone(b[:56])
	const algs = 60000
	many = binary.LittleEndian.AppendUint32(many, algs)
	for range algs {
		many = append(many, 0x0c, 0, 48, 0)
	}
	many = append(many, 0)
	binary.LittleEndian.PutUint32(many[28:], uint32(len(many)-32))
	for range 1000 {
		many = append(many, ccelEvent(1, 6, "")...)
	}
	events := slices.Clone(b)
	for range ccelMaxEvents + 2 {
		events = append(events, 1, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	}
	for what, log := range map[string][]byte{"algorithms": many, "events": events} {
		if err := checkCCELShape(log); err == nil {
			t.Errorf("many %s: accepted", what)
		}
	}
}

func FuzzCCEL(f *testing.F) {
	f.Add(testFile(f, "ccel-ovmf.bin")[:ovmfEnd+16])
	f.Add(testFile(f, "tdx-cos113-ccel.bin"))
	other := slices.Repeat([]string{"ab"}, 4)
	for i := range other {
		other[i] = hex.EncodeToString(bytes.Repeat([]byte{0xab}, 48))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := replayCCEL(b, other, false); err == nil {
			t.Fatal("replays to registers that no log of this size was found for")
		}
	})
}
