package appraisal

import (
	"crypto/rand"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

var allPCRs = []uint{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}

func roots(t *testing.T, ca *tpmtest.CA) []RootSet {
	t.Helper()
	set, err := ParseRoots("demo", ca.RootsPEM(t))
	if err != nil {
		t.Fatal(err)
	}
	return []RootSet{set}
}

// testdata/trustee-tpm-evidence.json is evidence from the repository
// confidential-containers/trustee (Apache-2.0), made for report data unknown
// here: what its quote signs is taken from it.
func TestTrusteeTPMEvidence(t *testing.T) {
	b, err := os.ReadFile("testdata/trustee-tpm-evidence.json")
	if err != nil {
		t.Fatal(err)
	}
	ev, err := kbs.DecodeTPMEvidence(b)
	if err != nil {
		t.Fatal(err)
	}
	q, err := parseQuote(ev)
	if err != nil {
		t.Fatal(err)
	}
	if err := q.verify(); err != nil {
		t.Errorf("the quote does not verify under ak_public: %v", err)
	}
	var rd [kbs.ReportDataSize]byte
	copy(rd[:], q.attest.ExtraData.Buffer)
	v := &TPM{TrustedAKs: []string{spkiFingerprint(ev.AKPublic)}}
	a, err := v.Appraise(Input{Dialect: kbs.DialectKBS, Primary: b, ReportData: rd, Time: time.Unix(1750000000, 0)})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range a.Verdict.Checks {
		t.Logf("%-24s %-12s expected %s, found %s", c.Name, c.Outcome, c.Expected, c.Found)
	}
	for _, name := range []string{CheckQuoteSignature, CheckQuoteMagic, CheckPCRDigest, CheckAKBound} {
		if a.Verdict.Outcome(name) != Passed {
			t.Errorf("%s: %s", name, a.Verdict.Outcome(name))
		}
	}
	// An AK that is not listed is not bound to anything.
	a, err = (&TPM{}).Appraise(Input{Dialect: kbs.DialectKBS, Primary: b, ReportData: rd})
	if err != nil || a.Verdict.Outcome(CheckAKBound) != Failed || a.Verdict.Refusal() == nil || a.Facts.Identity != "" {
		t.Errorf("an AK that nobody listed was bound: %+v, %v", a, err)
	}
}

// attest is one attestation by a real TPM under dialect cvm-agent/1.
type attest struct {
	verifier *TPM
	in       Input
	evidence *kbs.TPMEvidence
	add      kbs.AdditionalCVMAgent
	tpm      *tpmtest.TPM
	nonce    string
	key      kbs.TEEPubKey
}

// newAttest runs challenge, activation and quote.
func newAttest(t *testing.T, kind tpmtest.Kind, initdata, log []byte, extend func(*tpmtest.TPM)) *attest {
	t.Helper()
	ca := tpmtest.NewCA(t)
	p := tpmtest.Start(t, ca, kind)
	a := &attest{verifier: &TPM{EKRoots: roots(t, ca)}, tpm: p, nonce: "bm9uY2U=", key: kbs.TEEPubKey{Kty: "EC", Crv: "P-256", Alg: kbs.AlgECDH, X: "x", Y: "y"}}
	if extend != nil {
		extend(p)
	}
	challenge, pending, err := a.verifier.Challenge(p.Auth(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := p.Activate(challenge)
	if err != nil {
		t.Fatalf("TPM2_ActivateCredential: %v", err)
	}
	a.add = kbs.AdditionalCVMAgent{EventLog: log, Activation: secret}
	a.in = Input{Dialect: kbs.Dialect, InitData: initdata, Pending: pending, Time: time.Now()}
	a.quote(t, allPCRs...)
	return a
}

// quote makes the quote over what a says now.
func (a *attest) quote(t *testing.T, pcrs ...uint) {
	t.Helper()
	var err error
	if a.in.Additional, err = a.add.Encode(); err != nil {
		t.Fatal(err)
	}
	if a.in.ReportData, err = kbs.ReportData(a.in.Additional, a.nonce, a.key); err != nil {
		t.Fatal(err)
	}
	a.evidence = a.tpm.Evidence(a.in.ReportData, pcrs...)
}

func (a *attest) appraise(t *testing.T) (*Appraisal, error) {
	t.Helper()
	a.in.Primary = tpmtest.JSON(t, a.evidence)
	return a.verifier.Appraise(a.in)
}

// The rows that need neither log nor initdata pass for a real TPM.
func TestGenuineQuotePasses(t *testing.T) {
	for name, kind := range map[string]tpmtest.Kind{"RSA": tpmtest.RSA, "ECC": tpmtest.ECC} {
		t.Run(name, func(t *testing.T) {
			a, err := newAttest(t, kind, nil, nil, nil).appraise(t)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range []string{CheckQuoteSignature, CheckQuoteMagic, CheckReportData, CheckPCRSelection, CheckPCRDigest, CheckAKBound, CheckAKAttributes, CheckAKSame, CheckEKChain, CheckActivation} {
				if a.Verdict.Outcome(n) != Passed {
					t.Errorf("%s: %+v", n, a.Verdict.Checks)
				}
			}
		})
	}
}

// Lesson 9: evidence whose log is missing is refused.
func TestLesson09_LogMissing(t *testing.T) {
	a, err := newAttest(t, tpmtest.ECC, nil, nil, nil).appraise(t)
	if err != nil {
		t.Fatal(err)
	}
	if a.Verdict.Outcome(CheckEventLog) != Failed || a.Verdict.Refusal() == nil || !strings.Contains(a.Verdict.Refusal().Error(), CheckEventLog) {
		t.Fatalf("evidence without its log: %v", a.Verdict.Refusal())
	}
}

// Lessons 10 and 11: every expected value, changed one at a time, is refused,
// by the check that is about it.
func TestLesson10_EachValueMutated(t *testing.T) {
	base := newAttest(t, tpmtest.RSA, nil, nil, nil)
	other := tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.ECC)
	for what, c := range map[string]struct {
		check  string
		mutate func(a *attest)
	}{
		"signature byte":           {CheckQuoteSignature, func(a *attest) { a.evidence.Quote.Signature[40] ^= 1 }},
		"clock in the message":     {CheckQuoteSignature, func(a *attest) { flipInMessage(a.evidence) }},
		"magic":                    {CheckQuoteMagic, func(a *attest) { a.evidence.Quote.Message[0] ^= 1 }},
		"report data, first byte":  {CheckReportData, func(a *attest) { a.in.ReportData[0] ^= 1 }},
		"report data, byte 31":     {CheckReportData, func(a *attest) { a.in.ReportData[31] ^= 1 }},
		"a PCR value":              {CheckPCRDigest, func(a *attest) { a.evidence.Quote.PCRs[7] = strings.Repeat("ab", 32) }},
		"the key of another TPM":   {CheckQuoteSignature, func(a *attest) { a.evidence.AKPublic = other.AKSPKI }},
		"ak_public of another TPM": {CheckAKSame, func(a *attest) { a.in.Pending.AKPublic = other.AKPublic }},
		"EK of another issuer":     {CheckEKChain, func(a *attest) { a.in.Pending.EKCert = other.EKCert }},
		"EK roots of another set":  {CheckEKChain, func(a *attest) { a.verifier = &TPM{} }},
		"the clock, before issue":  {CheckEKChain, func(a *attest) { a.in.Time = a.in.Time.AddDate(-1, 0, 0) }},
		"the clock, after expiry":  {CheckEKChain, func(a *attest) { a.in.Time = time.Date(12000, 1, 1, 0, 0, 0, 0, time.UTC) }},
		"activated secret":         {CheckActivation, func(a *attest) { a.in.Pending.Secret = slices.Repeat([]byte{1}, 32) }},
		"no activated secret":      {CheckActivation, func(a *attest) { a.in.Pending.Secret = nil }},
		"fixedTPM":                 {CheckAKAttributes, attribute(func(o *tpm2.TPMAObject) { o.FixedTPM = false })},
		"fixedParent":              {CheckAKAttributes, attribute(func(o *tpm2.TPMAObject) { o.FixedParent = false })},
		"sensitiveDataOrigin":      {CheckAKAttributes, attribute(func(o *tpm2.TPMAObject) { o.SensitiveDataOrigin = false })},
		"restricted":               {CheckAKAttributes, attribute(func(o *tpm2.TPMAObject) { o.Restricted = false })},
		"sign":                     {CheckAKAttributes, attribute(func(o *tpm2.TPMAObject) { o.SignEncrypt = false })},
		"decrypt":                  {CheckAKAttributes, attribute(func(o *tpm2.TPMAObject) { o.Decrypt = true })},
	} {
		t.Run(what, func(t *testing.T) {
			a := *base
			ev, pending := *base.evidence, *base.in.Pending
			ev.Quote.Signature, ev.Quote.Message, ev.Quote.PCRs = slices.Clone(ev.Quote.Signature), slices.Clone(ev.Quote.Message), slices.Clone(ev.Quote.PCRs)
			a.evidence, a.in.Pending = &ev, &pending
			c.mutate(&a)
			r, err := a.appraise(t)
			if err != nil {
				t.Fatalf("expected %s to fail, found the error %v", c.check, err)
			}
			if r.Verdict.Outcome(c.check) != Failed || r.Verdict.Refusal() == nil {
				t.Fatalf("%s did not fail: %+v", c.check, r.Verdict.Checks)
			}
		})
	}
}

// Lesson 11: key, nonce and log are tied to the quote by report_data.
func TestLesson11_SwapKeyNonceLog(t *testing.T) {
	base := newAttest(t, tpmtest.ECC, nil, []byte("log"), nil)
	for what, swap := range map[string]func(a *attest){
		"key":   func(a *attest) { a.key.X = "z" },
		"nonce": func(a *attest) { a.nonce = "bm9uY2V=" },
		"log":   func(a *attest) { a.add.EventLog = []byte("gol") },
		"activation": func(a *attest) {
			a.add.Activation = slices.Repeat([]byte{7}, 32)
		},
	} {
		a := *base
		swap(&a)
		var err error
		if a.in.Additional, err = a.add.Encode(); err != nil {
			t.Fatal(err)
		}
		if a.in.ReportData, err = kbs.ReportData(a.in.Additional, a.nonce, a.key); err != nil {
			t.Fatal(err)
		}
		r, err := a.appraise(t)
		if err != nil || r.Verdict.Outcome(CheckReportData) != Failed {
			t.Errorf("another %s passes for the quoted one (%v)", what, err)
		}
	}
}

func TestQuoteMustCoverTheLog(t *testing.T) {
	a := newAttest(t, tpmtest.ECC, nil, []byte("log"), nil)
	a.quote(t, 0, 8)
	r, err := a.appraise(t)
	if err != nil || r.Verdict.Outcome(CheckEventLog) != Failed || r.Facts.PCRs[14] != "" || r.Facts.PCRs[8] == "" {
		t.Fatalf("%+v, %v", r, err)
	}
}

func TestUnrestrictedAKIsRefused(t *testing.T) {
	ca := tpmtest.NewCA(t)
	p := tpmtest.Start(t, ca, tpmtest.Unrestricted)
	v := &TPM{EKRoots: roots(t, ca)}
	_, pending, err := v.Challenge(p.Auth(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ev := tpmtest.JSON(t, p.Evidence([48]byte{}, allPCRs...))
	r, err := v.Appraise(Input{Dialect: kbs.Dialect, Primary: ev, Pending: pending, Time: time.Now()})
	if err != nil || r.Verdict.Outcome(CheckAKAttributes) != Failed || r.Facts.Identity != "" {
		t.Fatalf("%+v, %v", r, err)
	}
}

// A credential for one AK does not activate for another of the same TPM kind.
func TestCredentialIsForOneTPM(t *testing.T) {
	ca := tpmtest.NewCA(t)
	p, q := tpmtest.Start(t, ca, tpmtest.ECC), tpmtest.Start(t, ca, tpmtest.ECC)
	v := &TPM{EKRoots: roots(t, ca)}
	auth := p.Auth()
	auth.AKPublic = q.AKPublic // an AK that is not in p
	c, _, err := v.Challenge(auth, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Activate(c); err == nil {
		t.Error("a TPM activated a credential for an AK that it does not have")
	}
	if _, err := q.Activate(c); err == nil {
		t.Error("a TPM activated a credential for another EK")
	}
}

func TestEKCertificate(t *testing.T) {
	ca := tpmtest.NewCA(t)
	p := tpmtest.Start(t, ca, tpmtest.ECC)
	cert, err := parseEKCert(append(slices.Clone(p.EKCert), 0xff, 0xff, 0xff))
	if err != nil {
		t.Fatalf("padding after the certificate: %v", err)
	}
	for _, b := range []byte{1, 0xfe, 0x80} {
		if _, err := parseEKCert(append(slices.Clone(p.EKCert), b)); err == nil {
			t.Errorf("the byte %#x after the certificate was accepted", b)
		}
	}
	if _, err := verifyEK(cert, roots(t, ca), time.Now()); err != nil {
		t.Fatal(err)
	}
	noEKU := *cert
	noEKU.UnknownExtKeyUsage = nil
	if _, err := verifyEK(&noEKU, roots(t, ca), time.Now()); err == nil {
		t.Error("a certificate without the EK usage was accepted")
	}
	strange := *cert
	strange.UnhandledCriticalExtensions = append(slices.Clone(cert.UnhandledCriticalExtensions), []int{1, 2, 3})
	if _, err := verifyEK(&strange, roots(t, ca), time.Now()); err == nil {
		t.Error("an unknown critical extension was accepted")
	}
	// Listed, it needs no issuer.
	v := &TPM{ListedEKs: []string{spkiFingerprint(cert.RawSubjectPublicKeyInfo)}}
	if !v.checkEK(NewVerdict("x"), &Facts{}, Input{Pending: &Pending{EKCert: p.EKCert}}) {
		t.Error("a listed EK was refused")
	}
}

func TestVerdictOfNothingIsARefusal(t *testing.T) {
	var none *Verdict
	for what, v := range map[string]*Verdict{
		"nil":                       none,
		"nothing required":          {Checks: []Check{{Name: "a", Outcome: Passed}}},
		"a required check missing":  NewVerdict("a"),
		"a required check skipped":  {Checks: []Check{{Name: "a", Outcome: NotChecked}}, Required: []string{"a"}},
		"passed and failed":         {Checks: []Check{{Name: "a", Outcome: Passed}, {Name: "a", Outcome: Failed}}, Required: []string{"a"}},
		"a failure beside":          {Checks: []Check{{Name: "a", Outcome: Passed}, {Name: "b", Outcome: Failed}}, Required: []string{"a"}},
		"an outcome without a name": {Checks: []Check{{Name: "a", Outcome: "yes"}}, Required: []string{"a"}},
	} {
		if v.Refusal() == nil {
			t.Errorf("%s is accepted", what)
		}
	}
}

func FuzzTPMEvidence(f *testing.F) {
	b, err := os.ReadFile("testdata/trustee-tpm-evidence.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	v := &TPM{TrustedAKs: []string{strings.Repeat("a", 64)}}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := v.Appraise(Input{Dialect: kbs.DialectKBS, Primary: b})
		if err == nil && a.Verdict.Refusal() == nil {
			t.Fatal("accepted")
		}
	})
}

func FuzzChallengeInput(f *testing.F) {
	f.Add([]byte{0x30, 0}, []byte{0, 1, 0, 11})
	f.Fuzz(func(_ *testing.T, cert, public []byte) {
		_, _, _ = (&TPM{}).Challenge(&kbs.CVMAgentAuth{Version: kbs.Dialect, EKCert: cert, AKPublic: public}, rand.Reader)
		_, _ = parseAK(public)
		_ = checkEKName(cert)
		_ = checkEKAttributes(cert)
	})
}

// flipInMessage changes the clock inside a TPMS_ATTEST, which no other check
// looks at.
func flipInMessage(e *kbs.TPMEvidence) {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Quote.Message)
	if err != nil {
		panic(err)
	}
	a.ClockInfo.Clock++
	e.Quote.Message = tpm2.Marshal(*a)
}

func attribute(f func(*tpm2.TPMAObject)) func(*attest) {
	return func(a *attest) {
		pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](a.in.Pending.AKPublic)
		if err != nil {
			panic(err)
		}
		f(&pub.ObjectAttributes)
		a.in.Pending.AKPublic = tpm2.Marshal(*pub)
	}
}
