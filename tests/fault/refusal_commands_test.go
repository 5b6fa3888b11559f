package fault

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// The commands of the scripts; testdata/refusal/README.md says what each is
// for. A command that fails ends its script.

type command struct {
	usage string
	args  int // least number of arguments
	do    func(ctx context.Context, w *world, ts *testscript.TestScript, args []string) error
}

var commands = func() map[string]func(*testscript.TestScript, bool, []string) {
	all := map[string]func(*testscript.TestScript, bool, []string){}
	for _, table := range []map[string]command{runCommands, inputCommands, outsideCommands, watchCommands} {
		for name, c := range table {
			all[name] = func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < c.args {
					ts.Fatalf("usage: %s %s", name, c.usage)
				}
				ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
				defer cancel()
				ts.Check(c.do(ctx, ts.Value(worldKey{}).(*world), ts, args))
			}
		}
	}
	return all
}()

// runCommands boot the guest, run its agent, and judge what came of it.
var runCommands = map[string]command{
	"boot":  {"[-unmeasured] SEED [KEY...]", 1, boot},
	"exits": {"[-isolated] STATUS PROGRAM [ARGUMENT...] [&]", 2, exits},
	"ended": {"", 0, ended},
	"until": {"REGEXP PROGRAM [ARGUMENT...]", 2, until},
	"ready": {"", 0, ready},
	"stop": {"", 0, func(_ context.Context, w *world, _ *testscript.TestScript, _ []string) error {
		w.agent.stop()
		return nil
	}},
	"crash":   {"", 0, func(_ context.Context, w *world, _ *testscript.TestScript, _ []string) error { return w.agent.crash() }},
	"refusal": {"PHASE CODE [REGEXP]", 2, refusal},
	"residue": {"none|everywhere", 1, residue},
}

// boot is a reboot of the guest with this seed: an initdata document (.toml),
// a signed policy (.dsse.json), or a policy (.yaml), which the owner signs.
func boot(ctx context.Context, w *world, ts *testscript.TestScript, args []string) error {
	unmeasured := args[0] == "-unmeasured"
	if unmeasured {
		args = args[1:]
	}
	seed, keys := ts.MkAbs(args[0]), args[1:]
	if len(keys) == 0 {
		keys = []string{"owner"}
	}
	if strings.HasSuffix(seed, ".yaml") {
		signed := strings.TrimSuffix(seed, ".yaml") + ".dsse.json"
		if err := w.signPolicy(seed, signed, keys); err != nil {
			return err
		}
		seed = signed
	}
	if base, ok := strings.CutSuffix(seed, ".dsse.json"); ok {
		if err := w.pack(seed, base+".toml", keys); err != nil {
			return err
		}
		seed = base + ".toml"
	}
	if unmeasured {
		return errors.Join(w.tpm.PowerOn(ctx), w.guest.Seed(seed))
	}
	return w.guest.Boot(ctx, seed)
}

// run is a program that `exits` started.
type run struct {
	cmd            *exec.Cmd
	want           int
	stdout, stderr lockedBuffer
	done           chan struct{}
}

func (r *run) stop() {
	_ = r.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-r.done:
	case <-time.After(20 * time.Second):
	}
	_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL) // children that outlived it
	<-r.done
}

// crash ends the program and its children as nobody can prepare for.
func (r *run) crash() error {
	err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
	<-r.done
	return err
}

func exits(ctx context.Context, w *world, ts *testscript.TestScript, args []string) error {
	isolated := args[0] == "-isolated"
	if isolated {
		args = args[1:]
	}
	want, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	background := args[len(args)-1] == "&"
	if background {
		args = args[:len(args)-1]
	}
	r := &run{cmd: w.command(ts, args[1:]), want: want, done: make(chan struct{})}
	r.cmd.Stdout, r.cmd.Stderr = &r.stdout, &r.stderr
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r.cmd.WaitDelay = time.Second
	start := r.cmd.Start
	if isolated {
		start = func() error { return startIsolated(r.cmd, w.front.host, w.gate.host) }
	}
	if err := start(); err != nil {
		return err
	}
	w.agent = r
	go func() {
		_ = r.cmd.Wait() // the outcome is in ProcessState
		close(r.done)
	}()
	if background {
		return nil
	}
	return ended(ctx, w, ts, nil)
}

