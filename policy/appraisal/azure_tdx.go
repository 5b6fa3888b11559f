package appraisal

import (
	"errors"
	"fmt"
	"io"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// AzureTDX judges evidence of TEE "az-tdx-vtpm": the TD quote names the vTPM's
// AK by the HCL runtime data, and the AK signs the PCRs.
type AzureTDX struct {
	TDX *TDX // roots, collateral and what is remembered of both
}

// TEE implements Verifier.
func (*AzureTDX) TEE() string { return "az-tdx-vtpm" }

// Challenge implements Verifier: the HCL report names the AK, so that it needs
// no credential.
func (*AzureTDX) Challenge(*kbs.CVMAgentAuth, io.Reader) (*kbs.CVMAgentChallenge, *Pending, error) {
	return nil, nil, nil
}

// Appraise implements Verifier.
func (v *AzureTDX) Appraise(in Input) (*Appraisal, error) {
	if in.Time.IsZero() {
		return nil, errNoTime
	}
	ev, err := kbs.DecodeAzureEvidence(v.TEE(), in.Primary)
	if err != nil {
		return nil, err
	}
	h, err := parseHCL(ev.HCLReport)
	if err != nil {
		return nil, err
	}
	if h.kind != hclTDX {
		return nil, fmt.Errorf("the HCL report holds a report of kind %s, expected %s", h.kind, hclTDX)
	}
	q, err := azureQuote(&ev.Quote, h)
	if err != nil {
		return nil, err
	}
	add, others, err := kbs.DecodeAdditional(in.Additional)
	if err != nil {
		return nil, err
	}
	t := NewVerdict()
	facts := Facts{TEE: v.TEE(), Dialect: in.Dialect}

	td, err := parseTDXQuote(ev.TDQuote)
	var version *tdxVersionError
	switch {
	case errors.As(err, &version):
		return refuseTDXVersion(t, facts, version), nil
	case err != nil:
		return nil, err
	}
	facts.TDX = v.TDX.checkQuote(t, td, in.Time)
	checkHCLRuntime(t, h, td.reportData())
	pcrs := checkAzureQuote(t, in, q, h)
	if facts.TDX != nil && t.Outcome(CheckHCLRuntime) == Passed && t.Outcome(CheckQuoteSignature) == Passed {
		facts.PCRs, facts.Identity = pcrs, h.identity()
	}

	checkLaunch(t, &facts, in.InitData, launchPCR8(&facts))
	if in.Dialect == kbs.Dialect {
		t.Require(CheckEventLog)
	}
	checkLog(t, &facts, add.EventLog, in.Dialect, registerPCR14(&facts))
	t.Skip("mrconfigid", "", "Azure launches the paravisor, whose MRCONFIGID is not the guest's; PCR 8 binds the launch")
	t.Skip("rtmrs", "", "the paravisor's own; the guest's boot is in the PCRs")
	t.Skip("hcl-td-report", "", "its MAC is good on its own machine alone; the quote over the same runtime data counts")
	t.Skip("hcl-vm-configuration", "", "the claims about the VM beside the keys are the host's settings; PCR 7 has secure boot")
	notChecked(t, &facts, add, others)
	return &Appraisal{Verdict: t, Facts: facts}, nil
}
