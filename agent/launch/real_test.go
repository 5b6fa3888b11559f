package launch_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// secret is what must be seen nowhere but in the workload's own file.
const secret = "correct-horse-battery-staple-292"

// TestReal launches with every part real and looks at what a launch leaves to
// see, at a killed daemon and at a destroyed instance.
func TestReal(t *testing.T) {
	ctx := t.Context()
	r, err := rig.New(rig.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, r.Close()) })
	stage, err := r.NewStage(ctx, nil)
	must(t, err)
	port, err := rig.FreePort()
	must(t, err)
	template, err := stage.Template("real", rig.PolicyWorkload{Name: "vault", Port: port, Encryption: "required",
		Extra: `secrets: [{name: token, resource: "kbs:///real/secret/token", mode: "0400"}]`})
	must(t, err)
	document := r.Path("policy", "real.yaml")
	dir, err := r.BuildApp(ctx, rig.App{Name: "vault", Version: "v1"})
	must(t, err)
	published, err := stage.Publish(ctx, rig.PublishOptions{Source: []string{dir}, To: "real/vault:v1", Encrypt: true,
		Workload: "vault", Template: template, Out: document, Version: 1})
	must(t, err)
	must(t, stage.PutSecret(ctx, "kbs:///real/secret/token", secret, published.KeyResource))
	signed, err := stage.SignPolicy(ctx, document)
	must(t, err)
	initdata, err := stage.Pack(ctx, signed)
	must(t, err)
	guest := stage.Guest
	must(t, guest.Boot(ctx, initdata))

	seen := watchProcesses(ctx)
	must(t, guest.Launch())
	must(t, guest.WaitReady(ctx, 3*time.Minute))

	t.Run("TestLesson29_NoSecretInSight", func(t *testing.T) {
		must(t, rig.WaitHTTP(ctx, port, "/secrets/token", strconv.Itoa(len(secret))+" bytes"))
		for _, where := range seen() {
			t.Errorf("the secret was seen in %s", where)
		}
		if hidesSecret([]byte(guest.Agent.Output())) {
			t.Error("the secret is in the agent's log")
		}
		secrets := filepath.Join(guest.RunDir, "secrets")
		found := 0
		for _, root := range []string{guest.RunDir, guest.StateDir, guest.Podman.GraphRoot, guest.Podman.RunRoot} {
			must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return nil // podman's files come and go
				}
				info, err := d.Info()
				if err != nil || info.Size() > 1<<20 {
					return nil
				}
				data, err := os.ReadFile(path)
				switch {
				case err != nil:
				case hidesSecret(data) && strings.HasPrefix(path, secrets):
					found++
					if info.Mode().Perm() != 0o400 {
						t.Errorf("%s has mode %o, expected 0400", path, info.Mode().Perm())
					}
				case hidesSecret(data):
					t.Errorf("the secret is in %s", path)
				}
				if (root == guest.RunDir || root == guest.StateDir) && info.Mode().Perm()&0o077 != 0 {
					t.Errorf("%s has mode %o: others can read the agent's files", path, info.Mode().Perm())
				}
				return nil
			}))
		}
		if found != 1 {
			t.Errorf("%d files with the secret below %s, expected one", found, secrets)
		}
		if info, err := os.Stat(secrets); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, expected mode 0700", secrets, err)
		}
	})

	t.Run("the idle daemon is small", func(t *testing.T) {
		time.Sleep(2 * time.Second)
		pid := guest.Agent.PID()
		t.Logf("idle PSS %d KiB, of it anonymous %d KiB; peak RSS %d KiB", field(t, pid, "smaps_rollup", "Pss:"), field(t, pid, "smaps_rollup", "Pss_Anon:"), field(t, pid, "status", "VmHWM:"))
	})

	t.Run("a killed daemon converges: nothing is extended twice, the workload is replaced", func(t *testing.T) {
		log := filepath.Join(guest.RunDir, "eventlog", "eventlog.cel")
		before, err := os.ReadFile(log)
		must(t, err)
		old, err := stage.Podman.Command(ctx, "ps", "-q", "--no-trunc")
		must(t, err)
		guest.Agent.Kill()
		must(t, guest.Launch())
		must(t, guest.WaitReady(ctx, 3*time.Minute))
		after, err := os.ReadFile(log)
		must(t, err)
		if !bytes.Equal(before, after) {
			t.Error("the event log changed over a restart")
		}
		now, err := stage.Podman.Command(ctx, "ps", "-q", "--no-trunc")
		must(t, err)
		if old == now || len(strings.Fields(now)) != 1 {
			t.Errorf("containers before %q, after %q", old, now)
		}
	})

	t.Run("a destroyed instance stays destroyed over a restart", func(t *testing.T) {
		_, err := guest.Ctl(ctx, "destroy", "--yes")
		must(t, err)
		guest.Halt()
		must(t, guest.Launch())
		must(t, rig.Eventually(ctx, time.Minute, func() error {
			status, err := guest.Status(ctx)
			if err == nil && status.State != "destroyed" {
				t.Logf("state %s", status.State)
			}
			return err
		}))
		left, err := stage.Podman.Leftovers(ctx)
		must(t, err)
		if len(left) > 0 {
			t.Errorf("left in podman: %v", left)
		}
		if _, err := guest.Ctl(ctx, "upgrade", signed); rig.ExitStatus(err) != 10 || !strings.Contains(err.Error(), "destroyed") {
			t.Errorf("upgrade after destroy: %v", err)
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// hidesSecret finds the secret in the forms in which keys leak.
func hidesSecret(data []byte) bool {
	for _, form := range []string{secret, hex.EncodeToString([]byte(secret)), strings.TrimRight(base64.StdEncoding.EncodeToString([]byte(secret)), "="),
		strings.TrimRight(base64.URLEncoding.EncodeToString([]byte(secret)), "=")} {
		if bytes.Contains(data, []byte(form)) {
			return true
		}
	}
	return false
}

// watchProcesses reads every process's arguments and environment again and
// again, until the returned function is called, which says where the secret was.
func watchProcesses(ctx context.Context) func() []string {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan map[string]bool)
	go func() {
		found := map[string]bool{}
		for ctx.Err() == nil {
			for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ"} {
				files, _ := filepath.Glob(pattern)
				for _, f := range files {
					if data, err := os.ReadFile(f); err == nil && hidesSecret(data) {
						found[f+": "+strings.ReplaceAll(string(data[:min(80, len(data))]), "\x00", " ")] = true
					}
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
		done <- found
	}()
	return func() (out []string) {
		cancel()
		for f := range <-done {
			out = append(out, f)
		}
		return out
	}
}

// field reads a number from /proc/PID/FILE.
func field(t *testing.T, pid int, file, name string) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), file))
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			n, err := strconv.Atoi(f[1])
			must(t, err)
			return n
		}
	}
	t.Fatalf("%s has no %s", file, name)
	return 0
}
