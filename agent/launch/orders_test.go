package launch

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func TestUpgrade(t *testing.T) {
	a, w, _ := launched(t)
	if err := a.Upgrade(t.Context(), []byte("v2")); err != nil {
		t.Fatal(err)
	}
	if got := w.podman.running(); got != "cvm-shop-web-v2" || len(w.podman.containers) != 1 {
		t.Errorf("running %q of %d containers", got, len(w.podman.containers))
	}
	if got := w.log.kinds(); got != "policy image policy-staged image-staged committed" {
		t.Errorf("events %q", got)
	}
	if len(w.images) != 1 || !w.images[imageOf("web", 2)] {
		t.Errorf("images %v", w.images)
	}
	if st := a.Status(); st.State != control.StateReady || st.Policy.Version != 2 || st.Workloads[0].Image != imageOf("web", 2) {
		t.Errorf("%+v", st)
	}

	t.Run("after a restart of the daemon the committed policy runs", func(t *testing.T) {
		again, _ := newTestAgent(t, w, strings.TrimSuffix(a.config.StateDir, "/state"))
		if err := again.launch(t.Context()); err != nil {
			t.Fatal(err)
		}
		if v := again.Status().Policy.Version; v != 2 {
			t.Errorf("version %d", v)
		}
		// The document in the run directory counts only with the committed digest.
		w.policies["v3"] = testPolicy(3, "web")
		if err := os.WriteFile(a.committedPath(w.log.State().Digest), []byte("v3"), 0o600); err != nil {
			t.Fatal(err)
		}
		again, _ = newTestAgent(t, w, strings.TrimSuffix(a.config.StateDir, "/state"))
		if err := again.launch(t.Context()); cause.Of(err) != cause.EventLogDiverged {
			t.Errorf("%v, expected eventlog-diverged", err)
		}
	})
}

// Upgrading twice is upgrading once, and nothing goes back.
func TestLesson26_UpgradeIdempotentAndOnlyUp(t *testing.T) {
	a, w, _ := launched(t)
	other := testPolicy(9, "web")
	other.Name = "other"
	w.policies["other"], w.policies["lower"], w.policies["same"] = other, testPolicy(1, "db"), testPolicy(2, "db")
	for range 2 {
		if err := a.Upgrade(t.Context(), []byte("v2")); err != nil {
			t.Fatal(err)
		}
	}
	before := w.log.kinds()
	for order, code := range map[string]cause.Code{"lower": cause.PolicyNotNewer, "same": cause.PolicyNotNewer, "v1": cause.PolicyNotNewer,
		"other": cause.PolicyOtherName, "unknown": cause.PolicySignature} {
		if err := a.Upgrade(t.Context(), []byte(order)); cause.Of(err) != code {
			t.Errorf("%s: %v, expected %s", order, err, code)
		}
	}
	if got := w.log.kinds(); got != before {
		t.Errorf("refused upgrades were measured: %s", got)
	}
	if got := w.podman.running(); got != "cvm-shop-web-v2" {
		t.Errorf("running %q", got)
	}
}

func TestUpgradeFailures(t *testing.T) {
	for name, tc := range map[string]struct {
		call, code string
		events     string
		outcome    cause.Code
		state      string
		running    string
	}{
		"a stage that fails leaves the old one alone":   {"fetch", "layer-digest-mismatch", "policy-staged image-staged rolled-back", cause.LayerMismatch, control.StateReady, "cvm-shop-web-v1"},
		"a key that is refused leaves the old one":      {"resource", "key-refused", "policy-staged image-staged rolled-back", cause.KeyRefused, control.StateReady, "cvm-shop-web-v1"},
		"a version that does not start is rolled back":  {"start web-v2", "workload-start-failed", "policy-staged image-staged committed rolled-back", cause.UpgradeRolledBack, control.StateReady, "cvm-shop-web-v1"},
		"a version that is unhealthy is rolled back":    {"healthy web-v2", "workload-unhealthy", "policy-staged image-staged committed rolled-back", cause.UpgradeRolledBack, control.StateReady, "cvm-shop-web-v1"},
		"without the commit in the log nothing swaps":   {"append committed ", "eventlog-write-failed", "policy-staged image-staged rolled-back", cause.EventLogWrite, control.StateReady, "cvm-shop-web-v1"},
		"an old version that does not come back either": {"healthy", "workload-unhealthy", "policy-staged image-staged committed rolled-back", cause.RollbackFailed, control.StateFailed, "cvm-shop-web-v1"},
	} {
		t.Run(name, func(t *testing.T) {
			a, w, _ := launched(t)
			w.fail[tc.call] = func() error { return cause.New(cause.Code(tc.code), "said so") }
			err := a.Upgrade(t.Context(), []byte("v2"))
			if cause.Of(err) != tc.outcome {
				t.Errorf("%v, expected %s", err, tc.outcome)
			}
			if got := strings.TrimPrefix(w.log.kinds(), "policy image "); got != tc.events {
				t.Errorf("events %q, expected %q", got, tc.events)
			}
			if got := w.podman.running(); got != tc.running {
				t.Errorf("running %q, expected %q", got, tc.running)
			}
			st := a.Status()
			if st.State != tc.state || st.Policy.Version != 1 || st.Cause != string(tc.outcome) {
				t.Errorf("state %s, version %d, cause %s", st.State, st.Policy.Version, st.Cause)
			}
			if tc.state == control.StateReady && len(w.images) != 1 {
				t.Errorf("images %v", w.images)
			}
			delete(w.fail, tc.call)
			if err := a.Upgrade(t.Context(), []byte("v2")); err != nil {
				t.Errorf("the same upgrade, once its fault is gone: %v", err)
			}
		})
	}

	t.Run("an old version whose container is gone is made anew", func(t *testing.T) {
		a, w, _ := launched(t)
		w.fail["healthy web-v2"] = func() error {
			_ = w.podman.Remove(t.Context(), "cvm-shop-web-v1")
			return cause.New(cause.WorkloadUnhealthy, "no")
		}
		if err := a.Upgrade(t.Context(), []byte("v2")); cause.Of(err) != cause.UpgradeRolledBack {
			t.Errorf("%v", err)
		}
		if got := w.podman.running(); got != "cvm-shop-web-v1" {
			t.Errorf("running %q", got)
		}
	})
	t.Run("an old version whose image is gone too cannot be restored", func(t *testing.T) {
		a, w, _ := launched(t)
		w.fail["healthy web-v2"] = func() error {
			_ = w.podman.Remove(t.Context(), "cvm-shop-web-v1")
			w.mu.Lock()
			delete(w.images, imageOf("web", 1))
			w.mu.Unlock()
			return cause.New(cause.WorkloadUnhealthy, "no")
		}
		if err := a.Upgrade(t.Context(), []byte("v2")); cause.Of(err) != cause.RollbackFailed {
			t.Errorf("%v", err)
		}
		if a.Status().State != control.StateFailed {
			t.Errorf("state %s", a.Status().State)
		}
	})
}

