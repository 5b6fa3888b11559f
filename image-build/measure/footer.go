package measure

import "encoding/binary"

// The GUIDed table at the end of OVMF (edk2, OvmfPkg/ResetVector/Ia16/
// ResetVectorVtf0.asm): it ends 32 bytes before the end of the image and is read
// backwards, each entry being data, a length that counts itself and the GUID,
// and the GUID. The last one is the footer, whose length is the whole table's.
const (
	footerEnd   = 32
	entryHead   = 2 + 16
	maxEntries  = 64
	maxSections = 64
)

var (
	guidFooter = guid("96b582de-1fb2-45f7-baea-a366c55a082d")
	// SEV (QEMU, target/i386/sev.c; edk2, OvmfPkg/ResetVector).
	guidSEVHashes   = guid("7255371f-3a3b-4b04-927b-1da6efa8d454")
	guidSEVInfo     = guid("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
	guidSEVMetadata = guid("dc886566-984a-4798-a75e-5585a7bf67cc")
	// TDX (Intel TDX Virtual Firmware Design Guide, section 11).
	guidTDXMetadata = guid("e47a6535-984a-4798-865e-4685a7bf8ec2")
)

// footer is the table, by GUID.
type footer map[[16]byte][]byte

func parseFooter(fw []byte) (footer, error) {
	if len(fw) < footerEnd+entryHead || len(fw) > MaxFirmware {
		return nil, bad("firmware: %d bytes, expected %d to %d", len(fw), footerEnd+entryHead, MaxFirmware)
	}
	end := len(fw) - footerEnd
	if [16]byte(fw[end-16:end]) != guidFooter {
		return nil, bad("firmware: no OVMF table footer %d bytes before the end", footerEnd)
	}
	total := int(binary.LittleEndian.Uint16(fw[end-entryHead:]))
	if total < entryHead || total > end {
		return nil, bad("firmware: OVMF table of %d bytes", total)
	}
	rest := fw[end-total : end-entryHead]
	table := footer{}
	for len(rest) > 0 {
		if len(rest) < entryHead || len(table) == maxEntries {
			return nil, bad("firmware: OVMF table has %d bytes that are no entry", len(rest))
		}
		id := [16]byte(rest[len(rest)-16:])
		size := int(binary.LittleEndian.Uint16(rest[len(rest)-entryHead:]))
		if size < entryHead || size > len(rest) {
			return nil, bad("firmware: OVMF table entry %x of %d bytes", id, size)
		}
		if _, twice := table[id]; twice {
			return nil, bad("firmware: OVMF table entry %x is there twice", id)
		}
		table[id] = rest[len(rest)-size : len(rest)-entryHead]
		rest = rest[:len(rest)-size]
	}
	return table, nil
}

// word is an entry that holds one 32-bit number and nothing else before it is
// worth reading.
func (f footer) word(id [16]byte, name string) (uint32, error) {
	e, ok := f[id]
	if !ok {
		return 0, bad("firmware: no %s in the OVMF table", name)
	}
	if len(e) < 4 {
		return 0, bad("firmware: %s has %d bytes, expected 4", name, len(e))
	}
	return binary.LittleEndian.Uint32(e), nil
}

// at is the image from offset bytes before its end.
func at(fw []byte, offset uint32, head int, name string) ([]byte, error) {
	if uint64(offset) > uint64(len(fw)) || int(offset) < head {
		return nil, bad("firmware: %s lies %d bytes before the end of %d", name, offset, len(fw))
	}
	return fw[len(fw)-int(offset):], nil
}
