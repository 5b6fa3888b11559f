package appraisal

import (
	"bytes"
	"encoding/hex"
)

// A TPM quote's extraData holds report_data cut to 32 bytes, or padded with
// zero bytes to 64: Trustee's guests of different ages do either.
const (
	quoteDataCut    = 32
	quoteDataPadded = 64
)

// checkExtraData compares a quote's extraData with the session's report_data.
// Offline it is compared with what the caller knows, which may be nothing: then
// the row says so, and what extraData holds.
func checkExtraData(t *Verdict, in Input, extra []byte) {
	want := in.ReportData[:]
	if in.Offline != nil {
		if want = in.Offline.ReportData; want == nil {
			t.Skip(CheckReportData, "", "no report data to compare with; extraData is "+hex.EncodeToString(extra))
			return
		}
	}
	t.Require(CheckReportData)
	switch {
	case len(want) > quoteDataCut && len(extra) == quoteDataCut:
		want = want[:quoteDataCut]
	case len(want) < len(extra) && len(extra) == quoteDataPadded:
		want = append(bytes.Clone(want), make([]byte, quoteDataPadded-len(want))...)
	case in.Offline == nil:
		want = want[:quoteDataCut]
	}
	t.Check(bytes.Equal(extra, want), CheckReportData, hex.EncodeToString(want), hex.EncodeToString(extra))
}
