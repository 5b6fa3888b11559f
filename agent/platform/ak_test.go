package platform

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/cc-runtime/cvm-agent/agent/platform/swtpmtest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// maker certifies EKs and AKs.
type maker struct {
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	roots []appraisal.RootSet
}

func newMaker(t *testing.T) *maker {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "maker"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	m := &maker{key: key}
	if m.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	set, err := appraisal.ParseRoots("maker", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	if err != nil {
		t.Fatal(err)
	}
	m.roots = []appraisal.RootSet{set}
	return m
}

var (
	usageEK = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	usageAK = asn1.ObjectIdentifier{2, 23, 133, 8, 3}
)

func (m *maker) certify(t *testing.T, key crypto.PublicKey, usage asn1.ObjectIdentifier) []byte {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "key"}, UnknownExtKeyUsage: []asn1.ObjectIdentifier{usage},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, m.cert, key, m.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// defineNV puts data into an NV index of the owner's.
func defineNV(t *testing.T, p *TPM, index tpm2.TPMHandle, data []byte) {
	t.Helper()
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	_, err := tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
		NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NT: tpm2.TPMNTOrdinary},
	})}.Execute(p.t)
	if err != nil {
		t.Fatal(err)
	}
	_, name, err := p.nvPublic(index)
	if err == nil {
		_, err = tpm2.NVWrite{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: index, Name: name}, Data: tpm2.TPM2BMaxNVBuffer{Buffer: data}}.Execute(p.t)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// public returns a primary key's public half.
func public(t *testing.T, p *TPM, template tpm2.TPMTPublic) crypto.PublicKey {
	t.Helper()
	made, err := p.createPrimary(template)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.flush(made.ObjectHandle) }()
	contents, err := made.OutPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm2.Pub(*contents)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// bound runs a session of dialect cvm-agent/1 against the real verifier and
