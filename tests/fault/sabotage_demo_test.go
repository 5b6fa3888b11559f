package fault

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// checkpoint is a moment in the demo at which the saboteur acts: when a program
// is called with arguments that the shell pattern matches, before it runs.
type checkpoint struct {
	program string // of our programs, or podman or runc
	pattern string // of the arguments, joined by spaces; blanks escaped
	do      func(ctx context.Context, d *sabotagedDemo) error
}

// sabotagedDemo is one run of the demo in a surrounding that the test controls.
type sabotagedDemo struct {
	work string // CVM_DEMO_WORK
	bin  string // CVM_DEMO_BIN: links to the real programs, or what replaces them
	path string // first in PATH
	real string // the checkout's bin

	mu   sync.Mutex
	out  strings.Builder
	pids map[string]int // of the parts, by the name that the demo gives them
	errs []error        // of the saboteur
}

// newSabotagedDemo lays out the programs. demo is the demo's own program.
func newSabotagedDemo(t *testing.T, demo string) *sabotagedDemo {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	// Sockets are in the work directory, so its path is short. The rest is
	// apart from it: whatever names the work directory afterwards is a residue.
	top, err := os.MkdirTemp("", "cvm-s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(top) })
	d := &sabotagedDemo{work: filepath.Join(top, "w"), bin: filepath.Join(top, "bin"), path: filepath.Join(top, "path"),
		real: filepath.Join(root, "bin"), pids: map[string]int{}}
	for _, dir := range []string{d.bin, d.path} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"cvm-agent", "cvm-broker", "cvm-early", "cvm-sbom", "cvmctl"} {
		if err := os.Symlink(filepath.Join(d.real, name), filepath.Join(d.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(demo, filepath.Join(d.bin, "cvm-demo")); err != nil {
		t.Fatal(err)
	}
	return d
}

// install puts a script in the place of each checkpoint's program and serves it
// until the context ends.
func (d *sabotagedDemo) install(ctx context.Context, t *testing.T, points []checkpoint) {
	t.Helper()
	for i, p := range points {
		file, real := filepath.Join(d.bin, p.program), filepath.Join(d.real, p.program)
		if p.program == "runc" {
			file, real = filepath.Join(d.path, "runc"), sabotageLookPath(t, "runc")
			d.replaceRuntime(t, file)
		}
		ask, answer := filepath.Join(d.path, fmt.Sprint("ask", i)), filepath.Join(d.path, fmt.Sprint("answer", i))
		for _, pipe := range []string{ask, answer} {
			if err := syscall.Mkfifo(pipe, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		script := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in\n%s) echo \"$*\" >%s; read -r _ <%s ;;\nesac\nexec %s \"$@\"\n", p.pattern, ask, answer, real)
		sabotageScript(t, file, script)
		go d.serve(ctx, p, ask, answer)
	}
}

// replaceRuntime has every podman of the demo use another program as runc.
func (d *sabotagedDemo) replaceRuntime(t *testing.T, runc string) {
	t.Helper()
	script := fmt.Sprintf("#!/bin/sh\nfor a do\n[ \"$a\" = runc ] && a=%s\nset -- \"$@\" \"$a\"\nshift\ndone\nexec %s \"$@\"\n", runc, sabotageLookPath(t, "podman"))
	sabotageScript(t, filepath.Join(d.path, "podman"), script)
}

func sabotageLookPath(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// sabotageScript writes the script beside the file and renames it, since the
// file may be a link to the real program.
func sabotageScript(t *testing.T, file, script string) {
	t.Helper()
	if err := os.WriteFile(file+".new", []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

// serve acts each time a script asks. The pipes are opened for both directions,
// so that neither side waits for the other's open.
func (d *sabotagedDemo) serve(ctx context.Context, p checkpoint, ask, answer string) {
	in, err := os.OpenFile(ask, os.O_RDWR, 0)
	if err != nil {
		d.failed(err)
		return
	}
	out, err := os.OpenFile(answer, os.O_RDWR, 0)
	if err != nil {
		d.failed(errors.Join(err, in.Close()))
		return
	}
	defer out.Close()
	context.AfterFunc(ctx, func() { _ = in.Close() })
	for lines := bufio.NewScanner(in); lines.Scan(); {
		if err := p.do(ctx, d); err != nil {
			d.failed(fmt.Errorf("at %s %s: %w", p.program, lines.Text(), err))
		}
		if _, err := out.WriteString("go\n"); err != nil {
			d.failed(err)
		}
	}
}

func (d *sabotagedDemo) failed(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.errs = append(d.errs, err)
}

// Write takes the demo's output and learns the parts' process ids.
func (d *sabotagedDemo) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before := strings.LastIndexByte(d.out.String(), '\n') + 1
	d.out.Write(p)
	for line := range strings.Lines(d.out.String()[before:]) {
		name, rest, ok := strings.Cut(strings.TrimSpace(line), ": started, pid ")
		if pid, err := strconv.Atoi(rest); ok && err == nil {
			d.pids[name] = pid
		}
	}
	return len(p), nil
}

// output is what the demo has said so far.
func (d *sabotagedDemo) output() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.out.String()
}

// signal sends a signal to a part; 0 asks whether it is there.
func (d *sabotagedDemo) signal(part string, s syscall.Signal) error {
	d.mu.Lock()
	pid := d.pids[part]
	d.mu.Unlock()
	if pid == 0 {
		return fmt.Errorf("the demo has named no process of %s", part)
	}
	return syscall.Kill(pid, s)
}

// waitFor waits until the demo has said, after the line that begins with from,
// one that holds all the words.
func (d *sabotagedDemo) waitFor(ctx context.Context, from string, words ...string) error {
	return rig.Eventually(ctx, time.Minute, func() error {
		_, out, _ := strings.Cut(d.output(), "\n"+from)
		for line := range strings.Lines(out) {
			if sabotageHolds(line, words) {
				return nil
			}
		}
		return fmt.Errorf("the demo has not said %q after %q", words, from)
	})
}

func sabotageHolds(line string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(line, w) {
			return false
		}
	}
	return true
}

// run runs the demo to its end and returns its exit status.
func (d *sabotagedDemo) run(ctx context.Context) (int, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "cvm-demo"))
	cmd.Env = append(os.Environ(), "CVM_DEMO_WORK="+d.work, "CVM_DEMO_BIN="+d.bin, "PATH="+d.path+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = d, d
	// As Ctrl-C does: it has to clean up.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		return 0, fmt.Errorf("the demo hangs: %w", ctx.Err())
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// podman runs the stock podman over the guest's storage.
func (d *sabotagedDemo) podman(ctx context.Context, args ...string) ([]string, error) {
	guest := filepath.Join(d.work, "guest")
	cmd := exec.CommandContext(ctx, "podman", append([]string{"--root", filepath.Join(guest, "graph"), "--runroot", filepath.Join(guest, "run"),
		"--tmpdir", filepath.Join(guest, "tmp"), "--volumepath", filepath.Join(guest, "volumes"), "--runtime", "runc"}, args...)...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+filepath.Join(guest, "containers.conf"), "CONTAINERS_STORAGE_CONF="+filepath.Join(guest, "storage.conf"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("podman %s: %w: %s", args[0], err, stderr.String())
	}
	return strings.Fields(string(out)), err
}

// residue lists what the demo has left behind.
func (d *sabotagedDemo) residue() (left []string, err error) {
	if _, err := os.Lstat(d.work); !errors.Is(err, fs.ErrNotExist) {
		left = append(left, fmt.Sprintf("work directory %s (%v)", d.work, err))
	}
	mounts, err := rig.MountsUnder(d.work)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		left = append(left, "mount "+m)
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, p := range processes {
		if _, err := strconv.Atoi(p.Name()); err != nil || p.Name() == strconv.Itoa(os.Getpid()) {
			continue
		}
		// A container names it in its mounts alone. A process that ends
		// meanwhile has nothing to read.
		for _, file := range []string{"cmdline", "environ", "mountinfo"} {
			data, err := os.ReadFile(filepath.Join("/proc", p.Name(), file))
			if err == nil && bytes.Contains(data, []byte(d.work)) {
				comm, _ := os.ReadFile(filepath.Join("/proc", p.Name(), "comm"))
				left = append(left, fmt.Sprintf("process %s (%s), by its %s", p.Name(), bytes.TrimSpace(comm), file))
				break
			}
		}
	}
	return left, nil
}
