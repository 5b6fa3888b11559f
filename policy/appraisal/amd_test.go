package appraisal

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/kds"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func (s *snpSession) appraiseRaw(t testing.TB, certs []kbs.SNPCert) *Appraisal {
	t.Helper()
	s.bind(t)
	var rd [64]byte
	copy(rd[:], s.in.ReportData[:])
	a, err := s.verifier.AppraiseRaw(s.chain.Report(t, rd, s.options), certs, s.in)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// The dates of certificates are compared with the verifier's clock, the known
// chain's too.
func TestCertificateDates(t *testing.T) {
	s := newSNPSession(t, snptest.Config{Created: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)})
	s.verifier.Collateral.Policy.Revocation = collateral.IfPresent
	s.verifier.Collateral.Dir = ""
	first, last := s.chain.Signer.Ask.NotBefore, s.chain.Signer.Vcek.NotAfter
	for _, c := range []struct {
		what string
		at   time.Time
		want Outcome
	}{
		{"in the middle", first.AddDate(1, 0, 0), Passed},
		{"before the ASK is valid", first.Add(-time.Second), Failed},
		{"on its first second", first, Passed},
		{"on the VCEK's last", last, Passed},
		{"after it", last.Add(time.Second), Failed},
		{"no clock", time.Time{}, Failed},
	} {
		s.in.Time = c.at
		a := s.appraise(t)
		if got := a.Verdict.Outcome(CheckSNPDates); got != c.want || (a.Verdict.Refusal() == nil) != (c.want == Passed) {
			t.Errorf("%s: %s, expected %s: %v", c.what, got, c.want, a.Verdict.Refusal())
		}
	}
}

// Certificates that do not belong to the report, or to AMD.
func TestWrongCertificates(t *testing.T) {
	tcb := snptest.DefaultTCB("Milan")
	tcb.SNP++
	sameKeys := func(c snptest.Config) *snptest.Chain { return snptest.New(t, c) }
	otherChip, otherTCB, genoa := sameKeys(snptest.Config{ChipID: bytes.Repeat([]byte{2}, 64)}), sameKeys(snptest.Config{TCB: &tcb}), sameKeys(snptest.Config{Line: "Genoa"})
	s := newSNPSession(t, snptest.Config{})
	vcek, vlek, ask, asvk, ark := s.chain.Signer.Vcek.Raw, s.chain.Signer.Vlek.Raw, s.chain.Signer.Ask.Raw, s.chain.Signer.Asvk.Raw, s.chain.Signer.Ark.Raw
	amd := amdRoots()["Milan"][0].ProductCerts
	cert := func(kind kbs.CertType, der []byte) kbs.SNPCert { return kbs.SNPCert{Type: kind, Data: der} }
	for what, c := range map[string]struct {
		check string
		vlek  bool
		certs []kbs.SNPCert
	}{
		"a VCEK of another chip":          {CheckSNPChip, false, []kbs.SNPCert{cert(kbs.CertVCEK, otherChip.Signer.Vcek.Raw)}},
		"a VCEK for another TCB":          {CheckSNPCertTCB, false, []kbs.SNPCert{cert(kbs.CertVCEK, otherTCB.Signer.Vcek.Raw)}},
		"a VLEK for another TCB":          {CheckSNPCertTCB, true, []kbs.SNPCert{cert(kbs.CertVLEK, otherTCB.Signer.Vlek.Raw)}},
		"a VCEK of another product":       {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, genoa.Signer.Vcek.Raw), cert(kbs.CertASK, genoa.Signer.Ask.Raw)}},
		"a VLEK where the VCEK signed":    {CheckSNPSigningKey, false, []kbs.SNPCert{cert(kbs.CertVLEK, vlek)}},
		"a VCEK where the VLEK signed":    {CheckSNPSigningKey, true, []kbs.SNPCert{cert(kbs.CertVCEK, vcek)}},
		"a VLEK called VCEK":              {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, vlek)}},
		"a VCEK called VLEK":              {CheckSNPChain, true, []kbs.SNPCert{cert(kbs.CertVLEK, vcek)}},
		"two VCEKs":                       {CheckSNPSigningKey, false, []kbs.SNPCert{cert(kbs.CertVCEK, vcek), cert(kbs.CertVCEK, vcek)}},
		"an empty VCEK":                   {CheckSNPSigningKey, false, []kbs.SNPCert{cert(kbs.CertVCEK, nil)}},
		"the ASK called VCEK":             {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, ask)}},
		"a VCEK with a byte after it":     {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, append(bytes.Clone(vcek), 0))}},
		"a VCEK with a byte changed":      {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, flipped(vcek, len(vcek)-9))}},
		"an ASK that is no certificate":   {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, vcek), cert(kbs.CertASK, []byte{0x30})}},
		"AMD's ARK for a made chain":      {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, vcek), cert(kbs.CertASK, ask), cert(kbs.CertARK, amd.Ark.Raw)}},
		"an ARK that is no certificate":   {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, vcek), cert(kbs.CertARK, []byte{0})}},
		"no certificate":                  {CheckSNPSigningKey, false, nil},
		"no VLEK":                         {CheckSNPSigningKey, true, []kbs.SNPCert{cert(kbs.CertASK, asvk), cert(kbs.CertARK, ark)}},
		"more than is read of a VCEK":     {CheckSNPSigningKey, false, []kbs.SNPCert{cert(kbs.CertVCEK, make([]byte, 20<<10))}},
		"a CA certificate with its name":  {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, caNamedVCEK(t, s.chain))}},
		"a certificate signed by the ARK": {CheckSNPChain, false, []kbs.SNPCert{cert(kbs.CertVCEK, ark)}},
	} {
		t.Run(what, func(t *testing.T) {
			s := *s
			s.verifier = &SNP{Roots: s.chain.Roots(), Collateral: s.verifier.Collateral}
			s.options.VLEK = c.vlek
			mustFail(t, s.appraiseRaw(t, c.certs), c.check)
			if s.verifier.chains.order != nil && c.check == CheckSNPChain {
				t.Error("a chain that failed is known")
			}
		})
	}
	// An ASK and an ARK that are not asked for change nothing, an ASK of AMD's is
	// passed over for the pinned one.
	mustPass(t, s.appraiseRaw(t, []kbs.SNPCert{cert(kbs.CertVCEK, vcek), cert(kbs.CertASK, amd.Ask.Raw)}))
	mustPass(t, s.appraiseRaw(t, []kbs.SNPCert{cert(kbs.CertVCEK, vcek), cert(kbs.CertVLEK, vlek), cert(kbs.CertASK, ask), cert(kbs.CertARK, ark)}))
}

