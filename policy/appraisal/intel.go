package appraisal

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/google/go-tdx-guest/abi"
	"github.com/google/go-tdx-guest/pcs"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// intelRootCRL is the address that the root's certificates give for its
// revocation list. It is fixed here: no certificate says where to look.
const intelRootCRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"

const maxParsed = 1024

// remember returns what parse made of a piece, from memory while the source
// still gives that very piece. Only what parse accepted is kept.
func remember[T any](v *TDX, key string, piece *collateral.Piece, parse func() (T, error)) (T, error) {
	type kept struct {
		piece *collateral.Piece
		value T
	}
	v.mu.Lock()
	k, ok := v.parsed[key].(kept)
	v.mu.Unlock()
	if ok && k.piece == piece {
		return k.value, nil
	}
	value, err := parse()
	if err != nil {
		return value, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.parsed == nil || len(v.parsed) >= maxParsed {
		v.parsed = map[string]any{}
	}
	v.parsed[key] = kept{piece, value}
	return value, nil
}

func (v *TDX) policy() collateral.Policy {
	if v.Collateral == nil {
		return collateral.Policy{}
	}
	return v.Collateral.Policy
}

func (v *TDX) fetch(address string) (*collateral.Piece, error) {
	return v.Collateral.Get(context.Background(), address)
}

// crl is a revocation list whose signature was verified.
type crl struct {
	from, to time.Time
	revoked  map[string]bool // serial numbers, decimal
}

// revocationList finds the list of issuer and verifies it; its dates are
// looked at each time.
func (v *TDX) revocationList(address string, issuer *x509.Certificate, now time.Time) (*crl, error) {
	piece, err := v.fetch(address)
	if err != nil {
		return nil, err
	}
	list, err := remember(v, "crl "+address+" "+string(issuer.Raw), piece, func() (*crl, error) { return parseCRL(piece.Body, issuer) })
	if err != nil {
		return nil, err
	}
	if now.Before(list.from) || now.After(list.to) {
		return nil, fmt.Errorf("the list is valid from %s to %s, the time is %s",
			list.from.Format(time.RFC3339), list.to.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return list, nil
}

func parseCRL(body []byte, issuer *x509.Certificate) (*crl, error) {
	list, err := x509.ParseRevocationList(body)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(list.RawIssuer, issuer.RawSubject) {
		return nil, fmt.Errorf("the list is by %s, expected %s", list.Issuer, issuer.Subject)
	}
	if err := list.CheckSignatureFrom(issuer); err != nil {
		return nil, err
	}
	if err := plainList(list); err != nil {
		return nil, err
	}
	out := &crl{from: list.ThisUpdate, to: list.NextUpdate, revoked: make(map[string]bool, len(list.RevokedCertificateEntries))}
	for _, e := range list.RevokedCertificateEntries {
		out.revoked[e.SerialNumber.String()] = true
	}
	return out, nil
}

// checkRevocation consults the list of the PCK certificate's issuer and the
// root's. It returns the root's, or nil: the signers of collateral are on it.
func (v *TDX) checkRevocation(t *Verdict, f *TDXFacts, chain *pckChain, now time.Time) *crl {
	required := v.policy().Revocation.Required()
	if required {
		t.Require(CheckTDXRevocation)
	}
	ca := "platform"
	if chain.issuer().Subject.CommonName == cnProcessor {
		ca = "processor"
	}
	root := v.checkListed(t, "the intermediate CA", intelRootCRL, chain.certs[2], chain.issuer(), required, now)
	pck := v.checkListed(t, "the PCK certificate", pcs.PckCrlURL(ca), chain.issuer(), chain.leaf(), required, now)
	f.NotRevoked = root != nil && pck != nil && t.Outcome(CheckTDXRevocation) == Passed
	return root
}

func (v *TDX) checkListed(t *Verdict, what, address string, issuer, cert *x509.Certificate, required bool, now time.Time) *crl {
	expected := what + " is not on its issuer's revocation list"
	list, err := v.revocationList(address, issuer, now)
	switch {
	case errors.Is(err, collateral.ErrMissing) && !required:
		t.Skip(CheckTDXRevocation, expected, err.Error())
		return nil
	case err != nil:
		t.Fail(CheckTDXRevocation, expected, err.Error())
		return nil
	}
	serial := cert.SerialNumber.String()
	t.Check(!list.revoked[serial], CheckTDXRevocation, expected,
		fmt.Sprintf("serial %x %s by %s", cert.SerialNumber, map[bool]string{true: "is revoked", false: "is not listed"}[list.revoked[serial]], address))
	return list
}

// signedByIntel is TCB info or a QE identity whose signature was verified. It
// is decoded from the very bytes that were signed.
type signedByIntel[T any] struct {
	chain []*x509.Certificate // signer, root
	value T
}

// intelSigned finds a document of Intel's: a JSON object whose member name is
// signed by member signature, the signer's chain being in the header.
func intelSigned[T any](v *TDX, address, header, name string, now time.Time) (*signedByIntel[T], error) {
	piece, err := v.fetch(address)
	if err != nil {
		return nil, err
	}
	doc, err := remember(v, name+" "+address, piece, func() (*signedByIntel[T], error) {
		chain, err := v.signerChain(piece.Header.Get(header), now)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", header, err)
		}
		doc := &signedByIntel[T]{chain: chain}
		return doc, decodeSigned(piece.Body, name, chain[0], &doc.value)
	})
	if err != nil {
		return nil, err
	}
	return doc, checkDates(doc.chain, now)
}

// signerChain reads the URL-encoded PEM in a header. Of the two certificates
// the first counts; the root is one of the configured ones.
func (v *TDX) signerChain(header string, now time.Time) ([]*x509.Certificate, error) {
	if header == "" {
		return nil, errors.New("not in the header")
	}
	text, err := url.QueryUnescape(header)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no PEM certificate")
	}
	signer, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if cn := signer.Subject.CommonName; cn != cnTCBSigning {
		return nil, fmt.Errorf("signed by %q, expected %q", cn, cnTCBSigning)
	}
	chain, err := v.verifyCert(signer, nil, now)
	if err != nil {
		return nil, err
	}
	if len(chain) != 2 {
		return nil, fmt.Errorf("the chain has %d certificates, expected 2", len(chain))
	}
	return chain, nil
}

// decodeSigned verifies the signature over the exact bytes of the member and
// decodes those and no others: a document with the member twice, or spelled
// another way, has no second meaning.
func decodeSigned(body []byte, name string, signer *x509.Certificate, value any) error {
	if err := bounded.CheckJSON(body, bounded.Limits{Bytes: collateral.MaxSize, Depth: 12, Nodes: 1 << 18}); err != nil {
		return err
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		return err
	}
	var hexSig string
	if err := json.Unmarshal(members["signature"], &hexSig); err != nil {
		return fmt.Errorf("signature: %w", err)
	}
	sig, err := hex.DecodeString(hexSig)
	if err != nil {
		return fmt.Errorf("signature: %w", err)
	}
	der, err := abi.SignatureToDER(sig)
	if err != nil {
		return fmt.Errorf("signature: %w", err)
	}
	signed := members[name]
	if len(signed) == 0 {
		return fmt.Errorf("no member %s", name)
	}
	if err := signer.CheckSignature(x509.ECDSAWithSHA256, signed, der); err != nil {
		return err
	}
	return json.Unmarshal(signed, value)
}
