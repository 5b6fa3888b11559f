package kbs

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	josejson "github.com/go-jose/go-jose/v4/json"
	jsonv2 "github.com/go-json-experiment/json"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// AuthRequest opens a session: POST auth.
type AuthRequest struct {
	Version     string    `json:"version"`
	TEE         string    `json:"tee"`
	ExtraParams AuthExtra `json:"extra-params"`
}

// AuthExtra is what a client offers beyond the protocol's core. Trustee's
// older clients send an empty string in its place.
type AuthExtra struct {
	SupportedHashAlgorithms []string      `json:"supported-hash-algorithms,omitempty"`
	CVMAgent                *CVMAgentAuth `json:"cvm-agent,omitempty"`
}

// CVMAgentAuth asks for dialect cvm-agent/1. Binary is standard base64.
type CVMAgentAuth struct {
	Version  string `json:"version"`             // Dialect
	EKCert   []byte `json:"ek_cert,omitempty"`   // DER of the endorsement key's certificate
	AKPublic []byte `json:"ak_public,omitempty"` // TPMT_PUBLIC of the attestation key, wire form
	AKCert   []byte `json:"ak_cert,omitempty"`   // DER of a certificate for the AK, in place of credential activation
}

// UnmarshalJSON reads an object, or the empty string or null for none.
func (e *AuthExtra) UnmarshalJSON(data []byte) error {
	*e = AuthExtra{}
	if empty, err := emptyExtra(data); empty || err != nil {
		return err
	}
	type plain AuthExtra
	return josejson.Unmarshal(data, (*plain)(e))
}

// Challenge answers AuthRequest.
type Challenge struct {
	Nonce       string         `json:"nonce"` // standard base64 of 32 bytes
	ExtraParams ChallengeExtra `json:"extra-params"`
}

// ChallengeExtra is encoded as the empty string when there is nothing in it.
type ChallengeExtra struct {
	SelectedHashAlgorithm string             `json:"selected-hash-algorithm,omitempty"`
	CVMAgent              *CVMAgentChallenge `json:"cvm-agent,omitempty"`
}

// CVMAgentChallenge is TPM2_ActivateCredential's input, each field with its
// two-byte size: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
type CVMAgentChallenge struct {
	CredentialBlob []byte `json:"credential_blob"`
	Secret         []byte `json:"secret"`
}

// MarshalJSON writes `""` when there is nothing to say, as Trustee does.
func (e ChallengeExtra) MarshalJSON() ([]byte, error) {
	if e == (ChallengeExtra{}) {
		return []byte(`""`), nil
	}
	type plain ChallengeExtra
	return json.Marshal(plain(e))
}

// UnmarshalJSON reads an object, or the empty string or null for none.
func (e *ChallengeExtra) UnmarshalJSON(data []byte) error {
	*e = ChallengeExtra{}
	if empty, err := emptyExtra(data); empty || err != nil {
		return err
	}
	type plain ChallengeExtra
	return josejson.Unmarshal(data, (*plain)(e))
}

// emptyExtra says whether extra-params is one of the two spellings of nothing.
func emptyExtra(data []byte) (bool, error) {
	data = bytes.TrimSpace(data)
	if bytes.Equal(data, []byte("null")) || bytes.Equal(data, []byte(`""`)) {
		return true, nil
	}
	if len(data) == 0 || data[0] != '{' {
		return false, errors.New("extra-params is neither an object nor an empty string")
	}
	return false, nil
}

// AttestRequest carries the evidence: POST attest.
type AttestRequest struct {
	InitData    *InitData         `json:"init-data"` // null when there is none
	RuntimeData RuntimeData       `json:"runtime-data"`
	TEEEvidence CompositeEvidence `json:"tee-evidence"`
}

// InitData is the exact initdata text.
type InitData struct {
	Format string `json:"format"` // "toml"
	Body   string `json:"body"`
}

// RuntimeData is what report_data covers, with the additional evidence.
type RuntimeData struct {
	Nonce     string    `json:"nonce"`
	TEEPubKey TEEPubKey `json:"tee-pubkey"`
}

// CompositeEvidence is the platform's own evidence, and a string of JSON text
// (or "") for everything else. The string itself is covered by report_data.
type CompositeEvidence struct {
	PrimaryEvidence    json.RawMessage `json:"primary_evidence"`
	AdditionalEvidence string          `json:"additional_evidence"`
}

