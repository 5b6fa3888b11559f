package broker

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// eatProfile is the profile that Trustee's tokens name.
const eatProfile = "tag:github.com,2024:confidential-containers/Trustee"

// issuer signs EAR tokens: JWS, ES256, with the public key as `jwk` in the
// header. Relying parties pin the key; the header is for their convenience.
type issuer struct {
	signer jose.Signer
}

func newIssuer(key *ecdsa.PrivateKey) (*issuer, error) {
	if key.Curve != elliptic.P256() {
		return nil, cause.New(cause.Config, "the token key is on %s, expected P-256", key.Params().Name)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key},
		(&jose.SignerOptions{EmbedJWK: true}).WithType("JWT"))
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	return &issuer{signer: s}, nil
}

// issue makes the token of an accepted attestation.
func (i *issuer) issue(n *session, reportData [kbs.ReportDataSize]byte, claims *kbs.CVMAgentClaims, now time.Time) (string, error) {
	runtime := kbs.RuntimeData{Nonce: n.nonce, TEEPubKey: n.key}
	annotated := map[string]any{
		"report_data":         hex.EncodeToString(reportData[:]),
		"runtime_data_claims": runtime,
		n.tee:                 n.facts,
	}
	vector := map[string]int{"hardware": 0, "configuration": 0, "executables": 0, "instance-identity": 2}
	if l := n.facts.Launch; l != nil {
		annotated["init_data"] = l.Digest
		vector["configuration"] = 2
	}
	raw := map[string]json.RawMessage{}
	for name, v := range annotated {
		b, err := json.Marshal(v)
		if err != nil {
			return "", fmt.Errorf("claim %s: %w", name, err)
		}
		raw[name] = b
	}
	payload, err := json.Marshal(kbs.TokenClaims{
		Issuer:   "cvm-broker",
		IssuedAt: now.Unix(),
		Expires:  n.expires.Unix(),
		Profile:  eatProfile,
		Nonce:    n.nonce,
		Verifier: &kbs.VerifierID{Build: "cvm-broker", Developer: "cvm-agent"},
		Submods:  map[string]kbs.Submod{"cpu0": {Status: kbs.StatusAffirming, Vector: vector, PolicyID: "cvm-broker", Annotated: raw}},
		CVMAgent: claims,
	})
	if err != nil {
		return "", err
	}
	jws, err := i.signer.Sign(payload)
	if err != nil {
		return "", err
	}
	return jws.CompactSerialize()
}

// encrypt makes the flattened JWE (RFC 7516) of a resource for the guest's key.
func encrypt(key kbs.TEEPubKey, data []byte) (string, error) {
	pub, err := key.PublicKey()
	if err != nil {
		return "", err
	}
	alg := jose.ECDH_ES_A256KW
	if key.Kty == "RSA" {
		alg = jose.RSA_OAEP_256
	}
	e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: alg, Key: pub}, nil)
	if err != nil {
		return "", err
	}
	obj, err := e.Encrypt(data)
	if err != nil {
		return "", err
	}
	return obj.FullSerialize(), nil
}
