package appraisal

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Azure's recorded evidence in the session that it was made for.
func TestTrusteeAzureSNPEvidence(t *testing.T) {
	ev := azureSNPEvidence(t)
	v := &AzureSNP{SNP: lenient()}
	in := Input{Dialect: kbs.DialectKBS, Primary: read(t, "trustee-az-snp-vtpm-evidence-v2.json"), Time: amdTime}
	h, err := parseHCL(ev.HCLReport)
	if err != nil {
		t.Fatal(err)
	}
	copy(in.ReportData[:], h.userData)
	a, err := v.Appraise(in)
	if err != nil {
		t.Fatal(err)
	}
	rows(t, a.Verdict)
	mustPass(t, a)
	f := a.Facts
	if f.Identity != h.identity() || len(f.PCRs) != 24 || f.PCRs[0] != ev.Quote.PCRs[0] || f.SNP == nil || f.SNP.Product != "Milan" || f.SNP.VMPL != 0 {
		t.Fatalf("%+v", f)
	}
	for _, name := range []string{CheckQuoteSignature, CheckQuoteMagic, CheckReportData, CheckPCRDigest, CheckHCLUserData, CheckHCLRuntime, CheckSNPSignature, CheckSNPChain} {
		if a.Verdict.Outcome(name) != Passed {
			t.Errorf("%s: %s", name, a.Verdict.Outcome(name))
		}
	}
	in.ReportData[0] ^= 1
	if a, err = v.Appraise(in); err != nil {
		t.Fatal(err)
	}
	mustFail(t, a, CheckReportData)
	mustFail(t, a, CheckHCLUserData)
	in.Offline = &Offline{}
	if a, err = v.Appraise(in); err != nil {
		t.Fatal(err)
	}
	mustPass(t, a)
	if a.Verdict.Outcome(CheckReportData) != NotChecked || a.Verdict.Outcome(CheckHCLUserData) != Passed {
		t.Error("offline without report data")
	}
}

