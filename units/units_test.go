// Package units_test holds the units against what they promise, without a
// running systemd: they verify, their exposure stays low, and in the image a
// failure never leaves the machine half open.
package units_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// units are systemd's own and podman's, which ours refer to.
const systemUnits = "/usr/lib/systemd/system"

// root makes a directory that looks like the image to systemd-analyze: the
// host's units, ours over them, and programs that can be executed.
func root(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Fatalf("%v: run make deps", err)
	}
	dir := t.TempDir()
	to := filepath.Join(dir, systemUnits)
	if err := os.CopyFS(to, onlyFiles{os.DirFS(systemUnits)}); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"usr/bin/cvm-agent", "usr/lib/cvm-agent/cvm-sbom", "usr/bin/podman"} {
		path := filepath.Join(dir, program)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range ours(t) {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(to, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// onlyFiles leaves links out: they enable units, which nothing here needs.
type onlyFiles struct{ fs.FS }

func (o onlyFiles) ReadDir(name string) ([]fs.DirEntry, error) {
	list, err := fs.ReadDir(o.FS, name)
	var out []fs.DirEntry
	for _, e := range list {
		if e.Type().IsRegular() && !strings.HasPrefix(e.Name(), "podman-") {
			out = append(out, e)
		}
	}
	return out, err
}

// ours are the units and drop-ins of this folder.
func ours(t *testing.T) (names []string) {
	t.Helper()
	for _, pattern := range []string{"*.service", "*.socket", "*.target", "*.service.d/*.conf", "*.socket.d/*.conf"} {
		list, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, list...)
	}
	if len(names) < 7 {
		t.Fatalf("found %v only", names)
	}
	return names
}

func analyze(args ...string) (string, error) {
	cmd := exec.Command("systemd-analyze", args...)
	cmd.Env = append(os.Environ(), "SYSTEMD_COLORS=0", "LC_ALL=C.UTF-8", "SYSTEMD_LOG_TARGET=console")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestUnitsVerify(t *testing.T) {
	dir := root(t)
	for _, unit := range []string{"cvm-agent.service", "cvm-agent.socket", "cvm-agent.target", "cvm-sbom@image.service", "podman.service", "podman.socket"} {
		out, err := analyze("verify", "--man=no", "--generators=no", "--root="+dir, unit)
		for line := range strings.Lines(out) {
			if strings.Contains(line, "Unknown key 'RestartMode'") {
				continue // the image's systemd is newer than Debian 12's
			}
			if strings.Contains(line, "cvm-") || strings.Contains(line, "podman") {
				t.Errorf("%s: %s", unit, line)
			}
		}
		if err != nil {
			t.Errorf("%s: %v: %s", unit, err, out)
		}
	}
	// The check itself finds what is wrong.
	bad := filepath.Join(dir, systemUnits, "cvm-bad.service")
	if err := os.WriteFile(bad, []byte("[Service]\nExecStart=/usr/bin/cvm-agent\nNoNewPrivilege=yes\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, _ := analyze("verify", "--man=no", "--generators=no", "--root="+dir, "cvm-bad.service"); !strings.Contains(out, "NoNewPrivilege") {
		t.Errorf("a misspelt directive is not found: %s", out)
	}
}

// The bars: 4.0 for the agent, 1.5 for the scanner.
func TestExposure(t *testing.T) {
	dir := root(t)
	for unit, bar := range map[string]string{"cvm-agent.service": "40", "cvm-sbom@image.service": "15"} {
		out, err := analyze("security", "--offline=yes", "--no-pager", "--root="+dir, "--threshold="+bar, unit)
		if err != nil || !strings.Contains(out, "Overall exposure level for "+unit) {
			t.Errorf("%s is over %s tenths, or not looked at: %v\n%s", unit, bar, err, out)
		}
	}
	if out, err := analyze("security", "--offline=yes", "--no-pager", "--root="+dir, "--threshold=40", "podman.service"); err == nil {
		t.Errorf("the bar lets everything pass: %s", out)
	}
}

// directives reads the settings of a unit file, in order.
func directives(t *testing.T, name string) map[string][]string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if k, v, ok := strings.Cut(line, "="); ok && !strings.HasPrefix(line, "#") {
			out[k] = append(out[k], v)
		}
	}
	return out
}

// However the agent ends in the image, the machine ends too; on a plain host
// the unit itself touches nothing but its service.
func TestNoHalfOpenMachine(t *testing.T) {
	image := directives(t, "cvm-agent.service.d/power-off.conf")
	for _, k := range []string{"StartLimitAction", "SuccessAction"} {
		if got := image[k]; len(got) != 1 || got[0] != "poweroff" {
			t.Errorf("%s=%v, expected poweroff", k, got)
		}
	}
	if got := image["OnFailure"]; len(got) != 1 || got[0] != "poweroff.target" {
		t.Errorf("OnFailure=%v", got)
	}
	if got := image["RestartMode"]; image["FailureAction"] != nil || len(got) != 1 || got[0] != "direct" {
		t.Error("one outage of the registry would end the machine (lesson 20)")
	}
	plain := directives(t, "cvm-agent.service")
	for k := range image {
		if _, ok := plain[k]; ok {
			t.Errorf("%s is in the unit itself: a plain host would be powered off", k)
		}
	}
	if got := plain["RestartPreventExitStatus"]; len(got) != 1 || got[0] != "2 10 22 30" {
		t.Errorf("a refusal is repeated: %v", got)
	}
}

// What is not enabled by name does not start by itself, and nothing that starts
// containers but the agent is.
func TestPresets(t *testing.T) {
	data, err := os.ReadFile("system-preset/00-cvm-agent.preset")
	if err != nil {
		t.Fatal(err)
	}
	var last string
	enabled := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if last = line; strings.HasPrefix(line, "enable ") {
			enabled[strings.TrimPrefix(line, "enable ")] = true
		}
	}
	if last != "disable *" {
		t.Errorf("the last line is %q", last)
	}
	for _, unit := range []string{"cvm-agent.target", "cvm-agent.service", "cvm-agent.socket", "podman.socket"} {
		if !enabled[unit] {
			t.Errorf("%s is not enabled", unit)
		}
	}
	for unit := range enabled {
		for _, never := range []string{"getty", "ssh", "podman.service", "podman-restart", "podman-auto-update", "cvm-sbom"} {
			if strings.Contains(unit, never) {
				t.Errorf("%s is enabled", unit)
			}
		}
	}
	// Before whatever else could start a container.
	before := strings.Join(directives(t, "cvm-agent.service")["Before"], " ")
	for _, unit := range []string{"podman-restart.service", "podman-auto-update.service", "docker.service", "containerd.service"} {
		if !strings.Contains(before, unit) {
			t.Errorf("the agent is not ordered before %s", unit)
		}
	}
	if socket := directives(t, "podman.socket.d/cvm-agent.conf"); strings.Join(socket["SocketMode"], " ") != "0600" {
		t.Errorf("podman's socket: %v", socket)
	}
}

// A crash of the agent writes no stack: in the image stderr is the host's, too.
func TestNoStackOnTheConsole(t *testing.T) {
	if got := directives(t, "cvm-agent.service")["Environment"]; len(got) != 1 || got[0] != "GOTRACEBACK=none" {
		t.Errorf("Environment=%v", got)
	}
}
