package ordercmd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/image-build/ordercmd"
	"github.com/cc-runtime/cvm-agent/policy"
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
	root.AddCommand(ordercmd.Commands()...)
	usage.Errors(root)
	err := root.ExecuteContext(context.Background())
	if err != nil {
		fmt.Fprintf(os.Stderr, "cvmctl: %v\n", err)
	}
	os.Exit(cause.Exit(err))
}

// TestScripts runs the commands as an operator does, against the real control
// API of an agent that carries out whatever was rightly ordered.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": func(ts *testscript.TestScript, _ bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				code := 0
				var exit interface{ ExitCode() int }
				if errors.As(err, &exit) {
					code = exit.ExitCode()
				}
				if fmt.Sprint(code) != args[0] {
					ts.Fatalf("exit status %d, expected %s", code, args[0])
				}
			},
		},
		Setup: func(env *testscript.Env) error {
			key, stranger := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519")
			for name, data := range map[string][]byte{"operator.key": key.PKCS8, "stranger.key": stranger.PKCS8} {
				if err := os.WriteFile(filepath.Join(env.WorkDir, name), data, 0o600); err != nil {
					return err
				}
			}
			a := &agent{key: key.PEM}
			ctx, cancel := context.WithCancel(context.Background())
			guest, host := net.Pipe()
			opened := false
			done := make(chan struct{})
			go func() {
				defer close(done)
				control.NewServer(a, slog.New(slog.DiscardHandler)).ServeSerial(ctx, func() (control.Port, error) {
					if opened {
						return nil, io.EOF
					}
					opened = true
					return guest, nil
				})
			}()
			l, err := net.Listen("unix", filepath.Join(env.WorkDir, "cvm.sock"))
			if err != nil {
				cancel()
				return err
			}
			env.Defer(func() { cancel(); _ = l.Close(); _ = host.Close(); <-done })
			go chardev(l, host)
			return nil
		},
	})
}

// chardev plays QEMU's socket: one client after the other on one stream.
func chardev(l net.Listener, host net.Conn) {
	var mu sync.Mutex
	var client net.Conn
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := host.Read(buf)
			if err != nil {
				return
			}
			mu.Lock()
			if client != nil {
				_, _ = client.Write(buf[:n])
			}
			mu.Unlock()
		}
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		mu.Lock()
		client = c
		mu.Unlock()
		_, _ = io.Copy(struct{ io.Writer }{host}, c)
		_ = c.Close()
	}
}

type agent struct {
	key string
	mu  sync.Mutex
	did []control.Event
}

func (a *agent) Status() control.Status {
	return control.Status{State: control.StateReady, Agent: "1.2.3", Policy: &control.Policy{Name: "shop", Version: 1, Expires: "2030-01-01T00:00:00Z"}}
}

func (a *agent) Rules() control.Rules {
	return control.Rules{OperatorGID: -1, Control: policy.Control{VirtioSerial: true, OrderKeys: []policy.OrderKey{{Key: a.key, Orders: []string{"upgrade", "destroy"}}}}}
}

func (a *agent) Identity() control.Identity {
	return control.Identity{Policy: "shop", InstanceID: "i-1", BootID: "0f1e2d3c-0000-4000-8000-0123456789ab"}
}

func (a *agent) Events(after uint64) ([]control.Event, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.did[min(after, uint64(len(a.did))):], make(chan struct{})
}

func (a *agent) do(sequence string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.did = append(a.did, control.Event{Seq: uint64(len(a.did) + 1), Time: time.Now(), Phase: control.Phase{Sequence: sequence, Name: "policy", Outcome: control.OK}})
}

func (a *agent) Upgrade(_ context.Context, signed []byte) error {
	a.do("upgrade")
	if !bytes.Contains(signed, []byte(`"payload":"Z29vZA=="`)) { // good
		return cause.New(cause.UpgradeRolledBack, "unhealthy")
	}
	return nil
}
func (a *agent) Destroy(context.Context) error { a.do("destroy"); return nil }