func (w *world) command(ts *testscript.TestScript, argv []string) *exec.Cmd {
	cmd := exec.Command(argv[0], argv[1:]...)
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if path := filepath.Join(dir, argv[0]); !strings.Contains(argv[0], "/") && isFile(path) {
			cmd = exec.Command(path, argv[1:]...)
			break
		}
	}
	cmd.Dir = ts.MkAbs(".")
	return cmd
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// ended waits for the program of `exits` and checks its status.
func ended(ctx context.Context, w *world, ts *testscript.TestScript, _ []string) error {
	r := w.agent
	select {
	case <-r.done:
	case <-ctx.Done():
		return fmt.Errorf("%s does not end: %s", r.cmd.Args[0], r.stderr.String())
	}
	fmt.Fprint(ts.Stdout(), r.stdout.String())
	fmt.Fprint(ts.Stderr(), r.stderr.String())
	if got := r.cmd.ProcessState.ExitCode(); got != r.want {
		return fmt.Errorf("exit status %d (%s), expected %d: %s", got, r.cmd.ProcessState, r.want, r.stderr.String())
	}
	return nil
}

// until repeats a program until its standard output matches.
func until(ctx context.Context, w *world, ts *testscript.TestScript, args []string) error {
	want, err := regexp.Compile("(?m)" + args[0])
	if err != nil {
		return err
	}
	return rig.Eventually(ctx, time.Minute, func() error {
		cmd := w.command(ts, args[1:])
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr.String())
		}
		if !want.Match(out) {
			return fmt.Errorf("no match for %q in\n%s", want, out)
		}
		return nil
	})
}

// ready waits until the agent says so and the workload answers.
func ready(ctx context.Context, w *world, _ *testscript.TestScript, _ []string) error {
	var ended error
	err := rig.Eventually(ctx, 2*time.Minute, func() error {
		select {
		case <-w.agent.done:
			ended = fmt.Errorf("the agent ended, %s: %s", w.agent.cmd.ProcessState, w.agent.stderr.String())
			return nil
		default:
		}
		status, err := w.guest.Status(ctx)
		if err == nil && status.State != "ready" {
			err = fmt.Errorf("state %s", status.State)
		}
		return err
	})
	return errors.Join(err, ended)
}

// refusal judges how the agent ended: with the status that its cause has in
// the table, after exactly one line of its own on standard error.
func refusal(_ context.Context, w *world, _ *testscript.TestScript, args []string) error {
	var lines []string
	for line := range strings.Lines(w.agent.stderr.String()) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "cvm-agent: ") {
			lines = append(lines, line)
		}
	}
	if len(lines) != 1 {
		return fmt.Errorf("expected one line for people, got %q in\n%s", lines, w.agent.stderr.String())
	}
	parts := strings.SplitN(lines[0], ": ", 4)
	if len(parts) != 4 || parts[1] != args[0] || parts[2] != args[1] {
		return fmt.Errorf("expected phase %s with cause %s, got %q", args[0], args[1], lines[0])
	}
	if len(args) > 2 {
		ok, err := regexp.MatchString(args[2], parts[3])
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("expected a text like %q, got %q", args[2], parts[3])
		}
	}
	at := slices.IndexFunc(cause.Table, func(r cause.Row) bool { return string(r.Code) == parts[2] })
	if at < 0 {
		return fmt.Errorf("cause %s is not documented", parts[2])
	}
	if row := cause.Table[at]; row.Exit != w.agent.cmd.ProcessState.ExitCode() || row.Exit == cause.ExitOK {
		return fmt.Errorf("exit status %d, documented is %d", w.agent.cmd.ProcessState.ExitCode(), row.Exit)
	}
	return nil
}

