package kbs

import (
	"encoding/json"
	"fmt"
)

// StatusAffirming is the only ear.status under which a token proves anything.
const StatusAffirming = "affirming"

// TokenClaims are the claims of an EAR token that a relying party reads. All
// others are tolerated: the layout is moving to a later EAR draft.
type TokenClaims struct {
	Issuer   string            `json:"iss,omitempty"`
	IssuedAt int64             `json:"iat"` // the broker's clock, seconds
	Expires  int64             `json:"exp"`
	Profile  string            `json:"eat_profile,omitempty"`
	Nonce    string            `json:"eat_nonce,omitempty"` // the session's nonce as in Challenge
	Verifier *VerifierID       `json:"ear.verifier-id,omitempty"`
	Submods  map[string]Submod `json:"submods"`
	CVMAgent *CVMAgentClaims   `json:"cvm-agent,omitempty"`
}

// VerifierID names who appraised.
type VerifierID struct {
	Build     string `json:"build"`
	Developer string `json:"developer"`
}

// Submod is one appraised part of the machine; the TEE is "cpu0".
type Submod struct {
	Status    string                     `json:"ear.status"`
	Vector    map[string]int             `json:"ear.trustworthiness-vector,omitempty"`
	PolicyID  string                     `json:"ear.appraisal-policy-id,omitempty"`
	Annotated map[string]json.RawMessage `json:"ear.veraison.annotated-evidence,omitempty"`
}

// CVMAgentClaims is the broker's signed statement about the policy name that
// the evidence proves. The tee-pubkey in the same token is fresh, so it is the
// agent's nonce over this statement.
type CVMAgentClaims struct {
	PolicyName  string   `json:"policy_name"`
	VersionMark uint64   `json:"version_mark"` // lowest version that may run; 0: the broker has no mark for the name
	Signers     []string `json:"signers"`      // fingerprints of the current signers as the broker knows them; empty: not set
	InstanceID  string   `json:"instance_id"`  // the broker's random value, bound to the attested key; 32 hex digits
	Tombstone   bool     `json:"tombstone"`    // the instance was destroyed: nothing is released to it any more
}

// DecodeTokenClaims reads the payload of a token whose signature the caller
// has verified. It checks shape, ear.status and that the token speaks of a TEE
// key, not times or keys.
func DecodeTokenClaims(payload []byte) (*TokenClaims, error) {
	var c TokenClaims
	if err := decode(payload, &c, "token claims"); err != nil {
		return nil, err
	}
	cpu, ok := c.Submods["cpu0"]
	if !ok {
		return nil, fmt.Errorf("token claims: no submods.cpu0")
	}
	if cpu.Status != StatusAffirming {
		return nil, fmt.Errorf("token claims: ear.status is %q, expected %q", clip(cpu.Status), StatusAffirming)
	}
	if _, err := c.TEEPubKey(); err != nil {
		return nil, err
	}
	return &c, nil
}

// TEEPubKey is the guest key that the token was issued to:
// submods.cpu0["ear.veraison.annotated-evidence"].runtime_data_claims["tee-pubkey"].
func (c *TokenClaims) TEEPubKey() (TEEPubKey, error) {
	var r struct {
		Key *TEEPubKey `json:"tee-pubkey"`
	}
	raw, ok := c.Submods["cpu0"].Annotated["runtime_data_claims"]
	if !ok {
		return TEEPubKey{}, fmt.Errorf("token claims: no runtime_data_claims")
	}
	if err := decode(raw, &r, "token claims: runtime_data_claims"); err != nil {
		return TEEPubKey{}, err
	}
	if r.Key == nil {
		return TEEPubKey{}, fmt.Errorf("token claims: no tee-pubkey in runtime_data_claims")
	}
	return *r.Key, nil
}
