// Package unpack turns the hostile bytes of one image layer into files.
//
// The work is done by a child: this program executed again, which confines
// itself (see confine.go) to the one directory that it fills before it reads a
// byte. The parent, Run, hands it a stream and gets back a file table, counts
// and the diff ID that the child computed; it parses no tar and no compression
// itself. The child is not trusted: its table and result are decoded strictly
// and bounded. What it computes stands only for bytes that the caller has
// authenticated otherwise: an attacker who owns the child owns only a directory
// that the caller throws away, because he got in by bytes that fail the
// caller's own digest check.
//
// Walk makes the same table from a directory that is already there.
//
// Every program that calls Run or Walk must call Reexec first thing in main.
package unpack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/agent/image/filetable"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Limits bounds one layer. All are required.
type Limits struct {
	MaxFiles int   // tar entries
	MaxBytes int64 // of the unpacked archive and, apart, of all its files
	MaxRatio int   // unpacked : compressed, judged once 16 MiB have come out
}

// Result is what a child found. DiffID and Bytes are of the unpacked archive
// and empty after Walk.
type Result struct {
	DiffID   string   `json:"diffID,omitempty"` // sha256:<hex>
	Bytes    int64    `json:"bytes,omitempty"`
	Files    int      `json:"files"`
	Opaque   []string `json:"opaque,omitempty"`   // directories that hide what is below, for the caller to mark
	RootMode *uint32  `json:"rootMode,omitempty"` // set if the archive has an entry for its root
	Error    string   `json:"error,omitempty"`
	Code     string   `json:"code,omitempty"` // a cause code
}

const (
	childName     = "cvm-agent-unpack" // argv[0] of the child
	maxResult     = 8 << 20
	maxOpaque     = 1 << 16
	pipeSize      = 1 << 20
	exitWait      = 10 * time.Second
	maxStderr     = 4 << 10
	copyBuffer    = 256 << 10
	modeUnpack    = "unpack"
	modeWalk      = "walk"
	fdTable       = 3
	fdResult      = 4
	ratioFromByte = 16 << 20
)

// order is what the parent tells the child, as JSON in argv: nothing secret.
type order struct {
	Mode   string `json:"mode"`
	Dir    string `json:"dir"`
	Limits Limits `json:"limits"`
}

// childCodes are the causes that a child may name.
var childCodes = []cause.Code{
	cause.LayerMalformed, cause.ImageLimits, cause.StorageFull,
	cause.StorageFailed, cause.Internal, cause.SandboxUnavailable,
}

// Run unpacks the layer that in delivers (gzip, zstd or plain tar) into dir,
// which must exist and be empty, in overlayfs form, and writes its file table
// to table. It returns when in is at its end and the child is gone.
//
// If in fails, its error is returned. If the child refuses the stream as
// malformed, in is still read to its end first: in's own verdict on the bytes
// (digest, HMAC) comes before the child's.
func Run(ctx context.Context, dir string, l Limits, in io.Reader, table io.Writer) (*Result, error) {
	return run(ctx, order{Mode: modeUnpack, Dir: dir, Limits: l}, in, table)
}

// Walk writes the file table of dir to table. It changes nothing.
func Walk(ctx context.Context, dir string, l Limits, table io.Writer) (*Result, error) {
	return run(ctx, order{Mode: modeWalk, Dir: dir, Limits: l}, bytes.NewReader(nil), table)
}

