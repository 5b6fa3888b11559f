package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/image-build/publish"
	"github.com/cc-runtime/cvm-agent/policy/usage/usagetest"
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

// Every group says the same of a command that it has not, and of none.
func TestUnknownCommands(t *testing.T) {
	groups := usagetest.Groups(t, command)
	for _, g := range []string{"cvmctl", "cvmctl measure", "cvmctl order", "cvmctl control", "cvmctl policy", "cvmctl seed", "cvmctl broker kek", "cvmctl completion"} {
		if !slices.Contains(groups, g) {
			t.Errorf("%s is no group of %q", g, groups)
		}
	}
}

// What the command line names may be a symbolic link: a command of cvmctl that
// refuses one would be alone in it.
func TestNamedFilesMayBeLinks(t *testing.T) {
	seen := 0
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if strings.Contains(string(text), "bounded.ReadFile(") {
			t.Errorf("%s reads by bounded.ReadFile, expected ReadNamed", path)
		}
		seen += strings.Count(string(text), "bounded.ReadNamed")
		return err
	})
	if err != nil || seen == 0 {
		t.Fatalf("%d named files, %v", seen, err)
	}
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
