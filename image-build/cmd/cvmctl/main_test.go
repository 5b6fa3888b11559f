package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/image-build/publish"
)

func TestMain(m *testing.M) {
	if publish.Reexec() {
		return
	}
	testscript.Main(m, map[string]func(){"cvmctl": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": status,
		},
	})
}

// status N PROGRAM ARGS… runs the program and wants exit status N.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N program args…")
	}

	if err := ts.Exec("sh", append([]string{"-c", `"$@"; echo $? >$WORK/status`, "sh"}, args[1:]...)...); err != nil {
		ts.Fatalf("%v", err)
	}
	data, err := os.ReadFile(ts.Getenv("WORK") + "/status")
	ts.Check(err)
	got := string(data[:len(data)-1])
	if got != args[0] {
		ts.Fatalf("exit status %s, expected %s", got, args[0])
	}
}
