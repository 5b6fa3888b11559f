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
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// azureTDX is one attestation of an Azure TD under dialect cvm-agent/1.
type azureTDX struct {
	verifier *AzureTDX
	platform *tdxtest.Platform
	report   tdxtest.Report
	options  snptest.AzureOptions
	change   []func(*tdxtest.Parts)
	after    func(*kbs.AzureEvidence)
	in       Input
}

func newAzureTDX(t testing.TB, c tdxtest.Config) *azureTDX {
	t.Helper()
	p := tdxtest.New(t, c)
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
	s := &azureTDX{
		verifier: &AzureTDX{TDX: &TDX{Roots: p.Roots(), Collateral: p.Source(t)}}, platform: p,
		report:  tdxtest.Report{MRTD: fill(1), RTMR: [4][48]byte{fill(2)}},
		options: snptest.AzureOptions{PCRs: map[int][32]byte{8: [32]byte(pcr8), 14: events}},
		in:      Input{Dialect: kbs.Dialect, InitData: initdata, Time: time.Now()},
	}
	add := kbs.AdditionalCVMAgent{EventLog: log}
	if s.in.Additional, err = add.Encode(); err != nil {
		t.Fatal(err)
	}
	if s.in.ReportData, err = kbs.ReportData(s.in.Additional, "bm9uY2U=", kbs.TEEPubKey{Kty: "EC"}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *azureTDX) appraise(t testing.TB) (*Appraisal, error) {
	t.Helper()
	s.in.Primary = s.platform.AzureEvidence(t, s.in.ReportData, s.report, s.options, s.change...)
	if s.after != nil {
		var ev kbs.AzureEvidence
		if err := json.Unmarshal(s.in.Primary, &ev); err != nil {
			t.Fatal(err)
		}
		s.after(&ev)
		var err error
		if s.in.Primary, err = json.Marshal(ev); err != nil {
			t.Fatal(err)
		}
	}
	return s.verifier.Appraise(s.in)
}

func TestMadeAzureTDXEvidence(t *testing.T) {
	s := newAzureTDX(t, tdxtest.Config{})
	a, err := s.appraise(t)
	if err != nil {
		t.Fatal(err)
	}
	accepted(t, a)
	pcr8, events := s.options.PCRs[8], s.options.PCRs[14]
	if f := a.Facts; f.TEE != "az-tdx-vtpm" || f.Log == nil || f.Log.Register != "PCR 14" || f.Launch == nil || !strings.HasPrefix(f.Identity, "az-ak:") || len(f.Identity) != 6+64 ||
		!f.TDX.NotRevoked || f.TDX.TCBStatus != "UpToDate" || f.TDX.MRTD != strings.Repeat("01", 48) ||
		f.PCRs[8] != hex.EncodeToString(pcr8[:]) || f.PCRs[14] != hex.EncodeToString(events[:]) || len(f.PCRs) != 24 {
		t.Fatalf("%+v", f)
	}
	if c, p, err := s.verifier.Challenge(nil, nil); c != nil || p != nil || err != nil {
		t.Fatal(c, p, err)
	}

	// Offline and without a session the two report data still agree.
	s.in.Offline, s.in.Dialect = &Offline{}, kbs.DialectKBS
	if a, err = s.verifier.Appraise(s.in); err != nil {
		t.Fatal(err)
	}
	accepted(t, a)
	if a.Verdict.Outcome(CheckReportData) != NotChecked || a.Verdict.Outcome(CheckHCLUserData) != Passed {
		t.Error("offline without report data")
	}
	s.in.Time = time.Time{}
	if _, err := s.verifier.Appraise(s.in); err == nil {
		t.Error("judged without a time")
	}
}

// Lessons 5, 9, 10, 11: each part alone changed is refused by the check that is
// about it, or cannot be read.
func TestLesson10_AzureTDXEachValueMutated(t *testing.T) {
	other := tdxtest.New(t, tdxtest.Config{})
	attest := func(change func(*tpm2.TPMSAttest)) func(*azureTDX) {
		return func(s *azureTDX) { s.options.Attest = change }
	}
	after := func(change func(*kbs.AzureEvidence)) func(*azureTDX) {
		return func(s *azureTDX) { s.after = change }
	}
	body := func(at int, b ...byte) func(*azureTDX) {
		return func(s *azureTDX) {
			s.change = append(s.change, func(p *tdxtest.Parts) { copy(p.Body[at:], b) })
		}
	}
	for what, c := range map[string]struct {
		check  string // "": cannot be read
		change func(*azureTDX)
	}{
		"PCR 8 zero":               {CheckLaunch, func(s *azureTDX) { s.options.PCRs[8] = [32]byte{} }},
		"PCR 8 of other init-data": {CheckLaunch, func(s *azureTDX) { s.options.PCRs[8] = [32]byte{1} }},
		"PCR 14 of another log":    {CheckEventLog, func(s *azureTDX) { s.options.PCRs[14] = [32]byte{1} }},
		"no log":                   {CheckEventLog, func(s *azureTDX) { s.in.Additional = "" }},
		"another session":          {CheckReportData, func(s *azureTDX) { s.after = func(*kbs.AzureEvidence) { s.in.ReportData[0] ^= 1 } }},
		"user-data of another":     {CheckHCLUserData, func(s *azureTDX) { s.options.UserData = make([]byte, 64) }},
		"user-data that goes on": {CheckHCLUserData, func(s *azureTDX) {
			s.options.UserData = append(slices.Clone(s.in.ReportData[:]), bytes.Repeat([]byte{1}, 16)...)
		}},
		"no user-data": {CheckHCLUserData, func(s *azureTDX) {
			s.options.Runtime = func(r string) string { return strings.Replace(r, `"user-data"`, `"data"`, 1) }
		}},
		"padded extraData":        {CheckReportData, attest(func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = append(slices.Clone(a.ExtraData.Buffer), 0) })},
		"another magic":           {CheckQuoteMagic, attest(func(a *tpm2.TPMSAttest) { a.Magic++ })},
		"TPM signature":           {CheckQuoteSignature, after(func(ev *kbs.AzureEvidence) { ev.Quote.Signature[9] ^= 1 })},
		"a PCR":                   {CheckPCRDigest, after(func(ev *kbs.AzureEvidence) { ev.Quote.PCRs[7] = strings.Repeat("1", 64) })},
		"runtime data":            {CheckHCLRuntime, after(func(ev *kbs.AzureEvidence) { ev.HCLReport[bytes.Index(ev.HCLReport, []byte("secure"))] ^= 1 })},
		"a quote over other data": {CheckHCLRuntime, body(520, 1, 2, 3)},
		"bytes after the hash":    {CheckHCLRuntime, body(552, 1)},
		"a changed TD quote":      {CheckTDXSignature, after(func(ev *kbs.AzureEvidence) { ev.TDQuote[48+136] ^= 1 })},
		"another machine's chain": {CheckTDXChain, func(s *azureTDX) {
			s.change = append(s.change, func(p *tdxtest.Parts) { p.Chain = other.Chain })
		}},
		"debug":                   {CheckTDXDebug, body(120, 1)},
		"migratable":              {CheckTDXMigratable, body(123, 0x30)},
		"TD quote version 3":      {CheckTDXVersion, after(func(ev *kbs.AzureEvidence) { ev.TDQuote[0] = 3 })},
		"TD quote cut":            {"", after(func(ev *kbs.AzureEvidence) { ev.TDQuote = ev.TDQuote[:1000] })},
		"no TD quote":             {"", after(func(ev *kbs.AzureEvidence) { ev.TDQuote = nil })},
		"a VCEK beside":           {"", after(func(ev *kbs.AzureEvidence) { ev.VCEK = []byte{1} })},
		"HCL report of SNP":       {"", after(func(ev *kbs.AzureEvidence) { ev.HCLReport[1224] = 2 })},
		"TPM signature cut":       {"", after(func(ev *kbs.AzureEvidence) { ev.Quote.Signature = ev.Quote.Signature[1:] })},
		"TPM message cut":         {"", after(func(ev *kbs.AzureEvidence) { ev.Quote.Message = ev.Quote.Message[:40] })},
		"additional not readable": {"", func(s *azureTDX) { s.in.Additional = "{" }},
		"version 1":               {"", after(func(ev *kbs.AzureEvidence) { ev.Version = 1 })},
	} {
		t.Run(what, func(t *testing.T) {
			s := newAzureTDX(t, tdxtest.Config{})
			c.change(s)
			a, err := s.appraise(t)
			switch {
			case c.check == "" && err == nil:
				t.Fatalf("read, and judged %v", a.Verdict.Refusal())
			case c.check == "":
			case err != nil:
				t.Fatal(err)
			default:
				refused(t, a, c.check)
			}
		})
	}
	// Lesson 38, and facts only of a quote that counts.
	s := newAzureTDX(t, tdxtest.Config{List: revoke("pck", tdxtest.SerialPCK)})
	a, err := s.appraise(t)
	if err != nil {
		t.Fatal(err)
	}
	refused(t, a, CheckTDXRevocation)
	s.change = []func(*tdxtest.Parts){func(p *tdxtest.Parts) { p.PCK = tdxtest.NewKey(t) }}
	if a, err = s.appraise(t); err != nil {
		t.Fatal(err)
	}
	refused(t, a, CheckTDXQESignature, CheckLaunch, CheckEventLog)
	if f := a.Facts; f.TDX != nil || f.PCRs != nil || f.Identity != "" || f.Launch != nil || f.Log != nil {
		t.Errorf("facts that nobody vouches for: %+v", f)
	}
}

func FuzzAzureTDXEvidence(f *testing.F) {
	s := newAzureTDX(f, tdxtest.Config{})
	if _, err := s.appraise(f); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(s.in.Primary))
	v := &AzureTDX{TDX: &TDX{}}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := v.Appraise(Input{Dialect: kbs.DialectKBS, Primary: b, Time: s.in.Time})
		if err == nil && a.Verdict.Refusal() == nil {
			t.Fatal("accepted")
		}
	})
}
