package main

import (
	"os"
	"slices"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/policy/usage/usagetest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cvm-broker": func() { os.Exit(run()) }})
}

func TestUnknownCommands(t *testing.T) {
	if groups := usagetest.Groups(t, command); !slices.Contains(groups, "cvm-broker") {
		t.Errorf("asked %q", groups)
	}
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata"})
}
