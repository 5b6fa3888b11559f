package measurecmd_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/measurecmd"
	"github.com/cc-runtime/cvm-agent/image-build/policycmd"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/usage"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cvmctl": func() {
		root := &cobra.Command{Use: "cvmctl", SilenceErrors: true, SilenceUsage: true}
		root.AddCommand(measurecmd.Command())
		root.AddCommand(policycmd.Commands()...)
		usage.Errors(root)
		if err := root.Execute(); err != nil {
			root.PrintErrln("cvmctl: " + err.Error())
			os.Exit(cause.Exit(err))
		}
	}})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			for from, to := range map[string]string{
				"../measure/testdata/ovmf-amdsev-suffix.bin":            "ovmf.bin",
				"../measure/testdata/uki.efi":                           "uki.efi",
				"../../policy/examples/reference/reference.yaml":        "reference.yaml",
				"../../policy/examples/reference/reference.schema.json": "reference.schema.json",
			} {
				data, err := os.ReadFile(from)
				if err != nil {
					return err
				}
				if err := os.WriteFile(e.WorkDir+"/"+to, data, 0o600); err != nil {
					return err
				}
			}
			return writeKeys(e.WorkDir)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// exits N CMD ARG...: the command must end with exactly this status.
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				got := "exit status 0"
				if err := ts.Exec(args[1], args[2:]...); err != nil {
					got = err.Error()
				}
				if neg || got != "exit status "+args[0] {
					ts.Fatalf("%s, expected %s", got, args[0])
				}
			},
		},
	})
}

func writeKeys(dir string) error {
	for name, k := range map[string]struct {
		curve elliptic.Curve
		kind  string
	}{
		"id.pem":     {elliptic.P384(), "EC PRIVATE KEY"},
		"author.pem": {elliptic.P384(), "PRIVATE KEY"},
		"p256.pem":   {elliptic.P256(), "EC PRIVATE KEY"},
	} {
		key, err := ecdsa.GenerateKey(k.curve, rand.Reader)
		if err != nil {
			return err
		}
		der, err := x509.MarshalECPrivateKey(key)
		if k.kind == "PRIVATE KEY" {
			der, err = x509.MarshalPKCS8PrivateKey(key)
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(dir+"/"+name, pem.EncodeToMemory(&pem.Block{Type: k.kind, Bytes: der}), 0o600); err != nil {
			return err
		}
	}
	return nil
}