// caNamedVCEK is signed by the ASK and called SEV-VCEK, but is a CA.
func caNamedVCEK(t testing.TB, c *snptest.Chain) []byte {
	t.Helper()
	of := *c.Signer.Vcek
	of.IsCA, of.BasicConstraintsValid, of.ExtraExtensions = true, true, nil
	for _, e := range c.Signer.Vcek.Extensions {
		if !e.Id.Equal([]int{2, 5, 29, 35}) {
			of.ExtraExtensions = append(of.ExtraExtensions, e)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, &of, c.Signer.Ask, c.Signer.Keys.Vcek.Public(), c.Signer.Keys.Ask)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// Without certificates in the evidence they come from the collateral, and from
// nowhere else.
func TestCertificatesFromCollateral(t *testing.T) {
	for _, line := range []string{"Milan", "Turin"} {
		s := newSNPSession(t, snptest.Config{Line: line})
		s.options.NoCerts = true
		mustFail(t, s.appraise(t), CheckSNPSigningKey)

		r := s.chain.SNPReport([64]byte{}, s.options)
		address := vcekAddress(line, r)
		if line == "Turin" && address != "https://kdsintf.amd.com/vcek/v1/Turin/c1c1c1c1c1c1c1c1?blSPL=4&teeSPL=1&snpSPL=24&ucodeSPL=219&fmcSPL=1" {
			t.Error(address)
		}
		var asked []string
		proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked = append(asked, r.URL.String())
			http.NotFound(w, r)
		}))
		defer proxy.Close()
		s.verifier.Collateral = s.chain.Collateral(t)
		s.verifier.Collateral.Proxy, _ = url.Parse(proxy.URL)
		s.verifier.Collateral.Client = proxy.Client()
		mustFail(t, s.appraise(t), CheckSNPSigningKey)
		if len(asked) != 1 || "https:/"+asked[0] != address {
			t.Errorf("the proxy was asked for %q, expected %s", asked, address)
		}

		s.verifier.Collateral = s.chain.Collateral(t)
		if err := s.verifier.Collateral.Put(address, collateral.Piece{Body: s.chain.Signer.Vcek.Raw}); err != nil {
			t.Fatal(err)
		}
		mustPass(t, s.appraise(t))
		// The chain too, where the roots are an ARK alone.
		bare := s.chain.Roots()
		bare[line][0].ProductCerts.Ask, bare[line][0].ProductCerts.Asvk = nil, nil
		s.verifier = &SNP{Roots: bare, Collateral: s.verifier.Collateral}
		mustFail(t, s.appraise(t), CheckSNPChain)
		var bundle bytes.Buffer
		for _, c := range []*x509.Certificate{s.chain.Signer.Ask, s.chain.Signer.Ark} {
			_ = pem.Encode(&bundle, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		}
		s.verifier = &SNP{Roots: bare, Collateral: s.chain.Collateral(t)}
		for a, b := range map[string][]byte{kds.ProductCertChainURL(abi.VcekReportSigner, line): bundle.Bytes(), address: s.chain.Signer.Vcek.Raw} {
			if err := s.verifier.Collateral.Put(a, collateral.Piece{Body: b}); err != nil {
				t.Fatal(err)
			}
		}
		mustPass(t, s.appraise(t))
		// A chip that hides its id cannot be asked for.
		s.options.MaskChip = true
		mustFail(t, s.appraise(t), CheckSNPSigningKey)
		// Nor a VLEK.
		s.options.MaskChip, s.options.VLEK = false, true
		mustFail(t, s.appraise(t), CheckSNPSigningKey)
	}
}

