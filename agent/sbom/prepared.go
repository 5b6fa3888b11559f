package sbom

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Prepared is cvm-sbom, started in its sandbox and waiting for an image. It is
// good for one scan. Its methods are not for several goroutines at a time.
type Prepared struct {
	s      *Sandbox
	base   string // mount point of the sandbox's root, in its own mount namespace
	group  *memoryGroup
	ctx    context.Context //nolint:containedctx // the life of the process
	cancel context.CancelCauseFunc
	cmd    *exec.Cmd
	mounts *os.File // the sandbox's mount namespace
	stdin  *os.File // write end
	stdout *cappedWriter
	stderr *headBuffer
	closed bool
}

// start starts the stage, puts it under its memory limit, and lets it become
// the program args[0], which waits for the end of its standard input.
func (s *Sandbox) start(ctx context.Context, args []string) (_ *Prepared, err error) {
	if err := trustedProgram(s.Program); err != nil {
		return nil, unavailable("program", err)
	}
	p := &Prepared{s: s, stderr: &headBuffer{max: maxStderr}}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.base, err = os.MkdirTemp(s.TempDir, "cvm-sbom-"); err != nil {
		return nil, unavailable("mount point", err)
	}
	uid, err := transientID()
	if err != nil {
		return nil, unavailable("transient user", err)
	}
	order := stageOrder{Base: p.base, Program: s.Program, Args: args, ID: uid, TempMax: s.TempMax}
	if order.Namespaces, err = namespaces(); err != nil {
		return nil, unavailable("namespaces", err)
	}
	if p.group, err = newMemoryGroup(s.MemoryMax, s.noCgroup); err != nil {
		return nil, unavailable("memory limit", err)
	}
	if p.group == nil {
		order.DataMax = s.MemoryMax
	}

	p.ctx, p.cancel = context.WithCancelCause(ctx)
	p.stdout = &cappedWriter{room: s.MaxOutput, full: func() { p.cancel(errOutput) }}
	var pipes pipes
	defer pipes.close()
	orderR, orderW := pipes.make()
	reportR, reportW := pipes.make()
	stdinR, stdinW := pipes.make()
	if pipes.err != nil {
		return nil, unavailable("pipe", pipes.err)
	}
	cmd := exec.CommandContext(p.ctx, "/proc/self/exe")
	cmd.Args = []string{stageName}
	cmd.Env = []string{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdinR, p.stdout, p.stderr
	cmd.ExtraFiles = []*os.File{orderR, reportW}
	cmd.WaitDelay = 2 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Setsid:     true,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return nil, unavailable("namespaces", err)
	}
	// The stage is the first process of its pid namespace: its end, and so that
	// of ctx, ends all that it may have started.
	p.cmd = cmd
	reportW.Close()
	if err := p.group.add(cmd.Process.Pid); err != nil {
		return nil, unavailable("memory limit", err)
	}
	// Now, while it has the rights of the agent, which may so look at it.
	if p.mounts, err = os.Open("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/ns/mnt"); err != nil {
		return nil, unavailable("mount namespace", err)
	}
	if err := json.NewEncoder(orderW).Encode(order); err != nil {
		return nil, unavailable("stage", err)
	}
	orderW.Close()
	// The report pipe closes without a word when the program takes over.
	if err := readReport(reportR); err != nil {
		return nil, err
	}
	p.stdin = pipes.keep(stdinW)
	return p, nil
}

// readReport reads what a stage says of the measure that failed: two lines, or
// nothing when all are in place.
func readReport(r io.Reader) error {
	report, err := bounded.ReadAll(r, maxReport)
	if err == nil && len(report) == 0 {
		return nil
	}
	measure, text, _ := strings.Cut(string(report), "\n")
	if err == nil {
		err = errors.New(printable(text))
	}
	return unavailable(printable(measure), err)
}

// Scan shows the program the image mounted at root and writes the SPDX 2.3 JSON
// document of it to out, as it comes. digests is ScanOptions.FileDigests.
// Errors: cause.SandboxUnavailable names the measure, cause.SBOMScanLimits the
// limit, cause.SBOMScanFailed quotes the program's last words, cause.Cancelled
// and cause.DeadlineExceeded are ctx's, or that of Start; an error of out comes
// as it is. The process has ended when Scan returns.
func (p *Prepared) Scan(ctx context.Context, root string, digests io.Reader, out io.Writer) error {
	defer p.Close()
	defer context.AfterFunc(ctx, func() { p.cancel(context.Cause(ctx)) })()
	timer := time.AfterFunc(p.s.Timeout, func() { p.cancel(errTimeout) })
	defer timer.Stop()
	if err := p.show(root); err != nil {
		if p.ctx.Err() != nil {
			return p.outcome(nil)
		}
		return err
	}
	p.stdout.to(out) // before the end of stdin, so before the first write
	if digests != nil {
		// The program may end before it has read all of them: its end says why.
		_, _ = io.Copy(p.stdin, digests)
	}
	p.stdin.Close()
	return p.outcome(p.cmd.Wait())
}

