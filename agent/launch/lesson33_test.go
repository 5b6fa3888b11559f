package launch

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// withSecrets is the world with the real directory for secrets, on a tmpfs.
type withSecrets struct {
	*world
	dir string
}

func (w withSecrets) Secrets() (Secrets, error) { return workload.OpenSecrets(w.dir) }

// Lesson 33: a secret that the policy names comes from the policy's broker and
// from nowhere else. Values that the host puts under its name, in the environment,
// in the seed or where the agent writes, are never seen; when the broker refuses,
// they do not step in.
func TestLesson33_SecretsComeFromTheBrokerAlone(t *testing.T) {
	const host = "chosen by the host"
	for _, name := range []string{"token", "TOKEN", "CVM_SECRET_TOKEN", "CREDENTIALS_DIRECTORY"} {
		t.Setenv(name, host)
	}
	shm, err := os.MkdirTemp("/dev/shm", "lesson33")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	w := newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	w.policies["v1"].Workloads[0].Run.User = "0"
	container := workload.Container{Policy: "shop", Version: 1, Workload: "web"}.Name()
	plant := func() {
		for _, path := range []string{filepath.Join(shm, container, "token"), filepath.Join(shm, container, "more")} {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(host), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	plant()
	a, _ := newTestAgent(t, w, t.TempDir())
	a.world = withSecrets{w, shm}
	if err := a.launch(t.Context()); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(shm, container, "token"))
	if err != nil || string(got) != "value of kbs:///default/secret/token" {
		t.Errorf("the workload's secret is %q, %v", got, err)
	}
	entries, err := os.ReadDir(filepath.Join(shm, container))
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the secret: %v, %v", entries, err)
	}

	// The broker says no: the host's value does not step in.
	w = newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	w.fail["resource kbs:///default/secret/token"] = func() error { return cause.New(cause.KeyRefused, "by rule") }
	plant()
	a, _ = newTestAgent(t, w, t.TempDir())
	a.world = withSecrets{w, shm}
	if err := a.launch(t.Context()); cause.Of(err) != cause.KeyRefused {
		t.Errorf("a refused secret: %v", err)
	}
	for _, c := range w.calls() {
		if strings.HasPrefix(c, "start ") {
			t.Errorf("a workload ran without its secret: %v", w.calls())
		}
	}
	if _, err := os.Stat(filepath.Join(shm, container, "token")); err == nil {
		t.Error("the host's value is where the workload would read it")
	}
}
