package measure

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"os"
	"strings"
	"testing"

	goregister "github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
)

// madeTDVF is a firmware of 64 KiB with TDX metadata: code, variables, and
// memory for the hand-off blocks, as OVMF lays them out, smaller.
func madeTDVF(change func(meta []byte)) []byte {
	le := binary.LittleEndian
	fw := bytes.Repeat([]byte("firmware"), 0x10000/8)
	meta := make([]byte, 16+32*5)
	copy(meta, "TDVF")
	le.PutUint32(meta[4:], uint32(len(meta)))
	le.PutUint32(meta[8:], 1)
	le.PutUint32(meta[12:], 5)
	for i, s := range []struct {
		from, length, attributes, kind uint32
		address, size                  uint64
	}{
		{0x4000, 0xc000, 1, tdvfBFV, 0xffff4000, 0xc000},
		{0, 0x4000, 0, tdvfCFV, 0xffff0000, 0x4000},
		{0, 0, 0, tdvfTempMem, 0x810000, 0x10000},
		{0, 0, 0, tdvfHOB, 0x809000, 0x2000},
		{0, 0, 0, tdvfTempMem, 0x80b000, 0x1000},
	} {
		d := meta[16+32*i:]
		le.PutUint32(d, s.from)
		le.PutUint32(d[4:], s.length)
		le.PutUint64(d[8:], s.address)
		le.PutUint64(d[16:], s.size)
		le.PutUint32(d[24:], s.kind)
		le.PutUint32(d[28:], s.attributes)
	}
	if change != nil {
		change(meta)
	}
	const offset = 0x400
	copy(fw[len(fw)-offset:], meta)
	table := le.AppendUint32(nil, offset)
	table = le.AppendUint16(table, 4+entryHead)
	table = append(table, guidTDXMetadata[:]...)
	table = le.AppendUint16(table, uint16(len(table)+entryHead))
	table = append(table, guidFooter[:]...)
	copy(fw[len(fw)-footerEnd-len(table):], table)
	return fw
}

func tdxConfig(t testing.TB) TDXConfig {
	return TDXConfig{
		Firmware: madeTDVF(nil), Memory: 4 << 30, Separator: SeparatorRTMR1,
		ACPI:   ACPI{Tables: []byte("tables"), RSDP: []byte("rsdp"), Loader: []byte("loader")},
		Direct: DirectBoot{Kernel: ukiFile(t)},
	}
}

// Golden values computed outside of this package, see testdata/README.md.
func TestTDX(t *testing.T) {
	got, err := TDX(tdxConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string][2]string{
		"MRTD":  {got.MRTD, "4d0e851b34ecf74e371a3d84b0164b7bba03636cb76dc0b3819b6c55e3d9bd4715e6cfb4ba6488341e2297731c617b09"},
		"RTMR0": {got.RTMR0, "cc291e676736a95dca5c87d7ebe094b8aa4a9edc79fc54242437ad91cd2d879bfca3065859e4bd57612d233b3748ef00"},
		"RTMR1": {got.RTMR1, "8cdcaaa7ea22d50386fa6cb525de878f6019104e12892f7737bff49774044377285d1cae7917baa1ea27ba813155a2eb"},
		"RTMR2": {got.RTMR2, "c162dba5333351df16b500f512a4e9f88c00f0dda100812445181ca375ee9c4faa3cc8b282ea4fed8c7c22b096976157"},
	} {
		if c[0] != c[1] {
			t.Errorf("%s is %s, expected %s", name, c[0], c[1])
		}
	}
}

