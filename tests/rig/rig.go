// Package rig starts the real parts that a launch needs on one machine: a
// registry, a software TPM with an endorsement certificate, the key broker, a
// podman service, keys made by stock cosign, and the agent itself; and takes
// all of it down again without leaving a process, a mount or a file.
//
// Everything is a separate process, run from the programs that `make build`
// and `make deps` made: the rig links none of the product. Nothing in the
// product knows of the rig. A test that wants to sabotage a part replaces its
// program, its input or its socket, all of which the rig's fields name.
//
// The demo, the fault and interop tests and the benchmarks share it.
package rig

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// readyWithin bounds how long a part may take until it answers.
const readyWithin = 2 * time.Minute

// Options says where a Rig works and with which programs. The zero value is
// right for tests: a fresh directory, the programs of this checkout.
type Options struct {
	Dir   string    // work directory, must not exist or be empty; "" makes one under $TMPDIR, removed by Close
	Bin   string    // directory of our programs; "" is bin/ of the checkout
	Tools string    // directory of the stock tools; "" is that of tests/deps.sh
	Out   io.Writer // gets one line per part started or stopped; nil is silent
	Keep  bool      // Close leaves Dir (processes and mounts still go)
}

// Rig is one set of parts. Its methods may be called from several goroutines.
type Rig struct {
	Dir   string
	Bin   string
	Tools string

	out      io.Writer
	keep     bool
	password string // of the keys that the rig makes

	mu      sync.Mutex
	closers []func() error // run in reverse order by Close
	serial  int
	closed  bool
}

// New makes the work directory and finds the programs. Close must follow.
func New(o Options) (*Rig, error) {
	r := &Rig{Dir: o.Dir, Bin: o.Bin, Tools: o.Tools, out: o.Out, keep: o.Keep, password: rand.Text()}
	if r.out == nil {
		r.out = io.Discard
	}
	if r.Bin == "" {
		root, err := Root()
		if err != nil {
			return nil, err
		}
		r.Bin = filepath.Join(root, "bin")
	}
	if r.Tools == "" {
		dir, err := toolsDir()
		if err != nil {
			return nil, err
		}
		r.Tools = dir
	}
	if r.Dir == "" {
		// Socket paths have to stay under 108 bytes, so the name is short.
		dir, err := os.MkdirTemp("", "cvm-")
		if err != nil {
			return nil, err
		}
		r.Dir = dir
	} else {
		if entries, err := os.ReadDir(r.Dir); err == nil && len(entries) > 0 {
			return nil, fmt.Errorf("work directory %s is not empty", r.Dir)
		}
		if err := os.MkdirAll(r.Dir, 0o700); err != nil {
			return nil, err
		}
	}
	var err error
	if r.Dir, err = filepath.Abs(r.Dir); err != nil {
		return nil, err
	}
	// Podman compares the roots of its storage textually.
	if r.Dir, err = filepath.EvalSymlinks(r.Dir); err != nil {
		return nil, err
	}
	return r, os.MkdirAll(filepath.Join(r.Dir, "log"), 0o700)
}

// Path joins names to the work directory.
func (r *Rig) Path(names ...string) string {
	return filepath.Join(append([]string{r.Dir}, names...)...)
}

// Program is the path of one of our programs.
func (r *Rig) Program(name string) string {
	path := filepath.Join(r.Bin, name)
	// go test takes a cached result unless a file that the test looked at has
	// changed, and running a program is not looking at it.
	_, _ = os.Stat(path)
	return path
}

// Tool is the path of a stock tool of tests/deps.sh.
func (r *Rig) Tool(name string) string { return filepath.Join(r.Tools, name) }

// OnClose has f run by Close, before everything registered earlier.
func (r *Rig) OnClose(f func() error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closers = append(r.closers, f)
}

// Close stops what the rig started, last started first, detaches every mount
// under the work directory, kills what still names it, and removes it. It may
// be called twice.
func (r *Rig) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	closers := r.closers
	r.mu.Unlock()

	var errs []error
	for i := len(closers) - 1; i >= 0; i-- {
		errs = append(errs, closers[i]())
	}
	// conmon and containers have left our process groups; they are known by
	// the work directory in their command line, which is ours alone.
	errs = append(errs, r.killStragglers(), unmountUnder(r.Dir))
	if !r.keep {
		errs = append(errs, os.RemoveAll(r.Dir))
	}
	return errors.Join(errs...)
}

// name makes a part's name unique: registry, registry-2, …
func (r *Rig) name(kind string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.serial++
	if _, err := os.Stat(r.Path(kind)); errors.Is(err, os.ErrNotExist) {
		return kind
	}
	return kind + "-" + strconv.Itoa(r.serial)
}

func (r *Rig) say(format string, args ...any) {
	fmt.Fprintf(r.out, format+"\n", args...)
}

func (r *Rig) killStragglers() error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		pids := processesNaming(r.Dir)
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes that name %s do not die: %v", r.Dir, pids)
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // gone already is as good
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// processesNaming lists processes other than this one, and its ancestors,
// whose command line holds dir.
func processesNaming(dir string) []int {
	spare := map[int]bool{}
	for pid := os.Getpid(); pid > 1 && !spare[pid]; pid = parentOf(pid) {
		spare[pid] = true
	}
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	var pids []int
	for _, file := range files {
		pid, err := strconv.Atoi(strings.Split(file, "/")[2])
		if err != nil || spare[pid] {
			continue
		}
		line, err := os.ReadFile(file)
		if err == nil && bytes.Contains(line, []byte(dir+"/")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func parentOf(pid int) int {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// "pid (name) state ppid": the name may hold anything, so from its end.
	_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 2 {
		return 0
	}
	ppid, _ := strconv.Atoi(fields[1])
	return ppid
}

// unmountUnder lazily detaches every mount at or below dir, deepest first.
func unmountUnder(dir string) error {
	points, err := MountsUnder(dir)
	if err != nil {
		return err
	}
	var errs []error
	for i := len(points) - 1; i >= 0; i-- {
		if err := syscall.Unmount(points[i], syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", points[i], err))
		}
	}
	return errors.Join(errs...)
}

// MountsUnder lists the mount points at or below dir, in the order of mounting.
func MountsUnder(dir string) ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(info)) {
		fields := strings.Fields(line)
		if len(fields) > 4 && (fields[4] == dir || strings.HasPrefix(fields[4], dir+"/")) {
			points = append(points, fields[4])
		}
	}
	return points, nil
}

// Root is the directory of the checkout: the nearest one upwards from the
// working directory whose go.mod is the root module's.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		mod, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && bytes.HasPrefix(mod, []byte("module github.com/cc-runtime/cvm-agent\n")) {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no checkout of cvm-agent above %s", dir)
		}
	}
}

// toolsDir follows tests/deps.sh.
func toolsDir() (string, error) {
	if dir := os.Getenv("CVM_TOOLS"); dir != "" {
		return filepath.Join(dir, "bin"), nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "cvm-agent", "tools", "bin"), nil
}

// Eventually calls f every 50 ms until it returns nil, and gives its last
// error when the time is over or ctx is done.
func Eventually(ctx context.Context, within time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", within, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
