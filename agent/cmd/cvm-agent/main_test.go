package main

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/usage/usagetest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"cvm-agent": func() { os.Exit(run(context.Background(), os.Args[1:])) },
	})
}

// TestScript runs the command as a user does, against an agent that plays its
// part by the file that the order names.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			socket := filepath.Join(env.WorkDir, "control.sock")
			l, err := control.Listen(socket, -1)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(context.Background())
			env.Defer(cancel)
			go func() { _ = control.NewServer(scripted{}, slog.New(slog.DiscardHandler)).Serve(ctx, l) }()
			return nil
		},
	})
}

func TestUnknownCommands(t *testing.T) {
	if groups := usagetest.Groups(t, command); !slices.Contains(groups, "cvm-agent ctl") {
		t.Errorf("asked %q", groups)
	}
}

// scripted is an agent with a fixed history.
type scripted struct{}

func (scripted) phases() []control.Phase {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return []control.Phase{
		{Sequence: "launch", Name: "policy", Outcome: control.OK, Start: at, DurationMS: 12.3, Text: "shop version 1"},
		{Sequence: "launch", Name: "key", Workload: "web", Outcome: control.Skipped, Start: at, Text: "the image is plain"},
		{Sequence: "launch", Name: "sbom", Workload: "web", Outcome: control.Failed, Cause: "sbom-differs", Text: "one package more", Start: at, DurationMS: 2345},
	}
}

func (s scripted) Status() control.Status {
	return control.Status{State: control.StateReady, Agent: "1.2.3", Platform: "tpm", Phases: s.phases(),
		Policy:    &control.Policy{Name: "shop", Version: 1, Digest: "sha256:abc", Expires: "2030-01-01T00:00:00Z"},
		Workloads: []control.Workload{{Name: "web", Image: "r.example/web@sha256:abc", Healthy: true}, {Name: "db", Image: "r.example/db@sha256:def", Text: "exited"}}}
}

func (s scripted) Events(after uint64) (out []control.Event, more <-chan struct{}) {
	for i, p := range s.phases() {
		if seq := uint64(i + 1); seq > after {
			out = append(out, control.Event{Seq: seq, Phase: p, Time: p.Start})
		}
	}
	return out, make(chan struct{})
}
func (scripted) Identity() control.Identity {
	return control.Identity{Policy: "shop", InstanceID: "i-1", BootID: "0f1e2d3c-0000-4000-8000-0123456789ab"}
}
func (scripted) Rules() control.Rules { return control.Rules{OperatorGID: -1} }

func (scripted) Upgrade(_ context.Context, order []byte) error {
	if code := strings.TrimSpace(string(order)); code != "good" {
		return cause.New(cause.Code(code), "the agent said so")
	}
	return nil
}
func (scripted) Destroy(context.Context) error { return nil }

// The scanner's parsers of hostile content stay out of the daemon, and so does
// the broker.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.FieldsSeq(string(out)) {
		if strings.Contains(dep, "anchore/syft") || strings.HasSuffix(dep, "cvm-agent/policy/broker") {
			t.Errorf("cvm-agent imports %s", dep)
		}
	}
}

func TestSize(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "cvm-agent")
	if out, err := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	info, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() >= 40<<20 {
		t.Errorf("the stripped binary has %d bytes, the bar is 40 MiB", info.Size())
	}
}