// Lesson 38: a revoked certificate in the list is refused; a list that is
// missing follows the policy; a list that is there and wrong always refuses.
func TestLesson38RevocationIsChecked(t *testing.T) {
	now := time.Now()
	hour := func(n int) time.Time { return now.Add(time.Duration(n) * time.Hour) }
	s := newSNPSession(t, snptest.Config{})
	c, other := s.chain, snptest.New(t, snptest.Config{Line: "Genoa"})
	good := c.CRL(t, hour(-1), hour(1))
	for what, x := range map[string]struct {
		crl                 []byte // nil: missing
		required, ifPresent Outcome
		notRevoked          bool
	}{
		"a list that is empty":          {good, Passed, Passed, true},
		"a list of others":              {c.CRL(t, hour(-1), hour(1), big.NewInt(7)), Passed, Passed, true},
		"the ASK in the list":           {c.CRL(t, hour(-1), hour(1), big.NewInt(7), c.Config.Serial), Failed, Failed, false},
		"the ARK in the list":           {c.CRL(t, hour(-1), hour(1), c.Signer.Ark.SerialNumber), Failed, Failed, false},
		"the ASK in a list that is old": {c.CRL(t, hour(-3), hour(-1), c.Config.Serial), Failed, Failed, false},
		"a list that is old":            {c.CRL(t, hour(-3), hour(-1)), Failed, Failed, false},
		"a list of tomorrow":            {c.CRL(t, hour(1), hour(3)), Failed, Failed, false},
		"a list by another ARK":         {other.CRL(t, hour(-1), hour(1)), Failed, Failed, false},
		"a list with a byte changed":    {flipped(good, len(good)-9), Failed, Failed, false},
		"a list that is cut":            {good[:len(good)-1], Failed, Failed, false},
		"no list but something else":    {c.Signer.Ark.Raw, Failed, Failed, false},
		"no list":                       {nil, Failed, NotChecked, false},
	} {
		for need, want := range map[collateral.Need]Outcome{"": x.required, collateral.Require: x.required, collateral.IfPresent: x.ifPresent} {
			for _, vlek := range []bool{false, true} {
				s.options.VLEK = vlek
				s.verifier = &SNP{Roots: c.Roots(), Collateral: c.CollateralWith(t, x.crl)}
				s.verifier.Collateral.Policy.Revocation = need
				a := s.appraise(t)
				if got := a.Verdict.Outcome(CheckSNPRevocation); got != want || (a.Verdict.Refusal() == nil) != (want != Failed) || a.Facts.SNP == nil || a.Facts.SNP.NotRevoked != x.notRevoked {
					t.Errorf("%s, policy %q, VLEK %t: %s, expected %s; %+v", what, need, vlek, got, want, a.Facts.SNP)
				}
			}
		}
		if x.crl == nil {
			continue
		}
		// The same list from the host, where the collateral has none.
		s.verifier = &SNP{Roots: c.Roots(), Collateral: c.CollateralWith(t, nil)}
		s.options.VLEK = false
		a := s.appraiseRaw(t, append(c.Certs(false), kbs.SNPCert{Type: kbs.CertCRL, Data: x.crl}))
		if got := a.Verdict.Outcome(CheckSNPRevocation); got != x.required {
			t.Errorf("%s, from the evidence: %s, expected %s", what, got, x.required)
		}
	}
	s.options.VLEK = false
	// The collateral's list counts before the host's, which may keep back the
	// one that revokes.
	s.verifier = &SNP{Roots: c.Roots(), Collateral: c.CollateralWith(t, c.CRL(t, hour(-1), hour(1), c.Config.Serial))}
	mustFail(t, s.appraiseRaw(t, append(c.Certs(false), kbs.SNPCert{Type: kbs.CertCRL, Data: good})), CheckSNPRevocation)
	// No source at all: revocation is required.
	s.verifier = &SNP{Roots: c.Roots()}
	mustFail(t, s.appraise(t), CheckSNPRevocation)
}