// returns the rows that concern the AK, and the quote's key.
func bound(t *testing.T, p *TPM, v *appraisal.TPM) (*appraisal.Appraisal, crypto.PublicKey) {
	t.Helper()
	ctx := context.Background()
	auth, err := p.Auth(ctx)
	if err != nil {
		t.Fatal(err)
	}
	challenge, pending, err := v.Challenge(auth, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	extra, err := p.Additional(ctx, "bm9uY2U=", challenge)
	if err != nil {
		t.Fatal(err)
	}
	additional, err := extra.Encode()
	if err != nil {
		t.Fatal(err)
	}
	rd := [48]byte{1, 2, 3}
	raw, err := p.Evidence(ctx, rd, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := v.Appraise(appraisal.Input{Dialect: kbs.Dialect, Primary: raw, Additional: additional, ReportData: rd, Pending: pending, Time: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	ev, err := kbs.DecodeTPMEvidence(raw)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKIXPublicKey(ev.AKPublic)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{appraisal.CheckQuoteSignature, appraisal.CheckReportData, appraisal.CheckPCRDigest, appraisal.CheckAKSame, appraisal.CheckAKAttributes, appraisal.CheckAKBound} {
		if a.Verdict.Outcome(n) != appraisal.Passed {
			t.Errorf("%s: %+v", n, a.Verdict.Checks)
		}
	}
	return a, key
}

func isECC(key crypto.PublicKey) bool { _, ok := key.(*ecdsa.PublicKey); return ok }

func TestAKByActivation(t *testing.T) {
	sw, p := start(t)
	set, err := appraisal.ParseRoots("swtpm", sw.Roots)
	if err != nil {
		t.Fatal(err)
	}
	v := &appraisal.TPM{EKRoots: []appraisal.RootSet{set}}
	if _, key := bound(t, p, v); isECC(key) {
		t.Error("auto made an ECC key where the TPM makes RSA: Trustee takes no other")
	}
	for algorithm, ecc := range map[string]bool{AlgorithmECC: true, AlgorithmRSA: false} {
		again, err := reopen(t, sw, p)
		if err != nil {
			t.Fatal(err)
		}
		p = again
		p.options.Algorithm = algorithm
		a, key := bound(t, p, v)
		if isECC(key) != ecc || a.Verdict.Outcome(appraisal.CheckActivation) != appraisal.Passed {
			t.Errorf("%s made %T: %+v", algorithm, key, a.Verdict.Checks)
		}
	}
	if _, err := p.Additional(context.Background(), "", nil); cause.Of(err) != cause.BrokerProtocol {
		t.Errorf("a broker that leaves the credential out gave %v", err)
	}
}

func reopen(t *testing.T, sw *swtpmtest.TPM, p *TPM) (*TPM, error) {
	t.Helper()
	if err := p.Close(); err != nil {
		return nil, err
	}
	again, err := OpenTPM(sw.Spec)
	if err == nil {
		t.Cleanup(func() { _ = again.Close() })
	}
	return again, err
}

// refusing refuses the first TPM2_CreatePrimary, as a TPM without RSA does.
type refusing struct {
	transport.TPMCloser
	refused bool
}

func (r *refusing) Send(in []byte) ([]byte, error) {
	if binary.BigEndian.Uint32(in[6:]) == uint32(tpm2.TPMCCCreatePrimary) && !r.refused {
		r.refused = true
		return []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x02, 0xc4}, nil // TPM_RC_VALUE of parameter 2
	}
	return r.TPMCloser.Send(in)
}

func TestAKIsECCWhereRSAIsNot(t *testing.T) {
	sw, p := start(t)
	set, err := appraisal.ParseRoots("swtpm", sw.Roots)
	if err != nil {
		t.Fatal(err)
	}
	r := &refusing{TPMCloser: p.t}
	p.t = r
	if _, key := bound(t, p, &appraisal.TPM{EKRoots: []appraisal.RootSet{set}}); !isECC(key) || !r.refused {
		t.Errorf("auto made %T", key)
	}
	// Who asks for RSA gets RSA or an error.
	p, err = reopen(t, sw, p)
	if err != nil {
		t.Fatal(err)
	}
	p.t, p.options.Algorithm = &refusing{TPMCloser: p.t}, AlgorithmRSA
	if _, err := p.Auth(context.Background()); cause.Of(err) != cause.EvidenceFailed {
		t.Errorf("got %v", err)
	}
}

// bareTPM is a TPM that nobody certified.
func bareTPM(t *testing.T) *TPM {
	t.Helper()
	sw, err := swtpmtest.StartWithoutEKCert(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sw.Stop() })
	p, err := OpenTPM(sw.Spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func TestAKIsECCWhereTheEKIs(t *testing.T) {
	p, m := bareTPM(t), newMaker(t)
	if _, err := p.Auth(context.Background()); cause.Of(err) != cause.EvidenceFailed || !strings.Contains(err.Error(), "no EK certificate") {
		t.Errorf("without any certificate: %v", err)
	}
	defineNV(t, p, nvECCEKCert, m.certify(t, public(t, p, tpm2.ECCEKTemplate), usageEK))
	a, key := bound(t, p, &appraisal.TPM{EKRoots: m.roots})
	if !isECC(key) || a.Verdict.Outcome(appraisal.CheckEKChain) != appraisal.Passed {
		t.Errorf("made %T: %+v", key, a.Verdict.Checks)
	}
}

func TestAKByCertificate(t *testing.T) {
	p, m := bareTPM(t), newMaker(t)
	der := m.certify(t, public(t, p, akECC), usageAK)
	dir := t.TempDir()
	files := map[string][]byte{
		"der": der, "pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		"other": m.certify(t, public(t, p, akRSA), usageAK), "junk": []byte("junk"),
		"key": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}),
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const index = 0x01C10010
	defineNV(t, p, index, append(bytes.Clone(der), bytes.Repeat([]byte{0xff}, 20)...)) // NV is larger than what is in it
	forget := func(certificate string) {
		if p.ak != nil {
			_ = p.flush(p.ak.handle)
		}
		p.ak, p.options = nil, AKOptions{Algorithm: AlgorithmECC, Certificate: certificate}
	}
	for _, from := range []string{"nv:0x01C10010", "file:" + dir + "/der", "file:" + dir + "/pem"} {
		forget(from)
		if err := p.options.Check(); err != nil {
			t.Fatal(err)
		}
		a, _ := bound(t, p, &appraisal.TPM{AKRoots: m.roots})
		if a.Verdict.Outcome(appraisal.CheckAKCert) != appraisal.Passed || a.Facts.Identity == "" {
			t.Errorf("%s: %+v", from, a.Verdict.Checks)
		}
	}
	for _, from := range []string{"nv:0x01C10011", "file:" + dir + "/other", "file:" + dir + "/junk", "file:" + dir + "/key", "file:" + dir + "/none"} {
		forget(from)
		if _, err := p.Auth(context.Background()); cause.Of(err) != cause.EvidenceFailed {
			t.Errorf("%s gave %v", from, err)
		}
	}
	for name, o := range map[string]AKOptions{
		"another algorithm": {Algorithm: "dsa"}, "a relative file": {Certificate: "file:x"}, "no index": {Certificate: "nv:"},
		"an index that is none": {Certificate: "nv:0x81000003"}, "no kind": {Certificate: "/x"}, "an URL": {Certificate: "https://x"},
	} {
		if o.Check() == nil {
			t.Errorf("%s was taken: %+v", name, o)
		}
	}
	if err := errors.Join((AKOptions{}).Check(), AKOptions{Algorithm: "auto", Certificate: "nv:29425680"}.Check()); err != nil {
		t.Error(err)
	}
}

func TestAzureOptionsAreChecked(t *testing.T) {
	for name, o := range map[string]AzureOptions{
		"a relative file": {VCEK: "x"}, "no URL": {THIM: "169.254.169.254"}, "a path": {THIM: "http://h/x"},
		"a password": {THIM: "http://u:p@h"}, "another scheme": {THIM: "ftp://h"}, "a query": {THIM: "http://h?x"},
	} {
		if o.Check() == nil {
			t.Errorf("%s was taken: %+v", name, o)
		}
	}
	if err := errors.Join((AzureOptions{}).Check(), AzureOptions{VCEK: "/x", THIM: "http://169.254.169.254"}.Check()); err != nil {
		t.Error(err)
	}
}

func TestDERWithoutPadding(t *testing.T) {
	der := []byte{0x30, 0x03, 0x02, 0x01, 0xff} // its own last byte looks like padding
	for name, c := range map[string]struct {
		data []byte
		ok   bool
	}{
		"as it is": {der, true}, "padded with ones": {append(bytes.Clone(der), 0xff, 0xff), true}, "padded with zeros": {append(bytes.Clone(der), 0, 0), true},
		"with more": {append(bytes.Clone(der), 0xff, 7), false}, "cut off": {der[:4], false}, "padding alone": {[]byte{0xff, 0xff}, false}, "nothing": {nil, false},
	} {
		if got, err := withoutPadding(c.data); (err == nil) != c.ok || (c.ok && !bytes.Equal(got, der)) {
			t.Errorf("%s gave %x, %v", name, got, err)
		}
	}
}
