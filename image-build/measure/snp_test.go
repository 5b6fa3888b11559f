package measure

import (
	"encoding/hex"
	"os"
	"strings"
	"testing"
)

// Where the digests here come from: testdata/README.md.
const suffixDigest = "086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"

func suffix(t testing.TB) []byte {
	t.Helper()
	fw, err := os.ReadFile("testdata/ovmf-amdsev-suffix.bin")
	if err != nil {
		t.Fatal(err)
	}
	return fw
}

func TestSNP(t *testing.T) {
	epyc, err := VCPUSignature("EPYC-v4")
	if err != nil {
		t.Fatal(err)
	}
	empty := func(cmdline string) *DirectBoot { return &DirectBoot{Cmdline: cmdline} }
	for name, c := range map[string]struct {
		direct   *DirectBoot
		hashed   bool
		vcpus    int
		features uint64
		vmm      VMM
		want     string
	}{
		"no command line, debug swap":       {empty(""), true, 1, 0x21, QEMU, "329c8ce0972ae52343b64d34a434a86f245dfd74f5ed7aae15d22efc78fb9683632b9b50e4e1d7fa41179ef98a7ef198"},
		"no command line, SNP alone":        {empty(""), true, 1, 0x1, QEMU, "ddc5224521617a536ee7ce9dd6224d1b58a8d4fda1c741f3ac99fc4bfa04ba6e9fc98646d4a07a9079397fa3852819b5"},
		"a command line":                    {empty("console=ttyS0 loglevel=7"), true, 1, 0x21, QEMU, "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977"},
		"the file measured, not its digest": {empty("console=ttyS0 loglevel=7"), false, 1, 0x21, QEMU, "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977"},
		"no direct boot":                    {nil, false, 1, 0x21, QEMU, "e1e1ca029dd7973ab9513295be68198472dcd4fc834bd9af9b63f6e8a1674dbf281a9278a4a2ebe0eed9f22adbcd0e2b"},
		"four vCPUs":                        {empty(""), false, 4, 0x21, QEMU, "4953b1fb416fa874980e8442b3706d345926d5f38879134e00813c5d7abcbe78eafe7b422907be0b4698e2414a631942"},
		"EC2":                               {empty(""), false, 1, 0x21, EC2, "6ae80856486b1396af8c82a40351d6ed76a20c785e9c7fa4ffa27c22d5d6313b4b3b458cd3c9968e6f89fb5d8450d7a6"},
		"GCE":                               {empty(""), false, 1, 0x1, GCE, "5da7106cf14cf46b1725ebab123eb9e53bd46a1e9f400cd0c08e7827b04b688ea8b4e403c8404efed4397ea5d5d0722e"},
		"GCE with four vCPUs":               {empty(""), false, 4, 0x1, GCE, "5c5debf100fc339f90276e761ee1f1658d08922c3b20e2a2e6c7a6c3370b2452a15a00eae11886a93d6fd1e7ab81e29d"},
	} {
		t.Run(name, func(t *testing.T) {
			config := SNPConfig{Firmware: suffix(t), Direct: c.direct, VCPUs: c.vcpus, VCPUSignature: epyc, Features: c.features, VMM: c.vmm}
			if c.hashed {
				config.FirmwareDigest = new([48]byte)
				if _, err := hex.Decode(config.FirmwareDigest[:], []byte(suffixDigest)); err != nil {
					t.Fatal(err)
				}
			}
			got, err := SNP(config)
			if err != nil {
				t.Fatal(err)
			}
			if hex.EncodeToString(got[:]) != c.want {
				t.Errorf("launch digest %x, expected %s", got, c.want)
			}
		})
	}
}

func TestSNPFirmware(t *testing.T) {
	got, err := SNPFirmware(suffix(t))
	if err != nil || hex.EncodeToString(got[:]) != suffixDigest {
		t.Errorf("%x, %v, expected %s", got, err, suffixDigest)
	}
}

