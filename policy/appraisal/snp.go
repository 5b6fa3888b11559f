package appraisal

import (
	"fmt"
	"io"
	"strings"

	"github.com/google/go-sev-guest/verify"
	"github.com/google/go-sev-guest/verify/trust"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// The checks of an SEV-SNP report, in the order of the table. CheckReportData,
// CheckLaunch and CheckEventLog belong to them as well.
const (
	CheckSNPVersion    = "report-version"
	CheckSNPReserved   = "reserved-bits"
	CheckSNPAlgorithm  = "signature-algorithm"
	CheckSNPSigningKey = CheckSigningKey // a rule may ask for more in a row of the same name
	CheckSNPChain      = "vendor-chain"
	CheckSNPDates      = "certificate-dates"
	CheckSNPRevocation = CheckRevocation
	CheckSNPSignature  = "report-signature"
	CheckSNPProduct    = "product"
	CheckSNPChip       = "chip-id"
	CheckSNPCertTCB    = "certificate-tcb"
	CheckSNPTCBOrder   = "tcb-order"
	CheckSNPPolicyForm = "guest-policy-form"
	CheckSNPDebug      = "guest-policy-debug"
	CheckSNPMigration  = "guest-policy-migration"
	CheckSNPAuthorKey  = "author-key"
	CheckSNPVMPL       = CheckVMPL
)

var snpRequired = []string{
	CheckSNPVersion, CheckSNPReserved, CheckSNPAlgorithm, CheckSNPSigningKey, CheckSNPChain, CheckSNPDates, CheckSNPSignature,
	CheckSNPProduct, CheckSNPCertTCB, CheckSNPTCBOrder, CheckSNPPolicyForm, CheckSNPDebug, CheckSNPMigration, CheckSNPAuthorKey, CheckSNPVMPL,
}

// Versions of the report's layout that are read: the JSON form of the wire has
// 3 to 5, a raw report may also be of version 2.
const (
	snpVersionRaw  = 2
	snpVersionWire = 3
	snpVersionMax  = 5
)

// SNP judges evidence of TEE "snp". Its fields are not changed once it is
// used; it is safe for concurrent use and keeps what it learnt about
// certificates.
type SNP struct {
	// Roots are by product line ("Milan", "Genoa", "Turin"); nil: AMD's own, as
	// go-sev-guest embeds them.
	Roots map[string][]*trust.AMDRootCerts
	// Collateral has certificates that the evidence lacks and revocation lists.
	// Nil has none, and then revocation, which is required, fails.
	Collateral *collateral.Source

	chains chainCache
	lists  listCache
}

// TEE implements Verifier.
func (*SNP) TEE() string { return "snp" }

// Challenge implements Verifier: SNP needs no credential.
func (*SNP) Challenge(*kbs.CVMAgentAuth, io.Reader) (*kbs.CVMAgentChallenge, *Pending, error) {
	return nil, nil, nil
}

// Appraise implements Verifier.
func (v *SNP) Appraise(in Input) (*Appraisal, error) {
	ev, err := kbs.DecodeSNPEvidence(in.Primary)
	if err != nil {
		return nil, err
	}
	raw, err := ev.Report.Raw()
	if err != nil {
		return nil, fmt.Errorf("snp evidence: %w", err)
	}
	return v.appraise(raw, ev.CertChain, in, snpVersionWire)
}

// AppraiseRaw judges a report as the firmware wrote it, of kbs.SNPReportSize
// bytes, with the certificates that came with it. in.Primary is not looked at.
func (v *SNP) AppraiseRaw(raw []byte, certs []kbs.SNPCert, in Input) (*Appraisal, error) {
	return v.appraise(raw, certs, in, snpVersionRaw)
}

func (v *SNP) appraise(raw []byte, certs []kbs.SNPCert, in Input, lowest uint32) (*Appraisal, error) {
	if len(raw) != kbs.SNPReportSize {
		return nil, fmt.Errorf("attestation report has %d bytes, expected %d", len(raw), kbs.SNPReportSize)
	}
	add, others, err := kbs.DecodeAdditional(in.Additional)
	if err != nil {
		return nil, err
	}
	t := NewVerdict()
	facts := Facts{TEE: v.TEE(), Dialect: in.Dialect}
	proven := v.judge(t, raw, certs, in, lowest)
	checkReportField(t, in, raw[0x50:0x90])
	var host SNPFacts // what is not proven binds nothing
	reg := noReport
	if proven != nil {
		reg = noRegister
		facts.SNP, host = proven, *proven
		facts.Identity = "snp:" + proven.ReportID
	}
	checkLaunch(t, &facts, in.InitData, launchHostData(&host))
	if in.Dialect == kbs.Dialect {
		t.Require(CheckEventLog)
	}
	checkLog(t, &facts, add.EventLog, in.Dialect, reg)
	notChecked(t, &facts, add, others)
	for _, c := range certs {
		if kind, ok := strings.CutPrefix(string(c.Type), "OTHER:"); ok {
			t.Skip("certificate:"+kind, "", "not known here")
			facts.Not = append(facts.Not, "certificate:"+kind)
		}
	}
	return &Appraisal{Verdict: t, Facts: facts}, nil
}

// notChecked lists the members of the additional evidence that this TEE has no
// use for, and those that nobody knows.
func notChecked(t *Verdict, facts *Facts, add kbs.AdditionalCVMAgent, others []string) {
	if len(add.Activation) > 0 {
		others = append(others, "cvm-agent-activation")
	}
	if add.Instance != "" {
		others = append(others, "cvm-agent-instance")
	}
	for _, name := range others {
		t.Skip("additional-evidence:"+name, "", "not known here, or not needed on "+facts.TEE)
		facts.Not = append(facts.Not, name)
	}
}

// judge fills the rows that concern the report and its signing key alone. It
// returns what the report says when AMD's key has signed it, and nil
// otherwise; other rows may still have failed.
func (v *SNP) judge(t *Verdict, raw []byte, certs []kbs.SNPCert, in Input, lowest uint32) *SNPFacts {
	t.Require(snpRequired...)
	r := readSNPReport(t, raw, lowest)
	if r == nil {
		return nil
	}
	r.checkContent(t)
	facts := r.facts()
	key := v.signingKey(t, r, certs)
	if key == nil {
		return nil
	}
	key.checkDates(t, in.Time)
	facts.NotRevoked = v.checkRevocation(t, key, certs, in.Time)
	key.checkAgainst(t, r)
	if err := verify.SnpReportSignature(raw, key.leaf); err != nil {
		t.Fail(CheckSNPSignature, "ECDSA P-384 with SHA-384 by the "+key.kind(), err.Error())
		return nil
	}
	t.Pass(CheckSNPSignature, "ECDSA P-384 with SHA-384 by the "+key.kind(), "valid")
	facts.Product, facts.SigningKey = key.line, strings.ToLower(key.kind())
	return facts
}
