package verifycmd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func vector(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// thim returns the two PEM texts of Azure's answer.
func thim(t testing.TB) (vcek, chain string) {
	t.Helper()
	var m map[string]string
	if err := json.Unmarshal(vector(t, "snp-report-hostdata-certs.json"), &m); err != nil {
		t.Fatal(err)
	}
	return m["vcekCert"], m["certificateChain"]
}

// made is a made-up CA certificate, another name's certificate by it, and an
// empty revocation list, in DER.
func made(t testing.TB) (ca, leaf, crl []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ARK-Made"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCRLSign | x509.KeyUsageCertSign, SubjectKeyId: []byte{1},
	}
	other := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "www.example"}, NotAfter: root.NotAfter}
	if ca, err = x509.CreateCertificate(rand.Reader, root, root, key.Public(), key); err != nil {
		t.Fatal(err)
	}
	if leaf, err = x509.CreateCertificate(rand.Reader, other, root, key.Public(), key); err != nil {
		t.Fatal(err)
	}
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	if crl, err = x509.CreateRevocationList(rand.Reader, list, root, key); err != nil {
		t.Fatal(err)
	}
	return ca, leaf, crl
}

func TestCertsInEveryForm(t *testing.T) {
	vcek, chain := thim(t)
	_, _, crl := made(t)
	crlPEM := string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: crl}))
	for what, c := range map[string]struct {
		in   []byte
		want []kbs.CertType
	}{
		"Azure's JSON":          {vector(t, "snp-report-hostdata-certs.json"), []kbs.CertType{kbs.CertVCEK, kbs.CertASK, kbs.CertARK}},
		"one in DER":            {vector(t, "snp-report-v2-vcek.der"), []kbs.CertType{kbs.CertVCEK}},
		"one in PEM":            {[]byte(vcek), []kbs.CertType{kbs.CertVCEK}},
		"a chain in PEM":        {[]byte(vcek + chain), []kbs.CertType{kbs.CertVCEK, kbs.CertASK, kbs.CertARK}},
		"white space around":    {[]byte("\n " + chain + "\n\n"), []kbs.CertType{kbs.CertASK, kbs.CertARK}},
		"a list in DER":         {crl, []kbs.CertType{kbs.CertCRL}},
		"a list behind a chain": {[]byte(chain + crlPEM), []kbs.CertType{kbs.CertASK, kbs.CertARK, kbs.CertCRL}},
	} {
		got, err := parseCerts(c.in)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		var kinds []kbs.CertType
		for _, g := range got {
			kinds = append(kinds, g.Type)
		}
		if !slices.Equal(kinds, c.want) {
			t.Errorf("%s: %v, expected %v", what, kinds, c.want)
		}
	}
}

func TestCertsThatAreNone(t *testing.T) {
	vcek, chain := thim(t)
	der := vector(t, "snp-report-v2-vcek.der")
	_, leaf, _ := made(t)
	for what, in := range map[string][]byte{
		"nothing":                  nil,
		"white space":              []byte(" \n"),
		"a truncated certificate":  der[:len(der)-1],
		"a certificate and a byte": append(slices.Clone(der), 0),
		"of somebody else":         leaf,
		"a private key":            []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
		"half a PEM block":         []byte(vcek[:len(vcek)/2]),
		"text between the blocks":  []byte(vcek + "hello\n" + chain),
		"text after the blocks":    []byte(vcek + "hello"),
		"too many":                 []byte(strings.Repeat(vcek, maxCerts+1)),
		"JSON without a chain":     []byte(`{"vcekCert":` + quoted(t, vcek) + `}`),
		"JSON with a key twice":    []byte(`{"vcekCert":"","vcekCert":` + quoted(t, vcek) + `,"certificateChain":` + quoted(t, chain) + `}`),
		"JSON of another type":     []byte(`{"vcekCert":1,"certificateChain":2}`),
		"JSON with empty PEM":      []byte(`{"vcekCert":"","certificateChain":""}`),
	} {
		if got, err := parseCerts(in); err == nil {
			t.Errorf("%s: %d certificates", what, len(got))
		}
	}
}

func quoted(t testing.TB, s string) string {
	t.Helper()
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func FuzzCerts(f *testing.F) {
	// Small seeds: the time goes into new inputs, not into making long ones short.
	ca, leaf, crl := made(f)
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca}))
	f.Add(ca)
	f.Add(leaf)
	f.Add(crl)
	f.Add([]byte(text))
	f.Add([]byte(`{"vcekCert":` + quoted(f, text) + `,"certificateChain":` + quoted(f, text) + `}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseCerts(b)
		if err != nil {
			if got != nil {
				t.Fatal("certificates beside an error")
			}
			return
		}
		if len(got) == 0 || len(got) > maxCerts+3 {
			t.Fatalf("%d certificates", len(got))
		}
		for _, c := range got {
			if len(c.Data) == 0 || c.Type == "" {
				t.Fatalf("%+v", c)
			}
			// What was read from text comes back from DER as the same thing.
			again, err := parseCerts(c.Data)
			if err != nil || len(again) != 1 || again[0].Type != c.Type || !bytes.Equal(again[0].Data, c.Data) {
				t.Fatalf("%s: %v", c.Type, err)
			}
		}
	})
}
