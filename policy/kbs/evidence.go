package kbs

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// Bounds of what evidence carries, in bytes.
const (
	maxCert      = 8 << 10   // one certificate, DER
	maxCertTable = 16        // entries of cert_chain
	maxQuote     = 64 << 10  // a TDX quote with its certification data
	maxCCEL      = 512 << 10 // a CC event log
	maxHCLReport = 64 << 10
	maxTPMPart   = 4 << 10 // TPMS_ATTEST, TPMT_SIGNATURE
)

// SNPEvidence is the primary evidence of TEE "snp".
type SNPEvidence struct {
	Report    SNPReport `json:"attestation_report"`
	CertChain []SNPCert `json:"cert_chain"` // null when the host gave none
}

// The certificate kinds of SNPCert. Others are kept and not looked at.
const (
	CertVCEK = "VCEK"
	CertVLEK = "VLEK"
	CertASK  = "ASK" // also the ASVK
	CertARK  = "ARK"
	CertCRL  = "CRL"
)

// SNPCert is one entry of the host's certificate table.
type SNPCert struct {
	Type CertType `json:"cert_type"`
	Data Bytes    `json:"data"` // DER
}

// CertType is a kind's name, or "OTHER:" and the GUID of another kind, which
// the wire writes as {"OTHER":"<guid>"}.
type CertType string

// UnmarshalJSON reads both forms.
func (c *CertType) UnmarshalJSON(data []byte) error {
	var name string
	if err := json.Unmarshal(data, &name); err == nil {
		*c = CertType(clip(name))
		return nil
	}
	var other map[string]string
	if err := json.Unmarshal(data, &other); err != nil || len(other) != 1 {
		return errors.New("cert_type is neither a name nor {\"OTHER\":\"<guid>\"}")
	}
	guid, ok := other["OTHER"]
	if !ok {
		return errors.New("cert_type is neither a name nor {\"OTHER\":\"<guid>\"}")
	}
	*c = CertType("OTHER:" + clip(guid))
	return nil
}

// MarshalJSON writes what UnmarshalJSON reads.
func (c CertType) MarshalJSON() ([]byte, error) {
	if guid, ok := bytes.CutPrefix([]byte(c), []byte("OTHER:")); ok {
		return json.Marshal(map[string]string{"OTHER": string(guid)})
	}
	return json.Marshal(string(c))
}

// DecodeSNPEvidence reads the primary evidence of TEE "snp". It judges nothing
// but sizes and form.
func DecodeSNPEvidence(data []byte) (*SNPEvidence, error) {
	var e SNPEvidence
	if err := decode(data, &e, "snp evidence"); err != nil {
		return nil, err
	}
	if _, err := e.Report.Raw(); err != nil {
		return nil, fmt.Errorf("snp evidence: %w", err)
	}
	if len(e.CertChain) > maxCertTable {
		return nil, fmt.Errorf("snp evidence: cert_chain has %d entries, at most %d are read", len(e.CertChain), maxCertTable)
	}
	for i, c := range e.CertChain {
		most := maxCert
		if c.Type == CertCRL {
			most = maxCCEL
		}
		if len(c.Data) == 0 || len(c.Data) > most {
			return nil, fmt.Errorf("snp evidence: cert_chain[%d] has %d bytes, expected 1 to %d", i, len(c.Data), most)
		}
	}
	return &e, nil
}

// TDXEvidence is the primary evidence of TEE "tdx".
type TDXEvidence struct {
	EventLog []byte `json:"cc_eventlog"` // CCEL, standard base64; null when there is none
	Quote    []byte `json:"quote"`       // quote version 4 or 5, standard base64
}

// DecodeTDXEvidence reads the primary evidence of TEE "tdx".
func DecodeTDXEvidence(data []byte) (*TDXEvidence, error) {
	var e TDXEvidence
	if err := decode(data, &e, "tdx evidence"); err != nil {
		return nil, err
	}
	if len(e.Quote) == 0 || len(e.Quote) > maxQuote {
		return nil, fmt.Errorf("tdx evidence: quote has %d bytes, expected 1 to %d", len(e.Quote), maxQuote)
	}
	if len(e.EventLog) > maxCCEL {
		return nil, fmt.Errorf("tdx evidence: cc_eventlog has %d bytes, at most %d are read", len(e.EventLog), maxCCEL)
	}
	return &e, nil
}

