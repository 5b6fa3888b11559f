package measure

import (
	"encoding/binary"
	"io"
)

// Bounds of a FAT. 1<<20 clusters of the table are 4 MiB.
const (
	maxClusters   = 1 << 20
	maxDirEntries = 4096
	dirEntry      = 32
	attrVolume    = 0x08
	attrDirectory = 0x10
	attrLongName  = 0x0f
)

// fat reads files by their 8.3 names from FAT16 and FAT32 (Microsoft FAT32 File
// System Specification 1.03; UEFI 2.10, section 13.3). A chain of clusters that
// is longer than the file system, or than what it holds, is refused.
type fat struct {
	r        io.ReaderAt
	table    []uint32
	root     []byte // FAT16: the root directory itself
	rootAt   uint32 // FAT32: its first cluster
	data     int64
	cluster  int64
	clusters uint32
}

func openFAT(r *io.SectionReader) (*fat, error) {
	var b [sector]byte
	if _, err := r.ReadAt(b[:], 0); err != nil {
		return nil, bad("ESP: %w", err)
	}
	le := binary.LittleEndian
	if b[510] != 0x55 || b[511] != 0xaa || le.Uint16(b[11:]) != sector {
		return nil, bad("ESP: no FAT of %d-byte sectors, which is what OVMF reads", sector)
	}
	perCluster, reserved, fats, rootEntries := int64(b[13]), int64(le.Uint16(b[14:])), int64(b[16]), int64(le.Uint16(b[17:]))
	total, perFAT := int64(le.Uint16(b[19:])), int64(le.Uint16(b[22:]))
	if total == 0 {
		total = int64(le.Uint32(b[32:]))
	}
	wide := perFAT == 0
	if wide {
		perFAT = int64(le.Uint32(b[36:]))
	}
	rootSectors := (rootEntries*dirEntry + sector - 1) / sector
	start := reserved + fats*perFAT + rootSectors
	if perCluster == 0 || perCluster&(perCluster-1) != 0 || reserved == 0 || fats == 0 || fats > 2 || total > r.Size()/sector || start >= total || rootEntries > maxDirEntries {
		return nil, bad("ESP: a FAT whose sizes do not fit its %d sectors", r.Size()/sector)
	}
	clusters := (total - start) / perCluster
	width := int64(2)
	if wide {
		width = 4
	}
	// A FAT32 says so by its empty 16-bit fields, which is what edk2 goes by: it
	// may have fewer clusters than the specification wants.
	right := clusters >= 4085 && clusters < 65525
	if wide {
		right = rootEntries == 0 && clusters > 0
	}
	if !right || clusters > maxClusters || (clusters+2)*width > perFAT*sector {
		return nil, bad("ESP: %d clusters, expected a FAT16 or FAT32 of at most %d", clusters, maxClusters)
	}
	f := &fat{r: r, data: start * sector, cluster: perCluster * sector, clusters: uint32(clusters)}
	raw := make([]byte, (clusters+2)*width)
	if _, err := r.ReadAt(raw, reserved*sector); err != nil {
		return nil, bad("ESP: the FAT: %w", err)
	}
	for ; len(raw) > 0; raw = raw[width:] {
		if wide {
			f.table = append(f.table, le.Uint32(raw)&0x0fffffff)
		} else {
			v := uint32(le.Uint16(raw))
			if v >= 0xfff7 { // bad cluster and end of chain, as FAT32 writes them
				v |= 0x0fff0000
			}
			f.table = append(f.table, v)
		}
	}
	if wide {
		f.rootAt = le.Uint32(b[44:])
		return f, nil
	}
	f.root = make([]byte, rootEntries*dirEntry)
	if _, err := r.ReadAt(f.root, (reserved+fats*perFAT)*sector); err != nil {
		return nil, bad("ESP: root directory: %w", err)
	}
	return f, nil
}

// chain reads the clusters from the first on, at most max bytes.
func (f *fat) chain(first uint32, max int64) ([]byte, error) {
	var out []byte
	for c, n := first, uint32(0); ; n++ {
		if c < 2 || c >= f.clusters+2 || n == f.clusters {
			return nil, bad("ESP: a chain of clusters leads to %d of %d", c, f.clusters)
		}
		if int64(len(out)) > max {
			return nil, bad("ESP: a chain of clusters holds more than %d bytes", max)
		}
		at := len(out)
		out = append(out, make([]byte, f.cluster)...)
		if _, err := f.r.ReadAt(out[at:], f.data+int64(c-2)*f.cluster); err != nil {
			return nil, bad("ESP: cluster %d: %w", c, err)
		}
		if c = f.table[c]; c >= 0x0ffffff8 {
			return out, nil
		}
	}
}

// file is an entry of a directory, by its short name as the disk has it.
type file struct {
	name      string // 11 bytes
	directory bool
	first     uint32
	size      int64
}

// list reads a directory; first 0 is the root.
func (f *fat) list(first uint32) ([]file, error) {
	raw := f.root
	if first == 0 {
		first = f.rootAt
	}
	if first != 0 {
		var err error
		if raw, err = f.chain(first, maxDirEntries*dirEntry); err != nil {
			return nil, err
		}
	}
	var out []file
	for ; len(raw) >= dirEntry && raw[0] != 0; raw = raw[dirEntry:] {
		attr := raw[11]
		if raw[0] == 0xe5 || attr&attrLongName == attrLongName || attr&attrVolume != 0 || raw[0] == '.' {
			continue
		}
		le := binary.LittleEndian
		out = append(out, file{string(raw[:11]), attr&attrDirectory != 0, uint32(le.Uint16(raw[20:]))<<16 | uint32(le.Uint16(raw[26:])), int64(le.Uint32(raw[28:]))})
	}
	return out, nil
}

func (f *fat) read(e file, max int64) ([]byte, error) {
	if e.size > max {
		return nil, bad("ESP: %q has %d bytes, at most %d are accepted", e.name, e.size, max)
	}
	if e.size == 0 {
		return nil, nil
	}
	out, err := f.chain(e.first, e.size)
	if err != nil {
		return nil, err
	}
	if int64(len(out)) < e.size {
		return nil, bad("ESP: %q has %d bytes on the disk, expected %d", e.name, len(out), e.size)
	}
	return out[:e.size], nil
}
