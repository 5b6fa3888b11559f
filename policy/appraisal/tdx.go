package appraisal

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// The checks of TDX evidence, in the order of the table, beside report-data,
// launch-binding and event-log.
const (
	CheckTDXVersion     = "tdx-quote-version"
	CheckTDXHeader      = "tdx-quote-header"
	CheckTDXChain       = "tdx-pck-chain"
	CheckTDXSignature   = "tdx-quote-signature"
	CheckTDXQESignature = "tdx-qe-report-signature"
	CheckTDXQEData      = "tdx-qe-report-data"
	CheckTDXLibrary     = "tdx-library"
	CheckTDXRevocation  = "tdx-revocation"
	CheckTDXDebug       = "tdx-debug"
	CheckTDXMigratable  = "tdx-migratable"
	CheckTDXAttributes  = "tdx-attributes"
	CheckTDXXFAM        = "tdx-xfam"
	CheckTDXModule      = "tdx-module"
	CheckTDXTCBInfo     = "tdx-tcb-info"
	CheckTDXTCBLevel    = "tdx-tcb-level"
	CheckTDXQEIdentity  = "tdx-qe-identity"
	CheckTDXTCBStatus   = "tdx-tcb-status"
	CheckCCEL           = "cc-eventlog"
	CheckInstanceKey    = "instance-key"
)

// TDX judges evidence of TEE "tdx": a DCAP quote, version 4 or 5. It is used
// by pointer and safe for concurrent use; its fields are not changed once it
// is used.
type TDX struct {
	Roots      *x509.CertPool     // nil: the Intel SGX Root CA
	Collateral *collateral.Source // nil: there is none

	mu     sync.Mutex
	chains map[[sha256.Size]byte]*pckChain
	parsed map[string]any
}

var errNoTime = errors.New("an appraisal needs a time")

// TEE implements Verifier.
func (*TDX) TEE() string { return "tdx" }

// Challenge implements Verifier. The instance names itself by a key of its own
// over the session's nonce, so there is nothing to ask.
func (*TDX) Challenge(*kbs.CVMAgentAuth, io.Reader) (*kbs.CVMAgentChallenge, *Pending, error) {
	return nil, nil, nil
}

// Appraise implements Verifier.
func (v *TDX) Appraise(in Input) (*Appraisal, error) {
	ev, err := kbs.DecodeTDXEvidence(in.Primary)
	if err != nil {
		return nil, err
	}
	return v.AppraiseRaw(ev.Quote, ev.EventLog, in)
}

// AppraiseRaw judges a bare quote, and the CCEL beside it if there is one, in
// place of in.Primary.
func (v *TDX) AppraiseRaw(quote, ccel []byte, in Input) (*Appraisal, error) {
	if in.Time.IsZero() {
		return nil, errNoTime
	}
	add, others, err := kbs.DecodeAdditional(in.Additional)
	if err != nil {
		return nil, err
	}
	t := NewVerdict()
	facts := Facts{TEE: v.TEE(), Dialect: in.Dialect}
	q, err := parseTDXQuote(quote)
	var version *tdxVersionError
	switch {
	case errors.As(err, &version):
		return refuseTDXVersion(t, facts, version), nil
	case err != nil:
		return nil, err
	}
	facts.TDX = v.checkQuote(t, q, in.Time)
	checkReportField(t, in, q.reportData())

	proven := facts.TDX
	if proven == nil {
		proven = &TDXFacts{}
	}
	checkLaunch(t, &facts, in.InitData, launchMRConfigID(proven))
	if in.Dialect == kbs.Dialect {
		t.Require(CheckEventLog)
	}
	checkLog(t, &facts, add.EventLog, in.Dialect, registerRTMR3(proven))
	checkCCEL(t, ccel, proven.RTMRs, t.Outcome(CheckEventLog) == Passed)
	v.identify(t, &facts, in, q, add.Instance)

	t.Skip("tdx-owner", "", "MROWNER and MROWNERCONFIG are facts; no rule pins them")
	t.Skip("tdx-user-data", "", "the quote header's user data is the quoting enclave's own")
	if in.Dialect == kbs.Dialect && in.Offline == nil {
		add.Instance = "" // looked at above
	}
	notChecked(t, &facts, add, others)
	return &Appraisal{Verdict: t, Facts: facts}, nil
}

func refuseTDXVersion(t *Verdict, facts Facts, found *tdxVersionError) *Appraisal {
	t.Require(CheckTDXVersion)
	t.Fail(CheckTDXVersion, "4 or 5", found.Error())
	return &Appraisal{Verdict: t, Facts: facts}
}

// checkQuote fills the rows that concern the quote and Intel's collateral
// alone. It returns what the quote says, or nil unless Intel's chain vouches
// for it; the rows about its content are filled either way.
func (v *TDX) checkQuote(t *Verdict, q *tdxQuote, now time.Time) *TDXFacts {
	t.Require(CheckTDXVersion, CheckTDXHeader, CheckTDXChain, CheckTDXSignature, CheckTDXQESignature, CheckTDXQEData)
	t.Pass(CheckTDXVersion, "4 or 5", q.describe())
	q.checkHeader(t)
	chain := v.checkChain(t, q, now)
	q.checkSignatures(t, chain)
	v.checkByLibrary(t, q, now)

	f := q.facts()
	t.Require(CheckTDXDebug, CheckTDXMigratable, CheckTDXAttributes, CheckTDXXFAM, CheckTDXModule)
	q.checkBody(t)
	if chain == nil {
		for _, name := range []string{CheckTDXRevocation, CheckTDXTCBInfo, CheckTDXTCBLevel, CheckTDXQEIdentity, CheckTDXTCBStatus} {
			t.Skip(name, "", "no PCK chain that counts")
		}
		return nil
	}
	f.FMSPC = strings.ToLower(chain.ext.FMSPC)
	root := v.checkRevocation(t, f, chain, now)
	v.checkTCB(t, f, q, chain, root, now)
	for _, name := range []string{CheckTDXHeader, CheckTDXChain, CheckTDXSignature, CheckTDXQESignature, CheckTDXQEData} {
		if t.Outcome(name) != Passed {
			return nil
		}
	}
	if t.Outcome(CheckTDXLibrary) == Failed {
		return nil
	}
	return f
}

// checkReportField compares a hardware report's 64 bytes with this session's 48
// and zeros, or with what an offline caller knows, which may be nothing.
func checkReportField(t *Verdict, in Input, found []byte) {
	want := in.ReportData[:]
	if in.Offline != nil {
		if want = in.Offline.ReportData; want == nil {
			t.Skip(CheckReportData, "", "no report data to compare with; the field is "+hex.EncodeToString(found))
			return
		}
	}
	t.Require(CheckReportData)
	padded := zeroPadded(want, len(found))
	if padded == nil {
		t.Fail(CheckReportData, fmt.Sprintf("%d bytes, more than the field has", len(want)), hex.EncodeToString(found))
		return
	}
	t.Check(bytes.Equal(found, padded), CheckReportData, hex.EncodeToString(padded), hex.EncodeToString(found))
}
