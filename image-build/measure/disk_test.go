package measure

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"strings"
	"testing"
)

// entry is a directory entry of a made FAT.
type entry struct {
	name  string // 11 bytes
	attr  byte
	first int
	size  int
}

func (e entry) bytes() []byte {
	var b [32]byte
	copy(b[:], e.name)
	b[11] = e.attr
	binary.LittleEndian.PutUint16(b[20:], uint16(e.first>>16))
	binary.LittleEndian.PutUint16(b[26:], uint16(e.first))
	binary.LittleEndian.PutUint32(b[28:], uint32(e.size))
	return b[:]
}

// madeFAT is a FAT16 or FAT32 with one sector per cluster. The file's clusters
// come in reverse, so that only the table tells their order.
func madeFAT(wide bool, uki []byte, extra func(root, boot *[]entry)) []byte {
	clusters, width, reserved, rootSectors := 5000, 2, 1, 32
	if wide {
		clusters, width, reserved, rootSectors = 66000, 4, 32, 0
	}
	perFAT := ((clusters+2)*width + sector - 1) / sector
	start := reserved + 2*perFAT + rootSectors
	out := make([]byte, (start+clusters)*sector)
	le := binary.LittleEndian
	le.PutUint16(out[11:], sector)
	out[13] = 1
	le.PutUint16(out[14:], uint16(reserved))
	out[16] = 2
	if wide {
		le.PutUint32(out[36:], uint32(perFAT))
		le.PutUint32(out[44:], 2)
	} else {
		le.PutUint16(out[17:], uint16(rootSectors*sector/32))
		le.PutUint16(out[22:], uint16(perFAT))
	}
	le.PutUint32(out[32:], uint32(start+clusters))
	out[510], out[511] = 0x55, 0xaa
	link := func(c, next int) {
		at := out[reserved*sector+c*width:]
		if wide {
			le.PutUint32(at, uint32(next))
		} else {
			le.PutUint16(at, uint16(next))
		}
	}
	end := 0xfff8
	if wide {
		end = 0x0ffffff8
	}
	cluster := func(c int) []byte { return out[(start+c-2)*sector:] }
	n := (len(uki) + sector - 1) / sector
	root := []entry{{"CVM        ", 0x08, 0, 0}, {"EFI        ", 0x10, 3, 0}}
	boot := []entry{{".          ", 0x10, 4, 0}, {"..         ", 0x10, 3, 0}, {"BOOTX64 EFI", 0x20, 5 + n - 1, len(uki)}}
	if extra != nil {
		extra(&root, &boot)
	}
	write := func(to []byte, list []entry) {
		for i, e := range list {
			copy(to[i*32:], e.bytes())
		}
	}
	for c := 2; c <= 4; c++ {
		link(c, end)
	}
	if wide {
		write(cluster(2), root)
	} else {
		write(out[(reserved+2*perFAT)*sector:], root)
	}
	write(cluster(3), []entry{{"BOOT       ", 0x10, 4, 0}})
	write(cluster(4), boot)
	for i := range n {
		c := 5 + n - 1 - i
		copy(cluster(c), uki[i*sector:min(len(uki), (i+1)*sector)])
		if i == n-1 {
			link(c, end)
		} else {
			link(c, c-1)
		}
	}
	return out
}

// madeDisk is a GPT disk with an EFI system partition and another one.
func madeDisk(esp []byte, change func(header, entries []byte)) []byte {
	const first = 34
	sectors := first + len(esp)/sector + 10 + 33
	out := make([]byte, sectors*sector)
	h, entries := out[sector:2*sector], out[2*sector:34*sector]
	le := binary.LittleEndian
	copy(h, "EFI PART")
	le.PutUint32(h[8:], 0x10000)
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[32:], uint64(sectors-1))
	le.PutUint64(h[40:], first)
	le.PutUint64(h[48:], uint64(sectors-34))
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 128)
	le.PutUint32(h[84:], 128)
	copy(entries, bytes.Repeat([]byte{7}, 16))
	le.PutUint64(entries[32:], uint64(first+len(esp)/sector))
	le.PutUint64(entries[40:], uint64(first+len(esp)/sector+5))
	copy(entries[128:], guidESP[:])
	le.PutUint64(entries[128+32:], first)
	le.PutUint64(entries[128+40:], uint64(first+len(esp)/sector-1))
	if change != nil {
		change(h, entries)
	}
	le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
	le.PutUint32(h[16:], 0)
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	copy(out[first*sector:], esp)
	return out
}

func fromDisk(d []byte) ([]byte, error) { return UKIFromDisk(bytes.NewReader(d), int64(len(d))) }

func TestUKIFromDisk(t *testing.T) {
	uki := ukiFile(t)
	for name, wide := range map[string]bool{"FAT16": false, "FAT32": true} {
		got, err := fromDisk(madeDisk(madeFAT(wide, uki, nil), nil))
		if err != nil || !bytes.Equal(got, uki) {
			t.Errorf("%s: %d bytes, %v, expected the UKI's %d", name, len(got), err, len(uki))
		}
	}
}

