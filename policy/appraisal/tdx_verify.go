package appraisal

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tdx-guest/abi"
	"github.com/google/go-tdx-guest/pcs"
	tdxpb "github.com/google/go-tdx-guest/proto/tdx"
	"github.com/google/go-tdx-guest/verify"
)

// The Intel SGX Root CA, which go-tdx-guest embeds too but does not export: it
// would use it only together with a warning on standard output.
//
//go:embed intel_sgx_root_ca.pem
var intelRootPEM []byte

var intelRoots = func() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(intelRootPEM)
	return pool
}()

func (v *TDX) roots() *x509.CertPool {
	if v.Roots != nil {
		return v.Roots
	}
	return intelRoots
}

// The quoting enclave's vendor in a quote's header: Intel.
var intelQEVendor = []byte{0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07}

// checkHeader holds the quote to TDX and to the one kind of key that exists.
func (q *tdxQuote) checkHeader(t *Verdict) {
	kind := binary.LittleEndian.Uint16(q.header[2:])
	tee := binary.LittleEndian.Uint32(q.header[4:])
	vendor := q.header[12:28]
	t.Check(kind == abi.AttestationKeyType && tee == abi.TeeTDX && bytes.Equal(vendor, intelQEVendor), CheckTDXHeader,
		fmt.Sprintf("TEE type %#x, key type %d (ECDSA P-256), QE vendor %x", abi.TeeTDX, abi.AttestationKeyType, intelQEVendor),
		fmt.Sprintf("TEE type %#x, key type %d, QE vendor %x", tee, kind, vendor))
}

// checkSignatures fills the rows from the TD report to the PCK certificate.
func (q *tdxQuote) checkSignatures(t *Verdict, chain *pckChain) {
	err := q.verifySignature()
	t.Check(err == nil, CheckTDXSignature, "ECDSA P-256 over header and TD report, under the attestation key", validOr(err))

	err = errors.New("no PCK certificate that counts")
	if chain != nil {
		var der []byte
		if der, err = abi.SignatureToDER(q.qeSignature); err == nil {
			err = chain.leaf().CheckSignature(x509.ECDSAWithSHA256, q.qeReport, der)
		}
	}
	t.Check(err == nil, CheckTDXQESignature, "ECDSA P-256 over the QE report, under the PCK certificate", validOr(err))

	h := sha256.New()
	h.Write(q.key)
	h.Write(q.qeAuth)
	want := zeroPadded(h.Sum(nil), 64)
	got := q.qeReport[qeReportDataFrom:]
	t.Check(bytes.Equal(want, got), CheckTDXQEData, "SHA-256(attestation key || QE authentication data) "+hex.EncodeToString(want), hex.EncodeToString(got))
}

func (q *tdxQuote) verifySignature() error {
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, q.key...))
	if err != nil {
		return fmt.Errorf("attestation key: %w", err)
	}
	der, err := abi.SignatureToDER(q.signature)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(q.signed)
	if !ecdsa.VerifyASN1(key, digest[:], der) {
		return errors.New("ECDSA verification failed")
	}
	return nil
}

func validOr(err error) string {
	if err != nil {
		return err.Error()
	}
	return "valid"
}

// checkByLibrary asks go-tdx-guest for its opinion of the same bytes. It reads
// version 4 alone. No collateral is given to it: README.md says why.
func (v *TDX) checkByLibrary(t *Verdict, q *tdxQuote, now time.Time) {
	const expected = "go-tdx-guest accepts signature, QE report and PCK chain"
	if q.version != abi.QuoteVersion {
		t.Skip(CheckTDXLibrary, expected, "it reads version 4 only")
		return
	}
	t.Require(CheckTDXLibrary)
	quote, err := abi.QuoteToProto(q.raw)
	if err == nil {
		err = verify.TdxQuote(quote, &verify.Options{TrustedRoots: v.roots(), Now: &verify.TimeSet{
			PckCertChain: now, TcbInfo: now, QeIdentity: now, PckCrl: now, RootCaCrl: now,
		}})
	}
	t.Check(err == nil, CheckTDXLibrary, expected, validOr(err))
}

// pckChain is a PCK chain that leads to a configured root.
type pckChain struct {
	certs []*x509.Certificate // leaf, intermediate, root
	ext   *pcs.PckExtensions
}