// Lessons 10 and 11: every part of the recorded evidence, changed one at a
// time, is refused by the check that is about it, or cannot be read.
func TestLesson10_AzureSNPEachValueMutated(t *testing.T) {
	other := snptest.New(t, snptest.Config{})
	for what, c := range map[string]struct {
		check  string // "": cannot be read
		mutate func(ev *kbs.AzureEvidence)
	}{
		"signature":     {CheckQuoteSignature, func(ev *kbs.AzureEvidence) { ev.Quote.Signature[7] ^= 1 }},
		"signature cut": {"", func(ev *kbs.AzureEvidence) { ev.Quote.Signature = ev.Quote.Signature[:255] }},
		"signature as TPMT_SIGNATURE": {"", func(ev *kbs.AzureEvidence) {
			ev.Quote.Signature = append(kbs.Hex{0, 0x14, 0, 11, 1, 0}, ev.Quote.Signature...)
		}},
		"magic":                         {CheckQuoteMagic, func(ev *kbs.AzureEvidence) { ev.Quote.Message[0] ^= 1 }},
		"clock":                         {CheckQuoteSignature, func(ev *kbs.AzureEvidence) { ev.Quote.Message[97] ^= 1 }},
		"extraData":                     {CheckReportData, func(ev *kbs.AzureEvidence) { ev.Quote.Message[50] ^= 1 }},
		"message cut":                   {"", func(ev *kbs.AzureEvidence) { ev.Quote.Message = ev.Quote.Message[:100] }},
		"message with more":             {"", func(ev *kbs.AzureEvidence) { ev.Quote.Message = append(ev.Quote.Message, 0) }},
		"a PCR":                         {CheckPCRDigest, func(ev *kbs.AzureEvidence) { ev.Quote.PCRs[23] = strings.Repeat("1", 64) }},
		"two PCRs swapped":              {CheckPCRDigest, func(ev *kbs.AzureEvidence) { ev.Quote.PCRs[0], ev.Quote.PCRs[1] = ev.Quote.PCRs[1], ev.Quote.PCRs[0] }},
		"a PCR too few":                 {"", func(ev *kbs.AzureEvidence) { ev.Quote.PCRs = ev.Quote.PCRs[1:] }},
		"runtime data":                  {CheckHCLRuntime, func(ev *kbs.AzureEvidence) { i := bytes.Index(ev.HCLReport, []byte("console")); ev.HCLReport[i] ^= 1 }},
		"user-data":                     {CheckHCLUserData, func(ev *kbs.AzureEvidence) { i := bytes.Index(ev.HCLReport, []byte("982F5C")); ev.HCLReport[i] = '8' }},
		"REPORT_DATA":                   {CheckHCLRuntime, func(ev *kbs.AzureEvidence) { ev.HCLReport[32+0x50] ^= 1 }},
		"REPORT_DATA after the hash":    {CheckHCLRuntime, func(ev *kbs.AzureEvidence) { ev.HCLReport[32+0x8f] ^= 1 }},
		"SNP measurement":               {CheckSNPSignature, func(ev *kbs.AzureEvidence) { ev.HCLReport[32+0x90] ^= 1 }},
		"SNP signature":                 {CheckSNPSignature, func(ev *kbs.AzureEvidence) { ev.HCLReport[32+0x2a0] ^= 1 }},
		"VMPL":                          {CheckSNPVMPL, func(ev *kbs.AzureEvidence) { ev.HCLReport[32+0x30] = 4 }},
		"VCEK of a made chain":          {CheckSNPChain, func(ev *kbs.AzureEvidence) { ev.VCEK = other.Signer.Vcek.Raw }},
		"VCEK of another chip":          {CheckSNPChip, func(ev *kbs.AzureEvidence) { ev.VCEK = read(t, "snp-report-v2-vcek.der") }},
		"no VCEK":                       {"", func(ev *kbs.AzureEvidence) { ev.VCEK = nil }},
		"a TD quote beside":             {"", func(ev *kbs.AzureEvidence) { ev.TDQuote = []byte{1} }},
		"version 1":                     {"", func(ev *kbs.AzureEvidence) { ev.Version = 1 }},
		"HCL report said to be of TDX":  {"", func(ev *kbs.AzureEvidence) { ev.HCLReport[1224] = 4 }},
		"HCL report cut":                {"", func(ev *kbs.AzureEvidence) { ev.HCLReport = ev.HCLReport[:1300] }},
		"debug bit in the guest policy": {CheckSNPDebug, func(ev *kbs.AzureEvidence) { ev.HCLReport[32+0x0a] |= 8 }},
	} {
		t.Run(what, func(t *testing.T) {
			ev := azureSNPEvidence(t)
			in := Input{Dialect: kbs.DialectKBS, Time: amdTime}
			if h, err := parseHCL(ev.HCLReport); err != nil {
				t.Fatal(err)
			} else {
				copy(in.ReportData[:], h.userData)
			}
			c.mutate(ev)
			var err error
			if in.Primary, err = json.Marshal(ev); err != nil {
				t.Fatal(err)
			}
			a, err := (&AzureSNP{SNP: lenient()}).Appraise(in)
			if c.check == "" {
				if err == nil {
					t.Fatalf("read, and judged %v", a.Verdict.Refusal())
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			mustFail(t, a, c.check)
		})
	}
}

// Every part of the recorded evidence that something signs or fixes: no byte
// of it can be another.
func TestEveryByteOfAzureEvidenceFlipped(t *testing.T) {
	if _, err := (&AzureSNP{}).Appraise(Input{}); err == nil {
		t.Error("judged without a verifier for the report")
	}
	good := azureSNPEvidence(t)
	h, err := parseHCL(good.HCLReport)
	if err != nil {
		t.Fatal(err)
	}
	in := Input{Dialect: kbs.DialectKBS, Time: amdTime}
	copy(in.ReportData[:], h.userData)
	v := &AzureSNP{SNP: lenient()}
	for name, part := range map[string]func(ev *kbs.AzureEvidence) []byte{
		"hcl_report": func(ev *kbs.AzureEvidence) []byte { return ev.HCLReport },
		"signature":  func(ev *kbs.AzureEvidence) []byte { return ev.Quote.Signature },
		"message":    func(ev *kbs.AzureEvidence) []byte { return ev.Quote.Message },
		"vcek":       func(ev *kbs.AzureEvidence) []byte { return ev.VCEK },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ev := azureSNPEvidence(t)
			b := part(ev)
			for i := 0; i < len(b); i += 3 {
				b[i] ^= 0x20
				primary, err := json.Marshal(ev)
				if err != nil {
					t.Fatal(err)
				}
				in := in
				in.Primary = primary
				if a, err := v.Appraise(in); err == nil && a.Verdict.Refusal() == nil {
					t.Fatalf("byte %d changed: accepted", i)
				}
				b[i] ^= 0x20
			}
		})
	}
}

// azureSession is one attestation under dialect cvm-agent/1.
type azureSession struct {
	verifier *AzureSNP
	chain    *snptest.Chain
	options  snptest.AzureOptions
	in       Input
}

