package rig

import (
	"context"
	"os"
	"strings"
	"testing"
)

// TestRigLeavesNothing starts every part that needs none of our programs, uses
// podman, and looks for what is left after Close.
func TestRigLeavesNothing(t *testing.T) {
	ctx := context.Background()
	r, err := New(Options{Out: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	reg, err := r.StartRegistry(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.StartReferrersRegistry(ctx); err != nil {
		t.Fatal(err)
	}
	tpm, err := r.StartTPM(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := tpm.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := r.NewKeys(ctx, "signer"); err != nil {
		t.Fatal(err)
	}
	podman, err := r.StartPodman(ctx, "guest")
	if err != nil {
		t.Fatal(err)
	}
	app := App{Name: "app", Version: "v1"}
	dir, err := r.BuildApp(ctx, app)
	if err != nil {
		t.Fatal(err)
	}
	ref := reg.Reference("app", ":v1")
	if _, err := podman.Command(ctx, "build", "-q", "-t", ref, dir); err != nil {
		t.Fatal(err)
	}
	if _, err := podman.Command(ctx, "push", "-q", "--tls-verify=false", ref); err != nil {
		t.Fatal(err)
	}
	port, err := FreePort()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := podman.Command(ctx, "run", "-d", "--read-only", ref, ListenOn(port)); err != nil {
		t.Fatal(err)
	}
	if err := WaitHTTP(ctx, port, "/", "app v1"); err != nil {
		t.Fatal(err)
	}
	left, err := podman.Leftovers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) < 2 {
		t.Errorf("a container and an image are there, Leftovers says %q", left)
	}

	dirs, pids := r.Dir, processesNaming(r.Dir)
	if len(pids) == 0 {
		t.Error("no process names the work directory, so nothing was tested")
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if pids := processesNaming(dirs); len(pids) > 0 {
		t.Errorf("processes left: %v", pids)
	}
	if mounts, err := MountsUnder(dirs); err != nil || len(mounts) > 0 {
		t.Errorf("mounts left: %v %v", mounts, err)
	}
	if _, err := os.Stat(dirs); !os.IsNotExist(err) {
		t.Errorf("work directory left: %v", err)
	}
	if _, err := get(ctx, port, "/"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("the container still answers: %v", err)
	}
}