// Read is Scan into the normal form, while the document comes in.
func (p *Prepared) Read(ctx context.Context, root string, digests io.Reader) (*Document, error) {
	r, w := io.Pipe()
	scanned := make(chan error, 1)
	go func() {
		err := p.Scan(ctx, root, digests, w)
		w.CloseWithError(err) // io.EOF for nil
		scanned <- err
	}()
	doc, err := Read(r)
	r.CloseWithError(err) // ends the program when the reader has had enough
	if scanErr := <-scanned; scanErr != nil {
		return nil, scanErr
	}
	return doc, err
}

// show mounts the image in the sandbox, without what is mounted below it. The
// mount is made outside and closed to writes, devices, set-user-ID and
// execution before anybody can see it; a process of this program enters the
// sandbox's mount namespace to put it there, as threads cannot come back.
func (p *Prepared) show(root string) error {
	const measure = "read-only image"
	fd, err := unix.OpenTree(unix.AT_FDCWD, root, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return unavailable(measure, fmt.Errorf("open_tree %s: %w", root, err))
	}
	tree := os.NewFile(uintptr(fd), root)
	defer tree.Close()
	closed := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &closed); err != nil {
		return unavailable(measure, fmt.Errorf("mount_setattr: %w", err))
	}
	var pipes pipes
	defer pipes.close()
	reportR, reportW := pipes.make()
	if pipes.err != nil {
		return unavailable("pipe", pipes.err)
	}
	cmd := exec.CommandContext(p.ctx, "/proc/self/exe")
	cmd.Args = []string{mountName}
	cmd.Env = []string{}
	cmd.ExtraFiles = []*os.File{p.mounts, tree, reportW}
	cmd.WaitDelay = 2 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return unavailable(measure, err)
	}
	reportW.Close()
	reported := readReport(reportR)
	if err := cmd.Wait(); reported == nil && err != nil {
		return unavailable(measure, err)
	}
	return reported
}

// Close ends the program, if it still runs, and removes what was made for it.
func (p *Prepared) Close() {
	if p.closed {
		return
	}
	p.closed = true
	if p.cancel != nil {
		p.cancel(context.Canceled)
	}
	if p.cmd != nil && p.cmd.ProcessState == nil {
		_ = p.cmd.Wait()
	}
	for _, f := range []*os.File{p.mounts, p.stdin} {
		if f != nil {
			f.Close()
		}
	}
	p.group.remove()
	if p.base != "" {
		os.Remove(p.base)
	}
}

var (
	errTimeout = errors.New("timeout of the scan")
	errOutput  = errors.New("too much output")
)

// outcome turns the end of the program into its cause code.
func (p *Prepared) outcome(err error) error {
	words := printable(p.stderr.String())
	why := context.Cause(p.ctx)
	switch {
	case errors.Is(why, errOutput):
		return cause.New(cause.SBOMScanLimits, "the SBOM scan wrote more than %d bytes", p.s.MaxOutput)
	case errors.Is(why, errTimeout):
		return cause.New(cause.SBOMScanLimits, "the SBOM scan took longer than %v", p.s.Timeout)
	case errors.Is(why, context.DeadlineExceeded):
		return cause.New(cause.DeadlineExceeded, "the SBOM scan was stopped: %w", why)
	case why != nil:
		return cause.New(cause.Cancelled, "the SBOM scan was stopped: %w", why)
	case p.stdout.err != nil:
		return p.stdout.err
	case err == nil:
		return nil
	case p.group.killed(), strings.Contains(words, "out of memory"), strings.Contains(words, "cannot allocate memory"):
		return cause.New(cause.SBOMScanLimits, "the SBOM scan needs more than %d bytes of memory", p.s.MemoryMax)
	case p.cmd.ProcessState.ExitCode() == exitLimit:
		return cause.New(cause.SBOMScanLimits, "the SBOM scan refused the image: %s", words)
	}
	return cause.New(cause.SBOMScanFailed, "the SBOM scan ended with %v: %s", p.cmd.ProcessState, words)
}

// cappedWriter passes up to room bytes on and calls full on the next one.
type cappedWriter struct {
	mu   sync.Mutex
	w    io.Writer // nil until the scan: output before it is against the contract
	room int64
	full func()
	err  error // of w
}

func (c *cappedWriter) to(w io.Writer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.w = w
}

func (c *cappedWriter) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.room -= int64(len(b)); c.room < 0 || c.w == nil {
		c.full()
		return 0, bounded.ErrTooLarge
	}
	n, err := c.w.Write(b)
	if err != nil {
		c.err = err
	}
	return n, err
}

// pipes makes pipes, keeps the first error, and closes all ends that are not
// taken out.
type pipes struct {
	ends []*os.File
	err  error
}

func (p *pipes) make() (r, w *os.File) {
	if p.err == nil {
		r, w, p.err = os.Pipe()
	}
	if p.err == nil {
		p.ends = append(p.ends, r, w)
	}
	return r, w
}

func (p *pipes) keep(f *os.File) *os.File {
	for i, e := range p.ends {
		if e == f {
			p.ends[i] = nil
		}
	}
	return f
}

func (p *pipes) close() {
	for _, f := range p.ends {
		if f != nil {
			f.Close() // a second close is an error that does not matter
		}
	}
}
