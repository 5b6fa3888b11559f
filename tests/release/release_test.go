// Package release tests the programs as they are released: what is linked into
// them, and what they do on a machine that has no TEE.
package release

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

const (
	root   = "../.."
	module = "github.com/cc-runtime/cvm-agent"
)

// released reads from the Makefile what `make build` builds in this module.
func released(t *testing.T) (programs []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^PROGRAMS := (.+)$`).FindSubmatch(text)
	if m == nil {
		t.Fatal("the Makefile names no PROGRAMS")
	}
	programs = strings.Fields(string(m[1]))
	for _, want := range []string{"agent/cmd/cvm-agent", "policy/cmd/cvm-broker", "image-build/cmd/cvmctl", "initrd/cmd/cvm-early"} {
		if !slices.Contains(programs, want) {
			t.Fatalf("PROGRAMS lacks %s", want)
		}
	}
	// The flags below are these but for -s -w, which would take the symbols.
	if !bytes.Contains(text, []byte("\nLDFLAGS := -s -w -X main.version=$(VERSION)\n")) {
		t.Fatal("the Makefile's LDFLAGS are not those that this test builds with")
	}
	return programs
}

// bin is where the programs are, built once for all tests.
var bin string

func TestMain(m *testing.M) {
	var err error
	if bin, err = os.MkdirTemp("", "release"); err != nil {
		panic(err)
	}
	status := m.Run()
	_ = os.RemoveAll(bin)
	os.Exit(status)
}

// build builds the released programs, and the fake beside them, with their
// symbols.
func build(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(bin, "fake")); err == nil {
		return
	}
	args := []string{"build", "-ldflags", "-X main.version=test", "-o", bin + "/"}
	for _, p := range append(released(t), "tests/release/testdata/fake") {
		args = append(args, "./"+p)
	}
	command(t, "go", args...)
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return string(out)
}

// fake says whether an import path is of something that makes evidence up: a
// test package of ours, or a fake device, simulator or made chain of a library.
func fake(path string) bool {
	if path == "testing" {
		return true
	}
	if rest, ok := strings.CutPrefix(path, module+"/"); ok {
		return slices.ContainsFunc(strings.Split(rest, "/"), func(e string) bool { return strings.HasSuffix(e, "test") || e == "tests" })
	}
	if strings.HasPrefix(path, "github.com/google/") {
		return slices.ContainsFunc(strings.Split(path, "/"), func(e string) bool {
			return e == "testing" || e == "simulator" || strings.HasPrefix(e, "fake") || strings.HasSuffix(e, "test")
		})
	}
	return false
}

// symbols are the names in a program's symbol table.
func symbols(t *testing.T, path string) []string {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, err := f.Symbols()
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	names := make([]string, len(table))
	for i, s := range table {
		names[i] = s.Name
	}
	return names
}

// packageOf is the import path of a symbol, "" where it has none.
func packageOf(symbol string) string {
	symbol = strings.TrimPrefix(symbol, "type:*")
	symbol, _, _ = strings.Cut(symbol, "[")
	slash := strings.LastIndex(symbol, "/")
	dot := strings.Index(symbol[slash+1:], ".")
	if dot < 0 {
		return ""
	}
	return symbol[:slash+1+dot]
}

// fakes are the packages of fakes that symbols name.
func fakes(names []string) (found []string) {
	for _, s := range names {
		if p := packageOf(s); fake(p) && !slices.Contains(found, p) {
			found = append(found, p)
		}
	}
	return found
}

// Lessons 3 and 4: no fake device, no simulated TPM, no made chain and no
// sample evidence is in a program as it is released.
func TestLesson03_NoFakeInARelease(t *testing.T) {
	programs := released(t)
	build(t)
	if found := fakes(symbols(t, filepath.Join(bin, "fake"))); !slices.Contains(found, module+"/policy/appraisal/snptest") ||
		!slices.Contains(found, "github.com/google/go-sev-guest/testing") {
		t.Fatalf("the fake was not recognised: %v", found)
	}
	// All that makes or judges evidence has a method TEE, through an interface
	// in agent and broker, so that the linker keeps all of them.
	least := map[string]int{"cvm-agent": 4, "cvm-broker": 4}
	method := regexp.MustCompile(`^` + regexp.QuoteMeta(module) + `/(.+)\.\(\*?(\w+)\)\.TEE$`)
	for _, p := range programs {
		name := filepath.Base(p)
		t.Run(name, func(t *testing.T) {
			for _, dep := range strings.Fields(command(t, "go", "list", "-deps", "./"+p)) {
				if dep != "testing" && fake(dep) { // libraries of others do import testing
					t.Errorf("it depends on %s", dep)
				}
			}
			names := symbols(t, filepath.Join(bin, name))
			if len(names) < 1000 {
				t.Fatalf("only %d symbols: is it stripped?", len(names))
			}
			for _, p := range fakes(names) {
				if p != "testing" {
					t.Errorf("code of %s is linked", p)
				}
			}
			var kinds []string
			for _, s := range names {
				m := method.FindStringSubmatch(s)
				if m == nil {
					continue
				}
				if m[1] != "agent/platform" && m[1] != "policy/appraisal" {
					t.Errorf("%s: evidence is made or judged elsewhere", s)
				}
				if !slices.Contains([]string{"TPM", "SNP", "TDX", "AzureSNP", "AzureTDX", "Azure", "Guest"}, m[2]) {
					t.Errorf("%s: a kind of evidence that no platform of the design makes", s)
				}
				kinds = append(kinds, m[2])
			}
			if len(kinds) < least[name] {
				t.Errorf("only %v were found: does this test still look at the right method?", kinds)
			}
		})
	}
}

// Lesson 4: a released agent on a machine without a TEE and without a TPM
// launches nothing: it says that nothing can be attested, and asks no broker.
func TestLesson04_NoDeviceFailsClosed(t *testing.T) {
	build(t)
	signer := dssetest.New(t, "ecdsa")
	p := &policy.Policy{
		APIVersion: policy.APIVersion, Name: "shop", Version: 1, Expires: time.Now().Add(time.Hour).UTC().Format(time.RFC3339),
		Platforms: []policy.Platform{policy.PlatformTPM},
		Workloads: []policy.Workload{{
			Name: "web", Image: "registry.example/shop@sha256:" + strings.Repeat("1", 64), Encryption: "optional",
			Signatures: policy.Signatures{Required: []policy.Signer{{Key: signer.PEM}}},
		}},
	}
	for _, platforms := range [][]policy.Platform{{policy.PlatformTPM}, {"snp"}, {"tdx"}, {"az-snp-vtpm"}, {"az-tdx-vtpm"}} {
		for what, tpm := range map[string]string{"no TPM configured": `""`, "a TPM that is not there": "device:/dev/tpmrm0"} {
			t.Run(fmt.Sprint(platforms, " ", what), func(t *testing.T) {
				p.Platforms = platforms
				envelope, err := policy.Sign(p, signer)
				if err != nil {
					t.Fatal(err)
				}
				initdata, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: signer.PEM})
				if err != nil {
					t.Fatal(err)
				}
				work := t.TempDir()
				write(t, filepath.Join(work, "initdata.toml"), initdata)
				write(t, filepath.Join(work, "agent.yaml"), fmt.Appendf(nil, `initdata: %[1]s/initdata.toml
trust: {signers: [%[2]s]}
tpm: %[3]s
stateDir: %[1]s/state
runDir: %[1]s/run
storage: {graphRoot: %[1]s/graph, runRoot: %[1]s/graph-run}
podmanSocket: %[1]s/podman.sock
controlSocket: %[1]s/control.sock
socketGroup: root
sbomProgram: %[1]s/cvm-sbom
`, work, signer.Fingerprint, tpm))
				status, last := runWithoutDevices(t, filepath.Join(bin, "cvm-agent"), "run", "--config", filepath.Join(work, "agent.yaml"))
				if status != 10 && status != 20 {
					t.Errorf("exit status %d: %s", status, last)
				}
				if !strings.HasPrefix(last, "cvm-agent: ") || !strings.Contains(last, "no SEV-SNP") ||
					(!strings.Contains(last, ": platform-not-allowed: ") && !strings.Contains(last, ": tpm-unavailable: ")) {
					t.Errorf("expected the platform's cause, found %q", last)
				}
			})
		}
	}
}

// Lesson 24: a released cvmctl says the same of recorded evidence where there
// is no network at all, not even loopback, as where there is one.
func TestLesson24_EvidenceWithoutANetwork(t *testing.T) {
	build(t)
	vectors, err := filepath.Abs(filepath.Join(root, "image-build/verifycmd/testdata/vectors"))
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		args []string
		last string
	}{
		"SNP, accepted":            {[]string{"--format", "snp", "--in", "snp-report-v2.bin", "--certs", "snp-report-v2-vcek.der", "--allow-missing", "revocation"}, "accepted"},
		"SNP, lists missing":       {[]string{"--format", "snp", "--in", "snp-report-v2.bin", "--certs", "snp-report-v2-vcek.der"}, "refused: collateral is missing"},
		"SNP, certificate missing": {[]string{"--format", "snp", "--in", "snp-report-v2.bin"}, "refused: the report's certificate is missing"},
		"Azure, accepted":          {[]string{"--format", "kbs", "--tee", "az-snp-vtpm", "--in", "trustee-az-snp-vtpm-evidence-v2.json", "--allow-missing", "revocation"}, "accepted"},
		"TDX, collateral missing":  {[]string{"--format", "tdx", "--in", "tdx-quote-v4.bin"}, "refused: collateral is missing"},
	} {
		t.Run(what, func(t *testing.T) {
			var said []string
			for _, with := range [][]string{nil, {"unshare", "--net"}} {
				argv := append(append(with, filepath.Join(bin, "cvmctl"), "verify", "evidence", "--time", "2026-06-01T00:00:00Z"), c.args...)
				cmd := exec.Command(argv[0], argv[1:]...)
				cmd.Dir = vectors
				out, _ := cmd.Output() // the exit status is the last line's
				lines := strings.Split(strings.TrimSpace(string(out)), "\n")
				if last := lines[len(lines)-1]; !strings.HasPrefix(last, c.last) || (last == "accepted") != (cmd.ProcessState.ExitCode() == 0) {
					t.Errorf("%q and exit status %d, expected %q", last, cmd.ProcessState.ExitCode(), c.last)
				}
				said = append(said, string(out))
			}
			if said[0] != said[1] {
				t.Errorf("with a network:\n%s\nwithout:\n%s", said[0], said[1])
			}
		})
	}
}

// runWithoutDevices runs a program where /dev has nothing but null, and where
// neither configfs nor the TEE's sysfs is to be seen. It returns the exit status
// and the last line of stderr.
func runWithoutDevices(t *testing.T, argv ...string) (status int, last string) {
	t.Helper()
	const hide = `set -e
mkdir -p "$0/dev"; mount -t tmpfs none "$0/dev"; touch "$0/dev/null" "$0/dev/urandom"
mount --bind /dev/null "$0/dev/null"; mount --bind /dev/urandom "$0/dev/urandom"
mount --rbind "$0/dev" /dev
if [ -d /sys/kernel/config ]; then mount -t tmpfs none /sys/kernel/config; fi
exec "$@"`
	cmd := exec.Command("unshare", append([]string{"--mount", "--propagation", "private", "sh", "-c", hide, t.TempDir()}, argv...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	done := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer done.Stop()
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
	return cmd.ProcessState.ExitCode(), lines[len(lines)-1]
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