func run(ctx context.Context, o order, in io.Reader, table io.Writer) (*Result, error) {
	arg, err := json.Marshal(o)
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	stdin, toChild, err := os.Pipe()
	if err != nil {
		return nil, cause.New(cause.SandboxUnavailable, "making a pipe: %w", err)
	}
	defer stdin.Close()
	defer toChild.Close()
	// Best effort: an unprivileged limit on pipe sizes only costs speed.
	_, _ = unix.FcntlInt(toChild.Fd(), unix.F_SETPIPE_SZ, pipeSize)
	if err := unix.SetNonblock(int(toChild.Fd()), true); err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	tableR, tableW, err := os.Pipe()
	if err != nil {
		return nil, cause.New(cause.SandboxUnavailable, "making a pipe: %w", err)
	}
	defer tableR.Close()
	defer tableW.Close()
	resultR, resultW, err := os.Pipe()
	if err != nil {
		return nil, cause.New(cause.SandboxUnavailable, "making a pipe: %w", err)
	}
	defer resultR.Close()
	defer resultW.Close()

	var stderr boundedBuffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe", string(arg))
	cmd.Args[0] = childName
	cmd.Env = []string{"GOGC=50", "GOMEMLIMIT=64MiB", "GOTRACEBACK=none"}
	cmd.Dir = "/"
	cmd.Stdin = stdin
	cmd.Stderr = &stderr
	cmd.ExtraFiles = []*os.File{tableW, resultW} // fdTable, fdResult
	cmd.WaitDelay = exitWait
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
	waited, err := startOnOwnThread(cmd)
	if err != nil {
		return nil, cause.New(cause.SandboxUnavailable, "starting the confined unpacker: %w", err)
	}
	stdin.Close()
	tableW.Close()
	resultW.Close()

	type tableDone struct {
		files int
		err   error
	}
	tableCh := make(chan tableDone, 1)
	go func() {
		n := 0
		err := filetable.Read(tableR, o.Limits.MaxFiles, func(line []byte, _ filetable.Entry) error {
			n++
			_, err := table.Write(line)
			return err
		})
		if err != nil {
			cancel() // nobody reads on: the child must not wait for us
		}
		tableCh <- tableDone{n, err}
	}()
	resultCh := make(chan []byte, 1)
	go func() {
		b, err := bounded.ReadAll(resultR, maxResult)
		if err != nil {
			b = nil
		}
		resultCh <- b
	}()

	// The stream. A child that stops reading shows as EPIPE.
	readErr, writeErr := feed(toChild, in)
	if readErr != nil {
		cancel()
	}
	toChild.Close()
	waitErr := <-waited
	td := <-tableCh
	raw := <-resultCh
	if readErr != nil {
		return nil, readErr
	}
	if err := context.Cause(ctx); err != nil && td.err == nil {
		return nil, cause.Wrap(cause.DeadlineExceeded, fmt.Errorf("unpacking a layer: %w", err))
	}

	var r Result
	if err := bounded.DecodeJSON(raw, &r, bounded.Limits{Bytes: maxResult, Nodes: maxOpaque + 64}); err != nil {
		return nil, cause.New(cause.LayerMalformed, "the confined unpacker died (%v) with no usable result: %s", waitErr, stderr.line())
	}
	if r.Code != "" {
		code := cause.Code(r.Code)
		if !slices.Contains(childCodes, code) {
			code = cause.LayerMalformed
		}
		err := cause.New(code, "%s", printable(r.Error))
		if code == cause.LayerMalformed && writeErr != nil {
			// The bytes may be wrong in a way that in knows better.
			if _, rerr := io.Copy(io.Discard, in); rerr != nil {
				return nil, rerr
			}
		}
		return nil, err
	}
	switch {
	case waitErr != nil:
		return nil, cause.New(cause.LayerMalformed, "the confined unpacker failed: %v: %s", waitErr, stderr.line())
	case td.err != nil && errors.Is(td.err, filetable.ErrMalformed):
		return nil, cause.Wrap(cause.LayerMalformed, td.err)
	case td.err != nil:
		return nil, cause.Wrap(cause.StorageFailed, fmt.Errorf("keeping the file table: %w", td.err))
	case writeErr != nil:
		return nil, cause.New(cause.LayerMalformed, "the confined unpacker did not read the whole layer: %v", writeErr)
	case td.files != r.Files:
		return nil, cause.New(cause.LayerMalformed, "the file table has %d entries, the unpacker says %d", td.files, r.Files)
	}
	return &r, nil
}

// startOnOwnThread starts cmd on a thread that lives as long as the child:
// PR_SET_PDEATHSIG fires when the *thread* that forked goes away.
func startOnOwnThread(cmd *exec.Cmd) (<-chan error, error) {
	started, waited := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			waited <- cmd.Wait()
		}
	}()
	return waited, <-started
}

// feed copies in to w and tells the two sides' errors apart.
func feed(w io.Writer, in io.Reader) (readErr, writeErr error) {
	buf := make([]byte, copyBuffer)
	for {
		n, err := in.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				if err != nil && err != io.EOF {
					return err, werr
				}
				return nil, werr
			}
		}
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
	}
}

// boundedBuffer keeps the first bytes of the child's stderr, which may quote
// hostile names.
type boundedBuffer struct{ b []byte }

func (w *boundedBuffer) Write(p []byte) (int, error) {
	if room := maxStderr - len(w.b); room > 0 {
		w.b = append(w.b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

func (w *boundedBuffer) line() string {
	first, _, _ := strings.Cut(string(w.b), "\n")
	return printable(first)
}

// printable makes text that quotes hostile names safe for a log line.
func printable(s string) string {
	q := strconv.QuoteToGraphic(s[:min(len(s), 500)])
	return q[1 : len(q)-1]
}