// AdditionalCVMAgent is the JSON text inside additional_evidence under
// dialect cvm-agent/1.
type AdditionalCVMAgent struct {
	EventLog   []byte `json:"cvm-agent-eventlog,omitempty"`   // CEL-TLV bytes
	Activation []byte `json:"cvm-agent-activation,omitempty"` // 32 bytes out of TPM2_ActivateCredential
	// Instance is a compact JWS (ES256, P-256 key in the header's jwk) over the
	// ASCII of the session's nonce: it names this instance where the hardware
	// does not (TDX).
	Instance string `json:"cvm-agent-instance,omitempty"`
}

// AttestResponse answers AttestRequest.
type AttestResponse struct {
	Token string `json:"token"` // compact JWS
}

// TPMEvidence is the primary evidence of TEE "tpm".
type TPMEvidence struct {
	Quote    TPMQuote `json:"tpm_quote"`
	AKPublic []byte   `json:"ak_public"` // SPKI DER
}

// TPMQuote is a TPM 2.0 quote and the SHA-256 bank's values as the guest read
// them; the values count only as far as the quote's digest covers them.
type TPMQuote struct {
	Signature []byte   `json:"signature"` // TPMT_SIGNATURE
	Message   []byte   `json:"message"`   // TPMS_ATTEST
	PCRs      []string `json:"pcrs"`      // 24 values, 64 hex digits each
}

// PCRCount is the number of PCRs in a bank.
const PCRCount = 24

// Values decodes the PCR values.
func (q TPMQuote) Values() (*[PCRCount][32]byte, error) {
	if len(q.PCRs) != PCRCount {
		return nil, fmt.Errorf("tpm_quote.pcrs has %d values, expected %d", len(q.PCRs), PCRCount)
	}
	var v [PCRCount][32]byte
	for i, s := range q.PCRs {
		b, err := hex.DecodeString(s)
		if err != nil || len(b) != 32 {
			return nil, fmt.Errorf("tpm_quote.pcrs[%d] is not 64 hex digits", i)
		}
		v[i] = [32]byte(b)
	}
	return &v, nil
}

// DecodeAuthRequest reads the body of POST auth. The version is not judged:
// a mismatch has an answer of its own.
func DecodeAuthRequest(data []byte) (*AuthRequest, error) {
	var r AuthRequest
	if err := decode(data, &r, "auth request"); err != nil {
		return nil, err
	}
	if len(r.TEE) == 0 || len(r.TEE) > 32 || len(r.Version) > 32 {
		return nil, errors.New("auth request: tee or version is missing or too long")
	}
	if c := r.ExtraParams.CVMAgent; c != nil {
		if c.Version != Dialect {
			return nil, fmt.Errorf("auth request: extra-params.cvm-agent.version is %q, expected %q", clip(c.Version), Dialect)
		}
		if len(c.EKCert) > 16<<10 || len(c.AKPublic) > 4<<10 || len(c.AKCert) > maxCert {
			return nil, errors.New("auth request: ek_cert, ak_public or ak_cert is too long")
		}
	}
	return &r, nil
}

// DecodeChallenge reads the answer to POST auth. An encoding that has no
// selected hash or selects sha384 is accepted; no other hash is spoken.
func DecodeChallenge(data []byte) (*Challenge, error) {
	var c Challenge
	if err := decode(data, &c, "challenge"); err != nil {
		return nil, err
	}
	n, err := base64.StdEncoding.DecodeString(c.Nonce)
	if err != nil || len(n) != NonceSize {
		return nil, fmt.Errorf("challenge: nonce is not standard base64 of %d bytes", NonceSize)
	}
	if h := c.ExtraParams.SelectedHashAlgorithm; h != "" && !strings.EqualFold(h, "sha384") {
		return nil, fmt.Errorf("challenge: selected-hash-algorithm %q, expected sha384", clip(h))
	}
	if a := c.ExtraParams.CVMAgent; a != nil {
		if len(a.CredentialBlob) < 2 || len(a.CredentialBlob) > 1024 || len(a.Secret) < 2 || len(a.Secret) > 1024 {
			return nil, errors.New("challenge: credential_blob and secret must have 2 to 1024 bytes")
		}
	}
	return &c, nil
}