func TestDestroy(t *testing.T) {
	a, w, _ := launched(t)
	for range 2 {
		if err := a.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := w.log.kinds(); got != "policy image destroy" {
		t.Errorf("events %q", got)
	}
	if len(w.podman.containers) != 0 || len(w.images) != 0 {
		t.Errorf("left over: %v, %v", w.podman.containers, w.images)
	}
	if a.Status().State != control.StateDestroyed {
		t.Errorf("state %s", a.Status().State)
	}
	if err := a.Upgrade(t.Context(), []byte("v2")); cause.Of(err) != cause.Destroyed {
		t.Errorf("upgrade after destroy: %v", err)
	}
	if err := a.session(t.Context(), nil, &generation{broker: fakeBroker{w}}, nil); cause.Of(err) != cause.Destroyed {
		t.Errorf("a key after destroy: %v", err)
	}
	again, _ := newTestAgent(t, w, strings.TrimSuffix(a.config.StateDir, "/state"))
	if err := again.launch(t.Context()); cause.Of(err) != cause.Destroyed {
		t.Errorf("a launch after destroy: %v", err)
	}
	if err := os.Remove(again.latchPath()); err != nil { // a disk rolled back: the log still says it
		t.Fatal(err)
	}
	again, _ = newTestAgent(t, w, strings.TrimSuffix(a.config.StateDir, "/state"))
	if err := again.launch(t.Context()); cause.Of(err) != cause.Destroyed {
		t.Errorf("a launch after destroy without the latch: %v", err)
	}
}

func TestDestroyNamesWhatRemains(t *testing.T) {
	a, w, _ := launched(t)
	w.fail["volumes"] = func() error { return cause.New(cause.StorageFailed, "volume busy") }
	err := a.Destroy(t.Context())
	if cause.Of(err) != cause.DestroyFailed || !strings.Contains(err.Error(), "volumes") {
		t.Errorf("%v", err)
	}
	if len(w.podman.containers) != 0 {
		t.Error("one failure kept the containers")
	}
	delete(w.fail, "volumes")
	if err := a.Destroy(t.Context()); err != nil {
		t.Errorf("again: %v", err)
	}
}

// Which order may interrupt which.
func TestInterruptions(t *testing.T) {
	a, w, _ := launched(t)
	inFetch, release := make(chan struct{}), make(chan struct{})
	w.fail["fetch"] = func() error {
		close(inFetch)
		<-release
		return cause.New(cause.Cancelled, "taken over")
	}
	upgraded := make(chan error, 1)
	go func() { upgraded <- a.Upgrade(t.Context(), []byte("v2")) }()
	<-inFetch
	if err := a.Upgrade(t.Context(), []byte("v2")); cause.Of(err) != cause.Busy {
		t.Errorf("upgrade during upgrade: %v", err)
	}
	destroyed := make(chan error, 2)
	go func() { destroyed <- a.Destroy(t.Context()) }()
	for a.Status().State != control.StateDestroying {
		time.Sleep(time.Millisecond)
	}
	go func() { destroyed <- a.Destroy(t.Context()) }() // joins
	if err := a.Upgrade(t.Context(), []byte("v2")); cause.Of(err) != cause.Destroyed {
		t.Errorf("upgrade during destroy: %v", err)
	}
	close(release)
	if err := <-upgraded; err == nil {
		t.Error("the upgrade that destroy took over succeeded")
	}
	for range 2 {
		if err := <-destroyed; err != nil {
			t.Errorf("destroy: %v", err)
		}
	}
	if got := w.log.kinds(); got != "policy image policy-staged image-staged destroy" {
		t.Errorf("events %q", got)
	}
	if a.Status().State != control.StateDestroyed || len(w.podman.containers) != 0 {
		t.Errorf("state %s, containers %v", a.Status().State, w.podman.containers)
	}
}
