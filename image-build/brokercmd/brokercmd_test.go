package brokercmd

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/usage"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"cvmctl-broker": func() {
			c := Command()
			usage.Errors(c)
			if err := c.Execute(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(cause.Exit(err))
			}
		},
	})
}

// Each script talks to a real broker of its own: $URL, $BROKER/ca.pem,
// $BROKER/admin.token.
func TestScripts(t *testing.T) { scripts(t, "testdata", nil) }

// The broker of these takes rules signed by one key alone: rules.dsse.json and
// lower.dsse.json are, stranger.dsse.json is not.
func TestSignedRules(t *testing.T) {
	k, stranger := dssetest.New(t, "ecdsa"), dssetest.New(t, "ecdsa")
	example, err := os.ReadFile("../../policy/examples/reference/reference.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d, err := release.DecodeReferenceYAML(example)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"signer.pub": []byte(k.PEM), "plain.yaml": example}
	sign := func(name string, version uint64, by *dssetest.Key) {
		d.Version = version
		if files[name], err = release.SignReference(d, by); err != nil {
			t.Fatal(err)
		}
	}
	sign("rules.dsse.json", 3, k)
	sign("lower.dsse.json", 2, k)
	sign("stranger.dsse.json", 4, stranger)
	scripts(t, "testdata/signed", files)
}

// scripts runs the scripts of a directory; with files, which they find beside
// themselves, signer.pub is the broker's rule signer.
func scripts(t *testing.T, dir string, files map[string][]byte) {
	testscript.Run(t, testscript.Params{
		Dir: dir,
		Setup: func(e *testscript.Env) error {
			for name, data := range files {
				if err := os.WriteFile(filepath.Join(e.WorkDir, name), data, 0o600); err != nil {
					return err
				}
			}
			dir := filepath.Join(e.WorkDir, "broker")
			if err := broker.Init(broker.InitOptions{Dir: dir, Hosts: []string{"127.0.0.1"}, Listen: "127.0.0.1:0", Now: time.Now()}); err != nil {
				return err
			}
			c, err := broker.LoadConfig(filepath.Join(dir, broker.FileConfig))
			if err != nil {
				return err
			}
			if files != nil {
				c.RuleSigners = &broker.RuleSignerConfig{Keys: []string{filepath.Join(e.WorkDir, "signer.pub")}, Threshold: 1}
			}
			ctx, cancel := context.WithCancel(context.Background())
			out, in := io.Pipe()
			done := make(chan error, 1)
			go func() {
				done <- broker.Run(ctx, c, "", slog.New(slog.DiscardHandler), in)
				in.Close()
			}()
			e.Defer(func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
			var url string
			if _, err := fmt.Fscanf(out, "listening on %s\n", &url); err != nil {
				return err
			}
			e.Setenv("URL", url)
			e.Setenv("BROKER", dir)
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"status": func(ts *testscript.TestScript, neg bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				got := 0
				if e, ok := err.(interface{ ExitCode() int }); ok {
					got = e.ExitCode()
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if fmt.Sprint(got) != args[0] {
					ts.Fatalf("exit status %d, expected %s", got, args[0])
				}
			},
		},
	})
}
