package measure

import "encoding/binary"

// The section types and attributes of a TDVF (Intel TDX Virtual Firmware Design
// Guide, tables 11-2 and 11-3; edk2, OvmfPkg/ResetVector/X64/IntelTdxMetadata.asm).
const (
	tdvfBFV     = 0 // boot firmware volume: code
	tdvfCFV     = 1 // configuration firmware volume: variables
	tdvfHOB     = 2
	tdvfTempMem = 3

	tdvfMRExtend = 1 << 0 // contents are measured
	tdvfPageAug  = 1 << 1 // pages are added after the launch
)

// maxTDVFMemory bounds the pages that a launch hashes.
const maxTDVFMemory = 64 << 20

// tdvfSection is a range that the VMM adds to the TD.
type tdvfSection struct {
	data             []byte // from the file; may be shorter than the memory
	address, size    uint64
	kind, attributes uint32
}

// tdvf is a firmware image as a TDX launch sees it.
type tdvf struct{ sections []tdvfSection }

func parseTDVF(fw []byte) (*tdvf, error) {
	table, err := parseFooter(fw)
	if err != nil {
		return nil, err
	}
	offset, err := table.word(guidTDXMetadata, "TDX metadata")
	if err != nil {
		return nil, err
	}
	meta, err := at(fw, offset, 16, "TDX metadata")
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	size, version, count := le.Uint32(meta[4:]), le.Uint32(meta[8:]), le.Uint32(meta[12:])
	if string(meta[:4]) != "TDVF" || version != 1 {
		return nil, bad("firmware: TDX metadata %q version %d, expected TDVF version 1", meta[:4], version)
	}
	if count == 0 || count > maxSections || uint64(size) < 16+32*uint64(count) || uint64(size) > uint64(len(meta)) {
		return nil, bad("firmware: TDX metadata of %d bytes with %d sections", size, count)
	}
	out := &tdvf{}
	var total uint64
	for d := meta[16 : 16+32*count]; len(d) > 0; d = d[32:] {
		from, length := uint64(le.Uint32(d)), uint64(le.Uint32(d[4:]))
		s := tdvfSection{address: le.Uint64(d[8:]), size: le.Uint64(d[16:]), kind: le.Uint32(d[24:]), attributes: le.Uint32(d[28:])}
		if s.address%page != 0 || s.size%page != 0 || s.size == 0 || s.size > maxTDVFMemory || s.address > 1<<52 {
			return nil, bad("firmware: TDX section %#x of %#x bytes is not whole pages", s.address, s.size)
		}
		if total += s.size; total > maxTDVFMemory {
			return nil, bad("firmware: TDX sections of more than %d bytes", maxTDVFMemory)
		}
		if length > s.size || from+length > uint64(len(fw)) {
			return nil, bad("firmware: TDX section %#x takes bytes %d to %d of %d", s.address, from, from+length, len(fw))
		}
		if s.kind > tdvfTempMem || s.attributes&^(tdvfMRExtend|tdvfPageAug) != 0 || s.attributes == tdvfMRExtend|tdvfPageAug {
			return nil, bad("firmware: TDX section type %d with attributes %#x is not known", s.kind, s.attributes)
		}
		if s.attributes&tdvfMRExtend != 0 && length != s.size {
			return nil, bad("firmware: TDX section %#x is measured, and %d of its %d bytes are not in the file", s.address, s.size-length, s.size)
		}
		s.data = fw[from : from+length]
		out.sections = append(out.sections, s)
	}
	return out, nil
}

// one is the only section of a type.
func (t *tdvf) one(kind uint32, name string) (*tdvfSection, error) {
	var found *tdvfSection
	for i := range t.sections {
		if t.sections[i].kind == kind {
			if found != nil {
				return nil, bad("firmware: two %s sections", name)
			}
			found = &t.sections[i]
		}
	}
	if found == nil {
		return nil, bad("firmware: no %s section", name)
	}
	return found, nil
}
