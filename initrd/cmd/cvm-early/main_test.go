package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/platformtest"
	"github.com/cc-runtime/cvm-agent/agent/platform/swtpmtest"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cvm-early": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			dir, err := os.MkdirTemp("", "early")
			if err != nil {
				return err
			}
			tpm, err := swtpmtest.Start(dir)
			if err != nil {
				return err
			}
			e.Defer(func() { _ = tpm.Stop(); _ = os.RemoveAll(dir) })
			e.Setenv("TPM", tpm.Spec)
			e.Values["tpm"] = tpm
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			// extend INDEX: another program extends a PCR.
			"extend": func(ts *testscript.TestScript, _ bool, args []string) {
				p, err := platform.OpenTPM(ts.Getenv("TPM"))
				ts.Check(err)
				defer p.Close()
				index := map[string]int{"8": 8, "12": 12, "13": 13, "14": 14}[args[0]]
				digest := make([]byte, 32)
				digest[0] = 1
				ts.Check(p.ExtendPCR(context.Background(), index, digest))
			},
			"reboot": func(ts *testscript.TestScript, _ bool, _ []string) {
				ts.Check(ts.Value("tpm").(*swtpmtest.TPM).Reboot())
			},
		},
	})
}

// In a TEE the launch is bound already, and a TPM is not asked.
func TestATEEsOwnLaunchFieldIsChecked(t *testing.T) {
	raw, err := policy.PackInitdata("sha384", map[string]string{policy.KeyPolicy: "{}"})
	if err != nil {
		t.Fatal(err)
	}
	in, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "initdata.toml")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	chain, host := snptest.New(t, snptest.Config{}), tdxtest.New(t, tdxtest.Config{})
	snp := func(hostData []byte) platform.Hardware {
		return platformtest.SNPByDevice(&snptest.Device{Chain: chain, Options: snptest.Options{HostData: hostData}})
	}
	tdx := func(config []byte) platform.Hardware {
		return platformtest.NewTD(t, host, tdxtest.Report{MRConfigID: [48]byte(config)}).ByDevice()
	}
	both := snp(in.HostData())
	both.Files = platformtest.NewFiles(platformtest.DeviceSEV, platformtest.DeviceTDX)
	for name, c := range map[string]struct {
		h    platform.Hardware
		code cause.Code
		says string
	}{
		"SEV-SNP":            {snp(in.HostData()), "", "snp launch is bound to"},
		"SEV-SNP, unbound":   {snp(nil), cause.LaunchUnbound, ""},
		"TDX":                {tdx(in.MRConfigID()), "", "tdx launch is bound to"},
		"TDX, other":         {tdx(append(make([]byte, 47), 1)), cause.LaunchBinding, ""},
		"both":               {both, cause.PlatformNotAllowed, ""},
		"neither and no TPM": {platformtest.Bare(nil), cause.Usage, ""},
	} {
		var out strings.Builder
		err := measure(context.Background(), c.h, file, "", &out)
		if cause.Of(err) != c.code || !strings.HasPrefix(out.String(), c.says) {
			t.Errorf("%s: %q, %v, expected %q", name, out.String(), err, c.code)
		}
	}
}

// The early stage stays small: what parses images or talks to podman has no
// place in it.
func TestLinksNeitherPodmanNorCosign(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.Lines(string(out)) {
		for _, heavy := range []string{"podman", "cosign", "sigstore", "go-containerregistry", "go.podman.io", "ocicrypt"} {
			if strings.Contains(dep, heavy) {
				t.Errorf("cvm-early links %s", strings.TrimSpace(dep))
			}
		}
	}
}
