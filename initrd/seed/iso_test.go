package seed_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/image-build/seedcmd"
	"github.com/cc-runtime/cvm-agent/initrd/seed"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const rootDir = 18 * 2048 // where the library puts the root directory

func image(t testing.TB) []byte {
	t.Helper()
	b, err := seedcmd.WriteISO(seed.Files{seed.UserDataFile: []byte("#cloud-config\n"), seed.MetaDataFile: {}, seed.NetworkConfigFile: bytes.Repeat([]byte("#\n"), 3000)})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadISO(t *testing.T) {
	b := image(t)
	files, err := seed.ReadISO(bytes.NewReader(b))
	if err != nil || len(files) != 3 || string(files[seed.UserDataFile]) != "#cloud-config\n" || len(files[seed.NetworkConfigFile]) != 6000 {
		t.Fatalf("%v, %v", files, err)
	}
	copy(b[16*2048+40:], "cidata")
	if !seed.IsSeed(bytes.NewReader(b)) {
		t.Error("cidata is no seed")
	}
	for _, label := range []string{"CIDATB", "xCIDAT", "CIDATA2", "Cidata"} {
		copy(b[16*2048+40:], label+strings.Repeat(" ", 32-len(label)))
		if seed.IsSeed(bytes.NewReader(b)) {
			t.Errorf("%s is a seed", label)
		}
	}
}

// Images by the tools that people use, each with Rock Ridge and Joliet names
// beside the plain ones. See testdata/README.md.
func TestReadISOByOtherTools(t *testing.T) {
	for _, file := range []string{"testdata/genisoimage.iso", "testdata/xorriso.iso"} {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files, err := seed.ReadISO(f)
		if !seed.IsSeed(f) || err != nil || len(files) != 3 || string(files[seed.MetaDataFile]) != "instance-id: i-1\n" {
			t.Errorf("%s: %q, %v", file, files, err)
		}
	}
}

// both puts a number in both byte orders.
func both(b []byte, n uint32) {
	binary.LittleEndian.PutUint32(b, n)
	binary.BigEndian.PutUint32(b[4:], n)
}

func TestReadISORefuses(t *testing.T) {
	entry := func(b []byte, name string) []byte {
		i := bytes.Index(b[rootDir:rootDir+2048], []byte(name)) + rootDir - 33
		return b[i : i+int(b[i])]
	}
	for name, c := range map[string]struct {
		change func(b []byte)
		code   cause.Code
		says   string
	}{
		"another file":               {func(b []byte) { copy(entry(b, "meta-data")[33:], "meta-dat4") }, cause.SeedRefused, "meta-dat4"},
		"a name with controls":       {func(b []byte) { copy(entry(b, "meta-data")[33:], "\x1b[2J\nxxxx") }, cause.SeedRefused, "the file  [2j "},
		"a file twice":               {func(b []byte) { copy(entry(b, "meta-data;1")[33:], "user-data") }, cause.SeedRefused, "twice"},
		"a directory":                {func(b []byte) { entry(b, "user-data")[25] |= 2 }, cause.SeedRefused, "no plain file"},
		"several extents":            {func(b []byte) { entry(b, "user-data")[25] |= 0x80 }, cause.SeedRefused, "no plain file"},
		"interleaved":                {func(b []byte) { entry(b, "user-data")[26] = 1 }, cause.SeedRefused, "no plain file"},
		"over the limit":             {func(b []byte) { both(entry(b, "meta-data")[10:], 1<<20) }, cause.SeedRefused, "meta-data has 1048576 bytes"},
		"huge":                       {func(b []byte) { both(entry(b, "user-data")[10:], 1<<32-1) }, cause.SeedRefused, "at most"},
		"beyond the disk":            {func(b []byte) { both(entry(b, "user-data")[2:], 1<<32-1) }, cause.SeedMalformed, "user-data: sector"},
		"two sizes":                  {func(b []byte) { entry(b, "user-data")[10]++ }, cause.SeedMalformed, "two extents"},
		"an empty name":              {func(b []byte) { entry(b, "user-data")[32] = 0 }, cause.SeedMalformed, "name"},
		"a name beyond its record":   {func(b []byte) { entry(b, "user-data")[32] = 250 }, cause.SeedMalformed, "name"},
		"a record beyond the end":    {func(b []byte) { copy(b[rootDir+2048-9:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff"); fill(b) }, cause.SeedMalformed, "record"},
		"a root that is a file":      {func(b []byte) { b[16*2048+156+25] = 0 }, cause.SeedMalformed, "root directory"},
		"a huge root":                {func(b []byte) { both(b[16*2048+156+10:], 1<<30) }, cause.SeedMalformed, "root directory"},
		"blocks of another size":     {func(b []byte) { b[16*2048+128] = 1 }, cause.SeedMalformed, "logical blocks"},
		"no volume":                  {func(b []byte) { b[16*2048+1] = 'X' }, cause.SeedMalformed, "no ISO 9660"},
		"no primary descriptor":      {func(b []byte) { b[16*2048] = 255 }, cause.SeedMalformed, "no primary"},
		"descriptors without end":    {func(b []byte) { endless(b) }, cause.SeedMalformed, "volume descriptors"},
		"a link (Rock Ridge)":        {func(b []byte) { rockRidge(b, "PX\x24\x01\xff\xa1\x00\x00"+strings.Repeat("\x00", 28)) }, cause.SeedRefused, "user-data is no plain file"},
		"a link's target":            {func(b []byte) { rockRidge(b, "SL\x08\x01\x00\x00\x00\x00") }, cause.SeedRefused, "user-data is no plain file"},
		"another name (Rock Ridge)":  {func(b []byte) { rockRidge(b, "NM\x08\x01\x00abc") }, cause.SeedRefused, "the file abc"},
		"a record that is cut short": {func(b []byte) { rockRidge(b, "PX\x24\x01\xff\xa1\x00\x00") }, cause.SeedMalformed, "not Rock Ridge"},
		"a record of no length":      {func(b []byte) { rockRidge(b, "NM\x00\x01\x00abc") }, cause.SeedMalformed, "not Rock Ridge"},
		"a name in several parts":    {func(b []byte) { rockRidge(b, "NM\x08\x01\x01abc") }, cause.SeedMalformed, "several parts"},
	} {
		b := image(t)
		b = append(b, make([]byte, 64*2048)...)
		c.change(b)
		_, err := seed.ReadISO(bytes.NewReader(b))
		if cause.Of(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, expected %s with %q", name, err, c.code, c.says)
		}
	}
}

// fill leaves no zero before the end of the root directory: one long record
// after the others.
func fill(b []byte) {
	i := rootDir
	for b[i] != 0 {
		i += int(b[i])
	}
	for ; i < rootDir+2048; i += 250 {
		b[i] = 250
	}
}

func endless(b []byte) {
	for i := 16 * 2048; i+2048 <= len(b); i += 2048 {
		copy(b[i:], "\x02CD001\x01")
	}
}

// rockRidge replaces the root directory by one record with a system use field.
func rockRidge(b []byte, use string) {
	dir := b[rootDir : rootDir+2048]
	i := bytes.Index(dir, []byte("user-data;1")) - 33
	record := append(bytes.Clone(dir[i:i+int(dir[i])]), use...)
	record[0] = byte(len(record))
	clear(dir)
	copy(dir, record)
}

// FuzzReadISO puts a volume descriptor and a root directory where they belong:
// the mutations are of what is parsed, not of what is passed over.
func FuzzReadISO(f *testing.F) {
	const descriptor = 16 * 2048
	b := image(f)
	f.Add(b[descriptor:descriptor+256], b[rootDir:rootDir+256])
	rockRidge(b, "NM\x0e\x01\x00user-data")
	f.Add(b[descriptor:descriptor+256], b[rootDir:rootDir+256])
	f.Fuzz(func(t *testing.T, volume, dir []byte) {
		disk := make([]byte, 24*2048)
		copy(disk[descriptor:descriptor+2048], volume)
		copy(disk[rootDir:], dir)
		files, err := seed.ReadISO(bytes.NewReader(disk))
		if err == nil && !bytes.HasPrefix(volume[1:], []byte("CD001\x01")) {
			t.Fatal("a seed out of nothing")
		}
		for name, data := range files {
			if int64(len(data)) > seed.Limits[name] || !bytes.Contains(disk, data) {
				t.Fatalf("%s: %d bytes", name, len(data))
			}
		}
	})
}