// A list that was good when it was first seen is compared with the clock again.
func TestKnownListGrowsOld(t *testing.T) {
	s := newSNPSession(t, snptest.Config{})
	mustPass(t, s.appraise(t))
	s.in.Time = s.in.Time.Add(25 * time.Hour)
	mustFail(t, s.appraise(t), CheckSNPRevocation)
}

// A critical extension may turn a list into one of something else.
func TestListWithACriticalExtension(t *testing.T) {
	c := snptest.New(t, snptest.Config{})
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour), SignatureAlgorithm: x509.SHA384WithRSAPSS}
	l.ExtraExtensions = append(l.ExtraExtensions, c.Signer.Ask.Extensions[0])
	l.ExtraExtensions[0].Id, l.ExtraExtensions[0].Critical = []int{2, 5, 29, 28}, true
	der, err := x509.CreateRevocationList(rand.Reader, l, c.Signer.Ark, c.Signer.Keys.Ark)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseRevocationList(der, c.Signer.Ark); err == nil {
		t.Error("accepted")
	}
}

func TestProductLines(t *testing.T) {
	for cpu, want := range map[[2]uint8]string{
		{0x19, 0x01}: "Milan", {0x19, 0x0f}: "Milan", {0x19, 0x11}: "Genoa", {0x19, 0xa0}: "Genoa", {0x19, 0xaf}: "Genoa", {0x1a, 0x02}: "Turin", {0x1a, 0x11}: "Turin",
		{0x19, 0x20}: "", {0x19, 0x9f}: "", {0x19, 0xb0}: "", {0x17, 0x01}: "", {0x1b, 0x00}: "", {0x1a, 0x20}: "",
	} {
		if got := productLine(cpu[0], cpu[1]); got != want {
			t.Errorf("family %#x, model %#x: %q, expected %q", cpu[0], cpu[1], got, want)
		}
	}
	for line, roots := range amdRoots() {
		if p := roots[0].ProductCerts; p.Ask == nil || p.Asvk == nil || p.Ark == nil {
			t.Errorf("%s lacks a root", line)
		}
	}
}

// What is known is bounded, and forgets what was not used for longest.
func TestCacheIsBounded(t *testing.T) {
	var c lru[int]
	first := cacheKey([]byte("0"))
	c.put(first, 0)
	for i := range 3 * maxKnown {
		c.put(cacheKey([]byte{1}, big.NewInt(int64(i)).Bytes()), i)
		if _, ok := c.get(first); !ok {
			t.Fatal("what is used all the time was forgotten")
		}
	}
	if n := c.order.Len(); n != maxKnown || len(c.known) != maxKnown {
		t.Fatalf("%d entries, expected %d", n, maxKnown)
	}
	if cacheKey([]byte("a"), []byte("b")) == cacheKey([]byte("ab"), nil) {
		t.Error("parts run together")
	}
}

func FuzzSNPEvidence(f *testing.F) {
	f.Add(read(f, "trustee-snp-evidence.json"))
	v := lenient()
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := v.Appraise(Input{Dialect: kbs.DialectKBS, Primary: b, Time: amdTime, ReportData: [48]byte{1}})
		if err == nil && a.Verdict.Refusal() == nil {
			t.Fatal("accepted")
		}
	})
}

func FuzzSNPRawReport(f *testing.F) {
	for _, r := range allRecorded(f) {
		f.Add(r.raw, []byte(r.certs[0].Data), []byte{})
	}
	v := lenient()
	f.Fuzz(func(t *testing.T, raw, leaf, ica []byte) {
		certs := []kbs.SNPCert{{Type: kbs.CertVCEK, Data: leaf}}
		if len(ica) > 0 {
			certs = append(certs, kbs.SNPCert{Type: kbs.CertASK, Data: ica})
		}
		a, err := v.AppraiseRaw(raw, certs, Input{Dialect: kbs.DialectKBS, Time: amdTime, ReportData: [48]byte{1}})
		if err == nil && a.Verdict.Refusal() == nil {
			t.Fatal("accepted")
		}
	})
}

func FuzzAMDRevocationList(f *testing.F) {
	c := snptest.New(f, snptest.Config{})
	f.Add(c.CRL(f, time.Now(), time.Now().Add(time.Hour), big.NewInt(1)))
	ark := amdRoots()["Milan"][0].ProductCerts.Ark
	f.Fuzz(func(t *testing.T, der []byte) {
		if _, err := parseRevocationList(der, ark); err == nil {
			t.Fatal("a list that AMD did not sign")
		}
	})
}