func TestSNPEveryInputCounts(t *testing.T) {
	base := SNPConfig{Firmware: suffix(t), Direct: &DirectBoot{Kernel: []byte("k"), Initrd: []byte("i"), Cmdline: "c"}, VCPUs: 2, VCPUSignature: 0x800f12, Features: 1, VMM: QEMU}
	seen := map[[48]byte]string{}
	for name, change := range map[string]func(*SNPConfig){
		"the same":       func(*SNPConfig) {},
		"firmware":       func(c *SNPConfig) { c.Firmware[0] ^= 1 },
		"kernel":         func(c *SNPConfig) { c.Direct.Kernel = []byte("K") },
		"initrd":         func(c *SNPConfig) { c.Direct.Initrd = nil },
		"command line":   func(c *SNPConfig) { c.Direct.Cmdline = "c " },
		"no direct boot": func(c *SNPConfig) { c.Direct = nil },
		"vCPUs":          func(c *SNPConfig) { c.VCPUs = 1 },
		"vCPU type":      func(c *SNPConfig) { c.VCPUSignature++ },
		"features":       func(c *SNPConfig) { c.Features = 0x21 },
		"VMM":            func(c *SNPConfig) { c.VMM = EC2 },
	} {
		c, d := base, *base.Direct
		c.Firmware, c.Direct = suffix(t), &d
		change(&c)
		got, err := SNP(c)
		if err != nil {
			t.Fatal(name, err)
		}
		if other, ok := seen[got]; ok {
			t.Errorf("%s and %s have one digest", name, other)
		}
		seen[got] = name
	}
}

func TestSNPRefuses(t *testing.T) {
	good := func() SNPConfig {
		return SNPConfig{Firmware: suffix(t), Direct: &DirectBoot{}, VCPUs: 1, VCPUSignature: 1, Features: 1, VMM: QEMU}
	}
	find := func(fw []byte, id [16]byte) int { return strings.LastIndex(string(fw), string(id[:])) }
	for name, c := range map[string]struct {
		change func(*SNPConfig)
		want   string
	}{
		"no vCPU":                         {func(c *SNPConfig) { c.VCPUs = 0 }, "0 vCPUs"},
		"too many vCPUs":                  {func(c *SNPConfig) { c.VCPUs = 5000 }, "5000 vCPUs"},
		"features without SNP":            {func(c *SNPConfig) { c.Features = 0x20 }, "SNP active"},
		"an unknown VMM":                  {func(c *SNPConfig) { c.VMM = "xen" }, `VMM "xen"`},
		"a firmware of broken pages":      {func(c *SNPConfig) { c.Firmware = c.Firmware[1:] }, "whole pages"},
		"an empty firmware":               {func(c *SNPConfig) { c.Firmware = nil }, "0 bytes"},
		"no footer":                       {func(c *SNPConfig) { c.Firmware[find(c.Firmware, guidFooter)] ^= 1 }, "no OVMF table footer"},
		"a table longer than the file":    {func(c *SNPConfig) { c.Firmware[len(c.Firmware)-49] = 0xff }, "OVMF table of"},
		"no metadata":                     {func(c *SNPConfig) { c.Firmware[find(c.Firmware, guidSEVMetadata)] ^= 1 }, "no SEV metadata"},
		"no reset block":                  {func(c *SNPConfig) { c.Firmware[find(c.Firmware, guidSEVInfo)] ^= 1 }, "no SEV-ES reset block"},
		"no hashes table, a kernel":       {func(c *SNPConfig) { c.Firmware[find(c.Firmware, guidSEVHashes)] ^= 1 }, "no place for kernel hashes"},
		"metadata that is something else": {func(c *SNPConfig) { c.Firmware[strings.Index(string(c.Firmware), "ASEV")] = 'B' }, "expected ASEV"},
		"too many sections":               {func(c *SNPConfig) { c.Firmware[strings.Index(string(c.Firmware), "ASEV")+12] = 200 }, "sections"},
		"an unknown section":              {func(c *SNPConfig) { c.Firmware[strings.Index(string(c.Firmware), "ASEV")+24] = 0x77 }, "section type 0x77"},
		"a section off its page":          {func(c *SNPConfig) { c.Firmware[strings.Index(string(c.Firmware), "ASEV")+16] = 1 }, "whole pages"},
	} {
		t.Run(name, func(t *testing.T) {
			config := good()
			c.change(&config)
			if _, err := SNP(config); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, expected %q", err, c.want)
			}
		})
	}
	if _, err := VCPUSignature("EPYC-v99"); err == nil {
		t.Error("an unknown vCPU type was accepted")
	}
}

func FuzzOVMF(f *testing.F) {
	f.Add(suffix(f))
	f.Fuzz(func(t *testing.T, fw []byte) {
		// Whatever it says of itself, reading it ends and never panics.
		_, _ = SNP(SNPConfig{Firmware: fw, FirmwareDigest: new([48]byte), Direct: &DirectBoot{}, VCPUs: 2, Features: 1, VMM: QEMU})
	})
}
