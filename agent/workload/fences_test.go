package workload_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy"
)

// imageProfile is the guest image's seccomp profile, made as the image makes it,
// of the profile that this machine's podman has.
func imageProfile(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.Command("jq", "-f", "../../image-build/guest/seccomp.jq", "/usr/share/containers/seccomp.json").Output()
	if err != nil || !json.Valid(out) {
		t.Fatalf("jq: %v", err)
	}
	path := filepath.Join(dir, "seccomp.json")
	if err := os.WriteFile(path, bytes.TrimSpace(out), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestLesson30_FencesOfTheImagesProfile: a workload opens no socket to the host,
// gets no namespace of its own, root in it though it is, and still runs.
func TestLesson30_FencesOfTheImagesProfile(t *testing.T) {
	s := newService(t)
	ctx := t.Context()
	p, err := workload.Connect(ctx, s.socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		capabilities []string
		audit        string
	}{
		"a workload without a capability":                          {nil, "errno 22"},
		"a workload with the capabilities that a policy may allow": {[]string{"CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_AUDIT_WRITE"}, "ok"},
	} {
		t.Run(name, func(t *testing.T) {
			port := freePort(t)
			c := workload.Container{Policy: "test", Version: 1, Workload: "fenced", ImageID: s.image, Run: policy.Run{
				Entrypoint: []string{"/guest", "serve", "127.0.0.1:" + strconv.Itoa(int(port))}, Capabilities: tc.capabilities, User: "0",
				HealthCheck: &policy.HealthCheck{HTTP: &policy.HTTPCheck{Port: port}, Interval: policy.Duration(50 * time.Millisecond)},
			}}
			id, err := p.Start(ctx, c)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Remove(ctx, id)
			if err := p.WaitHealthy(ctx, id, c, nil); err != nil {
				t.Fatal(err)
			}
			got := get(t, port, "/fences")
			for what, want := range map[string]string{
				"socket unix": "ok", "socket inet": "ok", "socket inet6": "ok", "socket netlink": "ok", "fork": "ok", "socket audit": tc.audit,
				"socket vsock": "errno 38", "socket alg": "errno 38", "clone user": "errno 38", "clone3": "errno 38", "io_uring_setup": "errno 38",
				"unshare user": "errno 1", "setns": "errno 1", "mount": "errno 1", "fsopen": "errno 1",
			} {
				if !strings.Contains(got, what+": "+want+"\n") {
					t.Errorf("%s: expected %s of\n%s", what, want, got)
				}
			}
		})
	}
}
