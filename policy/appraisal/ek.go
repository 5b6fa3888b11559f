package appraisal

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// RootSet is a named set of EK or AK certificate issuers. Every certificate in it is
// an anchor.
type RootSet struct {
	Name  string
	Roots *x509.CertPool
}

// ParseRoots reads concatenated PEM certificates, at least one, all of them
// CAs.
func ParseRoots(name string, data []byte) (RootSet, error) {
	set := RootSet{Name: name, Roots: x509.NewCertPool()}
	n := 0
	for rest := data; ; {
		var b *pem.Block
		b, rest = pem.Decode(rest)
		if b == nil {
			if s := bytes.TrimSpace(rest); n == 0 || (len(s) > 0 && bytes.Contains(s, []byte("-----BEGIN"))) {
				return RootSet{}, fmt.Errorf("EK roots %q: no usable PEM certificate", name)
			}
			return set, nil
		}
		if b.Type != "CERTIFICATE" {
			return RootSet{}, fmt.Errorf("EK roots %q: PEM block %q, expected CERTIFICATE", name, b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return RootSet{}, fmt.Errorf("EK roots %q: %w", name, err)
		}
		if !c.IsCA {
			return RootSet{}, fmt.Errorf("EK roots %q: %s is not a CA certificate", name, c.Subject)
		}
		set.Roots.AddCert(c)
		n++
	}
}

// The object identifiers of the TCG EK Credential Profile, section 3.2.
var (
	oidEKCertificate  = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidManufacturer   = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel          = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidFirmware       = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
	oidSpecification  = asn1.ObjectIdentifier{2, 23, 133, 2, 16}
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidDirectoryAttrs = asn1.ObjectIdentifier{2, 5, 29, 9}
)

// verifyEK checks that cert is an EK certificate by the TCG profile and
// returns the names of the sets to whose roots it chains at the given time.
func verifyEK(cert *x509.Certificate, sets []RootSet, now time.Time) ([]string, error) {
	if cert.IsCA {
		return nil, errors.New("the EK certificate is a CA certificate")
	}
	// The extended key usage tells an EK from any other certificate of its
	// issuer, so its absence is not tolerated.
	if !slices.ContainsFunc(cert.UnknownExtKeyUsage, oidEKCertificate.Equal) {
		return nil, errors.New("the EK certificate has no extended key usage tcg-kp-EKCertificate (2.23.133.8.1)")
	}
	leaf := *cert
	leaf.UnhandledCriticalExtensions = nil
	for _, id := range cert.UnhandledCriticalExtensions {
		if err := handleCritical(cert, id); err != nil {
			return nil, err
		}
	}
	return chains(&leaf, sets, now, "EK")
}

// handleCritical understands the two critical extensions that the profile
// puts into EK certificates and crypto/x509 does not know, and no other.
func handleCritical(cert *x509.Certificate, id asn1.ObjectIdentifier) error {
	i := slices.IndexFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(id) })
	if i < 0 {
		return fmt.Errorf("the EK certificate's critical extension %s cannot be found", id)
	}
	value := cert.Extensions[i].Value
	switch {
	case id.Equal(oidSubjectAltName):
		return checkEKName(value)
	case id.Equal(oidDirectoryAttrs):
		return checkEKAttributes(value)
	}
	return fmt.Errorf("the EK certificate has the critical extension %s, which is not understood", id)
}

// checkEKName reads a subject alternative name that is one directoryName with
// manufacturer, model and firmware version (profile, section 3.2.9). A vTPM's
// issuer adds nothing else, so anything else is refused.
func checkEKName(der []byte) error {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &names); err != nil || len(rest) > 0 || len(names) != 1 {
		return errors.New("the EK certificate's subject alternative name is not one name")
	}
	if names[0].Class != asn1.ClassContextSpecific || names[0].Tag != 4 {
		return errors.New("the EK certificate's subject alternative name is not a directoryName")
	}
	var sets []rdnSET
	if rest, err := asn1.Unmarshal(names[0].Bytes, &sets); err != nil || len(rest) > 0 {
		return errors.New("the EK certificate's directoryName cannot be decoded")
	}
	missing := []asn1.ObjectIdentifier{oidManufacturer, oidModel, oidFirmware}
	for _, set := range sets {
		for _, a := range set {
			i := slices.IndexFunc(missing, a.Type.Equal)
			if i < 0 {
				return fmt.Errorf("the EK certificate's directoryName has the attribute %s, which is unknown or repeated", a.Type)
			}
			missing = slices.Delete(missing, i, i+1)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the EK certificate's directoryName lacks the attribute %s", missing[0])
	}
	return nil
}

