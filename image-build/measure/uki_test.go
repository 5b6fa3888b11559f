package measure

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"os"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
)

// Golden values of testdata/uki.efi, computed outside of this package, see
// testdata/README.md.
const (
	goldenUKI     = "00a4577ea70806aab2b8ea9fd6d8101f2269a953539c5c2e9907f46a96117284"
	goldenKernel  = "bd39beea5ed37cd9d5c15bb4b2bb91eb2530bb833506c0415a0987d5b7f4aae9"
	goldenPCR2    = "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969"
	goldenPCR4    = "26edf0a3db00fba361d3e7ba5d500fc0f45f752866d065752af401f71863ae37"
	goldenPCR9    = "a38141a24546640991eb07ae9e87d38921780c5d687c37039283687705aa7ed4"
	goldenPCR11   = "085ff1720ea94b16ac1f4866c5825227d1a87bcbf42b11cd43100b35389153ef"
	goldenNoPhase = "e8c1f8ea3f56cbb744001d5f106a68576ae703a5dbca0e2e112b743b456b8802"
	goldenMeasure = "af4ecf6dc7ca1c770661056c8da5c8f8b6daf71f6de08928f84fbdcff33886bb"
)

func ukiFile(t testing.TB) []byte {
	t.Helper()
	data, err := os.ReadFile("testdata/uki.efi")
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func parseUKI(t testing.TB, data []byte) *UKI {
	t.Helper()
	u, err := ParseUKI(data)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestPCRs(t *testing.T) {
	u := parseUKI(t, ukiFile(t))
	got, err := PCRs(u, PCRConfig{Phases: []string{"sysinit", "ready"}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range map[string]string{"2": goldenPCR2, "4": goldenPCR4, "9": goldenPCR9, "11": goldenPCR11, "12": release.ZeroPCR, "13": release.ZeroPCR, "8": ""} {
		if got[i] != want {
			t.Errorf("PCR %s is %q, expected %q", i, got[i], want)
		}
	}
	if got, err = PCRs(u, PCRConfig{}); err != nil || got["11"] != goldenNoPhase {
		t.Errorf("PCR 11 without phases is %s, %v, expected %s", got["11"], err, goldenNoPhase)
	}
	if _, err := PCRs(u, PCRConfig{Phases: []string{"sysinit:ready"}}); err == nil {
		t.Error("a phase with a colon was accepted")
	}
}

// systemd-measure 252 knows neither .uname nor .sbat.
func TestPCR11AsSystemdMeasure(t *testing.T) {
	u := parseUKI(t, ukiFile(t))
	delete(u.sections, ".uname")
	delete(u.sections, ".sbat")
	got, err := pcr11(u, []string{"sysinit", "ready"})
	if err != nil || hex.EncodeToString(got) != goldenMeasure {
		t.Errorf("PCR 11 %x, %v, expected %s", got, err, goldenMeasure)
	}
}

func TestAuthenticode(t *testing.T) {
	data := ukiFile(t)
	u := parseUKI(t, data)
	for name, c := range map[string]struct {
		image *image
		want  string
	}{"the UKI": {u.image, goldenUKI}, "the kernel in it": {u.kernel, goldenKernel}} {
		if got, err := c.image.authenticode(sha256.New()); err != nil || hex.EncodeToString(got) != c.want {
			t.Errorf("%s: %x, %v, expected %s", name, got, err, c.want)
		}
	}
	// Signing changes the checksum, the directory and the end, and not the hash.
	certs := bytes.Repeat([]byte{0xcc}, 64)
	signed := append(bytes.Clone(data), certs...)
	dir := u.image.certDir
	binary.LittleEndian.PutUint32(signed[u.image.checksum:], 0x12345678)
	binary.LittleEndian.PutUint32(signed[dir:], uint32(len(data)))
	binary.LittleEndian.PutUint32(signed[dir+4:], uint32(len(certs)))
	if got, err := parseUKI(t, signed).image.authenticode(sha256.New()); err != nil || hex.EncodeToString(got) != goldenUKI {
		t.Errorf("signed: %x, %v, expected %s", got, err, goldenUKI)
	}
}

// Every byte of the file is in PCR 4, 9 or 11, but for those that Authenticode
// leaves out.
func TestUKIEveryByteCounts(t *testing.T) {
	data := ukiFile(t)
	u := parseUKI(t, data)
	base, err := PCRs(u, PCRConfig{})
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for i := range data {
		if i >= u.image.checksum && i < u.image.checksum+4 || i >= u.image.certDir && i < u.image.certDir+8 {
			left++
			continue
		}
		changed := bytes.Clone(data)
		changed[i] ^= 0x01
		v, err := ParseUKI(changed)
		if err != nil {
			continue // refused
		}
		if got, err := PCRs(v, PCRConfig{}); err == nil && got["4"] == base["4"] {
			t.Fatalf("byte %#x counts in no PCR 4", i)
		}
	}
	if left != 12 {
		t.Errorf("%d bytes left out, expected 12", left)
	}
}

func TestCmdline(t *testing.T) {
	u := parseUKI(t, ukiFile(t))
	if got, err := u.Cmdline(); err != nil || got != "console=ttyS0 roothash=00ff ro" {
		t.Errorf("%q, %v", got, err)
	}
	for name, c := range map[string]struct{ section, want string }{
		"up to a NUL":        {"a b\x00c", "a b"},
		"tabs and newlines":  {"\n a\tb\r\n", "a b"},
		"nothing but spaces": {" \n", ""},
		"not ASCII":          {"a=\u00e9", ""},
		"too long":           {strings.Repeat("a", MaxCmdline+1), ""},
	} {
		u.sections[".cmdline"] = []byte(c.section)
		got, err := u.Cmdline()
		if got != c.want || (err != nil) != (c.want == "") {
			t.Errorf("%s: %q, %v, expected %q", name, got, err, c.want)
		}
	}
}

// The archives that the stub adds come behind the initrd, each on four bytes.
func TestUKIInitrd(t *testing.T) {
	u := parseUKI(t, ukiFile(t))
	base := u.sections[".initrd"]
	got := u.initrd()
	if !bytes.HasPrefix(got, base) || got[len(base)] != 0 || len(got)%4 != 0 || !bytes.HasSuffix(got, stubCPIO("os-release", u.sections[".osrel"])) {
		t.Errorf("%q", got)
	}
	delete(u.sections, ".osrel")
	if got := u.initrd(); !bytes.Equal(got, base) {
		t.Errorf("one initrd alone is %d bytes, expected the %d of the section", len(got), len(base))
	}
	u.sections[".ucode"] = []byte("microcode")
	u.sections[ukiPCRSig] = []byte("{}")
	if got := u.initrd(); !bytes.HasPrefix(got, append([]byte("microcode\x00\x00\x00"), base...)) || !bytes.Contains(got, []byte(".extra/tpm2-pcr-signature.json")) {
		t.Errorf("%q", got)
	}
}

// rename changes a section's name in the file.
func rename(data []byte, from, to string) []byte {
	i := bytes.Index(data, append([]byte(from), make([]byte, 8-len(from))...))
	copy(data[i:i+8], append([]byte(to), make([]byte, 8)...))
	return data
}

func TestUKIRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func([]byte) []byte
		want   string
	}{
		"nothing":                  {func(d []byte) []byte { return nil }, "no MZ"},
		"a text":                   {func(d []byte) []byte { return []byte("#!/bin/sh\n") }, "no MZ"},
		"a header beyond the end":  {func(d []byte) []byte { d[0x3f] = 0x7f; return d }, "no PE header"},
		"another machine":          {func(d []byte) []byte { d[0x44], d[0x45] = 0x64, 0xaa; return d }, "x86-64"},
		"no section":               {func(d []byte) []byte { d[0x46] = 0; return d }, "0 sections"},
		"too many sections":        {func(d []byte) []byte { d[0x46] = 200; return d }, "200 sections"},
		"a symbol table":           {func(d []byte) []byte { d[0x4c] = 1; return d }, "symbol table"},
		"a section beyond the end": {func(d []byte) []byte { return d[:len(d)-512] }, "ends at"},
		"no kernel":                {func(d []byte) []byte { return rename(d, ".linux", ".other") }, "no section .linux"},
		"no command line":          {func(d []byte) []byte { return rename(d, ".cmdline", ".other") }, "no section .cmdline"},
		"no initrd":                {func(d []byte) []byte { return rename(d, ".initrd", ".other") }, "no section .initrd"},
		"a section twice":          {func(d []byte) []byte { return rename(d, ".uname", ".osrel") }, "twice"},
		"profiles":                 {func(d []byte) []byte { return rename(d, ".uname", ".profile") }, "chooses at boot"},
		"a kernel that is no PE":   {func(d []byte) []byte { return rename(rename(d, ".linux", ".other"), ".uname", ".linux") }, ".linux: "},
		"bytes that are not in the file": {func(d []byte) []byte {
			i := bytes.Index(d, []byte(".osrel"))
			binary.LittleEndian.PutUint32(d[i+8:], 0x10000)
			return d
		}, "in memory"},
		"certificates beyond the end": {func(d []byte) []byte { d[0x58+112+39] = 0x7f; return d }, "certificate table"},
	} {
		if _, err := ParseUKI(c.change(ukiFile(t))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, expected %q", name, err, c.want)
		}
	}
}

func FuzzUKI(f *testing.F) {
	f.Add(ukiFile(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		if u, err := ParseUKI(data); err == nil {
			_, _ = PCRs(u, PCRConfig{})
		}
	})
}