func (c *pckChain) leaf() *x509.Certificate   { return c.certs[0] }
func (c *pckChain) issuer() *x509.Certificate { return c.certs[1] }

// The subject names that tell Intel's certificates apart: the root issues
// intermediates as well as the signers of collateral.
const (
	cnPCK        = "Intel SGX PCK Certificate"
	cnPlatform   = "Intel SGX PCK Platform CA"
	cnProcessor  = "Intel SGX PCK Processor CA"
	cnTCBSigning = "Intel SGX TCB Signing"
)

func (v *TDX) checkChain(t *Verdict, q *tdxQuote, now time.Time) *pckChain {
	const expected = "a PCK certificate by an Intel CA by a configured root, all valid at the given time"
	chain, err := v.pckChain(q.chain, now)
	if err != nil {
		t.Fail(CheckTDXChain, expected, err.Error())
		return nil
	}
	t.Pass(CheckTDXChain, expected, fmt.Sprintf("serial %x of %s, FMSPC %s", chain.leaf().SerialNumber, chain.issuer().Subject.CommonName, chain.ext.FMSPC))
	return chain
}

const maxChains = 1024

// pckChain verifies a chain. One that was verified is remembered, and its
// dates are looked at again.
func (v *TDX) pckChain(pem []byte, now time.Time) (*pckChain, error) {
	key := sha256.Sum256(pem)
	v.mu.Lock()
	chain, ok := v.chains[key]
	v.mu.Unlock()
	if ok {
		return chain, checkDates(chain.certs, now)
	}
	chain, err := v.verifyPCK(pem, now)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.chains == nil || len(v.chains) >= maxChains {
		v.chains = map[[sha256.Size]byte]*pckChain{}
	}
	v.chains[key] = chain
	return chain, nil
}

func (v *TDX) verifyPCK(pem []byte, now time.Time) (*pckChain, error) {
	// The library's reader of the chain wants a quote around it.
	given, err := verify.ExtractChainFromQuote(&tdxpb.QuoteV4{SignedData: &tdxpb.Ecdsa256BitQuoteV4AuthData{
		CertificationData: &tdxpb.CertificationData{QeReportCertificationData: &tdxpb.QEReportCertificationData{
			PckCertificateChainData: &tdxpb.PCKCertificateChainData{PckCertChain: pem},
		}},
	}})
	if err != nil {
		return nil, err
	}
	leaf, ca := given.PCKCertificate, given.IntermediateCertificate
	if leaf.Subject.CommonName != cnPCK || leaf.IsCA {
		return nil, fmt.Errorf("the leaf is %q, expected %q", leaf.Subject.CommonName, cnPCK)
	}
	if cn := ca.Subject.CommonName; cn != cnPlatform && cn != cnProcessor {
		return nil, fmt.Errorf("the intermediate is %q, expected %q or %q", cn, cnPlatform, cnProcessor)
	}
	certs, err := v.verifyCert(leaf, ca, now)
	if err != nil {
		return nil, err
	}
	if len(certs) != 3 {
		return nil, fmt.Errorf("the chain has %d certificates, expected 3", len(certs))
	}
	ext, err := pcs.PckCertificateExtensions(leaf)
	if err != nil {
		return nil, err
	}
	if len(ext.FMSPC) != 12 || len(ext.PCEID) != 4 || len(ext.TCB.CPUSvnComponents) != 16 {
		return nil, errors.New("the PCK certificate lacks FMSPC, PCE ID or TCB")
	}
	return &pckChain{certs: certs, ext: ext}, nil
}

// verifyCert returns the chain from cert to a configured root at the given
// time; by is nil where the root issues it.
func (v *TDX) verifyCert(cert, by *x509.Certificate, now time.Time) ([]*x509.Certificate, error) {
	between := x509.NewCertPool()
	if by != nil {
		between.AddCert(by)
	}
	chains, err := cert.Verify(x509.VerifyOptions{
		Roots: v.roots(), Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, err
	}
	for _, c := range chains[0] {
		if k, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
			return nil, fmt.Errorf("%s has a key that is not on P-256", c.Subject.CommonName)
		}
	}
	return chains[0], nil
}

func checkDates(certs []*x509.Certificate, now time.Time) error {
	for _, c := range certs {
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return fmt.Errorf("%s is valid from %s to %s, the time is %s", c.Subject.CommonName,
				c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
		}
	}
	return nil
}
