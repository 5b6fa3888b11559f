package sbom

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

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
// on memory, time, output, files and processes; an empty environment. The
// image comes last, by a process of its own that ends before the scan. It dies
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
	// FileDigests (for Scan alone), when not nil, is NDJSON of digests that are known already,
	// one {"path":"/usr/bin/x","sha256":"<hex>"} per line, in any order. Only
	// whoever wrote the very bytes under the root may vouch for them.
	FileDigests io.Reader
	// SHA1 also records SHA-1, which SPDX 2.3 asks for and Compare ignores.
	SHA1 bool
}

// Scan returns the SPDX 2.3 JSON document of the image mounted at root; it is
// Start and Prepared.Scan in one.
func (s *Sandbox) Scan(ctx context.Context, root string, o ScanOptions) ([]byte, error) {
	p, err := s.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	var out bytes.Buffer
	if err := p.Scan(ctx, root, o.FileDigests, &out); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// Start starts cvm-sbom in its sandbox, with no image yet: half of the time
// that it takes for a small image goes into what is the same for all images,
// and can so pass while the image is on its way. The program lives until its
// scan, Close or the end of ctx. The error is cause.SandboxUnavailable.
func (s *Sandbox) Start(ctx context.Context, o ScanOptions) (*Prepared, error) {
	b := s.withDefaults()
	return b.start(ctx, []string{
		"cvm-sbom", "scan", "--root", sandboxRoot, "--name", o.Name,
		"--max-files", strconv.FormatInt(b.MaxFiles, 10), "--max-bytes", strconv.FormatInt(b.MaxBytes, 10),
		"--memory-target", strconv.FormatUint(b.MemoryMax/4*3, 10),
		"--sha1=" + strconv.FormatBool(o.SHA1),
		"--file-digests", "-", // the end of them is the sign that the root is there
	})
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
