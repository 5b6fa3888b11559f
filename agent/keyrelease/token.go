package keyrelease

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// maxTokenLife bounds what a broker may call one session, generously: Trustee
// and cvm-broker say five minutes.
const maxTokenLife = time.Hour

// verifyToken checks the answer to the evidence. The signature counts under a
// key that the policy pins and no other; the token's own jwk and x5c headers
// prove nothing. The session's key in it makes it fresh.
func (cl *Client) verifyToken(body []byte, nonce string, key kbs.TEEPubKey, ours bool) (Claims, error) {
	var answer kbs.AttestResponse
	if err := bounded.CheckJSON(body, bounded.Limits{Bytes: kbs.MaxBody, Depth: 4}); err != nil {
		return Claims{}, cause.New(cause.BrokerProtocol, "the answer to the evidence: %w", err)
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return Claims{}, cause.New(cause.BrokerProtocol, "the answer to the evidence: %w", err)
	}
	jws, err := jose.ParseSignedCompact(answer.Token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return Claims{}, cause.New(cause.TokenInvalid, "the token is not a compact JWS with ES256: %w", err)
	}
	var payload []byte
	for _, k := range cl.tokenKeys {
		pub, ok := k.(*ecdsa.PublicKey)
		if !ok || pub.Curve != elliptic.P256() {
			continue
		}
		if payload, err = jws.Verify(pub); err == nil {
			break
		}
		payload = nil
	}
	if payload == nil {
		return Claims{}, cause.New(cause.TokenInvalid, "the token is not signed by one of the %d keys that the policy pins", len(cl.tokenKeys))
	}
	return checkClaims(payload, nonce, key, ours)
}

// checkClaims reads the claims of a verified token.
func checkClaims(payload []byte, nonce string, key kbs.TEEPubKey, ours bool) (Claims, error) {
	t, err := kbs.DecodeTokenClaims(payload)
	if err != nil {
		return Claims{}, cause.New(cause.TokenInvalid, "%w", err)
	}
	theirs, err := t.TEEPubKey()
	if err != nil {
		return Claims{}, cause.New(cause.TokenInvalid, "%w", err)
	}
	if theirs.Kty != key.Kty || theirs.Crv != key.Crv || theirs.X != key.X || theirs.Y != key.Y {
		return Claims{}, cause.New(cause.TokenInvalid, "the token is of another session: its tee-pubkey is not this session's")
	}
	if t.Nonce != "" && t.Nonce != nonce {
		return Claims{}, cause.New(cause.TokenInvalid, "the token is of another session: its eat_nonce is not this session's")
	}
	c := Claims{IssuedAt: time.Unix(t.IssuedAt, 0).UTC(), Expires: time.Unix(t.Expires, 0).UTC()}
	// The guest's clock is the host's: only the broker's times are compared.
	if t.IssuedAt <= 0 || !c.Expires.After(c.IssuedAt) || c.Expires.Sub(c.IssuedAt) > maxTokenLife {
		return Claims{}, cause.New(cause.TokenInvalid, "the token is valid from %s to %s: not a session's life", c.IssuedAt.Format(time.RFC3339), c.Expires.Format(time.RFC3339))
	}
	if !ours {
		return c, nil
	}
	m := t.CVMAgent
	if m == nil {
		return Claims{}, cause.New(cause.TokenInvalid, "the token says nothing of the policy, as dialect %s has it", kbs.Dialect)
	}
	c.HasMark, c.PolicyName, c.VersionMark = true, m.PolicyName, m.VersionMark
	c.Signers, c.InstanceID, c.Tombstone = m.Signers, m.InstanceID, m.Tombstone
	return c, nil
}
