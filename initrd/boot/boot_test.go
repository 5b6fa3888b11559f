package boot

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/image-build/seedcmd"
	"github.com/cc-runtime/cvm-agent/initrd/disk"
	"github.com/cc-runtime/cvm-agent/initrd/seed"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

const hash = "00112233445566778899aabbccddeeff0123456789abcdef0123456789abcdef"

const goodLine = "console=ttyS0 roothash=" + hash + " ro systemd.import_credentials=no ds=nocloud;s=file:///run/cvm-agent/seed/ panic=-1"

func config(change string) string {
	c := `{"cmdline":"` + goodLine + `","signers":["` + hash + `"],"threshold":1,"versionFloor":1,"debug":false,"onFailure":"poweroff","waitSeconds":0,"modules":["virtio_blk.ko"],"scratch":"tmpfs"}`
	if from, to, ok := strings.Cut(change, "=>"); ok {
		return strings.Replace(c, from, to, 1)
	}
	return c
}

func TestDecodeConfig(t *testing.T) {
	c, err := DecodeConfig([]byte(config("")))
	if err != nil || c.rootHash() != hash || c.trust().Threshold != 1 || c.wait() != 0 {
		t.Fatalf("%+v, %v", c, err)
	}
	c, err = DecodeConfig([]byte(config(`"poweroff","waitSeconds":0=>"wait","waitSeconds":5`)))
	if err != nil || c.wait().Seconds() != 5 {
		t.Fatalf("%+v, %v", c, err)
	}
	for name, change := range map[string]string{
		"an unknown field":     `"debug"=>"shell":true,"debug"`,
		"no root hash":         `roothash==>root=`,
		"two root hashes":      `console=ttyS0=>roothash=` + hash,
		"half a root hash":     hash + `=>abcd`,
		"an endless wait":      `"waitSeconds":0=>"waitSeconds":601`,
		"a shell on failure":   `"poweroff"=>"shell"`,
		"scratch on the disk":  `"tmpfs"=>"ext4"`,
		"no command line":      `"cmdline":"` + goodLine + `"=>"cmdline":""`,
		"trailing data":        `"scratch":"tmpfs"}=>"scratch":"tmpfs"}{}`,
		"a field twice":        `"debug":false=>"debug":false,"debug":true`,
		"a command of 2 lines": `ro =>ro\n `,
	} {
		if _, err := DecodeConfig([]byte(config(change))); cause.Of(err) != cause.Config {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Lesson 2: the datasource is a word of the measured line, and the line is held
// to the byte: the host can choose no other.
func TestLesson02_TheCommandLineIsHeldToTheByte(t *testing.T) {
	for _, good := range []string{goodLine, goodLine + "\n"} {
		if err := checkCmdline(goodLine, []byte(good)); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for name, line := range map[string]string{
		"another datasource":     strings.Replace(goodLine, "ds=nocloud;s=file:///run/cvm-agent/seed/", "ds=nocloud;s=http://192.0.2.1/", 1),
		"a second datasource":    goodLine + " ds=nocloud;s=http://192.0.2.1/",
		"cloud-init's other key": goodLine + " ci.ds=Ec2",
		"credentials":            strings.Replace(goodLine, "import_credentials=no", "import_credentials=yes", 1),
		"another init":           goodLine + " init=/bin/sh",
		"another root":           strings.Replace(goodLine, "0011", "1100", 1),
		"nothing":                "",
		"shorter":                goodLine[:len(goodLine)-1],
		"a blank":                goodLine + " ",
		"two line feeds":         goodLine + "\n\n",
		"a NUL":                  goodLine + "\x00",
		"in front":               "rd.break " + goodLine,
	} {
		if err := checkCmdline(goodLine, []byte(line)); cause.Of(err) != cause.CmdlineChanged {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Lesson 2, 41, 42: what a host can say in SMBIOS ends the boot.
func TestLesson02_ASeedNamedBySMBIOSIsRefused(t *testing.T) {
	table := "\x01\x1b\x00\x01\x81\xfe\xff\x04QEMU\x00Standard PC\x00%s\x00\x00\x7f\x04\xff\xfe\x00\x00"
	if err := checkSMBIOS([]byte(strings.Replace(table, "%s", "serial-1", 1))); err != nil {
		t.Error(err)
	}
	for _, word := range []string{
		"ds=nocloud;s=http://192.0.2.1/", "ds=nocloud-net;seedfrom=http://192.0.2.1/", "DS=NoCloud",
		"io.systemd.credential:tmpfiles.extra=x", "io.systemd.credential.binary:a=b",
		"io.systemd.stub.kernel-cmdline-extra=rd.break", "io.systemd.boot.kernel-cmdline-extra=x",
	} {
		err := checkSMBIOS([]byte(strings.Replace(table, "%s", word, 1)))
		if cause.Of(err) != cause.SMBIOSRefused || !strings.Contains(err.Error(), "hold \""+word+"\"") {
			t.Errorf("%s: %v", word, err)
		}
	}
}

// Lesson 2: two seeds are none.
func TestLesson02_ASecondSeedIsFound(t *testing.T) {
	image, err := seedcmd.WriteISO(seed.Files{seed.UserDataFile: []byte("#cloud-config\n")})
	if err != nil {
		t.Fatal(err)
	}
	s := disk.System{Block: t.TempDir(), Dev: t.TempDir()}
	for name, data := range map[string][]byte{"vda": make([]byte, 1<<16), "vdb": image, "vdc": nil, "dm-0": image, "loop0": image, "ram0": image, "vdb1": image} {
		if err := os.Mkdir(filepath.Join(s.Block, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(s.Dev, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(s.Block, "vdb1", "partition"), []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := findSeeds(s)
	if err != nil || !slices.Equal(got, []string{filepath.Join(s.Dev, "vdb")}) {
		t.Fatalf("%v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(s.Dev, "vdc"), image, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err = findSeeds(s); err != nil || len(got) != 2 {
		t.Fatalf("%v, %v", got, err)
	}
}

// Lesson 6: registers before the seed, the binding before the policy and the
// root, the hand-over last.
func TestLesson06_NothingIsUsedBeforeItIsMeasured(t *testing.T) {
	var order []string
	for _, s := range steps {
		order = append(order, s.name)
	}
	for _, pair := range [][2]string{
		{"cmdline", "modules"}, {"cmdline", "seed"}, {"smbios", "seed"}, {"registers", "seed"}, {"registers", "binding"}, {"seed", "binding"},
		{"binding", "policy"}, {"binding", "root"}, {"policy", "root"}, {"root", "scratch"}, {"binding", "handover"}, {"scratch", "handover"},
	} {
		a, b := slices.Index(order, pair[0]), slices.Index(order, pair[1])
		if a < 0 || b < 0 || a >= b {
			t.Errorf("%s does not come before %s in %v", pair[0], pair[1], order)
		}
	}
}

type signer struct{ key *ecdsa.PrivateKey }

func (s signer) PublicKey() crypto.PublicKey { return s.key.Public() }

func (s signer) Sign(message []byte) ([]byte, error) {
	sum := sha256.Sum256(message)
	return ecdsa.SignASN1(rand.Reader, s.key, sum[:])
}

// Who signs, how many and how old: the measured image says, before the root is
// opened.
func TestThePolicyIsOpenedUnderTheImagesTrust(t *testing.T) {
	keys := make([]dsse.Signer, 2)
	var prints []string
	for i := range keys {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = signer{key}
		print, err := dsse.Fingerprint(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		prints = append(prints, print)
	}
	text, err := os.ReadFile("../../policy/examples/minimal.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.DecodeYAML(text)
	if err != nil {
		t.Fatal(err)
	}
	p.Version = 5
	initdata := func(signer dsse.Signer) *policy.Initdata {
		envelope, err := policy.Sign(p, signer)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKIXPublicKey(signer.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		raw, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope),
			policy.KeySigners: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))})
		if err != nil {
			t.Fatal(err)
		}
		in, err := policy.ParseInitdata(raw)
		if err != nil {
			t.Fatal(err)
		}
		return in
	}
	for name, c := range map[string]struct {
		signer    dsse.Signer
		signers   []string
		threshold int
		floor     uint64
		code      cause.Code
	}{
		"the image's signer":         {keys[0], prints[:1], 1, 5, ""},
		"one of two":                 {keys[1], prints, 1, 1, ""},
		"another signer":             {keys[1], prints[:1], 1, 1, cause.PolicySignature},
		"too few":                    {keys[0], prints, 2, 1, cause.PolicySignature},
		"an older version":           {keys[0], prints[:1], 1, 6, cause.PolicyBelowFloor},
		"an image that trusts none":  {keys[0], nil, 1, 1, cause.Config},
		"an image that asks for few": {keys[0], prints, 0, 1, cause.Config},
	} {
		s := &stage{config: &Config{Signers: c.signers, Threshold: c.threshold, VersionFloor: c.floor}, initdata: initdata(c.signer), seed: &seed.Seed{}}
		if err := s.checkPolicy(context.Background()); cause.Of(err) != c.code {
			t.Errorf("%s: %v, expected %q", name, err, c.code)
		}
	}
}

// A seed may choose among the policy's mirrors, and add none.
func TestMirrorsAreThePolicys(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	print, err := dsse.Fingerprint(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../policy/examples/minimal.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.DecodeYAML(text)
	if err != nil {
		t.Fatal(err)
	}
	p.Registries = []policy.Registry{{Host: "registry.example.org", Mirrors: []string{"m1.example.org", "m2.example.org:5000"}}}
	envelope, err := policy.Sign(p, signer{key})
	if err != nil {
		t.Fatal(err)
	}
	public, err := dsse.MarshalPublicKeyPEM(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	raw, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: string(public)})
	if err != nil {
		t.Fatal(err)
	}
	in, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		host, mirror string
		code         cause.Code
	}{
		"one of the policy's":          {"registry.example.org", "m2.example.org:5000", ""},
		"one that it does not have":    {"registry.example.org", "evil.example.org", cause.SeedRefused},
		"for a registry it has not":    {"docker.io", "m1.example.org", cause.SeedRefused},
		"one of another port":          {"registry.example.org", "m2.example.org", cause.SeedRefused},
		"the registry's own name":      {"registry.example.org", "registry.example.org", cause.SeedRefused},
		"one that differs in its case": {"registry.example.org", "M1.example.org", cause.SeedRefused},
	} {
		s := &stage{config: &Config{Signers: []string{print}, Threshold: 1, VersionFloor: 1}, initdata: in, seed: &seed.Seed{}}
		s.seed.UserData.CVMAgent.Mirrors = map[string][]string{c.host: {c.mirror}}
		if err := s.checkPolicy(context.Background()); cause.Of(err) != c.code {
			t.Errorf("%s: %v, expected %q", name, err, c.code)
		}
	}
	yaml, err := withMirrors([]byte("tpm: \"\"\n"), map[string][]string{"a": {"b", "c"}})
	if err != nil || string(yaml) != "tpm: \"\"\nmirrors: {\"a\":[\"b\",\"c\"]}\n" {
		t.Errorf("%q, %v", yaml, err)
	}
	if yaml, err = withMirrors([]byte("x"), nil); err != nil || string(yaml) != "x" {
		t.Errorf("%q, %v", yaml, err)
	}
}

func TestRunStopsAtTheFirstError(t *testing.T) {
	var ran []string
	note := func(name string, err error) step {
		return step{name, func(*stage, context.Context) error { ran = append(ran, name); return err }}
	}
	stop := errors.New("stop")
	report, err := new(stage).run(context.Background(), []step{note("a", nil), note("b", stop), note("c", nil)})
	if !errors.Is(err, stop) || !slices.Equal(ran, []string{"a", "b"}) || len(report) != 1 || report[0].Step != "a" {
		t.Errorf("%v, %v, %v", ran, report, err)
	}
}

func TestModules(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{"6.12/kernel/drivers/md/dm-verity.ko", "virtio_blk.ko", "x.ko.xz", "README"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, path), []byte("no module"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files, err := moduleFiles(dir)
	if err != nil || len(files) != 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, name := range []string{"dm-verity.ko", "dm_verity", "kernel/drivers/md/dm-verity.ko", "virtio-blk"} {
		if files[moduleName(name)] == "" {
			t.Errorf("%s is not found", name)
		}
	}
	if err := loadModules(dir, []string{"absent"}); cause.Of(err) != cause.Config {
		t.Errorf("absent: %v", err)
	}
	if err := loadModules(dir, []string{"virtio_blk"}); cause.Of(err) != cause.EarlyFailed {
		t.Errorf("no module: %v", err)
	}
	if err := loadModules(filepath.Join(dir, "none"), nil); err != nil {
		t.Errorf("no directory and no modules: %v", err)
	}
}

func TestHandOver(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	clean := seed.Files{seed.UserDataFile: []byte("#cloud-config\n{}\n"), seed.MetaDataFile: []byte("{}\n")}
	if err := writeHandover(dir, []byte("initdata"), []byte("yaml"), clean); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"initdata.toml": "initdata", "agent.yaml": "yaml", "seed/user-data": "#cloud-config\n{}\n", "seed/meta-data": "{}\n"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "seed", "network-config")); !os.IsNotExist(err) {
		t.Errorf("network-config out of nothing: %v", err)
	}
}

func FuzzCmdline(f *testing.F) {
	f.Add(goodLine, []byte(goodLine+"\n"))
	f.Add(goodLine, []byte(goodLine+" x"))
	f.Fuzz(func(t *testing.T, expected string, got []byte) {
		err := checkCmdline(expected, got)
		if same := string(got) == expected || string(got) == expected+"\n"; (err == nil) != same {
			t.Fatalf("%q, %q: %v", expected, got, err)
		}
	})
}

func FuzzDecodeConfig(f *testing.F) {
	f.Add([]byte(config("")))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := DecodeConfig(data)
		if err != nil {
			if cause.Of(err) != cause.Config {
				t.Fatal(err)
			}
			return
		}
		if len(c.rootHash()) != 64 || !strings.Contains(c.Cmdline, c.rootHash()) || c.wait() > maxWait*1e9 {
			t.Fatalf("%+v", c)
		}
	})
}

func TestDevicesAreFoundByTheirModalias(t *testing.T) {
	sys := t.TempDir()
	for file, alias := range map[string]string{
		"bus/virtio/devices/virtio1/modalias":     "virtio:d00000002v00001AF4\n",
		"bus/platform/devices/sev-guest/modalias": "platform:sev-guest\n",
		"bus/acpi/devices/VMBUS:00/modalias":      "acpi:VMBUS:\n",
		"bus/pci/devices/0000:00:1f.3/modalias":   "pci:v00008086d00002930\n",
		"devices/system/cpu/modalias":             "cpu:type:x86,ven0000fam0006mod008F:feature:,0000,0116,0117\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(sys, file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sys, file), []byte(alias), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for pattern, want := range map[string]bool{
		"virtio:d00000002v*":                       true,
		"virtio:d00000008v*":                       false,
		"platform:sev-guest":                       true,
		"cpu:type:x86,ven*fam*mod*:feature:*0116*": true,
		"cpu:type:x86,ven*fam*mod*:feature:*0118*": false,
		"acpi*:VMBUS:*":                            true,
		"acpi*:VMBus:*":                            false,
		"pci:v00008086d*":                          true,
	} {
		patterns := []string{"none", "platform:other", pattern}
		if got := fits(patterns, modaliases(sys, patterns)); got != want {
			t.Errorf("%s: %t, expected %t", pattern, got, want)
		}
	}
}