func TestUKIFromDiskRefuses(t *testing.T) {
	uki := ukiFile(t)
	fat := func(change func(root, boot *[]entry)) []byte { return madeDisk(madeFAT(false, uki, change), nil) }
	gpt := func(change func(h, e []byte)) []byte { return madeDisk(madeFAT(false, uki, nil), change) }
	edit := func(at int, b byte) []byte {
		esp := madeFAT(false, uki, nil)
		esp[at] = b
		return madeDisk(esp, nil)
	}
	le := binary.LittleEndian
	for name, c := range map[string]struct {
		disk []byte
		want string
	}{
		"nothing":                   {nil, "no GPT header"},
		"no table":                  {make([]byte, 100*sector), "no GPT header"},
		"a header's flipped bit":    {func() []byte { d := gpt(nil); d[sector+40] ^= 1; return d }(), "checksum"},
		"an entry's flipped bit":    {func() []byte { d := gpt(nil); d[2*sector+128+32] ^= 1; return d }(), "entries' checksum"},
		"two system partitions":     {gpt(func(h, e []byte) { copy(e, guidESP[:]); le.PutUint64(e[32:], 34) }), "two EFI system partitions"},
		"no system partition":       {gpt(func(h, e []byte) { e[128] ^= 1 }), "no EFI system partition"},
		"a partition beyond":        {gpt(func(h, e []byte) { le.PutUint64(e[128+40:], 1<<40) }), "outside"},
		"a partition of no sectors": {gpt(func(h, e []byte) { le.PutUint64(e[128+40:], 33) }), "outside"},
		"too many entries":          {gpt(func(h, e []byte) { le.PutUint32(h[80:], 1<<20) }), "GPT of 1048576"},
		"sectors beyond the disk":   {gpt(func(h, e []byte) { le.PutUint64(h[48:], 1<<40) }), "sectors 34 to"},
		"no FAT":                    {madeDisk(make([]byte, 5100*sector), nil), "no FAT"},
		"sectors of 4096":           {edit(12, 0x10), "512-byte sectors"},
		"no cluster size":           {edit(13, 0), "do not fit"},
		"a FAT12":                   {edit(13, 2), "expected a FAT16 or FAT32"},
		"more sectors than there":   {edit(34, 0xff), "do not fit"},
		"a loop in the chain": {func() []byte {
			e := madeFAT(false, uki, nil)
			le.PutUint16(e[sector+10*2:], 10)
			return madeDisk(e, nil)
		}(), "holds more than"},
		"a loop of a directory": {func() []byte { e := madeFAT(false, uki, nil); le.PutUint16(e[sector+3*2:], 3); return madeDisk(e, nil) }(), "chain of clusters"},
		"a chain out of the disk": {func() []byte {
			e := madeFAT(false, uki, nil)
			le.PutUint16(e[sector+10*2:], 60000)
			return madeDisk(e, nil)
		}(), "leads to 60000"},
		"a chain that is short": {func() []byte {
			e := madeFAT(false, uki, nil)
			le.PutUint16(e[sector+10*2:], 0xffff)
			return madeDisk(e, nil)
		}(), "on the disk, expected"},
		"a file too large":          {fat(func(_, boot *[]entry) { (*boot)[2].size = MaxKernel + 1 }), "at most"},
		"a loader's directory":      {fat(func(root, _ *[]entry) { *root = append([]entry{{"LOADER     ", 0x10, 4, 0}}, *root...) }), "/loader"},
		"something beside the UKI":  {fat(func(_, boot *[]entry) { *boot = append(*boot, entry{"BOOTX6~1D  ", 0x10, 4, 0}) }), "BOOTX64.EFI alone"},
		"another file in its place": {fat(func(_, boot *[]entry) { (*boot)[2].name = "GRUBX64 EFI" }), "BOOTX64.EFI alone"},
		"no /EFI":                   {fat(func(root, _ *[]entry) { (*root)[1].name = "EFJ        " }), `no directory "EFI`},
	} {
		if _, err := fromDisk(c.disk); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, expected %q", name, err, c.want)
		}
	}
}

func FuzzGPT(f *testing.F) {
	d := madeDisk(madeFAT(false, []byte("MZ"), nil), nil)
	f.Add(d[:40*sector])
	f.Fuzz(func(t *testing.T, disk []byte) {
		_, _ = fromDisk(disk)
	})
}

func FuzzFAT(f *testing.F) {
	esp := madeFAT(false, []byte("MZ"), nil)
	f.Add(esp[:sector], esp[sector:2*sector])
	f.Fuzz(func(t *testing.T, boot, table []byte) {
		// The head and the table are hostile, the rest is a good file system.
		esp := madeFAT(false, bytes.Repeat([]byte("MZ"), 400), nil)
		copy(esp[:sector], boot)
		copy(esp[sector:2*sector], table)
		_, _ = fromDisk(madeDisk(esp, nil))
	})
}

// The bytes are sfdisk's for its type U: what this package writes in its other
// tests would agree with any mistake in the constant.
func TestTypeOfTheSystemPartition(t *testing.T) {
	want := [16]byte{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}
	if guidESP != want {
		t.Errorf("%x, expected %x", guidESP, want)
	}
}