// AzureVersion is the only version of the Azure forms that is read.
const AzureVersion = 2

// Hex is bytes in lowercase or uppercase hex.
type Hex []byte

// MarshalJSON writes lowercase hex.
func (h Hex) MarshalJSON() ([]byte, error) { return json.Marshal(hex.EncodeToString(h)) }

// UnmarshalJSON reads hex.
func (h *Hex) UnmarshalJSON(data []byte) error {
	var s string
	if err := json.Unmarshal(data, &s); err != nil {
		return err
	}
	b, err := hex.DecodeString(s)
	*h = b
	return err
}

// URLBase64 is bytes in base64url with padding (RFC 4648 section 5).
type URLBase64 []byte

// MarshalJSON writes it.
func (u URLBase64) MarshalJSON() ([]byte, error) {
	return json.Marshal(base64.URLEncoding.EncodeToString(u))
}

// UnmarshalJSON reads it.
func (u *URLBase64) UnmarshalJSON(data []byte) error {
	var s string
	if err := json.Unmarshal(data, &s); err != nil {
		return err
	}
	b, err := base64.URLEncoding.DecodeString(s)
	*u = b
	return err
}

// AzureQuote is the vTPM's quote in the Azure forms; the PCR values are those
// of the SHA-256 bank.
type AzureQuote struct {
	Signature Hex      `json:"signature"` // the bare RSASSA signature, or a TPMT_SIGNATURE: see the appraisal
	Message   Hex      `json:"message"`   // TPMS_ATTEST
	PCRs      []string `json:"pcrs"`      // 24 values, 64 hex digits each
}

// AzureEvidence is the primary evidence of TEE "az-snp-vtpm", with VCEK, and
// "az-tdx-vtpm", with TDQuote.
type AzureEvidence struct {
	Version   uint32     `json:"version"`
	Quote     AzureQuote `json:"tpm_quote"`
	HCLReport URLBase64  `json:"hcl_report"`
	VCEK      URLBase64  `json:"vcek,omitempty"`     // DER
	TDQuote   URLBase64  `json:"td_quote,omitempty"` // quote version 4 or 5
}

// DecodeAzureEvidence reads the primary evidence of tee, one of the two names
// above.
func DecodeAzureEvidence(tee string, data []byte) (*AzureEvidence, error) {
	var e AzureEvidence
	if err := decode(data, &e, tee+" evidence"); err != nil {
		return nil, err
	}
	if e.Version != AzureVersion {
		return nil, fmt.Errorf("%s evidence: version %d, expected %d", tee, e.Version, AzureVersion)
	}
	if (tee == "az-snp-vtpm") != (len(e.VCEK) > 0) || (tee == "az-tdx-vtpm") != (len(e.TDQuote) > 0) {
		return nil, fmt.Errorf("%s evidence: vcek belongs to az-snp-vtpm, td_quote to az-tdx-vtpm, and each must be there", tee)
	}
	for _, p := range []struct {
		name  string
		n     int
		most  int
		empty bool
	}{
		{"tpm_quote.signature", len(e.Quote.Signature), maxTPMPart, false}, {"tpm_quote.message", len(e.Quote.Message), maxTPMPart, false},
		{"hcl_report", len(e.HCLReport), maxHCLReport, false}, {"vcek", len(e.VCEK), maxCert, true}, {"td_quote", len(e.TDQuote), maxQuote, true},
	} {
		if p.n > p.most || (p.n == 0 && !p.empty) {
			return nil, fmt.Errorf("%s evidence: %s has %d bytes, at most %d are read and none is not enough", tee, p.name, p.n, p.most)
		}
	}
	if _, err := (TPMQuote{PCRs: e.Quote.PCRs}).Values(); err != nil {
		return nil, fmt.Errorf("%s evidence: %w", tee, err)
	}
	return &e, nil
}
