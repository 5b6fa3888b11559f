package verifycmd

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Bounds of --certs.
const (
	maxCertFiles = 64
	maxCerts     = 64
)

// certificateFiles are the extensions that a directory of --certs is read for.
var certificateFiles = []string{".der", ".pem", ".crt", ".cer", ".crl", ".json"}

// readCerts reads --certs of an SEV-SNP report.
func (o *options) readCerts() ([]kbs.SNPCert, error) {
	if o.certs == "" {
		return nil, nil
	}
	files, read, err := listed(o.certs, certificateFiles...)
	if err == nil && len(files) > maxCertFiles {
		err = fmt.Errorf("%s has %d files, at most %d are read", o.certs, len(files), maxCertFiles)
	}
	if err != nil {
		return nil, cause.New(cause.Usage, "--certs: %w", err)
	}
	var all []kbs.SNPCert
	for _, f := range files {
		data, err := read(f, collateral.MaxSize)
		if err != nil {
			return nil, unread("--certs", err)
		}
		some, err := parseCerts(data)
		if err != nil {
			return nil, malformed("--certs: %s: %w", f, err)
		}
		all = append(all, some...)
	}
	if len(all) > maxCerts {
		return nil, malformed("--certs: %d certificates, at most %d are read", len(all), maxCerts)
	}
	return all, nil
}

// parseCerts reads certificates and revocation lists in DER, in PEM, or in the
// JSON that Azure's THIM service answers with. It trusts none of them.
func parseCerts(data []byte) ([]kbs.SNPCert, error) {
	text := bytes.TrimSpace(data)
	switch {
	case len(text) == 0:
		return nil, errors.New("empty")
	case text[0] == '{':
		return parseTHIM(text)
	case bytes.HasPrefix(text, []byte("-----BEGIN ")):
		return parsePEM(text)
	}
	if list, err := x509.ParseRevocationList(data); err == nil {
		return []kbs.SNPCert{{Type: kbs.CertCRL, Data: list.Raw}}, nil
	}
	c, err := x509.ParseCertificate(data)
	if err != nil {
		return nil, fmt.Errorf("neither PEM, nor JSON, nor a certificate or revocation list in DER: %w", err)
	}
	one, err := classify(c)
	if err != nil {
		return nil, err
	}
	return []kbs.SNPCert{one}, nil
}

// parseTHIM reads {"vcekCert":PEM,"certificateChain":PEM,…}.
func parseTHIM(text []byte) ([]kbs.SNPCert, error) {
	if err := bounded.CheckJSON(text, bounded.Limits{Bytes: 256 << 10, Depth: 2, String: 256 << 10}); err != nil {
		return nil, err
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(text, &members); err != nil {
		return nil, err
	}
	var all []kbs.SNPCert
	for _, name := range []string{"vcekCert", "certificateChain"} {
		var p string
		if err := json.Unmarshal(members[name], &p); err != nil {
			return nil, fmt.Errorf("%s is missing or not a string", name)
		}
		some, err := parsePEM([]byte(p))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, some...)
	}
	return all, nil
}

// parsePEM reads PEM blocks with nothing but white space between them.
func parsePEM(text []byte) ([]kbs.SNPCert, error) {
	var all []kbs.SNPCert
	for rest := bytes.TrimSpace(text); len(rest) > 0; {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN ")) {
			return nil, errors.New("text outside of the PEM blocks")
		}
		b, next := pem.Decode(rest)
		if b == nil {
			return nil, errors.New("a PEM block cannot be decoded")
		}
		rest = bytes.TrimSpace(next)
		switch b.Type {
		case "CERTIFICATE":
			c, err := x509.ParseCertificate(b.Bytes)
			if err != nil {
				return nil, err
			}
			one, err := classify(c)
			if err != nil {
				return nil, err
			}
			all = append(all, one)
		case "X509 CRL":
			list, err := x509.ParseRevocationList(b.Bytes)
			if err != nil {
				return nil, err
			}
			all = append(all, kbs.SNPCert{Type: kbs.CertCRL, Data: list.Raw})
		default:
			return nil, fmt.Errorf("PEM block %q, expected CERTIFICATE or X509 CRL", bounded.OneLine(b.Type))
		}
		if len(all) > maxCerts {
			return nil, fmt.Errorf("more than %d certificates", maxCerts)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("no PEM block")
	}
	return all, nil
}

// classify says which place of AMD's chain a certificate claims to have (VCEK
// certificate specification 57230, section 3); the verifier finds out.
func classify(c *x509.Certificate) (kbs.SNPCert, error) {
	kind := kbs.CertType("")
	switch {
	case c.IsCA && bytes.Equal(c.RawIssuer, c.RawSubject):
		kind = kbs.CertARK
	case c.IsCA:
		kind = kbs.CertASK
	case c.Subject.CommonName == "SEV-VCEK":
		kind = kbs.CertVCEK
	case c.Subject.CommonName == "SEV-VLEK":
		kind = kbs.CertVLEK
	default:
		return kbs.SNPCert{}, fmt.Errorf("the certificate of %q is none of AMD's chain: VCEK, VLEK, ASK, ARK", bounded.OneLine(c.Subject.CommonName))
	}
	return kbs.SNPCert{Type: kind, Data: c.Raw}, nil
}