// DecodeAttestRequest reads the body of POST attest. The primary evidence that
// it returns is part of data.
func DecodeAttestRequest(data []byte) (*AttestRequest, error) {
	var r AttestRequest
	// The primary evidence is most of the body, and its verifier's to decode. It
	// is bounded and checked with the rest, then set aside: a decoder would scan
	// it once more only to copy it.
	from, to, err := bounded.FindJSON(data, limits, "tee-evidence", "primary_evidence")
	if err != nil {
		return nil, fmt.Errorf("attest request: %w", err)
	}
	rest := data
	if to > from {
		rest = slices.Concat(data[:from], []byte("null"), data[to:])
	}
	if err := jsonv2.Unmarshal(rest, &r); err != nil {
		return nil, fmt.Errorf("attest request: %w", err)
	}
	if to > from {
		r.TEEEvidence.PrimaryEvidence = data[from:to:to]
	}
	if r.InitData != nil && r.InitData.Format != "toml" {
		return nil, fmt.Errorf("attest request: init-data.format is %q, expected \"toml\"", clip(r.InitData.Format))
	}
	if p := bytes.TrimSpace(r.TEEEvidence.PrimaryEvidence); len(p) == 0 || p[0] != '{' {
		return nil, errors.New("attest request: tee-evidence.primary_evidence is not an object")
	}
	if _, err := r.RuntimeData.TEEPubKey.PublicKey(); err != nil {
		return nil, fmt.Errorf("attest request: %w", err)
	}
	return &r, nil
}

// ourMembers are those of AdditionalCVMAgent.
var ourMembers = []string{"cvm-agent-eventlog", "cvm-agent-activation", "cvm-agent-instance"}

// maxInstance bounds AdditionalCVMAgent.Instance, in bytes.
const maxInstance = 4 << 10

// maxOthers bounds the members of others: verdicts and tokens name each.
const maxOthers = 16

// DecodeAdditional reads the additional evidence: this project's members, and
// the names of all others, which nothing here checks.
func DecodeAdditional(text string) (a AdditionalCVMAgent, others []string, err error) {
	if text == "" {
		return a, nil, nil
	}
	if err := decode([]byte(text), &a, "additional_evidence"); err != nil {
		return AdditionalCVMAgent{}, nil, err
	}
	if len(a.Instance) > maxInstance {
		return AdditionalCVMAgent{}, nil, fmt.Errorf("additional_evidence: cvm-agent-instance has %d bytes, at most %d are read", len(a.Instance), maxInstance)
	}
	var all map[string]json.RawMessage
	if err := josejson.Unmarshal([]byte(text), &all); err != nil || all == nil {
		return AdditionalCVMAgent{}, nil, errors.New("additional_evidence is not an object")
	}
	for name := range all {
		if !slices.Contains(ourMembers, name) {
			others = append(others, clip(name))
		}
	}
	if len(others) > maxOthers {
		return AdditionalCVMAgent{}, nil, fmt.Errorf("additional_evidence has %d members that are not known here, at most %d are accepted", len(others), maxOthers)
	}
	slices.Sort(others)
	return a, others, nil
}

// Encode writes the JSON text for CompositeEvidence.AdditionalEvidence; ""
// when there is nothing.
func (a AdditionalCVMAgent) Encode() (string, error) {
	if len(a.EventLog) == 0 && len(a.Activation) == 0 && a.Instance == "" {
		return "", nil
	}
	b, err := json.Marshal(a)
	return string(b), err
}

// DecodeAttestResponse reads the answer to POST attest.
func DecodeAttestResponse(data []byte) (*AttestResponse, error) {
	var r AttestResponse
	if err := decode(data, &r, "attest response"); err != nil {
		return nil, err
	}
	if r.Token == "" {
		return nil, errors.New("attest response: no token")
	}
	return &r, nil
}

// DecodeTPMEvidence reads the primary evidence of TEE "tpm".
func DecodeTPMEvidence(data []byte) (*TPMEvidence, error) {
	var e TPMEvidence
	if err := decode(data, &e, "tpm evidence"); err != nil {
		return nil, err
	}
	for name, b := range map[string][]byte{"tpm_quote.signature": e.Quote.Signature, "tpm_quote.message": e.Quote.Message, "ak_public": e.AKPublic} {
		if len(b) == 0 || len(b) > 4<<10 {
			return nil, fmt.Errorf("tpm evidence: %s has %d bytes, expected 1 to 4096", name, len(b))
		}
	}
	if _, err := e.Quote.Values(); err != nil {
		return nil, fmt.Errorf("tpm evidence: %w", err)
	}
	return &e, nil
}

// clip makes a peer's text fit to be shown: short, one line, printable.
func clip(s string) string {
	const most = 256
	s = strings.ToValidUTF8(s, "?")
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return ' '
		}
		return r
	}, s)
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
