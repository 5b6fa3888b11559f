package measure

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"math/big"
	"slices"

	"github.com/google/go-sev-guest/abi"
)

// The ID block and its authentication (SEV-SNP ABI 1.58, section 8.19
// SNP_LAUNCH_FINISH: ID_BLOCK and ID_AUTH; chapter 10 for keys and signatures).
const (
	IDBlockSize = 96
	IDAuthSize  = 4096

	idKeyAlgo     = 0x000
	authKeyAlgo   = 0x004
	idBlockSig    = 0x040
	idKey         = 0x240
	idKeySig      = 0x680
	authorKey     = 0x880
	authorKeyEnd  = authorKey + abi.EcsdaPublicKeySize
	ecdsaP384     = 1 // ECDSA P-384 with SHA-384
	componentSize = 72
	signatureSize = 512
)

// IDBlock is what a guest owner says of a launch, 96 bytes.
type IDBlock struct {
	LaunchDigest [48]byte
	FamilyID     [16]byte
	ImageID      [16]byte
	GuestSVN     uint32
	Policy       uint64 // guest policy (table 10); the launch's must be the same
}

// Bits of the guest policy.
const (
	policyOne     = 1 << 17 // reserved, must be one
	policyMigrate = 1 << 18
	policyDebug   = 1 << 19
	policyMax     = 1<<26 - 1
)

// Bytes is the block as the firmware reads it. A policy that every verifier
// refuses (debug, migration) is not worth an ID block.
func (b IDBlock) Bytes() ([]byte, error) {
	if b.Policy&policyOne == 0 || b.Policy > policyMax {
		return nil, bad("guest policy %#x: bit 17 must be set and none above 25", b.Policy)
	}
	if b.Policy&(policyDebug|policyMigrate) != 0 {
		return nil, bad("guest policy %#x allows debugging or migration, which no verifier accepts", b.Policy)
	}
	if b.LaunchDigest == ([48]byte{}) {
		return nil, bad("the launch digest is zero")
	}
	out := make([]byte, IDBlockSize)
	copy(out[0x00:], b.LaunchDigest[:])
	copy(out[0x30:], b.FamilyID[:])
	copy(out[0x40:], b.ImageID[:])
	binary.LittleEndian.PutUint32(out[0x50:], 1)
	binary.LittleEndian.PutUint32(out[0x54:], b.GuestSVN)
	binary.LittleEndian.PutUint64(out[0x58:], b.Policy)
	return out, nil
}

// IDAuth is a signed ID block.
type IDAuth struct {
	Block           []byte   // 96 bytes
	Auth            []byte   // 4096 bytes
	IDKeyDigest     [48]byte // as the report has it
	AuthorKeyDigest [48]byte // zero without an author key
}

// SignIDBlock signs the block by the ID key and, where there is one, the ID key
// by the author key. Both are on P-384.
func SignIDBlock(b IDBlock, id, author *ecdsa.PrivateKey) (*IDAuth, error) {
	block, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	out := &IDAuth{Block: block, Auth: make([]byte, IDAuthSize)}
	binary.LittleEndian.PutUint32(out.Auth[idKeyAlgo:], ecdsaP384)
	key, err := publicKey(id)
	if err != nil {
		return nil, err
	}
	copy(out.Auth[idKey:], key)
	out.IDKeyDigest = sha512.Sum384(key)
	if err := sign(id, block, out.Auth[idBlockSig:]); err != nil {
		return nil, err
	}
	if author == nil {
		return out, nil
	}
	binary.LittleEndian.PutUint32(out.Auth[authKeyAlgo:], ecdsaP384)
	signer, err := publicKey(author)
	if err != nil {
		return nil, err
	}
	copy(out.Auth[authorKey:authorKeyEnd], signer)
	out.AuthorKeyDigest = sha512.Sum384(signer)
	return out, sign(author, key, out.Auth[idKeySig:])
}

// publicKey is the ABI's form of a key, 1028 bytes: curve, then coordinates in
// little endian.
func publicKey(k *ecdsa.PrivateKey) ([]byte, error) {
	if k == nil || k.Curve != elliptic.P384() {
		return nil, bad("the key is not on P-384")
	}
	return abi.EcdsaPublicKeyToBytes(&k.PublicKey)
}

// sign writes R and S, 72 bytes each in little endian.
func sign(k *ecdsa.PrivateKey, data, to []byte) error {
	digest := sha512.Sum384(data)
	r, s, err := ecdsa.Sign(rand.Reader, k, digest[:])
	if err != nil {
		return err
	}
	for i, v := range []*big.Int{r, s} {
		c := to[i*componentSize : (i+1)*componentSize]
		v.FillBytes(c)
		slices.Reverse(c)
	}
	return nil
}

// ParseKey reads an ECDSA key from PEM: SEC 1 or PKCS #8, unencrypted, as
// `openssl ecparam -name secp384r1 -genkey` writes it.
func ParseKey(data []byte) (*ecdsa.PrivateKey, error) {
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			return nil, bad("no EC PRIVATE KEY or PRIVATE KEY in PEM")
		}
		defer clear(b.Bytes)
		switch b.Type {
		case "EC PARAMETERS":
		case "EC PRIVATE KEY":
			k, err := x509.ParseECPrivateKey(b.Bytes)
			if err != nil {
				return nil, bad("%w", err)
			}
			return k, nil
		case "PRIVATE KEY":
			k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
			if err != nil {
				return nil, bad("%w", err)
			}
			ec, ok := k.(*ecdsa.PrivateKey)
			if !ok {
				return nil, bad("the key is %T, expected ECDSA", k)
			}
			return ec, nil
		default:
			return nil, bad("PEM block %q, expected EC PRIVATE KEY or PRIVATE KEY", b.Type)
		}
	}
}
