package launch

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The error that main prints on the console and STATUS= have nothing that a
// workload wrote; the journal and the phase have it.
func TestWorkloadsWordsAreBesideTheError(t *testing.T) {
	w := newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	w.fail["healthy"] = func() error {
		return cause.New(cause.WorkloadUnhealthy, "%s %w", "web", &workload.Ended{Code: 7, Log: "hunter2"})
	}
	a, q := newTestAgent(t, w, t.TempDir())
	var journal bytes.Buffer
	a.logger = slog.New(slog.NewTextHandler(&journal, nil))
	err := a.launch(t.Context())
	if err == nil || err.Error() != "healthy/web: workload-unhealthy: web exited with status 7" {
		t.Errorf("%v", err)
	}
	if q.has("hunter2") || !q.has("exited with status 7") {
		t.Errorf("STATUS= %q", q.lines)
	}
	if !strings.Contains(journal.String(), LogKey+"=hunter2") {
		t.Errorf("the journal lacks the log: %s", journal.String())
	}
	for _, p := range a.Status().Phases {
		if p.Name == "healthy" && p.Log == "hunter2" && !strings.Contains(p.Text, "hunter2") {
			return
		}
	}
	t.Errorf("no phase has the log: %+v", a.Status().Phases)
}
