package kbs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"fmt"
	"math/big"
)

// The key wrapping algorithms of a TEEPubKey (RFC 7518).
const (
	AlgECDH = "ECDH-ES+A256KW"
	AlgRSA  = "RSA-OAEP-256"
)

// TEEPubKey is the guest's ephemeral key as a JWK: EC on P-256 or P-521 with
// coordinates of fixed width (32 or 66 bytes), or RSA of 2048 to 4096 bits.
// All values are unpadded base64url.
type TEEPubKey struct {
	Kty string `json:"kty"`
	Crv string `json:"crv,omitempty"`
	Alg string `json:"alg"`
	X   string `json:"x,omitempty"`
	Y   string `json:"y,omitempty"`
	N   string `json:"n,omitempty"`
	E   string `json:"e,omitempty"`
}

// NewTEEPubKey describes an EC key on P-256 or P-521.
func NewTEEPubKey(pub *ecdsa.PublicKey) (TEEPubKey, error) {
	var crv string
	switch pub.Curve {
	case elliptic.P256():
		crv = "P-256"
	case elliptic.P521():
		crv = "P-521"
	default:
		return TEEPubKey{}, fmt.Errorf("tee-pubkey: curve %s, expected P-256 or P-521", pub.Params().Name)
	}
	point, err := pub.Bytes() // 04 ‖ x ‖ y
	if err != nil {
		return TEEPubKey{}, fmt.Errorf("tee-pubkey: %w", err)
	}
	w := (len(point) - 1) / 2
	enc := base64.RawURLEncoding.EncodeToString
	return TEEPubKey{Kty: "EC", Crv: crv, Alg: AlgECDH, X: enc(point[1 : 1+w]), Y: enc(point[1+w:])}, nil
}

// PublicKey returns *ecdsa.PublicKey or *rsa.PublicKey after checking
// algorithm, widths and that the point is on its curve.
func (k TEEPubKey) PublicKey() (crypto.PublicKey, error) {
	switch k.Kty {
	case "EC":
		return k.ec()
	case "RSA":
		return k.rsa()
	}
	return nil, fmt.Errorf("tee-pubkey: kty %q, expected EC or RSA", clip(k.Kty))
}

func (k TEEPubKey) ec() (*ecdsa.PublicKey, error) {
	var curve elliptic.Curve
	var width int
	switch k.Crv {
	case "P-256":
		curve, width = elliptic.P256(), 32
	case "P-521":
		curve, width = elliptic.P521(), 66
	default:
		return nil, fmt.Errorf("tee-pubkey: crv %q, expected P-256 or P-521", clip(k.Crv))
	}
	if k.Alg != AlgECDH {
		return nil, fmt.Errorf("tee-pubkey: alg %q, expected %s", clip(k.Alg), AlgECDH)
	}
	if k.N != "" || k.E != "" {
		return nil, fmt.Errorf("tee-pubkey: RSA members in an EC key")
	}
	point := []byte{4}
	for name, s := range map[string]string{"x": k.X, "y": k.Y} {
		b, err := rawURL(s)
		if err != nil || len(b) != width {
			return nil, fmt.Errorf("tee-pubkey: %s is not unpadded base64url of %d bytes", name, width)
		}
	}
	x, _ := rawURL(k.X)
	y, _ := rawURL(k.Y)
	pub, err := ecdsa.ParseUncompressedPublicKey(curve, append(append(point, x...), y...))
	if err != nil {
		return nil, fmt.Errorf("tee-pubkey: the point is not on %s", k.Crv)
	}
	return pub, nil
}

func (k TEEPubKey) rsa() (*rsa.PublicKey, error) {
	if k.Alg != AlgRSA {
		return nil, fmt.Errorf("tee-pubkey: alg %q, expected %s", clip(k.Alg), AlgRSA)
	}
	if k.Crv != "" || k.X != "" || k.Y != "" {
		return nil, fmt.Errorf("tee-pubkey: EC members in an RSA key")
	}
	n, err := rawURL(k.N)
	if err != nil || len(n) > 512 {
		return nil, fmt.Errorf("tee-pubkey: n is not unpadded base64url of at most 512 bytes")
	}
	e, err := rawURL(k.E)
	if err != nil || len(e) == 0 || len(e) > 4 {
		return nil, fmt.Errorf("tee-pubkey: e is not unpadded base64url of 1 to 4 bytes")
	}
	pub := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}
	if pub.N.BitLen() < 2048 || pub.N.Bit(0) == 0 || pub.E < 3 || pub.E&1 == 0 || pub.E > 1<<31-1 {
		return nil, fmt.Errorf("tee-pubkey: RSA modulus of %d bits or exponent not usable, expected 2048 to 4096 bits", pub.N.BitLen())
	}
	return pub, nil
}

// rawURL decodes unpadded base64url and refuses non-zero trailing bits and
// line breaks, so that a key has one spelling.
func rawURL(s string) ([]byte, error) {
	for i := range len(s) {
		if s[i] == '\r' || s[i] == '\n' {
			return nil, base64.CorruptInputError(i)
		}
	}
	return base64.RawURLEncoding.Strict().DecodeString(s)
}
