package appraisal

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// akIssuer certifies AKs.
type akIssuer struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	set  RootSet
}

func newAKIssuer(t *testing.T, now time.Time) *akIssuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "AK issuer"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	i := &akIssuer{key: key}
	if i.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	if i.set, err = ParseRoots("cloud", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); err != nil {
		t.Fatal(err)
	}
	return i
}

func (i *akIssuer) certify(t *testing.T, key crypto.PublicKey, now time.Time, change func(*x509.Certificate)) []byte {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "AK"}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, UnknownExtKeyUsage: []asn1.ObjectIdentifier{oidAKCertificate}}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.cert, key, i.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// An AK that its issuer certified needs no EK; everything about the certificate
// and the key is a row of its own.
func TestAKCertificate(t *testing.T) {
	now := time.Now()
	issuer, stranger := newAKIssuer(t, now), newAKIssuer(t, now)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	start := func(t *testing.T, kind tpmtest.Kind, cert func(key crypto.PublicKey) []byte) *attest {
		t.Helper()
		p := tpmtest.Start(t, tpmtest.NewCA(t), kind)
		key, err := x509.ParsePKIXPublicKey(p.AKSPKI)
		if err != nil {
			t.Fatal(err)
		}
		a := &attest{verifier: &TPM{AKRoots: []RootSet{issuer.set}}, tpm: p, nonce: "bm9uY2U=", key: kbs.TEEPubKey{Kty: "EC", Crv: "P-256", Alg: kbs.AlgECDH, X: "x", Y: "y"}}
		challenge, pending, err := a.verifier.Challenge(&kbs.CVMAgentAuth{Version: kbs.Dialect, AKPublic: p.AKPublic, AKCert: cert(key)}, rand.Reader)
		if err != nil || challenge != nil || len(pending.Secret) != 0 {
			t.Fatalf("a certified AK was challenged: %v, %v", challenge, err)
		}
		a.in = Input{Dialect: kbs.Dialect, Pending: pending, Time: now}
		a.quote(t, allPCRs...)
		return a
	}
	good := func(key crypto.PublicKey) []byte { return issuer.certify(t, key, now, nil) }
	for name, kind := range map[string]tpmtest.Kind{"RSA": tpmtest.RSA, "ECC": tpmtest.ECC} {
		t.Run(name, func(t *testing.T) {
			a, err := start(t, kind, good).appraise(t)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range []string{CheckAKCert, CheckAKSame, CheckAKAttributes, CheckAKBound, CheckQuoteSignature} {
				if a.Verdict.Outcome(n) != Passed {
					t.Errorf("%s: %+v", n, a.Verdict.Checks)
				}
			}
			if a.Verdict.Outcome(CheckEKChain) != NotChecked || a.Verdict.Outcome(CheckActivation) != NotChecked || a.Facts.Identity == "" || len(a.Facts.EKRoots) != 1 || a.Facts.EKRoots[0] != "cloud" {
				t.Errorf("%+v", a.Facts)
			}
		})
	}
	a := start(t, tpmtest.ECC, good)
	key, err := x509.ParsePKIXPublicKey(a.tpm.AKSPKI)
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		cert  []byte
		roots []RootSet
		at    time.Time
	}{
		"by an issuer that is not configured": {stranger.certify(t, key, now, nil), []RootSet{issuer.set}, now},
		"of another key":                      {issuer.certify(t, &other.PublicKey, now, nil), []RootSet{issuer.set}, now},
		"with no root configured":             {good(key), nil, now},
		"expired":                             {good(key), []RootSet{issuer.set}, now.Add(2 * time.Hour)},
		"not yet valid":                       {good(key), []RootSet{issuer.set}, now.Add(-30 * time.Minute)},
		"without the usage":                   {issuer.certify(t, key, now, func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }), []RootSet{issuer.set}, now},
		"with an EK's usage": {issuer.certify(t, key, now, func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{oidEKCertificate}
		}), []RootSet{issuer.set}, now},
		"that is a CA's":    {issuer.certify(t, key, now, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), []RootSet{issuer.set}, now},
		"for key agreement": {issuer.certify(t, key, now, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), []RootSet{issuer.set}, now},
		"with an unknown critical extension": {issuer.certify(t, key, now, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}), []RootSet{issuer.set}, now},
		"cut off": {good(key)[:200], []RootSet{issuer.set}, now},
	} {
		a.in.Pending.AKCert, a.verifier.AKRoots, a.in.Time = c.cert, c.roots, c.at
		got, err := a.appraise(t)
		if err != nil {
			t.Fatal(err)
		}
		if got.Verdict.Outcome(CheckAKCert) != Failed || got.Verdict.Outcome(CheckAKBound) != Failed || got.Facts.Identity != "" || got.Verdict.Refusal() == nil {
			t.Errorf("a certificate %s: %+v", what, got.Verdict.Checks)
		}
	}
	// A certificate does not make up for what the key is.
	loose, err := start(t, tpmtest.Unrestricted, good).appraise(t)
	if err != nil {
		t.Fatal(err)
	}
	if loose.Verdict.Outcome(CheckAKAttributes) != Failed || loose.Facts.Identity != "" {
		t.Errorf("an unrestricted key: %+v", loose.Verdict.Checks)
	}
	// The certificate is of the key alone: what else a TPMT_PUBLIC says is the
	// peer's word, and must not make another instance of the same key.
	again := start(t, tpmtest.ECC, good)
	first, err := again.appraise(t)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](again.in.Pending.AKPublic)
	if err != nil {
		t.Fatal(err)
	}
	pub.ObjectAttributes.NoDA = !pub.ObjectAttributes.NoDA
	again.in.Pending.AKPublic = tpm2.Marshal(pub)
	second, err := again.appraise(t)
	if err != nil {
		t.Fatal(err)
	}
	if first.Facts.Identity == "" || second.Verdict.Outcome(CheckAKBound) != Passed || second.Facts.Identity != first.Facts.Identity {
		t.Errorf("one AK is %q and %q", first.Facts.Identity, second.Facts.Identity)
	}
	// Both, or neither, is no way to choose the weaker one.
	for what, auth := range map[string]*kbs.CVMAgentAuth{
		"neither": {AKPublic: a.tpm.AKPublic},
		"both":    {AKPublic: a.tpm.AKPublic, EKCert: a.tpm.EKCert, AKCert: good(key)},
		"no key":  {AKCert: good(key)},
	} {
		if _, _, err := a.verifier.Challenge(auth, rand.Reader); err == nil {
			t.Errorf("%s was taken", what)
		}
	}
}

func FuzzAKCert(f *testing.F) {
	f.Add([]byte{0x30, 0x03, 0x02, 0x01, 0x01})
	v := &TPM{}
	f.Fuzz(func(t *testing.T, der []byte) {
		verdict, facts := NewVerdict(), Facts{}
		if v.checkAKCert(verdict, &facts, Input{Pending: &Pending{AKCert: der}, Time: time.Unix(1, 0)}, &ak{}) {
			t.Error("accepted without roots")
		}
	})
}
