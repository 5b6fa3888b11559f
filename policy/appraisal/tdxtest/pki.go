// Package tdxtest makes what Intel makes for a TDX host: certificates,
// collateral and quotes. All of it leads to a root of its own that nothing
// trusts by default. No program imports it.
package tdxtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"maps"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tdx-guest/pcs"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
)

// Serial numbers of the certificates that New makes.
const (
	SerialRoot   = 1
	SerialCA     = 2
	SerialPCK    = 3
	SerialSigner = 4 // of TCB info and QE identity
)

// Addresses of the collateral.
var (
	RootCRL    = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
	PCKCRL     = pcs.PckCrlURL("platform")
	TCBInfo    = pcs.TcbInfoURL(FMSPC)
	QEIdentity = pcs.QeIdentityURL()
)

// FMSPC is of every platform made here.
const FMSPC = "90c06f000000"

// Config changes what New makes. The zero value makes a platform that is up to
// date and nowhere revoked, all of it valid now.
type Config struct {
	Now time.Time // zero: time.Now
	// Certificate sees each certificate before it is issued: "root", "ca",
	// "pck", "signer".
	Certificate func(name string, c *x509.Certificate)
	// List sees each revocation list before it is issued: "root", "pck".
	List func(name string, l *x509.RevocationList)
	// TCBInfo and QEIdentity see the document before it is signed.
	TCBInfo    func(map[string]any)
	QEIdentity func(map[string]any)
}

// Platform is a TDX host with its quoting enclave, and Intel behind it.
type Platform struct {
	Root, CA, PCK, Signer *x509.Certificate
	Chain                 []byte // PCK, CA, root in PEM, as quotes carry it
	keys                  map[string]*ecdsa.PrivateKey
	attestation           *ecdsa.PrivateKey
	pieces                map[string]collateral.Piece
}

// New makes a platform.
func New(t testing.TB, c Config) *Platform {
	t.Helper()
	if c.Now.IsZero() {
		c.Now = time.Now()
	}
	p := &Platform{keys: map[string]*ecdsa.PrivateKey{}}
	issue := func(name, cn string, serial int64, parent *x509.Certificate, by string, change func(*x509.Certificate)) *x509.Certificate {
		key := newKey(t)
		p.keys[name] = key
		point, err := key.PublicKey.Bytes()
		check(t, err)
		id := sha1.Sum(point)
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(serial),
			Subject:      pkix.Name{CommonName: cn, Organization: []string{"Intel Corporation"}, Locality: []string{"Santa Clara"}, Province: []string{"CA"}, Country: []string{"US"}},
			NotBefore:    c.Now.Add(-24 * time.Hour), NotAfter: c.Now.AddDate(7, 0, 0),
			BasicConstraintsValid: true, SubjectKeyId: id[:], SignatureAlgorithm: x509.ECDSAWithSHA256,
			CRLDistributionPoints: []string{RootCRL},
		}
		change(tmpl)
		if c.Certificate != nil {
			c.Certificate(name, tmpl)
		}
		if parent == nil {
			parent = tmpl
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), p.keys[by])
		check(t, err)
		cert, err := x509.ParseCertificate(der)
		check(t, err)
		return cert
	}
	ca := func(tmpl *x509.Certificate) {
		tmpl.IsCA, tmpl.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	}
	p.Root = issue("root", "Intel SGX Root CA", SerialRoot, nil, "root", ca)
	p.CA = issue("ca", "Intel SGX PCK Platform CA", SerialCA, p.Root, "root", ca)
	p.PCK = issue("pck", "Intel SGX PCK Certificate", SerialPCK, p.CA, "ca", func(tmpl *x509.Certificate) {
		tmpl.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment
		tmpl.CRLDistributionPoints = []string{PCKCRL}
		tmpl.ExtraExtensions = []pkix.Extension{{Id: pcs.OidSgxExtension, Value: sgxExtension(t)}}
	})
	p.Signer = issue("signer", "Intel SGX TCB Signing", SerialSigner, p.Root, "root", func(tmpl *x509.Certificate) {
		tmpl.KeyUsage = x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment
	})
	p.attestation = newKey(t)
	p.Chain = append(chainPEM(p.PCK, p.CA, p.Root), 0)
	p.makeCollateral(t, c)
	return p
}

// Roots are what a verifier must trust for the platform to count.
func (p *Platform) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.Root)
	return pool
}

// RootPEM is the same for a file.
func (p *Platform) RootPEM() []byte { return chainPEM(p.Root) }

// Pieces are the collateral by address.
func (p *Platform) Pieces() map[string]collateral.Piece { return maps.Clone(p.pieces) }

// Source writes the collateral into a directory, but for the addresses in
// without, and returns a source of it.
func (p *Platform) Source(t testing.TB, without ...string) *collateral.Source {
	t.Helper()
	s := &collateral.Source{Dir: t.TempDir()}
	for address, piece := range p.pieces {
		if !slices.Contains(without, address) {
			check(t, s.Put(address, piece))
		}
	}
	return s
}

// What the platform has, and what Intel asks of it at its first level.
const (
	svn       = 5
	pceSVN    = 13
	moduleSVN = 6 // TEE_TCB_SVN[0] of TDX module version 1
	qeSVN     = 4
	qeProduct = 2
)

var qeSigner = sha256.Sum256([]byte("the quoting enclave's signer"))

