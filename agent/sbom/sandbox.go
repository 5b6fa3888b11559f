package sbom

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Defaults of a Sandbox's zero fields.
const (
	DefaultMemoryMax = 1 << 30
	DefaultTimeout   = 5 * time.Minute
	DefaultMaxFiles  = 2_000_000
	DefaultMaxBytes  = 64 << 30
	DefaultTempMax   = 256 << 20
	maxStderr        = 4 << 10
	maxReport        = 1 << 10
)

// Sandbox runs cvm-sbom with no rights but to read one image root.
//
// The program gets an unprivileged user that nothing else uses, with
// CAP_DAC_READ_SEARCH as its only capability (an image has files that only its
// root may read); a mount namespace that holds the root (read-only, nosuid,
// nodev, noexec), the program and an empty bounded /tmp; empty network, pid,
// IPC and UTS namespaces; no_new_privs; a list of allowed system calls; limits
// on memory, time, output, files and processes; an empty environment. It dies
// with its parent. Every measure is read back in place; one that cannot be set
// is cause.SandboxUnavailable and nothing is run.
//
// The calling program's main must call Reexec first.
type Sandbox struct {
	Program   string        // path of cvm-sbom: static, owned by root, not writable by others
	MemoryMax uint64        // bytes the scan may use, /tmp included
	Timeout   time.Duration // wall clock for the whole scan
	MaxOutput int64         // bytes of SPDX; at most MaxDocument
	MaxFiles  int64         // entries in the root
	MaxBytes  int64         // bytes in the root's regular files
	TempMax   uint64        // bytes in /tmp, where nested archives are unpacked
	TempDir   string        // where to make the mount point; os.TempDir() when empty

	noCgroup bool // tests: limit memory by RLIMIT_DATA
}

// ScanOptions vary from image to image.
type ScanOptions struct {
	Name string // name of the document
	// FileDigests, when not nil, is NDJSON of digests that are known already,
	// one {"path":"/usr/bin/x","sha256":"<hex>"} per line, in any order. Only
	// whoever wrote the very bytes under the root may vouch for them.
	FileDigests io.Reader
	// SHA1 also records SHA-1, which SPDX 2.3 asks for and Compare ignores.
	SHA1 bool
}

// Scan returns the SPDX 2.3 JSON document of the image mounted at root. Errors:
// cause.SandboxUnavailable names the measure, cause.SBOMScanLimits the limit,
// cause.SBOMScanFailed quotes the program's last words, cause.Cancelled and
// cause.DeadlineExceeded are ctx's.
func (s *Sandbox) Scan(ctx context.Context, root string, o ScanOptions) ([]byte, error) {
	b := s.withDefaults()
	args := []string{
		"cvm-sbom", "scan", "--root", sandboxRoot, "--name", o.Name,
		"--max-files", strconv.FormatInt(b.MaxFiles, 10), "--max-bytes", strconv.FormatInt(b.MaxBytes, 10),
		"--memory-target", strconv.FormatUint(b.MemoryMax/4*3, 10),
		"--sha1=" + strconv.FormatBool(o.SHA1),
	}
	if o.FileDigests != nil {
		args = append(args, "--file-digests", "-")
	}
	return b.run(ctx, root, args, o.FileDigests)
}

func (s *Sandbox) withDefaults() *Sandbox {
	b := *s
	if b.MemoryMax == 0 {
		b.MemoryMax = DefaultMemoryMax
	}
	if b.Timeout == 0 {
		b.Timeout = DefaultTimeout
	}
	if b.MaxOutput == 0 {
		b.MaxOutput = MaxDocument
	}
	if b.MaxFiles == 0 {
		b.MaxFiles = DefaultMaxFiles
	}
	if b.MaxBytes == 0 {
		b.MaxBytes = DefaultMaxBytes
	}
	if b.TempMax == 0 {
		b.TempMax = DefaultTempMax
	}
	if b.TempDir == "" {
		b.TempDir = os.TempDir()
	}
	return &b
}

func unavailable(measure string, err error) error {
	return cause.New(cause.SandboxUnavailable, "sandbox measure %q cannot be set: %w", measure, err)
}

