package measure

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/google/go-sev-guest/abi"
)

func newKey(t *testing.T, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// verifies checks a signature in the ABI's form with the key in the ABI's form,
// both read by go-sev-guest.
func verifies(key, data, sig []byte) bool {
	if binary.LittleEndian.Uint32(key) != abi.EccP384 {
		return false
	}
	point := []byte{4} // uncompressed, SEC 1
	for _, c := range [][]byte{key[4 : 4+72], key[4+72 : 4+144]} {
		point = append(point, abi.AmdBigInt(c).FillBytes(make([]byte, 48))...)
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), point)
	if err != nil {
		return false
	}
	digest := sha512.Sum384(data)
	return ecdsa.Verify(pub, digest[:], abi.AmdBigInt(sig[:72]), abi.AmdBigInt(sig[72:144]))
}

func TestIDBlockVerifies(t *testing.T) {
	id, author := newKey(t, elliptic.P384()), newKey(t, elliptic.P384())
	b := IDBlock{LaunchDigest: [48]byte{1, 2, 3}, FamilyID: [16]byte{4}, ImageID: [16]byte{5}, GuestSVN: 6, Policy: 0x30000}
	s, err := SignIDBlock(b, id, author)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, IDBlockSize)
	copy(want, []byte{1, 2, 3})
	want[0x30], want[0x40], want[0x50], want[0x54], want[0x5a] = 4, 5, 1, 6, 3
	if !bytes.Equal(s.Block, want) || len(s.Auth) != IDAuthSize {
		t.Fatalf("block %x, auth of %d bytes", s.Block, len(s.Auth))
	}
	key, signer := s.Auth[0x240:0x240+1028], s.Auth[0x880:0x880+1028]
	if !verifies(key, s.Block, s.Auth[0x40:]) {
		t.Error("the ID key does not verify the block")
	}
	if !verifies(signer, key, s.Auth[0x680:]) {
		t.Error("the author key does not verify the ID key")
	}
	if verifies(signer, s.Block, s.Auth[0x40:]) {
		t.Error("the author key verifies the block, which it did not sign")
	}
	if s.IDKeyDigest != sha512.Sum384(key) || s.AuthorKeyDigest != sha512.Sum384(signer) {
		t.Error("digests that are not the keys'")
	}
	for i := range s.Block {
		s.Block[i] ^= 1
		if verifies(key, s.Block, s.Auth[0x40:]) {
			t.Fatalf("byte %d of the block is not signed", i)
		}
		s.Block[i] ^= 1
	}
	// Everything between the fields is reserved and zero.
	for _, r := range [][2]int{{0x8, 0x40}, {0x40 + 144, 0x240}, {0x240 + 148, 0x680}, {0x680 + 144, 0x880}, {0x880 + 148, 0x1000}} {
		if !bytes.Equal(s.Auth[r[0]:r[1]], make([]byte, r[1]-r[0])) {
			t.Errorf("bytes %#x to %#x are not zero", r[0], r[1])
		}
	}
}

func TestIDBlockWithoutAuthor(t *testing.T) {
	s, err := SignIDBlock(IDBlock{LaunchDigest: [48]byte{1}, Policy: 0x30000}, newKey(t, elliptic.P384()), nil)
	if err != nil {
		t.Fatal(err)
	}
	if binary.LittleEndian.Uint32(s.Auth[4:]) != 0 || !bytes.Equal(s.Auth[0x680:], make([]byte, 0x1000-0x680)) || s.AuthorKeyDigest != ([48]byte{}) {
		t.Error("an author key that nobody gave")
	}
}

func TestIDBlockRefuses(t *testing.T) {
	good, p384 := IDBlock{LaunchDigest: [48]byte{1}, Policy: 0x30000}, newKey(t, elliptic.P384())
	for name, c := range map[string]struct {
		change     func(*IDBlock)
		id, author *ecdsa.PrivateKey
		want       string
	}{
		"debugging":          {func(b *IDBlock) { b.Policy |= 1 << 19 }, p384, nil, "debugging"},
		"migration":          {func(b *IDBlock) { b.Policy |= 1 << 18 }, p384, nil, "migration"},
		"a reserved bit":     {func(b *IDBlock) { b.Policy |= 1 << 26 }, p384, nil, "none above 25"},
		"bit 17 clear":       {func(b *IDBlock) { b.Policy = 0 }, p384, nil, "bit 17"},
		"no launch digest":   {func(b *IDBlock) { b.LaunchDigest = [48]byte{} }, p384, nil, "zero"},
		"an ID key on P-256": {func(*IDBlock) {}, newKey(t, elliptic.P256()), nil, "P-384"},
		"an author on P-521": {func(*IDBlock) {}, p384, newKey(t, elliptic.P521()), "P-384"},
		"no ID key whatever": {func(*IDBlock) {}, nil, nil, "P-384"},
	} {
		b := good
		c.change(&b)
		if _, err := SignIDBlock(b, c.id, c.author); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, expected %q", name, err, c.want)
		}
	}
}

func TestParseKey(t *testing.T) {
	k := newKey(t, elliptic.P384())
	sec1, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	for name, c := range map[string]struct{ in, want string }{
		"SEC 1":                       {block("EC PRIVATE KEY", sec1), ""},
		"SEC 1 behind its parameters": {block("EC PARAMETERS", []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}) + block("EC PRIVATE KEY", sec1), ""},
		"PKCS #8":                     {block("PRIVATE KEY", pkcs8), ""},
		"nothing":                     {"", "no EC PRIVATE KEY"},
		"a public key":                {block("PUBLIC KEY", nil), `PEM block "PUBLIC KEY"`},
		"an encrypted key":            {block("ENCRYPTED PRIVATE KEY", nil), "ENCRYPTED"},
		"broken DER":                  {block("EC PRIVATE KEY", sec1[:20]), "x509"},
	} {
		got, err := ParseKey([]byte(c.in))
		switch {
		case c.want == "" && (err != nil || !got.Equal(k)):
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, expected %q", name, err, c.want)
		}
	}
}