func sgxExtension(t testing.TB) []byte {
	t.Helper()
	type attribute struct {
		ID    asn1.ObjectIdentifier
		Value any
	}
	sub := func(base asn1.ObjectIdentifier, n int) asn1.ObjectIdentifier { return append(slices.Clone(base), n) }
	var tcb []attribute
	for i := range 16 {
		tcb = append(tcb, attribute{sub(pcs.OidTCB, i+1), svn})
	}
	tcb = append(tcb, attribute{pcs.OidPCESvn, pceSVN}, attribute{pcs.OidCPUSvn, slices.Repeat([]byte{svn}, 16)})
	fmspc, err := hex.DecodeString(FMSPC)
	check(t, err)
	der, err := asn1.Marshal([]attribute{
		{pcs.OidPPID, make([]byte, 16)},
		{pcs.OidTCB, tcb},
		{pcs.OidPCEID, []byte{0, 0}},
		{pcs.OidFMSPC, fmspc},
		{sub(pcs.OidSgxExtension, 5), asn1.Enumerated(1)},
	})
	check(t, err)
	return der
}

func (p *Platform) makeCollateral(t testing.TB, c Config) {
	t.Helper()
	from, to := c.Now.Add(-time.Hour).UTC().Truncate(time.Second), c.Now.Add(30*24*time.Hour).UTC().Truncate(time.Second)
	list := func(name string) []byte {
		return p.List(t, name, func(l *x509.RevocationList) {
			l.ThisUpdate, l.NextUpdate = from, to
			if c.List != nil {
				c.List(name, l)
			}
		})
	}
	components := func(n int) (out []any) {
		for range 16 {
			out = append(out, map[string]any{"svn": n})
		}
		return out
	}
	level := func(n int, status string, advisories ...string) map[string]any {
		l := map[string]any{"tcb": map[string]any{"sgxtcbcomponents": components(n), "pcesvn": n, "tdxtcbcomponents": components(n)},
			"tcbDate": "2026-03-01T00:00:00Z", "tcbStatus": status}
		if len(advisories) > 0 {
			l["advisoryIDs"] = advisories
		}
		return l
	}
	isv := func(n int, status string) map[string]any {
		return map[string]any{"tcb": map[string]any{"isvsvn": n}, "tcbDate": "2026-05-01T00:00:00Z", "tcbStatus": status}
	}
	zeros := hex.EncodeToString(make([]byte, 48))
	info := map[string]any{
		"id": "TDX", "version": 3, "issueDate": from.Format(time.RFC3339), "nextUpdate": to.Format(time.RFC3339),
		"fmspc": FMSPC, "pceId": "0000", "tcbType": 0, "tcbEvaluationDataNumber": 17,
		"tdxModule": map[string]any{"mrsigner": zeros, "attributes": zeros[:16], "attributesMask": "FFFFFFFFFFFFFFFF"},
		"tdxModuleIdentities": []any{map[string]any{"id": "TDX_01", "mrsigner": zeros, "attributes": zeros[:16], "attributesMask": "FFFFFFFFFFFFFFFF",
			"tcbLevels": []any{isv(moduleSVN, "UpToDate"), isv(2, "OutOfDate")}}},
		"tcbLevels": []any{level(svn, "UpToDate"), level(2, "OutOfDate", "INTEL-SA-00001")},
	}
	if c.TCBInfo != nil {
		c.TCBInfo(info)
	}
	identity := map[string]any{
		"id": "TD_QE", "version": 2, "issueDate": from.Format(time.RFC3339), "nextUpdate": to.Format(time.RFC3339), "tcbEvaluationDataNumber": 17,
		"miscselect": "00000000", "miscselectMask": "FFFFFFFF",
		"attributes": "11000000000000000000000000000000", "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
		"mrsigner": hex.EncodeToString(qeSigner[:]), "isvprodid": qeProduct,
		"tcbLevels": []any{isv(qeSVN, "UpToDate"), isv(1, "OutOfDate")},
	}
	if c.QEIdentity != nil {
		c.QEIdentity(identity)
	}
	signer := url.QueryEscape(string(chainPEM(p.Signer, p.Root)))
	p.pieces = map[string]collateral.Piece{
		RootCRL:    {Body: list("root")},
		PCKCRL:     {Body: list("pck"), Header: http.Header{pcs.SgxPckCrlIssuerChainPhrase: {url.QueryEscape(string(chainPEM(p.CA, p.Root)))}}},
		TCBInfo:    {Body: p.SignDocument(t, "tcbInfo", info), Header: http.Header{pcs.TcbInfoIssuerChainPhrase: {signer}}},
		QEIdentity: {Body: p.SignDocument(t, "enclaveIdentity", identity), Header: http.Header{pcs.SgxQeIdentityIssuerChainPhrase: {signer}}},
	}
}

// List is a revocation list valid now, "root" or "pck", with a change made
// before it is signed.
func (p *Platform) List(t testing.TB, name string, change func(*x509.RevocationList)) []byte {
	t.Helper()
	issuer, by := p.Root, "root"
	if name == "pck" {
		issuer, by = p.CA, "ca"
	}
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	change(l)
	der, err := x509.CreateRevocationList(rand.Reader, l, issuer, p.keys[by])
	check(t, err)
	return der
}

// SignDocument is a document as Intel's service gives it.
func (p *Platform) SignDocument(t testing.TB, name string, doc any) []byte {
	t.Helper()
	raw, err := json.Marshal(doc)
	check(t, err)
	out, err := json.Marshal(map[string]any{name: json.RawMessage(raw), "signature": hex.EncodeToString(sign(t, p.keys["signer"], raw))})
	check(t, err)
	return out
}

func chainPEM(certs ...*x509.Certificate) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return key
}

// sign is ECDSA with SHA-256, r ‖ s.
func sign(t testing.TB, key *ecdsa.PrivateKey, message []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(message)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	check(t, err)
	out := make([]byte, 64)
	r.FillBytes(out[:32])
	s.FillBytes(out[32:])
	return out
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