type rdnSET []struct {
	Type  asn1.ObjectIdentifier
	Value asn1.RawValue
}

// checkEKAttributes reads subject directory attributes that name the TPM
// specification (profile, section 3.2.10).
func checkEKAttributes(der []byte) error {
	var attrs []struct {
		Type   asn1.ObjectIdentifier
		Values asn1.RawValue
	}
	if rest, err := asn1.Unmarshal(der, &attrs); err != nil || len(rest) > 0 {
		return errors.New("the EK certificate's subject directory attributes cannot be decoded")
	}
	for _, a := range attrs {
		if !a.Type.Equal(oidSpecification) {
			return fmt.Errorf("the EK certificate has the subject directory attribute %s, which is not understood", a.Type)
		}
	}
	return nil
}

// ekPublic describes the certified key as the EK of the TCG's template for its
// kind (EK Credential Profile 2.5, L-1, L-2, H-3, H-6): credential protection
// needs the template's name algorithm and symmetric cipher.
func ekPublic(cert *x509.Certificate) (*tpm2.TPMTPublic, error) {
	switch k := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		pub := tpm2.RSAEKTemplate
		parms := tpm2.TPMSRSAParms{Symmetric: aes(128), KeyBits: tpm2.TPMKeyBits(k.N.BitLen())}
		switch {
		case k.E != 65537:
			return nil, fmt.Errorf("the EK's RSA exponent is %d, expected 65537", k.E)
		case k.N.BitLen() == 2048:
		case k.N.BitLen() == 3072:
			pub.NameAlg, parms.Symmetric = tpm2.TPMAlgSHA384, aes(256)
		default:
			return nil, fmt.Errorf("the EK is RSA of %d bits, expected 2048 or 3072", k.N.BitLen())
		}
		pub.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &parms)
		pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()})
		return &pub, nil
	case *ecdsa.PublicKey:
		pub := tpm2.ECCEKTemplate
		parms := tpm2.TPMSECCParms{Symmetric: aes(128), CurveID: tpm2.TPMECCNistP256}
		switch k.Curve {
		case elliptic.P256():
		case elliptic.P384():
			pub.NameAlg, parms.Symmetric, parms.CurveID = tpm2.TPMAlgSHA384, aes(256), tpm2.TPMECCNistP384
		default:
			return nil, fmt.Errorf("the EK is on %s, expected P-256 or P-384", k.Curve.Params().Name)
		}
		point, err := k.Bytes() // 04 ‖ x ‖ y
		if err != nil {
			return nil, fmt.Errorf("the EK's point: %w", err)
		}
		w := (len(point) - 1) / 2
		pub.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &parms)
		pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1 : 1+w]},
			Y: tpm2.TPM2BECCParameter{Buffer: point[1+w:]},
		})
		return &pub, nil
	}
	return nil, fmt.Errorf("the EK is %T, expected RSA or ECC", cert.PublicKey)
}

func aes(bits tpm2.TPMKeyBits) tpm2.TPMTSymDefObject {
	return tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES,
		KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, bits),
		Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	}
}

// spkiFingerprint is the lowercase hex SHA-256 of an SPKI in DER.
func spkiFingerprint(spki []byte) string {
	d := sha256.Sum256(spki)
	return hex.EncodeToString(d[:])
}

// parseEKCert reads a DER certificate. Certificates out of TPM NV memory may
// be padded; DER has one end, so what follows it must be the padding's bytes.
func parseEKCert(der []byte) (*x509.Certificate, error) {
	var raw asn1.RawValue
	rest, err := asn1.Unmarshal(der, &raw)
	if err != nil {
		return nil, fmt.Errorf("the EK certificate is not DER: %w", err)
	}
	for _, b := range rest {
		if b != 0x00 && b != 0xff {
			return nil, errors.New("the EK certificate has data after its end")
		}
	}
	cert, err := x509.ParseCertificate(raw.FullBytes)
	if err != nil {
		return nil, fmt.Errorf("the EK certificate: %w", err)
	}
	return cert, nil
}
