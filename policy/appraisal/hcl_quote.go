package appraisal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// The checks that both Azure forms add to those of a TPM quote and of the
// hardware report.
const (
	CheckHCLRuntime  = "hcl-runtime-data"
	CheckHCLUserData = "hcl-user-data"
)

// azureQuote is the vTPM's quote under the AK that the HCL report names. The
// wire has the bare RSASSA signature, not a TPMT_SIGNATURE.
func azureQuote(ev *kbs.AzureQuote, h *hclReport) (*quote, error) {
	if len(ev.Signature) != h.ak.Size() {
		return nil, fmt.Errorf("tpm_quote.signature has %d bytes, expected the bare RSASSA signature of %d", len(ev.Signature), h.ak.Size())
	}
	pcrs, err := kbs.TPMQuote{PCRs: ev.PCRs}.Values()
	if err != nil {
		return nil, err
	}
	attest, err := unmarshal[tpm2.TPMSAttest](ev.Message, "tpm_quote.message")
	if err != nil {
		return nil, err
	}
	signature := &tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgRSASSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA, &tpm2.TPMSSignatureRSA{
			Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: ev.Signature},
		}),
	}
	q := &quote{attest: attest, message: ev.Message, signature: signature, key: h.ak, pcrs: pcrs}
	if attest.Type == tpm2.TPMSTAttestQuote {
		if q.info, err = attest.Attested.Quote(); err != nil {
			return nil, fmt.Errorf("tpm_quote.message: %w", err)
		}
	}
	return q, nil
}

// checkAzureQuote fills the rows about the quote and the user-data, and
// returns the values of the quoted PCRs when their digest agrees.
func checkAzureQuote(t *Verdict, in Input, q *quote, h *hclReport) map[int]string {
	t.Require(CheckQuoteSignature, CheckQuoteMagic, CheckPCRSelection, CheckPCRDigest, CheckHCLUserData)
	q.checkSignature(t)
	checkAzureReportData(t, in, q.attest.ExtraData.Buffer, h.userData)
	q.checkPCRs(t)
	if t.Outcome(CheckPCRDigest) != Passed {
		return nil
	}
	return q.covered()
}

// checkAzureReportData compares extraData, which is the 48 bytes of
// report_data as they are, and the user-data, which is them zero-padded to 64.
// Offline and without report data the two are still compared with each other.
func checkAzureReportData(t *Verdict, in Input, extra, userData []byte) {
	want := in.ReportData[:]
	if in.Offline != nil {
		want = in.Offline.ReportData
	}
	if want == nil {
		t.Skip(CheckReportData, "", "no report data to compare with; extraData is "+hex.EncodeToString(extra))
		want = extra
	} else {
		t.Require(CheckReportData)
		t.Check(bytes.Equal(extra, want), CheckReportData, hex.EncodeToString(want), hex.EncodeToString(extra))
	}
	padded := zeroPadded(want, hclUserData)
	t.Check(padded != nil && bytes.Equal(userData, padded), CheckHCLUserData, hex.EncodeToString(padded), hex.EncodeToString(userData))
}

// zeroPadded is b with zero bytes up to size, nil when b is longer.
func zeroPadded(b []byte, size int) []byte {
	if len(b) > size {
		return nil
	}
	return append(bytes.Clone(b), make([]byte, size-len(b))...)
}

// checkHCLRuntime requires the hardware report's REPORT_DATA to name the
// runtime data, and with it the AK: its SHA-256 and zeros.
func checkHCLRuntime(t *Verdict, h *hclReport, reportData []byte) {
	t.Require(CheckHCLRuntime)
	sum := sha256.Sum256(h.runtime)
	want := zeroPadded(sum[:], 64)
	t.Check(bytes.Equal(reportData, want), CheckHCLRuntime, hex.EncodeToString(want), hex.EncodeToString(reportData))
}
