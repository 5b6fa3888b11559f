package disk

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const root = "00112233445566778899aabbccddeeff0123456789abcdef0123456789abcdef"

// gpt is a disk whose GPT has the partitions, as firmware writes it.
func gpt(t testing.TB, parts ...Partition) []byte {
	t.Helper()
	disk := make([]byte, 64*gptSector)
	copy(disk[gptSector:], "EFI PART")
	le.PutUint64(disk[gptSector+72:], 2)
	le.PutUint32(disk[gptSector+80:], maxPartitions)
	le.PutUint32(disk[gptSector+84:], gptEntry)
	for _, p := range parts {
		e := disk[2*gptSector+(p.Number-1)*gptEntry:][:gptEntry]
		e[0] = 1 // some type
		u, err := hex.DecodeString(p.UUID)
		if err != nil {
			t.Fatal(err)
		}
		// RFC 9562 text to the mixed order of UEFI 2.10, appendix A.
		copy(e[16:], []byte{u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6]})
		copy(e[24:], u[8:])
		for i, c := range utf16.Encode([]rune(p.Label)) {
			le.PutUint16(e[56+2*i:], c)
		}
	}
	return disk
}

func TestReadGPT(t *testing.T) {
	want := []Partition{{1, root[:32], "cvm-root"}, {2, root[32:], "cvm-verity"}, {100, strings.Repeat("f", 32), strings.Repeat("é", 36)}}
	got, err := ReadGPT(bytes.NewReader(gpt(t, want...)))
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("%v, %v", got, err)
	}
	for name, change := range map[string]func(b []byte){
		"no signature":         func(b []byte) { b[gptSector] = 0 },
		"entries of 64 bytes":  func(b []byte) { le.PutUint32(b[gptSector+84:], 64) },
		"a million entries":    func(b []byte) { le.PutUint32(b[gptSector+80:], 1<<20) },
		"entries in the MBR":   func(b []byte) { le.PutUint64(b[gptSector+72:], 0) },
		"entries far away":     func(b []byte) { le.PutUint64(b[gptSector+72:], 1<<62) },
		"entries past the end": func(b []byte) { le.PutUint64(b[gptSector+72:], 60) },
	} {
		b := gpt(t, want...)
		change(b)
		if got, err := ReadGPT(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// system is a kernel with the disks; each has the partitions that it is told.
func system(t *testing.T, disks map[string][]byte, shown map[string][]string) System {
	t.Helper()
	s := System{Block: t.TempDir(), Dev: t.TempDir()}
	for name, data := range disks {
		if err := os.WriteFile(filepath.Join(s.Dev, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(s.Block, name), 0o755); err != nil {
			t.Fatal(err)
		}
		for i, part := range shown[name] {
			dir := filepath.Join(s.Block, name, part)
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "partition"), []byte{'1' + byte(i), '\n'}, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return s
}

func TestPartitionsAreFoundByTheRootHash(t *testing.T) {
	image := gpt(t, Partition{1, strings.Repeat("1", 32), "esp"}, Partition{2, root[:32], "r"}, Partition{3, root[32:], "v"})
	other := gpt(t, Partition{1, root[32:], "v"}, Partition{2, strings.Repeat("2", 32), ScratchLabel})
	s := system(t, map[string][]byte{"vda": make([]byte, 4096), "vdb": image, "nvme0n1": other},
		map[string][]string{"vdb": {"vdb1", "vdb2", "vdb3"}, "nvme0n1": {"nvme0n1p1", "nvme0n1p2"}})
	data, hashes, err := s.VerityPartitions(root)
	if err != nil || data != filepath.Join(s.Dev, "vdb2") || hashes != filepath.Join(s.Dev, "nvme0n1p1") {
		t.Errorf("%s, %s, %v", data, hashes, err)
	}
	if data, hashes, err = s.VerityPartitions(strings.Repeat("3", 64)); err != nil || data != "" || hashes != "" {
		t.Errorf("another hash: %s, %s, %v", data, hashes, err)
	}
	if _, _, err = s.VerityPartitions("../x"); cause.Of(err) != cause.VerityFailed {
		t.Errorf("no hash: %v", err)
	}
	if node, err := s.FindScratch(); err != nil || node != filepath.Join(s.Dev, "nvme0n1p2") {
		t.Errorf("scratch %s, %v", node, err)
	}
	two := system(t, map[string][]byte{"vda": other, "vdb": other}, map[string][]string{"vda": {"vda1", "vda2"}, "vdb": {"vdb1", "vdb2"}})
	if node, err := two.FindScratch(); cause.Of(err) != cause.ScratchFailed {
		t.Errorf("two: %s, %v", node, err)
	}
}

func superblock(blocks uint64, salt []byte) []byte {
	b := make([]byte, 512)
	copy(b, "verity\x00\x00")
	le.PutUint32(b[8:], 1)
	le.PutUint32(b[12:], 1)
	copy(b[32:], "sha256")
	le.PutUint32(b[64:], 4096)
	le.PutUint32(b[68:], 4096)
	le.PutUint64(b[72:], blocks)
	le.PutUint16(b[80:], uint16(len(salt)))
	copy(b[88:], salt)
	return b
}

func TestParseVerity(t *testing.T) {
	v, err := ParseVerity(superblock(1000, []byte{0xab, 0xcd}))
	if err != nil {
		t.Fatal(err)
	}
	if got := v.table("/dev/vda2", "/dev/vda3", root); got != "1 /dev/vda2 /dev/vda3 4096 4096 1000 1 sha256 "+root+" abcd 2 panic_on_corruption panic_on_error" {
		t.Error(got)
	}
	for name, change := range map[string]func(b []byte){
		"no signature":        func(b []byte) { b[0] = 0 },
		"version 2":           func(b []byte) { b[8] = 2 },
		"ChromeOS's type":     func(b []byte) { b[12] = 0 },
		"another algorithm":   func(b []byte) { copy(b[32:], "md5\x00\x00\x00") },
		"a table injected":    func(b []byte) { copy(b[32:], "sha256 x") },
		"small data blocks":   func(b []byte) { le.PutUint32(b[64:], 512) },
		"small hash blocks":   func(b []byte) { le.PutUint32(b[68:], 512) },
		"no blocks":           func(b []byte) { le.PutUint64(b[72:], 0) },
		"a number that wraps": func(b []byte) { le.PutUint64(b[72:], 1<<61) },
		"a long salt":         func(b []byte) { le.PutUint16(b[80:], 65535) },
	} {
		b := superblock(1000, nil)
		change(b)
		if _, err := ParseVerity(b); cause.Of(err) != cause.VerityFailed {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseVerity(nil); cause.Of(err) != cause.VerityFailed {
		t.Errorf("nothing: %v", err)
	}
}

// A host that moves the number of blocks over a power of 128 makes the kernel
// take hashes for data, or data for hashes.
func TestTheNumberOfLevelsIsSettled(t *testing.T) {
	squash := func(bytes uint64) []byte {
		b := make([]byte, 96)
		copy(b, "hsqs")
		le.PutUint64(b[40:], bytes)
		return b
	}
	for name, c := range map[string]struct {
		blocks uint64
		root   []byte
		ok     bool
	}{
		"as made":               {1000, squash(1000 * 4096), true},
		"with less than a page": {1000, squash(999*4096 + 1), true},
		"padded":                {1024, squash(900 * 4096), true},
		"one level less":        {128, squash(1000 * 4096), false},
		"one level more":        {1000, squash(100 * 4096), false},
		"two levels more":       {1 << 20, squash(1000 * 4096), false},
		"beyond the hashes":     {1000, squash(1001 * 4096), false},
		"wraps":                 {1000, squash(1<<64 - 1), false},
		"hashes for data":       {1000, bytes.Repeat([]byte{7}, 96), false},
		"cut short":             {1000, []byte("hsqs"), false},
	} {
		v := &Verity{Blocks: c.blocks}
		if err := v.CheckRoot(bytes.NewReader(c.root)); (err == nil) != c.ok || (!c.ok && cause.Of(err) != cause.VerityFailed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Lesson 28: what the partition holds names no cipher, no key and no size. The
// table has all of them, and authentication among them.
func TestLesson28_NothingOnTheScratchDiskIsBelieved(t *testing.T) {
	if got := cryptTable("/dev/dm-1", bytes.Repeat([]byte{0xa5}, scratchKey)); got != "capi:gcm(aes)-random "+strings.Repeat("a5", 32)+" 0 /dev/dm-1 0 2 integrity:28:aead sector_size:4096" {
		t.Error(got)
	}
	if got := integrityTable("/dev/vdb1"); got != "/dev/vdb1 0 28 D 1 block_size:4096" {
		t.Error(got)
	}
	for name, c := range map[string]struct {
		words []string
		want  uint64
	}{
		"as formatted":        {[]string{"0", "100007", "-"}, 100000},
		"all of the disk":     {[]string{"0", "200000", "-"}, 0},
		"more than the disk":  {[]string{"0", "18446744073709551615", "-"}, 0},
		"nothing":             {[]string{"0", "7", "-"}, 0},
		"no number":           {[]string{"0", "x"}, 0},
		"not what it answers": {nil, 0},
	} {
		if got, err := providedSectors(c.words, 200000); got != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("%s: %d, %v", name, got, err)
		}
	}
	// A LUKS header, here and now: gone before the kernel looks.
	disk := filepath.Join(t.TempDir(), "vdb1")
	if err := os.WriteFile(disk, append([]byte("LUKS\xba\xbe\x00\x02"), make([]byte, 2<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := MakeScratch("x", disk); cause.Of(err) != cause.ScratchFailed {
		t.Errorf("a file for a disk: %v", err)
	}
}

func TestTheTableIsAsTheKernelReadsIt(t *testing.T) {
	b := target{sectors: 8, kind: "verity", params: "1234567"}.encode()
	spec := (*unix.DmTargetSpec)(unsafe.Pointer(&b[0]))
	if len(b) != specSize+8 || spec.Length != 8 || spec.Next != uint32(len(b)) || string(spec.Target_type[:7]) != "verity\x00" || string(b[specSize:]) != "1234567\x00" {
		t.Errorf("% x", b)
	}
	if n := len((target{params: "12345678"}).encode()); n != specSize+16 {
		t.Errorf("%d bytes", n)
	}
}

func FuzzReadGPT(f *testing.F) {
	f.Add(gpt(f, Partition{1, root[:32], "a"}))
	f.Fuzz(func(t *testing.T, disk []byte) {
		list, err := ReadGPT(bytes.NewReader(disk))
		if err != nil {
			return
		}
		for _, p := range list {
			if p.Number < 1 || p.Number > maxPartitions || len(p.UUID) != 32 || len(p.Label) > 36*4 {
				t.Fatalf("%+v", p)
			}
		}
	})
}

func FuzzParseVerity(f *testing.F) {
	f.Add(superblock(1000, []byte{1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := ParseVerity(b)
		if err == nil && (v.Blocks == 0 || v.Blocks > maxBlocks || len(strings.Fields(v.table("a", "b", root))) != 13) {
			t.Fatalf("%+v", v)
		}
	})
}
