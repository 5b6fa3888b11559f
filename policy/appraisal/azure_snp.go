package appraisal

import (
	"errors"
	"fmt"
	"io"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// AzureSNP judges evidence of TEE "az-snp-vtpm": the SNP report names the
// vTPM's AK by the HCL runtime data, and the AK signs the PCRs.
type AzureSNP struct {
	SNP *SNP // roots, collateral and what is known of certificates; not nil
}

// TEE implements Verifier.
func (*AzureSNP) TEE() string { return "az-snp-vtpm" }

// Challenge implements Verifier: the HCL report names the AK, so that it needs
// no credential.
func (*AzureSNP) Challenge(*kbs.CVMAgentAuth, io.Reader) (*kbs.CVMAgentChallenge, *Pending, error) {
	return nil, nil, nil
}

// Appraise implements Verifier.
func (v *AzureSNP) Appraise(in Input) (*Appraisal, error) {
	if v.SNP == nil {
		return nil, errors.New("no verifier for the SNP report")
	}
	ev, err := kbs.DecodeAzureEvidence(v.TEE(), in.Primary)
	if err != nil {
		return nil, err
	}
	h, err := parseHCL(ev.HCLReport)
	if err != nil {
		return nil, err
	}
	if h.kind != hclSNP {
		return nil, fmt.Errorf("the HCL report holds a report of kind %s, expected %s", h.kind, hclSNP)
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

	vcek := []kbs.SNPCert{{Type: kbs.CertVCEK, Data: kbs.Bytes(ev.VCEK)}}
	facts.SNP = v.SNP.judge(t, h.report, vcek, in, snpVersionRaw)
	if s := facts.SNP; s != nil {
		// The paravisor's own level: another would be the guest's word.
		t.Check(s.VMPL == 0, CheckSNPVMPL, "0, the paravisor's", fmt.Sprint(s.VMPL))
	}
	checkHCLRuntime(t, h, h.report[0x50:0x90])
	pcrs := checkAzureQuote(t, in, q, h)
	if facts.SNP != nil && t.Outcome(CheckHCLRuntime) == Passed && t.Outcome(CheckQuoteSignature) == Passed {
		facts.PCRs, facts.Identity = pcrs, h.identity()
	}

	checkLaunch(t, &facts, in.InitData, launchPCR8(&facts))
	if in.Dialect == kbs.Dialect {
		t.Require(CheckEventLog)
	}
	checkLog(t, &facts, add.EventLog, in.Dialect, registerPCR14(&facts))
	t.Skip("host-data", "", "Azure launches the paravisor, whose HOST_DATA is not the guest's; PCR 8 binds the launch")
	t.Skip("hcl-vm-configuration", "", "the claims about the VM beside the keys are the host's settings; PCR 7 has secure boot")
	notChecked(t, &facts, add, others)
	return &Appraisal{Verdict: t, Facts: facts}, nil
}
