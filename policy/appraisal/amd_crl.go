package appraisal

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-sev-guest/kds"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// revocationList is a CRL that an ARK signed. Dates are compared at each use.
type revocationList struct {
	from, until time.Time
	revoked     map[string]bool // serial numbers, big-endian bytes
}

// parseRevocationList reads a CRL, DER, and verifies its signature.
func parseRevocationList(der []byte, ark *x509.Certificate) (*revocationList, error) {
	if len(der) > collateral.MaxSize {
		return nil, fmt.Errorf("%d bytes, at most %d are read", len(der), collateral.MaxSize)
	}
	l, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(l.RawIssuer, ark.RawSubject) {
		return nil, fmt.Errorf("issued by %q, expected %q", l.Issuer.CommonName, ark.Subject.CommonName)
	}
	if err := l.CheckSignatureFrom(ark); err != nil {
		return nil, err
	}
	if err := plainList(l); err != nil {
		return nil, err
	}
	if l.NextUpdate.IsZero() {
		return nil, errors.New("it has no next update")
	}
	r := &revocationList{from: l.ThisUpdate, until: l.NextUpdate, revoked: make(map[string]bool, len(l.RevokedCertificateEntries))}
	for _, e := range l.RevokedCertificateEntries {
		r.revoked[string(e.SerialNumber.Bytes())] = true
	}
	return r, nil
}

// checkRevocation looks the ASK or ASVK and the ARK up in AMD's list. VCEKs
// are in no list: AMD supersedes them by the TCB. The collateral's list counts
// before one in the evidence, which the host may have kept back until it is
// old. It says whether a valid list was consulted.
func (v *SNP) checkRevocation(t *Verdict, k *vendorKey, certs []kbs.SNPCert, now time.Time) bool {
	const expected = "neither ASK or ASVK nor ARK in a list by the ARK that is valid now"
	need := collateral.Require
	if v.Collateral != nil {
		need = v.Collateral.Policy.Revocation
	}
	if need.Required() {
		t.Require(CheckSNPRevocation)
	}
	var der []byte
	p, err := v.Collateral.Get(context.Background(), kds.CrlLinkByKey(k.line, k.signer))
	switch {
	case err == nil:
		der = p.Body
	case errors.Is(err, collateral.ErrMissing):
		for _, c := range certs {
			if c.Type == kbs.CertCRL && der == nil {
				der = c.Data
			}
		}
	default:
		t.Fail(CheckSNPRevocation, expected, err.Error())
		return false
	}
	if der == nil {
		if need.Required() {
			t.Fail(CheckSNPRevocation, expected, err.Error())
		} else {
			t.Skip(CheckSNPRevocation, expected, err.Error())
		}
		return false
	}
	id := cacheKey(der, k.ark.Raw)
	l, ok := v.lists.get(id)
	if !ok {
		if l, err = parseRevocationList(der, k.ark); err != nil {
			t.Fail(CheckSNPRevocation, expected, "revocation list: "+err.Error())
			return false
		}
		v.lists.put(id, l)
	}
	dates := "list of " + l.from.UTC().Format(time.RFC3339) + ", next " + l.until.UTC().Format(time.RFC3339)
	for _, c := range []*x509.Certificate{k.ica, k.ark} {
		if l.revoked[string(c.SerialNumber.Bytes())] {
			t.Fail(CheckSNPRevocation, expected, fmt.Sprintf("%s is revoked; %s", c.Subject.CommonName, dates))
			return false
		}
	}
	return t.Check(!now.Before(l.from) && !now.After(l.until), CheckSNPRevocation, expected, dates)
}

// plainList refuses a critical extension: it may say that the list is a part
// of one, or of something else (RFC 5280 section 5.2).
func plainList(l *x509.RevocationList) error {
	for _, e := range l.Extensions {
		if e.Critical {
			return fmt.Errorf("critical extension %s is not known here", e.Id)
		}
	}
	return nil
}
