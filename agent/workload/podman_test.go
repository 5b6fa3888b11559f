package workload_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// containersConf is what this kind of machine needs to run containers in a
// container; it is never shipped.
const containersConf = `
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096", "memlock=8388608:8388608"]
netns = "host"
seccomp_profile = %q
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
`

// service is a real podman service on a temporary socket and storage.
type service struct {
	t      *testing.T
	dir    string
	socket string
	cmd    *exec.Cmd
	image  string // ID of the guest image
}

func (s *service) args(more ...string) []string {
	return append([]string{"--root", filepath.Join(s.dir, "root"), "--runroot", filepath.Join(s.dir, "runroot"),
		"--tmpdir", filepath.Join(s.dir, "tmp"), "--runtime", "runc"}, more...)
}

func (s *service) env() []string {
	return append(os.Environ(), "CONTAINERS_CONF="+filepath.Join(s.dir, "containers.conf"))
}

func (s *service) podman(stdin io.Reader, args ...string) string {
	s.t.Helper()
	cmd := exec.Command("podman", s.args(args...)...)
	cmd.Env, cmd.Stdin = s.env(), stdin
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("podman %v: %v: %s", args, err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func (s *service) start() {
	s.t.Helper()
	s.cmd = exec.Command("podman", s.args("system", "service", "--time", "0", "unix://"+s.socket)...)
	s.cmd.Env = s.env()
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *service) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func newService(t *testing.T) *service {
	t.Helper()
	dir, err := os.MkdirTemp("", "cvm-workload")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{t: t, dir: dir, socket: filepath.Join(dir, "podman.sock")}
	if err := os.WriteFile(filepath.Join(dir, "containers.conf"), []byte(fmt.Sprintf(containersConf, imageProfile(t, dir))), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.kill()
		cmd := exec.Command("podman", s.args("rm", "-fa", "-t", "0")...)
		cmd.Env = s.env()
		_ = cmd.Run()
		_ = syscall.Unmount(filepath.Join(dir, "root", "overlay"), syscall.MNT_DETACH)
		_ = os.RemoveAll(dir)
	})
	guest := filepath.Join(dir, "guest")
	build := exec.Command("go", "build", "-o", guest, "./testdata/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.image = strings.TrimPrefix(s.podman(rootfs(t, guest, "first"), "import", "-q", "-"), "sha256:")
	s.start()
	return s
}

func rootfs(t *testing.T, guest, marker string) io.Reader {
	t.Helper()
	program, err := os.ReadFile(guest)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, content := range map[string][]byte{"guest": program, "marker": []byte(marker)} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &buf
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func get(t *testing.T, port uint16, path string) string {
	t.Helper()
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", port, path))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestPodman(t *testing.T) {
	s := newService(t)
	ctx := t.Context()
	p, err := workload.Connect(ctx, s.socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	secrets, err := workload.OpenSecrets(filepath.Join(s.dir, "secrets"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(filepath.Join(s.dir, "secrets"), syscall.MNT_DETACH) })
	container := func(name string, run policy.Run) workload.Container {
		return workload.Container{Policy: "test", Version: 3, Workload: name, ImageID: s.image,
			ImageRef: "registry.example/guest@sha256:" + strings.Repeat("0", 64), Run: run}
	}
	serve := func(port uint16) []string {
		return []string{"/guest", "serve", "127.0.0.1:" + strconv.Itoa(int(port))}
	}

	t.Run("a container is isolated as the policy says, sees its secrets as files, and is gone after its removal", func(t *testing.T) {
		port := freePort(t)
		run := policy.Run{
			Entrypoint:  serve(port),
			Env:         map[string]string{"GREETING": "hi"},
			User:        "1234:1234",
			Secrets:     []policy.Secret{{Name: "token", Resource: "kbs:///a/b/c"}},
			Mounts:      []policy.Mount{{Type: "volume", Name: "data", Target: "/data"}, {Type: "tmpfs", Target: "/scratch", Size: 1 << 20}},
			HealthCheck: &policy.HealthCheck{HTTP: &policy.HTTPCheck{Port: port}, Interval: policy.Duration(50 * time.Millisecond)},
		}
		c := container("web", run)
		c.SecretDir, err = secrets.Write(c.Name(), run.User, run.Secrets, map[string][]byte{"token": []byte("s3cret")})
		if err != nil {
			t.Fatal(err)
		}
		id, err := p.Start(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.WaitHealthy(ctx, id, c, nil); err != nil {
			t.Fatal(err)
		}
		if got := get(t, port, "/secret?name=token"); got != "s3cret <nil>" {
			t.Errorf("secret: %q", got)
		}
		for path, writable := range map[string]bool{"/x": false, "/tmp/x": false, "/run/secrets/x": false, "/scratch/x": true} {
			if got := get(t, port, "/write?path="+path); (got == "<nil>") != writable {
				t.Errorf("write to %s: %s, expected writable %v", path, got, writable)
			}
		}
		status := get(t, port, "/status")
		for _, want := range []string{"CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Uid:\t1234"} {
			if !strings.Contains(status, want) {
				t.Errorf("/proc/self/status lacks %q:\n%s", want, status)
			}
		}
		env := get(t, port, "/env")
		if !strings.Contains(env, "GREETING=hi") || strings.Contains(env, "s3cret") {
			t.Errorf("environment: %s", env)
		}
		list, err := p.List(ctx, "test")
		if err != nil || len(list) != 1 || list[0].ImageID != s.image || list[0].Version != "3" || list[0].Workload != "web" {
			t.Errorf("list: %+v, %v", list, err)
		}
		if other, err := p.List(ctx, "other"); err != nil || len(other) != 0 {
			t.Errorf("list of another policy: %+v, %v", other, err)
		}
		if err := p.Stop(ctx, id, time.Second); err != nil {
			t.Error(err)
		}
		for range 2 { // idempotent
			if err := p.Remove(ctx, id); err != nil {
				t.Error(err)
			}
		}
		if out := s.podman(nil, "ps", "-aq"); out != "" {
			t.Errorf("left over: %s", out)
		}
		if err := secrets.Wipe(c.Name()); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(c.SecretDir); !os.IsNotExist(err) {
			t.Errorf("secrets directory: %v", err)
		}
		removed, err := p.RemoveVolumes(ctx, "test")
		if err != nil || len(removed) != 1 || removed[0] != "cvm-test-data" {
			t.Errorf("removed volumes: %v, %v", removed, err)
		}
	})

	t.Run("TestLesson27_VolumeKeyedByPolicyName: another version finds the volume of the first", func(t *testing.T) {
		for version := uint64(1); version <= 2; version++ {
			c := container("data", policy.Run{Entrypoint: []string{"/guest", "sleep"}, Mounts: []policy.Mount{{Type: "volume", Name: "keep", Target: "/data"}}})
			c.Version = version
			id, err := p.Start(ctx, c)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Remove(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.podman(nil, "volume", "ls", "-q"); got != "cvm-test-keep" {
			t.Errorf("volumes: %q", got)
		}
		if _, err := p.RemoveVolumes(ctx, ""); err != nil {
			t.Error(err)
		}
	})

	t.Run("health checks", func(t *testing.T) {
		port := freePort(t)
		fast := func(h policy.HealthCheck) *policy.HealthCheck {
			h.Interval, h.Deadline, h.Timeout = policy.Duration(20*time.Millisecond), policy.Duration(2*time.Minute), policy.Duration(500*time.Millisecond)
			return &h
		}
		for name, tc := range map[string]struct {
			argv  []string
			check *policy.HealthCheck
			log   string
			want  string // "" healthy
		}{
			"exec that succeeds":                      {serve(port), &policy.HealthCheck{Exec: []string{"/guest", "check", "0"}}, "", ""},
			"exec that fails":                         {serve(port), fast(policy.HealthCheck{Exec: []string{"/guest", "check", "3"}}), "", "exited with status 3"},
			"exec of a missing program":               {serve(port), fast(policy.HealthCheck{Exec: []string{"/missing"}}), "", "/missing"},
			"exec that hangs":                         {serve(port), fast(policy.HealthCheck{Exec: []string{"/guest", "sleep"}}), "", "deadline exceeded"},
			"tcp on an open port":                     {serve(port), fast(policy.HealthCheck{TCP: &policy.TCPCheck{Port: port}}), "", ""},
			"tcp on a closed port":                    {serve(port), fast(policy.HealthCheck{TCP: &policy.TCPCheck{Port: 1}}), "", "refused"},
			"http with status 500":                    {serve(port), fast(policy.HealthCheck{HTTP: &policy.HTTPCheck{Port: port, Path: "/broken"}}), "", "500"},
			"a container that ends, with its log":     {[]string{"/guest", "die", "no database"}, fast(policy.HealthCheck{TCP: &policy.TCPCheck{Port: port}}), "", "exited with status 7"},
			"a container that ends, its log not ours": {[]string{"/guest", "die", "no database"}, fast(policy.HealthCheck{TCP: &policy.TCPCheck{Port: port}}), "none", "exited with status 7"},
			"no check and a container that ends":      {[]string{"/guest", "die", "x"}, nil, "none", "exited with status 7"},
			"no check and a container that runs":      {serve(port), nil, "", ""},
		} {
			t.Run(name, func(t *testing.T) {
				c := container("health", policy.Run{Entrypoint: tc.argv, HealthCheck: tc.check})
				c.LogRule = tc.log
				id, err := p.Start(ctx, c)
				if err != nil {
					t.Fatal(err)
				}
				defer p.Remove(ctx, id)
				// A try that fails as expected is the end of a wait that would go on.
				waiting, enough := context.WithCancel(ctx)
				defer enough()
				seen := false
				err = p.WaitHealthy(waiting, id, c, func(err error) {
					if tc.want != "" && strings.Contains(err.Error(), tc.want) {
						seen = true
						enough()
					}
				})
				if tc.want == "" {
					if err != nil {
						t.Error(err)
					}
					return
				}
				if seen {
					if cause.Of(err) != cause.Cancelled {
						t.Errorf("%v, expected that the failed try is not the end", err)
					}
					return
				}
				if cause.Of(err) != cause.WorkloadUnhealthy || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("%v, expected workload-unhealthy with %q", err, tc.want)
				}
				if strings.Contains(err.Error(), "database") {
					t.Errorf("the log is in the error's text, which the host reads: %v", err)
				}
				want := ""
				if tc.log != "none" && len(tc.argv) == 3 && tc.argv[1] == "die" {
					want = tc.argv[2]
				}
				if got := workload.LogOf(err); got != want {
					t.Errorf("log %q, expected %q", got, want)
				}
			})
		}
	})

	t.Run("a check that never passes ends at its deadline, with a try's error", func(t *testing.T) {
		c := container("late", policy.Run{Entrypoint: serve(freePort(t)), HealthCheck: &policy.HealthCheck{TCP: &policy.TCPCheck{Port: 1},
			Interval: policy.Duration(20 * time.Millisecond), Deadline: policy.Duration(700 * time.Millisecond)}})
		id, err := p.Start(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Remove(ctx, id)
		var tries []string
		err = p.WaitHealthy(ctx, id, c, func(err error) { tries = append(tries, err.Error()) })
		if cause.Of(err) != cause.WorkloadUnhealthy || !strings.Contains(err.Error(), "did not become healthy within 700ms: ") {
			t.Fatalf("%v, expected workload-unhealthy at the deadline", err)
		}
		if !slices.ContainsFunc(tries, func(try string) bool { return strings.HasSuffix(err.Error(), ": "+try) }) {
			t.Errorf("%v names none of the tries %q", err, tries)
		}
	})

	t.Run("a later check that the deadline cuts off hides no verdict of before", func(t *testing.T) {
		var asked atomic.Int32
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if asked.Add(1) > 1 {
				<-r.Context().Done()
				return
			}
			w.WriteHeader(http.StatusTeapot)
		}))
		defer server.Close()
		port := uint16(server.Listener.Addr().(*net.TCPAddr).Port)
		c := container("hides", policy.Run{Entrypoint: serve(freePort(t)), HealthCheck: &policy.HealthCheck{HTTP: &policy.HTTPCheck{Port: port},
			Timeout: policy.Duration(time.Minute), Deadline: policy.Duration(5 * time.Second)}})
		id, err := p.Start(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Remove(ctx, id)
		err = p.WaitHealthy(ctx, id, c, nil)
		if cause.Of(err) != cause.WorkloadUnhealthy || !strings.HasSuffix(err.Error(), "within 5s: GET / answered 418, expected 200–399") || asked.Load() < 2 {
			t.Errorf("%v after %d requests, expected the answer before the one that was cut off", err, asked.Load())
		}
	})

	t.Run("a first check that the deadline cuts off is said to be, and is no verdict", func(t *testing.T) {
		c := container("cut", policy.Run{Entrypoint: serve(freePort(t)), HealthCheck: &policy.HealthCheck{Exec: []string{"/guest", "sleep"},
			Timeout: policy.Duration(time.Minute), Deadline: policy.Duration(time.Second)}})
		id, err := p.Start(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Remove(ctx, id)
		if err := p.WaitHealthy(ctx, id, c, nil); cause.Of(err) != cause.WorkloadUnhealthy || !strings.Contains(err.Error(), "did not become healthy within 1s: the first check was cut off: ") {
			t.Errorf("%v, expected workload-unhealthy and a check that was cut off", err)
		}
	})

	t.Run("a program that cannot be started is an error of the start, and nothing is left", func(t *testing.T) {
		_, err := p.Start(ctx, container("bad", policy.Run{Entrypoint: []string{"/missing"}}))
		if cause.Of(err) != cause.WorkloadStart {
			t.Errorf("%v, expected workload-start-failed", err)
		}
		if out := s.podman(nil, "ps", "-aq"); out != "" {
			t.Errorf("left over: %s", out)
		}
	})

	t.Run("an image that is not in the storage is refused", func(t *testing.T) {
		c := container("gone", policy.Run{})
		c.ImageID = strings.Repeat("ab", 32)
		if _, err := p.Start(ctx, c); cause.Of(err) != cause.WorkloadStart {
			t.Errorf("%v, expected workload-start-failed", err)
		}
		if err := p.RemoveImage(ctx, c.ImageID); err != nil {
			t.Errorf("removing an image that is gone: %v", err)
		}
	})

	t.Run("podman down is said while waiting, and ends at the deadline", func(t *testing.T) {
		s.kill()
		if _, err := p.List(ctx, ""); cause.Of(err) != cause.PodmanUnavailable {
			t.Errorf("%v, expected podman-unavailable", err)
		}
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		waits := 0
		_, err := workload.Connect(short, s.socket, func(error, time.Duration) { waits++ })
		if cause.Of(err) != cause.PodmanUnavailable || waits == 0 {
			t.Errorf("%v after %d waits, expected podman-unavailable", err, waits)
		}
		s.start()
		if _, err := workload.Connect(ctx, s.socket, nil); err != nil {
			t.Errorf("after the service came back: %v", err)
		}
	})
}
