package measure

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"hash"
	"slices"
)

const maxPESections = 96

// image is a PE image whose headers were checked to lie in it.
type image struct {
	data     []byte
	headers  int // SizeOfHeaders
	checksum int // offset of the checksum
	certDir  int // offset of the certificate table's directory entry; 0 without
	certSize int
	sections []*pe.Section
}

// parsePE reads the headers that UEFI firmware reads (Microsoft PE format; edk2,
// MdePkg/Library/BasePeCoffLib). Only PE32+, which is what x86-64 firmware runs.
func parsePE(data []byte) (*image, error) {
	if len(data) > MaxKernel {
		return nil, bad("PE image: %d bytes, at most %d are accepted", len(data), MaxKernel)
	}
	// debug/pe looks for a string table where the COFF header says: a bound on
	// the sections is one on what it reads.
	if len(data) < 0x40 || string(data[:2]) != "MZ" {
		return nil, bad("PE image: no MZ header")
	}
	off := int64(binary.LittleEndian.Uint32(data[0x3c:]))
	if off+24 > int64(len(data)) || string(data[off:off+4]) != "PE\x00\x00" {
		return nil, bad("PE image: no PE header at %#x", off)
	}
	if n := binary.LittleEndian.Uint16(data[off+6:]); n == 0 || n > maxPESections {
		return nil, bad("PE image: %d sections, expected 1 to %d", n, maxPESections)
	}
	if n := binary.LittleEndian.Uint32(data[off+12:]); n != 0 {
		return nil, bad("PE image: a COFF symbol table, which no UEFI image needs")
	}
	f, err := pe.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, bad("PE image: %w", err)
	}
	h, ok := f.OptionalHeader.(*pe.OptionalHeader64)
	if !ok || f.Machine != pe.IMAGE_FILE_MACHINE_AMD64 {
		return nil, bad("PE image: not PE32+ for x86-64")
	}
	img := &image{data: data, headers: int(h.SizeOfHeaders), checksum: int(off) + 24 + 64, sections: f.Sections}
	if img.headers > len(data) || img.headers < img.checksum+4 {
		return nil, bad("PE image: headers of %d bytes in %d", img.headers, len(data))
	}
	if h.NumberOfRvaAndSizes > pe.IMAGE_DIRECTORY_ENTRY_SECURITY {
		img.certDir = int(off) + 24 + 112 + 8*pe.IMAGE_DIRECTORY_ENTRY_SECURITY
		img.certSize = int(h.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_SECURITY].Size)
		if img.certDir+8 > img.headers || img.certSize > len(data) {
			return nil, bad("PE image: certificate table of %d bytes in %d", img.certSize, len(data))
		}
	}
	for _, s := range f.Sections {
		if int64(s.Offset)+int64(s.Size) > int64(len(data)) {
			return nil, bad("PE image: section %q ends at %d of %d bytes", s.Name, int64(s.Offset)+int64(s.Size), len(data))
		}
	}
	return img, nil
}

// authenticode is the image's hash as firmware measures it on load (Windows
// Authenticode Portable Executable Signature Format, "Calculating the PE Image
// Hash"; edk2, SecurityPkg/Library/DxeTpm2MeasureBootLib, MeasurePeImage): the
// headers without checksum and certificate directory, the sections in the order
// of their offsets, and what follows them but the certificates.
func (i *image) authenticode(h hash.Hash) ([]byte, error) {
	h.Write(i.data[:i.checksum])
	if i.certDir == 0 {
		h.Write(i.data[i.checksum+4 : i.headers])
	} else {
		h.Write(i.data[i.checksum+4 : i.certDir])
		h.Write(i.data[i.certDir+8 : i.headers])
	}
	sum := i.headers
	sorted := slices.Clone(i.sections)
	slices.SortStableFunc(sorted, func(a, b *pe.Section) int { return int(int64(a.Offset) - int64(b.Offset)) })
	for _, s := range sorted {
		if s.Size == 0 {
			continue
		}
		h.Write(i.data[s.Offset : s.Offset+s.Size])
		if sum += int(s.Size); sum > len(i.data) {
			return nil, bad("PE image: sections of more bytes than the image has")
		}
	}
	if rest := len(i.data) - sum - i.certSize; rest > 0 {
		h.Write(i.data[sum : sum+rest])
	} else if rest < 0 && i.certSize > 0 {
		return nil, bad("PE image: the certificate table overlaps the sections")
	}
	return h.Sum(nil), nil
}

// section is a section as it is in memory, which must be all in the file.
func (i *image) section(s *pe.Section) ([]byte, error) {
	if s.VirtualSize > s.Size {
		return nil, bad("PE section %q has %d bytes in memory and %d in the file", s.Name, s.VirtualSize, s.Size)
	}
	return i.data[s.Offset : s.Offset+s.VirtualSize], nil
}