func TestTDXEveryInputCounts(t *testing.T) {
	base, err := TDX(tdxConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	linux := parseUKI(t, ukiFile(t)).sections[".linux"]
	for name, c := range map[string]struct {
		change  func(*TDXConfig)
		differs string // of MRTD and RTMR 0 to 2
	}{
		"firmware code":  {func(c *TDXConfig) { c.Firmware[0x5000] ^= 1 }, "1000"},
		"variables":      {func(c *TDXConfig) { c.Firmware[0] ^= 1 }, "0100"},
		"memory":         {func(c *TDXConfig) { c.Memory += 1 << 30 }, "0100"},
		"ACPI tables":    {func(c *TDXConfig) { c.ACPI.Tables = []byte("t") }, "0100"},
		"ACPI RSDP":      {func(c *TDXConfig) { c.ACPI.RSDP = []byte("r") }, "0100"},
		"ACPI loader":    {func(c *TDXConfig) { c.ACPI.Loader = []byte("l") }, "0100"},
		"the separator":  {func(c *TDXConfig) { c.Separator = SeparatorRTMR0 }, "0110"},
		"the initrd":     {func(c *TDXConfig) { i := bytes.Index(c.Direct.Kernel, []byte("070701i")); c.Direct.Kernel[i] ^= 1 }, "0011"},
		"a Linux kernel": {func(c *TDXConfig) { c.Direct = DirectBoot{Kernel: linux, Initrd: []byte("i"), Cmdline: "c"} }, "0011"},
	} {
		config := tdxConfig(t)
		c.change(&config)
		got, err := TDX(config)
		if err != nil {
			t.Fatal(name, err)
		}
		differs := ""
		for _, p := range [][2]string{{got.MRTD, base.MRTD}, {got.RTMR0, base.RTMR0}, {got.RTMR1, base.RTMR1}, {got.RTMR2, base.RTMR2}} {
			if p[0] == p[1] {
				differs += "0"
			} else {
				differs += "1"
			}
		}
		if differs != c.differs {
			t.Errorf("%s changes %s, expected %s", name, differs, c.differs)
		}
	}
}

func TestTDXRefuses(t *testing.T) {
	meta := func(change func([]byte)) func(*TDXConfig) {
		return func(c *TDXConfig) { c.Firmware = madeTDVF(change) }
	}
	section := func(i, field int, v byte) func(*TDXConfig) {
		return meta(func(m []byte) { m[16+32*i+field] = v })
	}
	for name, c := range map[string]struct {
		change func(*TDXConfig)
		want   string
	}{
		"no TDX metadata":                   {func(c *TDXConfig) { c.Firmware = suffix(t) }, "TDX"},
		"metadata of another kind":          {meta(func(m []byte) { m[0] = 'X' }), "expected TDVF"},
		"another version":                   {meta(func(m []byte) { m[8] = 2 }), "version 2"},
		"too many sections":                 {meta(func(m []byte) { m[12] = 65 }), "65 sections"},
		"more sections than bytes":          {meta(func(m []byte) { m[12] = 6 }), "6 sections"},
		"a section off its page":            {section(2, 8, 1), "whole pages"},
		"a section of no page":              {section(3, 17, 0), "whole pages"},
		"a section larger than the bound":   {section(2, 20, 1), "whole pages"},
		"code beyond the file":              {section(0, 2, 1), "takes bytes"},
		"a measured hole":                   {section(0, 5, 0x10), "are not in the file"},
		"an unknown type":                   {section(4, 24, 9), "type 9"},
		"an unknown attribute":              {section(4, 28, 4), "attributes 0x4"},
		"two lists of hand-off blocks":      {section(4, 24, tdvfHOB), "two TD HOB"},
		"no list of hand-off blocks":        {section(3, 24, tdvfTempMem), "no TD HOB"},
		"no variables":                      {section(1, 24, tdvfBFV), "no configuration volume"},
		"sections that overlap":             {section(4, 9, 0xa0), "overlaps"},
		"little memory":                     {func(c *TDXConfig) { c.Memory = 1 << 20 }, "memory of"},
		"memory of broken pages":            {func(c *TDXConfig) { c.Memory++ }, "whole pages"},
		"no ACPI tables":                    {func(c *TDXConfig) { c.ACPI.Tables = nil }, "ACPI tables"},
		"no separator's place":              {func(c *TDXConfig) { c.Separator = "" }, "separator"},
		"a kernel that is no PE image":      {func(c *TDXConfig) { c.Direct.Kernel = []byte("ELF") }, "no MZ"},
		"a UKI with an initrd beside it":    {func(c *TDXConfig) { c.Direct.Initrd = []byte("i") }, "is a UKI"},
		"a UKI with a command line":         {func(c *TDXConfig) { c.Direct.Cmdline = "c" }, "is a UKI"},
		"a Linux kernel without its initrd": {func(c *TDXConfig) { c.Direct.Kernel = parseUKI(t, ukiFile(t)).sections[".linux"] }, "an initrd is needed"},
	} {
		config := tdxConfig(t)
		c.change(&config)
		if _, err := TDX(config); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, expected %q", name, err, c.want)
		}
	}
}

