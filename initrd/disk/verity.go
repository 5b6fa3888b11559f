package disk

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"regexp"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const (
	verityBlock  = 4096
	verityPerBlk = verityBlock / 32 // digests in a hash block
	maxBlocks    = 1 << 28          // of data: 1 TiB
)

var rootHash = regexp.MustCompile(`\A[0-9a-f]{64}\z`)

// Verity is what a verity superblock says that the root hash cannot settle by
// itself: the number of data blocks, and the salt.
type Verity struct {
	Blocks uint64
	Salt   []byte
}

// ParseVerity reads a superblock (cryptsetup's docs/verity) of the one form that
// is accepted: version 1, type 1, SHA-256, blocks of 4096 bytes.
//
// It comes from the host. The root hash is over salt and top block, whose
// length is fixed, so neither can be another's. The number of blocks alone
// decides how many levels of hashes there are: CheckRoot settles that.
func ParseVerity(b []byte) (*Verity, error) {
	bad := func(format string, args ...any) (*Verity, error) {
		return nil, cause.New(cause.VerityFailed, "verity superblock: "+format, args...)
	}
	if len(b) < 512 || !bytes.Equal(b[:8], []byte("verity\x00\x00")) {
		return bad("there is none")
	}
	algorithm, _, _ := bytes.Cut(b[32:64], []byte{0})
	v := Verity{Blocks: le.Uint64(b[72:])}
	salt := int(le.Uint16(b[80:]))
	switch {
	case le.Uint32(b[8:]) != 1 || le.Uint32(b[12:]) != 1:
		return bad("version %d, type %d, expected 1 and 1", le.Uint32(b[8:]), le.Uint32(b[12:]))
	case string(algorithm) != "sha256":
		return bad("algorithm %.32q, expected sha256", algorithm)
	case le.Uint32(b[64:]) != verityBlock || le.Uint32(b[68:]) != verityBlock:
		return bad("blocks of %d and %d bytes, expected %d", le.Uint32(b[64:]), le.Uint32(b[68:]), verityBlock)
	case v.Blocks == 0 || v.Blocks > maxBlocks:
		return bad("%d data blocks", v.Blocks)
	case salt > 256:
		return bad("a salt of %d bytes", salt)
	}
	v.Salt = bytes.Clone(b[88 : 88+salt])
	return &v, nil
}

// table is the target's parameters (Documentation/admin-guide/device-mapper/verity).
// The hashes begin in the block after the superblock.
func (v *Verity) table(data, hashes, root string) string {
	salt := "-"
	if len(v.Salt) > 0 {
		salt = hex.EncodeToString(v.Salt)
	}
	return fmt.Sprintf("1 %s %s %d %d %d 1 sha256 %s %s 2 panic_on_corruption panic_on_error", data, hashes, verityBlock, verityBlock, v.Blocks, root, salt)
}

// levels is how many levels of hash blocks are above n data blocks.
func levels(n uint64) int {
	l := 0
	for ; n > 1; n = (n + verityPerBlk - 1) / verityPerBlk {
		l++
	}
	return l
}

// CheckRoot reads the squashfs superblock through the verity device. What it
// says of its size must need as many levels of hashes as the verity superblock
// made the kernel assume: with another number, hashes would pass for data.
func (v *Verity) CheckRoot(root io.ReaderAt) error {
	b := make([]byte, 96)
	if n, err := root.ReadAt(b, 0); n < len(b) {
		return cause.New(cause.VerityFailed, "read the root: %w", err)
	}
	if !bytes.Equal(b[:4], []byte("hsqs")) {
		return cause.New(cause.VerityFailed, "the root is no squashfs")
	}
	used := (le.Uint64(b[40:]) + verityBlock - 1) / verityBlock
	if used == 0 || used > v.Blocks || levels(used) != levels(v.Blocks) {
		return cause.New(cause.VerityFailed, "a root of %d blocks under hashes for %d", used, v.Blocks)
	}
	return nil
}

// VerityPartitions returns the nodes of the data and the hash partition, whose
// UUIDs are the two halves of the root hash, or "" for what is not there yet.
func (s System) VerityPartitions(root string) (data, hashes string, err error) {
	if !rootHash.MatchString(root) {
		return "", "", cause.New(cause.VerityFailed, "root hash %.80q, expected 64 lowercase hex digits", root)
	}
	for i, half := range []string{root[:32], root[32:]} {
		nodes, err := s.Find(func(p Partition) bool { return p.UUID == half })
		if err != nil {
			return "", "", cause.Wrap(cause.VerityFailed, err)
		}
		if len(nodes) == 0 {
			continue
		}
		// A second one of that UUID is as good: the hash decides.
		if i == 0 {
			data = nodes[0]
		} else {
			hashes = nodes[0]
		}
	}
	return data, hashes, nil
}

// OpenVerity maps the root under the root hash as name, and returns its node.
func OpenVerity(name, data, hashes, root string) (string, error) {
	super, err := readStart(hashes, 512)
	if err != nil {
		return "", cause.Wrap(cause.VerityFailed, err)
	}
	v, err := ParseVerity(super)
	if err != nil {
		return "", err
	}
	m, err := openMapper()
	if err != nil {
		return "", cause.Wrap(cause.VerityFailed, err)
	}
	defer func() { _ = m.Close() }()
	node, err := m.create(name, target{sectors: v.Blocks * (verityBlock / 512), kind: "verity", params: v.table(data, hashes, root), ro: true})
	if err != nil {
		return "", cause.Wrap(cause.VerityFailed, err)
	}
	f, err := os.Open(node)
	if err != nil {
		return "", cause.Wrap(cause.VerityFailed, err)
	}
	defer f.Close()
	return node, v.CheckRoot(f)
}

func readStart(node string, n int) ([]byte, error) {
	f, err := os.Open(node)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, n)
	_, err = io.ReadFull(f, b)
	return b, err
}
