package verifycmd_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/verifycmd"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/usage"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cvmctl": cvmctl, "dial": dial})
}

// seal kills the process at its first socket: what runs behind it is offline,
// whatever it tries and however it hides the error.
func seal() {
	err := seccomp.LoadFilter(seccomp.Filter{
		NoNewPrivs: true,
		Flag:       seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls:      []seccomp.SyscallGroup{{Action: seccomp.ActionKillProcess, Names: []string{"socket", "socketpair", "connect", "io_uring_setup"}}},
		},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "seal:", err)
		os.Exit(1)
	}
}

// cvmctl is the real program's root, reduced to this package, and sealed.
func cvmctl() {
	seal()
	root := &cobra.Command{Use: "cvmctl", SilenceErrors: true, SilenceUsage: true}
	root.AddCommand(verifycmd.Command())
	usage.Errors(root)
	err := root.Execute()
	if err != nil {
		fmt.Fprintf(os.Stderr, "cvmctl: %v\n", err)
	}
	os.Exit(cause.Exit(err))
}

// dial shows that the seal holds.
func dial() {
	seal()
	_, err := net.Dial("tcp", "127.0.0.1:1")
	fmt.Println("survived:", err)
}

// Lesson 24: verification offline opens no connection. Every script runs behind the
// seal.
func TestLesson24_ScriptsWithoutASocket(t *testing.T) {
	vectors, err := filepath.Abs("testdata/vectors")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("V", vectors)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"status": status, "flip": flip, "cut": cut},
	})
}

// status N PROGRAM ARGS… runs the program and wants exit status N.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N program args…")
	}
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		e, ok := err.(interface{ ExitCode() int })
		if !ok {
			ts.Fatalf("%v", err)
		}
		got = e.ExitCode()
	}
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit status %d, expected %s", got, args[0])
	}
}

// flip IN OUT OFFSET writes IN with one bit of one byte changed.
func flip(ts *testscript.TestScript, _ bool, args []string) {
	data, at := load(ts, args)
	data[at] ^= 1
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), data, 0o600))
}

// cut IN OUT SIZE writes the first SIZE bytes of IN.
func cut(ts *testscript.TestScript, _ bool, args []string) {
	data, at := load(ts, args)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), data[:at], 0o600))
}

func load(ts *testscript.TestScript, args []string) ([]byte, int) {
	data, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	at, err := strconv.ParseInt(args[2], 0, 32)
	ts.Check(err)
	if int(at) >= len(data) {
		ts.Fatalf("%s has %d bytes", args[0], len(data))
	}
	return data, int(at)
}
