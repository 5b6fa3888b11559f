package main

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/swtpmtest"
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
