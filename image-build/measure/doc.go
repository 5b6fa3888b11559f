// Package measure predicts what a launch will measure, from the files of an
// image alone: the SEV-SNP launch digest and the ID block that names it, TPM
// PCRs of a booted UKI, TDX MRTD and RTMR 0 to 2. Each algorithm is a small
// file that names where its bytes come from.
//
// It measures nothing itself and asks no machine. Files are input of others:
// bounded, and refused where a value would have to be guessed. What was never
// compared with a recorded launch is said to be unproven, in the results too.
package measure

import (
	"encoding/hex"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const page = 4096

// Bounds of input files, in bytes.
const (
	MaxFirmware = 64 << 20
	MaxKernel   = 512 << 20 // a UKI, or a kernel
	MaxInitrd   = 1 << 30
	MaxCmdline  = 64 << 10
	MaxACPI     = 4 << 20
)

func bad(format string, args ...any) error {
	return cause.New(cause.MeasureInput, format, args...)
}

// guid is a GUID's text in the mixed byte order that firmware stores. Text that
// is none is a defect of this package.
func guid(s string) (out [16]byte) {
	b, err := hex.DecodeString(s[0:8] + s[9:13] + s[14:18] + s[19:23] + s[24:36])
	if err != nil || len(s) != 36 {
		panic("measure: no GUID: " + s)
	}
	copy(out[:], []byte{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]})
	copy(out[8:], b[8:])
	return out
}