func newAzureSession(t testing.TB) *azureSession {
	t.Helper()
	chain := snptest.New(t, snptest.Config{})
	initdata, err := policy.PackInitdata("sha256", map[string]string{"a": "b"})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := policy.ParseInitdata(initdata)
	if err != nil {
		t.Fatal(err)
	}
	pcr8, err := parsed.PCR8()
	if err != nil {
		t.Fatal(err)
	}
	log, events := logOf(t, "shop")
	s := &azureSession{verifier: &AzureSNP{SNP: &SNP{Roots: chain.Roots(), Collateral: chain.Collateral(t)}}, chain: chain}
	s.options.PCRs = map[int][32]byte{8: [32]byte(pcr8), 14: events}
	s.in = Input{Dialect: kbs.Dialect, InitData: initdata, Time: time.Now()}
	add := kbs.AdditionalCVMAgent{EventLog: log}
	if s.in.Additional, err = add.Encode(); err != nil {
		t.Fatal(err)
	}
	if s.in.ReportData, err = kbs.ReportData(s.in.Additional, "bm9uY2U=", kbs.TEEPubKey{Kty: "EC"}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *azureSession) appraise(t testing.TB) *Appraisal {
	t.Helper()
	s.in.Primary = s.chain.AzureEvidence(t, s.in.ReportData, s.options)
	a, err := s.verifier.Appraise(s.in)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestMadeAzureSNPEvidence(t *testing.T) {
	s := newAzureSession(t)
	a := s.appraise(t)
	mustPass(t, a)
	pcr8, events := s.options.PCRs[8], s.options.PCRs[14]
	if f := a.Facts; f.Log == nil || f.Log.Register != "PCR 14" || f.Launch == nil || !strings.HasPrefix(f.Identity, "az-ak:") || !f.SNP.NotRevoked ||
		f.PCRs[8] != hex.EncodeToString(pcr8[:]) || f.PCRs[14] != hex.EncodeToString(events[:]) {
		t.Fatalf("%+v", f)
	}
	if c, p, err := s.verifier.Challenge(nil, nil); c != nil || p != nil || err != nil {
		t.Fatal(c, p, err)
	}
	for what, c := range map[string]struct {
		check  string
		change func(s *azureSession)
	}{
		"VMPL 1":                   {CheckSNPVMPL, func(s *azureSession) { s.options.Report.VMPL = 1 }},
		"debug":                    {CheckSNPDebug, func(s *azureSession) { s.options.Report.Policy = 0xb0000 }},
		"PCR 8 zero (lesson 5)":    {CheckLaunch, func(s *azureSession) { s.options.PCRs[8] = [32]byte{} }},
		"PCR 8 of other init-data": {CheckLaunch, func(s *azureSession) { s.options.PCRs[8] = [32]byte{1} }},
		"PCR 14 of another log":    {CheckEventLog, func(s *azureSession) { s.options.PCRs[14] = [32]byte{1} }},
		"no log (lesson 9)":        {CheckEventLog, func(s *azureSession) { s.in.Additional = "" }},
		"user-data of another":     {CheckHCLUserData, func(s *azureSession) { s.options.UserData = make([]byte, 64) }},
		"user-data that goes on": {CheckHCLUserData, func(s *azureSession) {
			s.options.UserData = append(slices.Clone(s.in.ReportData[:]), bytes.Repeat([]byte{1}, 16)...)
		}},
		"no user-data": {CheckHCLUserData, func(s *azureSession) {
			s.options.Runtime = func(r string) string { return strings.Replace(r, `"user-data"`, `"data"`, 1) }
		}},
		"padded extraData": {CheckReportData, func(s *azureSession) {
			s.options.Attest = func(a *tpm2.TPMSAttest) {
				a.ExtraData.Buffer = append(slices.Clone(a.ExtraData.Buffer), make([]byte, 16)...)
			}
		}},
		"cut extraData": {CheckReportData, func(s *azureSession) {
			s.options.Attest = func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = a.ExtraData.Buffer[:32] }
		}},
		"another magic": {CheckQuoteMagic, func(s *azureSession) { s.options.Attest = func(a *tpm2.TPMSAttest) { a.Magic++ } }},
		"PCRs not selected": {CheckPCRDigest, func(s *azureSession) {
			s.options.Attest = func(a *tpm2.TPMSAttest) {
				q, _ := a.Attested.Quote()
				q.PCRSelect.PCRSelections[0].PCRSelect = []byte{1, 0, 0}
				a.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, q)
			}
		}},
		"revoked ASK (lesson 38)": {CheckSNPRevocation, func(s *azureSession) {
			crl := s.chain.CRL(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), s.chain.Config.Serial)
			s.verifier.SNP.Collateral = s.chain.CollateralWith(t, crl)
		}},
	} {
		t.Run(what, func(t *testing.T) {
			s := newAzureSession(t)
			c.change(s)
			mustFail(t, s.appraise(t), c.check)
		})
	}
}

func FuzzAzureSNPEvidence(f *testing.F) {
	f.Add(read(f, "trustee-az-snp-vtpm-evidence-v2.json"))
	v := &AzureSNP{SNP: lenient()}
	f.Fuzz(func(t *testing.T, b []byte) {
		// No report data of a session is that of the recording.
		a, err := v.Appraise(Input{Dialect: kbs.DialectKBS, Primary: b, Time: amdTime, ReportData: [48]byte{1}})
		if err == nil && a.Verdict.Refusal() == nil {
			t.Fatal("accepted")
		}
	})
}
