package appraisal

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// CheckAKCert is the row of an AK that its issuer vouches for, in place of
// CheckEKChain and CheckActivation.
const CheckAKCert = "ak-cert"

// oidAKCertificate is tcg-kp-AIKCertificate (TCG OID registry; TPM 2.0 Keys for
// Device Identity and Attestation, section 5): its holder is a restricted
// signing key of a TPM, as the issuer made sure.
var oidAKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 3}

// checkAKCert holds the session's AK certificate against the AK and the roots
// that may vouch for one. The key's attributes still come from its TPMT_PUBLIC:
// they are not in the certificate.
func (v *TPM) checkAKCert(t *Verdict, facts *Facts, in Input, a *ak) bool {
	const expected = "a certificate of this AK by a configured AK root"
	t.Require(CheckAKCert)
	cert, err := x509.ParseCertificate(in.Pending.AKCert)
	if err != nil {
		t.Fail(CheckAKCert, expected, "the AK certificate: "+err.Error())
		return false
	}
	if !bytes.Equal(cert.RawSubjectPublicKeyInfo, a.spki) {
		t.Fail(CheckAKCert, expected, "a certificate of key "+spkiFingerprint(cert.RawSubjectPublicKeyInfo))
		return false
	}
	sets, err := verifyAKCert(cert, v.AKRoots, in.Time)
	if err != nil {
		t.Fail(CheckAKCert, expected, err.Error())
		return false
	}
	facts.EKRoots = sets
	t.Pass(CheckAKCert, expected, "issued by "+cert.Issuer.String()+", root set "+strings.Join(sets, ", "))
	return true
}

// verifyAKCert returns the names of the sets to whose roots cert chains at the
// given time.
func verifyAKCert(cert *x509.Certificate, sets []RootSet, now time.Time) ([]string, error) {
	if cert.IsCA {
		return nil, errors.New("the AK certificate is a CA certificate")
	}
	// Without the usage any certificate of the issuer would do.
	if !slices.ContainsFunc(cert.UnknownExtKeyUsage, oidAKCertificate.Equal) {
		return nil, errors.New("the AK certificate has no extended key usage tcg-kp-AIKCertificate (2.23.133.8.3)")
	}
	if cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, errors.New("the AK certificate's key usage is not digitalSignature")
	}
	leaf := *cert
	leaf.UnhandledCriticalExtensions = nil
	for _, id := range cert.UnhandledCriticalExtensions {
		// The names of TPM and specification are those of an EK's.
		if err := handleCritical(cert, id); err != nil {
			return nil, fmt.Errorf("the AK certificate: %w", err)
		}
	}
	return chains(&leaf, sets, now, "AK")
}

// chains returns the names of the sets to whose roots leaf chains at the given
// time; whose names the leaf in errors.
func chains(leaf *x509.Certificate, sets []RootSet, now time.Time, whose string) ([]string, error) {
	if len(sets) == 0 {
		return nil, fmt.Errorf("no %s roots are configured", whose)
	}
	var names []string
	var last error
	for _, s := range sets {
		_, err := leaf.Verify(x509.VerifyOptions{
			Roots:         s.Roots,
			Intermediates: x509.NewCertPool(),
			CurrentTime:   now,
			// No standard usage fits; the one that does was checked before.
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		})
		if err != nil {
			last = err
			continue
		}
		names = append(names, s.Name)
	}
	if len(names) == 0 {
		return nil, last
	}
	return names, nil
}