// run starts the stage, puts it under its memory limit, lets it go on, and
// collects what the program writes.
func (s *Sandbox) run(ctx context.Context, root string, args []string, stdin io.Reader) ([]byte, error) {
	if err := trustedProgram(s.Program); err != nil {
		return nil, unavailable("program", err)
	}
	base, err := os.MkdirTemp(s.TempDir, "cvm-sbom-")
	if err != nil {
		return nil, unavailable("mount point", err)
	}
	defer os.Remove(base)
	uid, err := transientID()
	if err != nil {
		return nil, unavailable("transient user", err)
	}
	order := stageOrder{Base: base, Root: root, Program: s.Program, Args: args, ID: uid, TempMax: s.TempMax}
	if order.Namespaces, err = namespaces(); err != nil {
		return nil, unavailable("namespaces", err)
	}
	group, err := newMemoryGroup(s.MemoryMax, s.noCgroup)
	if err != nil {
		return nil, unavailable("memory limit", err)
	}
	defer group.remove()
	if group == nil {
		order.DataMax = s.MemoryMax
	}

	ctx, cancel := context.WithTimeoutCause(ctx, s.Timeout, errTimeout)
	defer cancel()
	orderR, orderW, err := os.Pipe()
	if err != nil {
		return nil, unavailable("pipe", err)
	}
	defer orderW.Close()
	reportR, reportW, err := os.Pipe()
	if err != nil {
		orderR.Close()
		return nil, unavailable("pipe", err)
	}
	defer reportR.Close()

	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{stageName}
	cmd.Env = []string{}
	cmd.Stdin = stdin // nil is /dev/null
	stdout := &cappedBuffer{max: int(s.MaxOutput), full: cancel}
	stderr := &headBuffer{max: maxStderr}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.ExtraFiles = []*os.File{orderR, reportW}
	cmd.WaitDelay = 2 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		Setsid:     true,
		Pdeathsig:  syscall.SIGKILL,
	}
	err = cmd.Start()
	orderR.Close()
	reportW.Close()
	if err != nil {
		return nil, unavailable("namespaces", err)
	}
	// The stage is the first process of its pid namespace: its end, and so this
	// kill, ends all that it may have started.
	fail := func(err error) ([]byte, error) {
		cancel()
		_ = cmd.Wait()
		return nil, err
	}
	if err := group.add(cmd.Process.Pid); err != nil {
		return fail(unavailable("memory limit", err))
	}
	if err := json.NewEncoder(orderW).Encode(order); err != nil {
		return fail(unavailable("stage", err))
	}
	orderW.Close()
	// The report pipe closes without a word when the program takes over.
	report, err := bounded.ReadAll(reportR, maxReport)
	if err != nil || len(report) > 0 {
		measure, text, _ := strings.Cut(string(report), "\n")
		if err == nil {
			err = errors.New(printable(text))
		}
		return fail(unavailable(printable(measure), err))
	}
	err = cmd.Wait()
	return s.outcome(ctx, cmd, err, stdout, stderr, group)
}

var errTimeout = errors.New("timeout of the scan")

// outcome turns the end of the program into its cause code.
func (s *Sandbox) outcome(ctx context.Context, cmd *exec.Cmd, err error, stdout *cappedBuffer, stderr *headBuffer, group *memoryGroup) ([]byte, error) {
	words := printable(stderr.String())
	switch {
	case stdout.over:
		return nil, cause.New(cause.SBOMScanLimits, "the SBOM scan wrote more than %d bytes", s.MaxOutput)
	case errors.Is(context.Cause(ctx), errTimeout):
		return nil, cause.New(cause.SBOMScanLimits, "the SBOM scan took longer than %v", s.Timeout)
	case ctx.Err() != nil:
		code := cause.Cancelled
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			code = cause.DeadlineExceeded
		}
		return nil, cause.New(code, "the SBOM scan was stopped: %w", context.Cause(ctx))
	case err == nil:
		return stdout.buf, nil
	case group.killed(), strings.Contains(words, "out of memory"), strings.Contains(words, "cannot allocate memory"):
		return nil, cause.New(cause.SBOMScanLimits, "the SBOM scan needs more than %d bytes of memory", s.MemoryMax)
	case cmd.ProcessState.ExitCode() == exitLimit:
		return nil, cause.New(cause.SBOMScanLimits, "the SBOM scan refused the image: %s", words)
	}
	return nil, cause.New(cause.SBOMScanFailed, "the SBOM scan ended with %v: %s", cmd.ProcessState, words)
}

// exitLimit is cvm-sbom's exit status for a limit given by flag.
const exitLimit = 3

// trustedProgram refuses a program that another user could replace or change.
func trustedProgram(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("path of cvm-sbom %q is not absolute", path)
	}
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o022 != 0 || (st.Uid != 0 && int(st.Uid) != os.Geteuid()) {
		return fmt.Errorf("%s is not a regular file that only root can write", path)
	}
	return nil
}

// idBase is the start of the range that systemd's UIDS-GIDS.md lists as unused
// by everybody: no file and no process on the host belongs to it.
const idBase = 0x70000000

func transientID() (int, error) {
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, err
	}
	return idBase + int(binary.LittleEndian.Uint32(b[:])&0xffffff), nil
}

// namespaces names the caller's namespaces, for the stage to find that its own
// are others.
func namespaces() (map[string]string, error) {
	out := map[string]string{}
	for _, ns := range []string{"mnt", "pid", "net", "ipc", "uts"} {
		id, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			return nil, err
		}
		out[ns] = id
	}
	return out, nil
}

// cappedBuffer collects up to max bytes and calls full on the next one.
type cappedBuffer struct {
	buf  []byte
	max  int
	over bool
	full func()
}

func (b *cappedBuffer) Write(p []byte) (int, error) {
	if len(b.buf)+len(p) > b.max {
		b.over, b.buf = true, nil
		b.full()
		return 0, bounded.ErrTooLarge
	}
	b.buf = append(b.buf, p...)
	return len(p), nil
}

// headBuffer keeps the first max bytes: what comes first names the fault, and a
// dump that follows does not help.
type headBuffer struct {
	bytes.Buffer
	max int
}

func (b *headBuffer) Write(p []byte) (int, error) {
	n := len(p)
	if room := b.max - b.Len(); len(p) > room {
		p = p[:room]
	}
	b.Buffer.Write(p)
	return n, nil
}

// printable makes one short line of what the program, or hostile content
// through it, wrote.
func printable(s string) string {
	return clip(strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' || r == '\t' }), " | "))
}
