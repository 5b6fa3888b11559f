package disk

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// ScratchLabel is the name of the partition that may be overwritten at boot.
const ScratchLabel = "cvm-scratch"

// The scratch device's cipher: AES-256-GCM over sectors of 4096 bytes, a random
// nonce for each write. Random nonces of 96 bits bound what one key may write
// to 2^32 sectors, 16 TiB in one boot (SP 800-38D, 8.3).
const (
	scratchCipher = "capi:gcm(aes)-random"
	scratchKey    = 32
	scratchTag    = 12 + 16 // nonce and tag, kept by dm-integrity
	scratchSector = 4096
	minScratch    = 64 << 20 / 512 // sectors
	wiped         = 1 << 20        // bytes at either end that are written before mkfs reads them
)

// FindScratch returns the node of the one partition with ScratchLabel, "" when
// there is none.
func (s System) FindScratch() (string, error) {
	nodes, err := s.Find(func(p Partition) bool { return p.Label == ScratchLabel })
	if err != nil {
		return "", cause.Wrap(cause.ScratchFailed, err)
	}
	switch len(nodes) {
	case 0:
		return "", nil
	case 1:
		return nodes[0], nil
	}
	return "", cause.New(cause.ScratchFailed, "%d partitions are called %s", len(nodes), ScratchLabel)
}

// MakeScratch makes name over the partition: dm-crypt with authentication, on
// dm-integrity that keeps the tags. Nothing that the partition holds is opened:
// its first sectors are erased, the kernel formats it anew, and the key is
// random, goes into the kernel and nowhere else. It returns the node.
func MakeScratch(name, partition string) (node string, err error) {
	defer func() { err = cause.Wrap(cause.ScratchFailed, err) }()
	size, err := erase(partition)
	if err != nil {
		return "", err
	}
	m, err := openMapper()
	if err != nil {
		return "", err
	}
	defer func() { _ = m.Close() }()
	tags := name + "-tags"
	provided, err := m.format(tags, partition, size)
	if err != nil {
		return "", err
	}
	under, err := m.create(tags, target{sectors: provided, kind: "integrity", params: integrityTable(partition)})
	if err != nil {
		return "", err
	}
	key := make([]byte, scratchKey)
	if _, err := rand.Read(key); err != nil {
		return "", err
	}
	node, err = m.create(name, target{sectors: provided, kind: "crypt", params: cryptTable(under, key), secret: true})
	clear(key)
	if err != nil {
		return "", err
	}
	return node, writeEnds(node, provided)
}

// integrityTable keeps tags without a journal: after a crash there is nothing
// to come back to (Documentation/admin-guide/device-mapper/dm-integrity).
func integrityTable(partition string) string {
	return fmt.Sprintf("%s 0 %d D 1 block_size:%d", partition, scratchTag, scratchSector)
}

func cryptTable(under string, key []byte) string {
	return fmt.Sprintf("%s %s 0 %s 0 2 integrity:%d:aead sector_size:%d", scratchCipher, hex.EncodeToString(key), under, scratchTag, scratchSector)
}

// format lets the kernel write a new dm-integrity superblock and returns the
// sectors that it leaves for data.
func (m *mapper) format(name, partition string, size uint64) (uint64, error) {
	if _, err := m.create(name, target{sectors: scratchSector / 512, kind: "integrity", params: integrityTable(partition)}); err != nil {
		return 0, err
	}
	words, err := m.status(name)
	if err = errors.Join(err, m.remove(name)); err != nil {
		return 0, err
	}
	return providedSectors(words, size)
}

// providedSectors reads dm-integrity's status: mismatches, sectors, position.
func providedSectors(words []string, size uint64) (uint64, error) {
	if len(words) < 2 {
		return 0, fmt.Errorf("dm-integrity: status %q", words)
	}
	n, err := strconv.ParseUint(words[1], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("dm-integrity: status %q", words)
	}
	n -= n % (scratchSector / 512)
	if n == 0 || n >= size {
		return 0, fmt.Errorf("dm-integrity: %d sectors for data of %d", n, size)
	}
	return n, nil
}

// erase overwrites what any superblock could be in, and returns the size.
func erase(partition string) (uint64, error) {
	f, err := os.OpenFile(partition, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return 0, err
	}
	size, err := sectors(f)
	if err == nil && size < minScratch {
		err = fmt.Errorf("%s has %d sectors, expected at least %d", partition, size, minScratch)
	}
	if err == nil {
		_, err = f.WriteAt(make([]byte, wiped), 0)
	}
	if err == nil {
		err = f.Sync()
	}
	return size, errors.Join(err, f.Close())
}

// writeEnds writes zeros where mkfs looks for other file systems: a sector that
// was never written has no valid tag and cannot be read.
func writeEnds(node string, size uint64) error {
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	zeros := make([]byte, wiped)
	_, err = f.WriteAt(zeros, 0)
	if err == nil {
		_, err = f.WriteAt(zeros, int64(size)*512-wiped)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
