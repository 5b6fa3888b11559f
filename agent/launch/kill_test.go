package launch

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func restarted(t *testing.T, a *Agent, w *world) *Agent {
	t.Helper()
	again, _ := newTestAgent(t, w, strings.TrimSuffix(a.config.StateDir, "/state"))
	return again
}

// A kill between the document of a third version and its commit leaves the
// second, itself an upgrade, to be found again; and so does a kill in the
// middle of a rollback to it.
func TestAKillBesideTheCommitKeepsTheCommittedPolicy(t *testing.T) {
	for name, at := range map[string]string{"before the commit": "append committed", "before the rollback": "append rolled-back"} {
		t.Run(name, func(t *testing.T) {
			a, w, _ := launched(t)
			w.policies["v3"] = testPolicy(3, "web")
			if err := a.Upgrade(t.Context(), []byte("v2")); err != nil {
				t.Fatal(err)
			}
			killed := func() error { panic(at) }
			w.fail[at+" "] = killed
			w.fail["healthy web-v3"] = func() error { return cause.New(cause.WorkloadUnhealthy, "no") }
			func() {
				defer func() { _ = recover() }()
				_ = a.Upgrade(t.Context(), []byte("v3"))
			}()
			delete(w.fail, at+" ")
			delete(w.fail, "healthy web-v3")
			again := restarted(t, a, w)
			if err := again.launch(t.Context()); err != nil {
				t.Fatal(err)
			}
			want := uint64(2)
			if at == "append rolled-back" {
				want = 3 // the log still commits it
			}
			if v := again.Status().Policy.Version; v != want {
				t.Errorf("version %d runs, expected %d", v, want)
			}
		})
	}
}

func TestARollbackNeverGoesBelowTheFloor(t *testing.T) {
	for name, raise := range map[string]func(w *world){
		"the new policy's minimum": func(w *world) { w.policies["v2"].MinimumVersion = 2 },
		"the broker's mark":        func(w *world) { w.claims.VersionMark = 2 },
	} {
		t.Run(name, func(t *testing.T) {
			a, w, _ := launched(t)
			raise(w)
			w.fail["healthy web-v2"] = func() error { return cause.New(cause.WorkloadUnhealthy, "no") }
			err := a.Upgrade(t.Context(), []byte("v2"))
			if cause.Of(err) != cause.RollbackFailed || !strings.Contains(err.Error(), "below") {
				t.Errorf("%v", err)
			}
			if got := w.podman.running(); got != "" {
				t.Errorf("running %q", got)
			}
			if st := a.Status(); st.State != control.StateFailed {
				t.Errorf("state %s", st.State)
			}
			for _, e := range w.log.Events() {
				if e.Kind == eventlog.KindRolledBack {
					t.Error("the log says that it went back")
				}
			}
		})
	}
}

// Destroy goes on where a kill cut it short, whatever this run knows of the
// former one.
func TestDestroyGoesOnAfterAKill(t *testing.T) {
	a, w, _ := launched(t)
	if err := os.WriteFile(a.latchPath(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	again := restarted(t, a, w)
	if err := again.launch(t.Context()); cause.Of(err) != cause.Destroyed {
		t.Fatal(err)
	}
	before := len(w.calls())
	again.stayDestroyed(t.Context())
	if len(w.images) != 0 || len(w.podman.containers) != 0 {
		t.Errorf("left over: %v, %v", w.images, w.podman.containers)
	}
	if !strings.Contains(strings.Join(w.calls()[before:], " "), "wipe-all") {
		t.Error("the secrets are left")
	}
	if got := again.Status(); got.State != control.StateDestroyed || got.Cause != "" {
		t.Errorf("state %s, %s: %s", got.State, got.Cause, got.Text)
	}
}

func TestDestroyDuringTheConfirmationLeavesNoImage(t *testing.T) {
	a, w, _ := launched(t)
	inHealth := make(chan struct{})
	destroyed := make(chan error, 1)
	w.fail["healthy web-v2"] = func() error {
		close(inHealth)
		for a.Status().State != control.StateDestroying {
			time.Sleep(time.Millisecond)
		}
		return cause.New(cause.Cancelled, "taken over")
	}
	upgraded := make(chan error, 1)
	go func() { upgraded <- a.Upgrade(t.Context(), []byte("v2")) }()
	<-inHealth
	go func() { destroyed <- a.Destroy(t.Context()) }()
	if err := <-upgraded; err == nil {
		t.Error("the upgrade succeeded")
	}
	if err := <-destroyed; err != nil {
		t.Error(err)
	}
	if len(w.images) != 0 || len(w.podman.containers) != 0 {
		t.Errorf("left over: %v, %v", w.images, w.podman.containers)
	}
}

// Podman dies after it has created a container, and is back for the clearing up.
func TestAContainerThatNobodyConfirmedIsRemoved(t *testing.T) {
	a, w, _ := launched(t)
	w.fail["start web-v2"] = func() error {
		w.podman.mu.Lock()
		w.podman.containers["cvm-shop-web-v2"] = &fakeContainer{}
		w.podman.mu.Unlock()
		return cause.New(cause.WorkloadStart, "the connection broke")
	}
	if err := a.Upgrade(t.Context(), []byte("v2")); cause.Of(err) != cause.UpgradeRolledBack {
		t.Errorf("%v", err)
	}
	if _, left := w.podman.containers["cvm-shop-web-v2"]; left {
		t.Error("the container is left")
	}
}