// emptyVariables is OVMF's variable store of 4 MiB images before its first boot
// (Debian's OVMF_VARS_4M.fd): two headers, and erased flash.
func emptyVariables(t *testing.T) []byte {
	t.Helper()
	out := bytes.Repeat([]byte{0xff}, 0x84000)
	for at, text := range map[int]string{
		0: "000000000000000000000000000000008d2bf1ff96768b4ca9852747075b4f5000400800000000005f465648fffe04004800afb8000000028400000000100000" +
			"0000000000000000782cf3aa7b949a43a1802e144ec37792b8ff03005afe000000000000",
		0x41000: "2b29589e687c7d49a0ce6500fd9f1b952caf2c64feffffffe00f000000000000",
	} {
		b, err := hex.DecodeString(text)
		if err != nil {
			t.Fatal(err)
		}
		copy(out[at:], b)
	}
	return out
}

// The log of a recorded launch: what it says of events whose content is known
// here is what this package extends, and in that order.
func TestTDXAgreesWithRecordedLog(t *testing.T) {
	data, err := os.ReadFile("testdata/ccel-ovmf.bin")
	if err != nil {
		t.Fatal(err)
	}
	log, err := tcg.ParseEventLog(data, tcg.ParseOpts{AllowPadding: true})
	if err != nil {
		t.Fatal(err)
	}
	got := map[uint32][]string{}
	for _, e := range log.Events(goregister.HashSHA384) {
		if e.Type != 3 {
			got[uint32(e.Index)] = append(got[uint32(e.Index)], hex.EncodeToString(e.Digest))
		}
	}
	digest := func(b []byte) string { d := sha512.Sum384(b); return hex.EncodeToString(d[:]) }
	// What of the firmware the hand-off blocks depend on: OVMF's memory sections
	// before 2025 (edk2, OvmfPkg/OvmfPkgX64.fdf). With them, and 2 GiB, the digest
	// is the recorded one.
	firmware := &tdvf{sections: []tdvfSection{
		{kind: tdvfTempMem, address: 0x810000, size: 0x10000},
		{kind: tdvfTempMem, address: 0x80b000, size: 0x2000},
		{kind: tdvfHOB, address: 0x809000, size: 0x2000},
		{kind: tdvfTempMem, address: 0x800000, size: 0x6000},
	}}
	hob, err := firmware.tdHOB(2 << 30)
	if err != nil {
		t.Fatal(err)
	}
	const unknown = ""
	rtmr0 := []string{digest(hob), digest(emptyVariables(t))}
	for _, v := range secureBootVariables() {
		rtmr0 = append(rtmr0, digest(v))
	}
	rtmr0 = append(rtmr0, digest(evSeparator), unknown, unknown, unknown, digest(bootOrder), digest(bootMenu()), digest(evSeparator))
	rtmr1 := []string{unknown, digest([]byte(evCallingApplication)), digest([]byte(evExitBoot)), digest([]byte(evExitBootDone))}
	for register, want := range map[uint32][]string{1: rtmr0, 2: rtmr1, 3: {unknown, unknown}} {
		if len(got[register]) != len(want) {
			t.Errorf("RTMR%d has %d events, expected %d", register-1, len(got[register]), len(want))
			continue
		}
		for i, w := range want {
			if w != unknown && got[register][i] != w {
				t.Errorf("RTMR%d, event %d is %s, expected %s", register-1, i, got[register][i], w)
			}
		}
	}
}

func FuzzTDVF(f *testing.F) {
	f.Add(madeTDVF(nil))
	f.Fuzz(func(t *testing.T, fw []byte) {
		p, err := parseTDVF(fw)
		if err != nil {
			return
		}
		_ = p.mrtd()
		_, _ = p.tdHOB(4 << 30)
	})
}
