package policycmd_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/policycmd"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/usage"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cvmctl": cvmctl})
}

// cvmctl is the real program's root, reduced to this package's commands.
func cvmctl() {
	root := &cobra.Command{Use: "cvmctl", SilenceErrors: true, SilenceUsage: true}
	root.AddCommand(policycmd.Commands()...)
	usage.Errors(root)
	err := root.Execute()
	if err != nil {
		fmt.Fprintf(os.Stderr, "cvmctl: %v\n", err)
	}
	os.Exit(cause.Exit(err))
}

func TestScripts(t *testing.T) {
	minimal, err := os.ReadFile("../../policy/examples/minimal.yaml")
	if err != nil {
		t.Fatal(err)
	}
	schema, err := os.ReadFile("../../policy/examples/policy.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	reference, err := os.ReadFile("../../policy/examples/reference/reference.yaml")
	if err != nil {
		t.Fatal(err)
	}
	referenceSchema, err := os.ReadFile("../../policy/examples/reference/reference.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := cosign.GenerateKeyPair(func(bool) ([]byte, error) { return []byte("correct horse"), nil })
	if err != nil {
		t.Fatal(err)
	}
	ed, rsa := dssetest.New(t, "ed25519"), dssetest.New(t, "rsa")
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			for name, data := range map[string][]byte{
				"policy.yaml": minimal, "expected.schema.json": schema,
				"reference.yaml": reference, "expected.reference.schema.json": referenceSchema,
				"cosign.key": pair.PrivateBytes, "cosign.pub": pair.PublicBytes,
				"ed25519.key": ed.PKCS8, "ed25519.pub": []byte(ed.PEM),
				"rsa.key": rsa.PKCS8, "rsa.pub": []byte(rsa.PEM),
			} {
				if err := os.WriteFile(filepath.Join(env.WorkDir, name), data, 0o600); err != nil {
					return err
				}
			}
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			// exits N CMD ARG...: the command must end with exactly this status.
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				got := "0"
				if err != nil {
					got = strings.TrimPrefix(err.Error(), "exit status ")
				}
				if (got == args[0]) == neg {
					ts.Fatalf("exit status %s, expected %s", got, args[0])
				}
			},
			// edit FILE OLD NEW replaces a text that must be there.
			"edit": func(ts *testscript.TestScript, _ bool, args []string) {
				text := ts.ReadFile(args[0])
				if !strings.Contains(text, args[1]) {
					ts.Fatalf("%s does not contain %q", args[0], args[1])
				}
				ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.Replace(text, args[1], args[2], 1)), 0o600))
			},
		},
	})
}
