package measure

import (
	"encoding/binary"
	"hash/crc32"
	"io"
)

// sector is the only size that OVMF reads a FAT with here, see the guest image.
const sector = 512

const maxPartitions = 128

var guidESP = guid("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")

// findESP finds the one EFI system partition of a GPT disk (UEFI 2.10, section
// 5.3): the primary header and its entries, by their checksums. The backup is
// not read: firmware does not either while the primary is whole.
func findESP(disk io.ReaderAt, size int64) (*io.SectionReader, error) {
	var h [sector]byte
	if _, err := disk.ReadAt(h[:], sector); err != nil {
		return nil, bad("disk: no GPT header: %w", err)
	}
	le := binary.LittleEndian
	if string(h[:8]) != "EFI PART" || le.Uint32(h[8:]) != 0x00010000 {
		return nil, bad("disk: no GPT header of revision 1.0 in the second sector of %d bytes", sector)
	}
	length := le.Uint32(h[12:])
	if length != 92 {
		return nil, bad("disk: a GPT header of %d bytes, expected 92", length)
	}
	sum := le.Uint32(h[16:])
	clear(h[16:20])
	if crc32.ChecksumIEEE(h[:length]) != sum || le.Uint64(h[24:]) != 1 {
		return nil, bad("disk: the GPT header's checksum or place is wrong")
	}
	first, last := le.Uint64(h[40:]), le.Uint64(h[48:])
	count, width := le.Uint32(h[80:]), le.Uint32(h[84:])
	if width != 128 || count == 0 || count > maxPartitions || first > last || last >= uint64(size)/sector {
		return nil, bad("disk: a GPT of %d entries of %d bytes, sectors %d to %d of %d", count, width, first, last, size/sector)
	}
	entries := make([]byte, count*width)
	at := le.Uint64(h[72:])
	if at < 2 || at >= first {
		return nil, bad("disk: GPT entries in sector %d", at)
	}
	if _, err := disk.ReadAt(entries, int64(at)*sector); err != nil {
		return nil, bad("disk: GPT entries: %w", err)
	}
	if crc32.ChecksumIEEE(entries) != le.Uint32(h[88:]) {
		return nil, bad("disk: the GPT entries' checksum is wrong")
	}
	var esp *io.SectionReader
	for ; len(entries) > 0; entries = entries[width:] {
		if [16]byte(entries[:16]) != guidESP {
			continue
		}
		from, to := le.Uint64(entries[32:]), le.Uint64(entries[40:])
		if from < first || to < from || to > last {
			return nil, bad("disk: an EFI system partition in sectors %d to %d, outside %d to %d", from, to, first, last)
		}
		if esp != nil {
			return nil, bad("disk: two EFI system partitions, of which firmware chooses")
		}
		esp = io.NewSectionReader(disk, int64(from)*sector, int64(to-from+1)*sector)
	}
	if esp == nil {
		return nil, bad("disk: no EFI system partition")
	}
	return esp, nil
}