// residue looks for everything that a failed launch could leave. `residue
// everywhere` is what shows, after a good launch, that each look would find it.
func residue(ctx context.Context, w *world, _ *testscript.TestScript, args []string) error {
	for _, look := range []struct {
		where string
		find  func(context.Context, *world) ([]string, error)
	}{
		{"podman", func(ctx context.Context, w *world) ([]string, error) { return w.podman.Leftovers(ctx) }},
		{"the storage's records", storageRecords},
		{"the storage's directories", func(_ context.Context, w *world) ([]string, error) {
			graph := w.podman.GraphRoot
			return entries(filepath.Join(graph, "overlay"), filepath.Join(graph, "overlay", "l"), filepath.Join(graph, "overlay", "staging"),
				filepath.Join(graph, "overlay", "tempdirs"), filepath.Join(graph, "overlay-layers"), filepath.Join(graph, "overlay-layers", "tmp"),
				filepath.Join(graph, "overlay-images"), filepath.Join(graph, "overlay-images", "tmp"), filepath.Join(w.podman.Dir, "volumes"))
		}},
		{"the agent's records", func(_ context.Context, w *world) ([]string, error) {
			return entries(filepath.Join(w.guest.StateDir, "images", "layers"), filepath.Join(w.guest.RunDir, "secrets"))
		}},
		{"the mounts", storageMounts},
		{"podman's events", containerEvents},
		{"the network", func(ctx context.Context, w *world) ([]string, error) {
			if rig.Answers(ctx, w.port) {
				return []string{"something answers on the workload's port"}, nil
			}
			return nil, nil
		}},
	} {
		left, err := look.find(ctx, w)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", look.where, err)
		case args[0] == "none" && len(left) > 0:
			return fmt.Errorf("%s: left behind:\n%s", look.where, strings.Join(left, "\n"))
		case args[0] == "everywhere" && len(left) == 0:
			return fmt.Errorf("%s: a workload runs, and nothing of it is seen", look.where)
		}
	}
	return nil
}

func storageRecords(_ context.Context, w *world) (left []string, err error) {
	for _, file := range []string{"overlay-layers/layers.json", "overlay-layers/volatile-layers.json", "overlay-images/images.json",
		"overlay-containers/containers.json", "overlay-containers/volatile-containers.json"} {
		data, err := os.ReadFile(filepath.Join(w.podman.GraphRoot, file))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var records []json.RawMessage
		if err = errors.Join(err, json.Unmarshal(data, &records)); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if len(records) > 0 {
			left = append(left, fmt.Sprintf("%d records in %s", len(records), file))
		}
	}
	return left, nil
}

// entries lists what is in directories, but for what an empty storage has.
func entries(dirs ...string) (left []string, err error) {
	for _, dir := range dirs {
		all, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, e := range all {
			if !storageOwn[e.Name()] {
				left = append(left, filepath.Join(dir, e.Name()))
			}
		}
	}
	return left, nil
}

func storageMounts(_ context.Context, w *world) ([]string, error) {
	own := filepath.Join(w.podman.GraphRoot, "overlay") // podman makes it a private mount
	mounts, err := rig.MountsUnder(own)
	return slices.DeleteFunc(mounts, func(m string) bool { return m == own }), err
}

// containerEvents finds containers that have ever existed.
func containerEvents(_ context.Context, w *world) (left []string, err error) {
	events, err := os.ReadFile(w.eventFile())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for line := range bytes.Lines(events[min(w.events, int64(len(events))):]) {
		if bytes.Contains(line, []byte(`"Type":"container"`)) {
			left = append(left, string(bytes.TrimSpace(line)))
		}
	}
	return left, nil
}

// storageOwn are the entries that an empty storage has.
var storageOwn = map[string]bool{"l": true, "staging": true, "tempdirs": true, "tmp": true, "compat": true, "layers.lock": true, "images.lock": true,
	"layers.json": true, "images.json": true, "volatile-layers.json": true, ".has-mount-program": true}

// lockedBuffer is written by a program while a script reads it.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
