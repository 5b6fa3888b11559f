package appraisal

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

const maxInstanceJWS = 4 << 10

// identify names the instance. The hardware does not: two TDs of one launch
// have the same quote but for report_data.
func (v *TDX) identify(t *Verdict, facts *Facts, in Input, q *tdxQuote, jws string) {
	const expected = "a compact JWS (ES256) over this session's nonce, by the P-256 key in its header"
	if in.Dialect != kbs.Dialect {
		t.Skip(CheckInstanceKey, expected, "not in dialect "+in.Dialect)
		if facts.TDX != nil {
			facts.Identity = "tdx-launch:" + q.launchHash()
		}
		return
	}
	if in.Offline != nil && in.Nonce == "" {
		t.Skip(CheckInstanceKey, expected, "no session, so no nonce to compare with")
		return
	}
	t.Require(CheckInstanceKey)
	thumbprint, err := instanceKey(jws, in.Nonce)
	if err != nil {
		t.Fail(CheckInstanceKey, expected, err.Error())
		return
	}
	// The JWS stands in additional_evidence: only a quote over that makes it
	// the TD's own.
	bound := facts.TDX != nil && t.Outcome(CheckReportData) == Passed
	found := "key " + thumbprint
	if !bound {
		found += ", but no quote that counts covers it"
	}
	if t.Check(bound, CheckInstanceKey, expected, found) {
		facts.Identity = "key:" + thumbprint
	}
}

// instanceKey verifies the JWS and returns the RFC 7638 thumbprint of its key,
// SHA-256 in hex.
func instanceKey(jws, nonce string) (string, error) {
	if jws == "" {
		return "", errors.New("no cvm-agent-instance in the evidence")
	}
	if nonce == "" {
		return "", errors.New("the session has no nonce")
	}
	if len(jws) > maxInstanceJWS {
		return "", fmt.Errorf("%d bytes, at most %d are read", len(jws), maxInstanceJWS)
	}
	obj, err := jose.ParseSignedCompact(jws, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return "", err
	}
	key := obj.Signatures[0].Protected.JSONWebKey
	if key == nil || !key.Valid() || !key.IsPublic() {
		return "", errors.New("no public jwk in the header")
	}
	pub, ok := key.Key.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return "", errors.New("the jwk is not on P-256")
	}
	payload, err := obj.Verify(pub)
	if err != nil {
		return "", err
	}
	if string(payload) != nonce {
		return "", errors.New("it is over another nonce")
	}
	thumbprint, err := key.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(thumbprint), nil
}

// launchHash is over the registers that a launch fixes. RTMR3 is not among
// them, since it grows.
func (q *tdxQuote) launchHash() string {
	h := sha256.New()
	for _, b := range [][]byte{q.mrTD(), q.rtmr(0), q.rtmr(1), q.rtmr(2), q.mrConfigID(), q.mrOwner(), q.mrOwnerConfig()} {
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil))
}
