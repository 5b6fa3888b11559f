package measure

import "encoding/binary"

// The section types of OVMF's SEV metadata (edk2, OvmfPkg/ResetVector/X64/
// OvmfSevMetadata.asm).
const (
	sevSecMem       = 1
	sevSecrets      = 2
	sevCPUID        = 3
	sevSVSMCAA      = 4
	sevKernelHashes = 0x10
)

// sevSection is a range of memory that the VMM adds before the launch.
type sevSection struct {
	gpa, size uint64
	kind      uint32
}

// sevFirmware is what OVMF says of itself for an SEV-SNP launch.
type sevFirmware struct {
	sections []sevSection // in the order of measuring
	resetEIP uint32       // where application processors start
	hashes   uint32       // address of the hashes table; 0 when there is none
}

// maxSEVMemory bounds the pages that one launch hashes for its sections.
const maxSEVMemory = 64 << 20

func parseSEV(fw []byte) (*sevFirmware, error) {
	table, err := parseFooter(fw)
	if err != nil {
		return nil, err
	}
	out := &sevFirmware{}
	if out.resetEIP, err = table.word(guidSEVInfo, "SEV-ES reset block"); err != nil {
		return nil, err
	}
	if _, ok := table[guidSEVHashes]; ok {
		if out.hashes, err = table.word(guidSEVHashes, "SEV hashes table"); err != nil {
			return nil, err
		}
	}
	offset, err := table.word(guidSEVMetadata, "SEV metadata")
	if err != nil {
		return nil, err
	}
	meta, err := at(fw, offset, 16, "SEV metadata")
	if err != nil {
		return nil, err
	}
	size, version, count := binary.LittleEndian.Uint32(meta[4:]), binary.LittleEndian.Uint32(meta[8:]), binary.LittleEndian.Uint32(meta[12:])
	if string(meta[:4]) != "ASEV" || version != 1 {
		return nil, bad("firmware: SEV metadata %q version %d, expected ASEV version 1", meta[:4], version)
	}
	if count == 0 || count > maxSections || uint64(size) < 16+12*uint64(count) || uint64(size) > uint64(len(meta)) {
		return nil, bad("firmware: SEV metadata of %d bytes with %d sections", size, count)
	}
	var total uint64
	for d := meta[16 : 16+12*count]; len(d) > 0; d = d[12:] {
		s := sevSection{uint64(binary.LittleEndian.Uint32(d)), uint64(binary.LittleEndian.Uint32(d[4:])), binary.LittleEndian.Uint32(d[8:])}
		if s.gpa%page != 0 || s.size%page != 0 || s.size == 0 {
			return nil, bad("firmware: SEV section %#x of %#x bytes is not whole pages", s.gpa, s.size)
		}
		if total += s.size; total > maxSEVMemory {
			return nil, bad("firmware: SEV sections of more than %d bytes", maxSEVMemory)
		}
		out.sections = append(out.sections, s)
	}
	return out, nil
}

func (f *sevFirmware) has(kind uint32) bool {
	for _, s := range f.sections {
		if s.kind == kind {
			return true
		}
	}
	return false
}
