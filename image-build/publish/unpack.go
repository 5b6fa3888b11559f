package publish

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"go.podman.io/image/v5/pkg/compression"
	"go.podman.io/storage/pkg/archive"
	"go.podman.io/storage/pkg/reexec"
	"golang.org/x/sys/unix"

	ggcr "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const unpackCommand = "cvmctl-unpack-layer"

func init() { reexec.Register(unpackCommand, unpackMain) }

// Reexec runs the confined unpack child when this process was started as one,
// and then returns true: main must return. Call it first in main.
func Reexec() bool { return reexec.Init() }

// unpackMain is the child: it applies the layer on its standard input to the
// directory in argv[1], confined to it, so that a base image's symlinks never
// lead out of it.
func unpackMain() {
	if err := unpackHere(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func unpackHere(root string) error {
	if err := unix.Chroot(root); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	unix.Umask(0)
	// InUserNS: device nodes are left out, even as root.
	_, err := archive.UnpackLayer("/", os.Stdin, &archive.TarOptions{InUserNS: true, IgnoreChownErrors: true})
	return err
}

// confined gives a child root over its own user namespace where the caller is
// not root, enough to chroot and to read every file it unpacked.
func confined(cmd *exec.Cmd) {
	cmd.Env = []string{"PATH=/usr/bin:/bin", "SYFT_CHECK_FOR_APP_UPDATE=false"} // never the caller's: it may hold COSIGN_PASSWORD
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if uid := os.Geteuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
}

// layoutImage opens the one image of the private layout.
func layoutImage(dir string) (ggcr.Image, error) {
	path, err := layout.FromPath(dir)
	if err != nil {
		return nil, err
	}
	index, err := path.ImageIndex()
	if err != nil {
		return nil, err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(m.Manifests) != 1 {
		return nil, fmt.Errorf("private layout has %d images, expected 1", len(m.Manifests))
	}
	return path.Image(m.Manifests[0].Digest)
}

// unpack applies the image's layers, whiteouts included, to root.
func unpack(ctx context.Context, img ggcr.Image, root string, s Step) error {
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	var total int64
	for _, l := range layers {
		n, err := l.Size()
		if err != nil {
			return err
		}
		total += n
	}
	s.Size(total)
	for i, l := range layers {
		blob, err := l.Compressed()
		if err != nil {
			return err
		}
		err = unpackLayer(ctx, root, counted{blob, s})
		blob.Close()
		if err != nil {
			return fmt.Errorf("unpack layer %d: %w", i, err)
		}
	}
	return nil
}

// unpackLayer decompresses in this process: inside the root, a decompressor
// found on PATH would be the image's own.
func unpackLayer(ctx context.Context, root string, blob io.Reader) error {
	plain, _, err := compression.AutoDecompress(blob)
	if err != nil {
		return err
	}
	defer plain.Close()
	cmd := reexec.CommandContext(ctx, unpackCommand, root)
	confined(cmd)
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = plain, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if bytes.Contains(stderr.Bytes(), []byte("no space left")) {
			return fmt.Errorf("%w: %s", syscall.ENOSPC, lastLine(stderr.String()))
		}
		return fmt.Errorf("%w%s", err, lastLine(stderr.String()))
	}
	return nil
}

type counted struct {
	r io.Reader
	s Step
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.s.Add(int64(n))
	return n, err
}

// maxSBOM bounds cvm-sbom's output, in bytes.
const maxSBOM = 96 << 20

// scan unpacks the image and runs the guest's own scanner over it, so that
// both sides look with the same eyes. It returns the SPDX JSON.
func (r *run) scan(ctx context.Context, layoutDir string, s Step) ([]byte, error) {
	program, err := sbomProgram(r.o.SBOMProgram)
	if err != nil {
		return nil, err
	}
	img, err := layoutImage(layoutDir)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(r.work, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		return nil, err
	}
	defer func() { _ = removeTree(root) }() // early, for the space; the run removes what is left, and says so
	if err := unpack(ctx, img, root, s); err != nil {
		return nil, failed(cause.PublishFailed, "unpack image for the SBOM", err)
	}
	cmd := exec.CommandContext(ctx, program, "scan", "--root", root, "--name", r.target.repo.Name())
	confined(cmd)
	cmd.Env = append(cmd.Env, "TMPDIR="+r.work, "HOME="+r.work)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, cause.New(cause.SBOMScanFailed, "start %s: %w", program, err)
	}
	sbom, readErr := bounded.ReadAll(out, maxSBOM)
	if readErr != nil {
		_ = cmd.Cancel() // Wait tells how it ended
	}
	if err := cmd.Wait(); err != nil || readErr != nil {
		if ctx.Err() != nil {
			return nil, failed(cause.Cancelled, "scan", ctx.Err())
		}
		return nil, cause.New(cause.SBOMScanFailed, "%s: %w%s", program, errors.Join(readErr, err), lastLine(stderr.String()))
	}
	return sbom, checkSBOM(sbom)
}

// checkSBOM refuses what is plainly no SPDX 2.3 document.
func checkSBOM(sbom []byte) error {
	var doc struct {
		SPDXVersion string `json:"spdxVersion"`
	}
	if err := json.Unmarshal(sbom, &doc); err != nil {
		return cause.New(cause.SBOMMalformed, "cvm-sbom's output: %w", err)
	}
	if doc.SPDXVersion != "SPDX-2.3" {
		return cause.New(cause.SBOMMalformed, "cvm-sbom's output has spdxVersion %q, expected SPDX-2.3", doc.SPDXVersion)
	}
	return nil
}

func sbomProgram(path string) (string, error) {
	candidates := []string{path}
	if path == "" {
		if self, err := os.Executable(); err == nil {
			candidates = append(candidates, filepath.Join(filepath.Dir(self), "cvm-sbom"))
		}
		candidates = append(candidates, "/usr/lib/cvm-agent/cvm-sbom")
		if p, err := exec.LookPath("cvm-sbom"); err == nil {
			candidates = append(candidates, p)
		}
	}
	for _, c := range candidates {
		if c == "" {
			continue
		}
		if info, err := os.Stat(c); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return filepath.Abs(c)
		}
	}
	return "", cause.New(cause.Usage, "cvm-sbom not found beside this program, in /usr/lib/cvm-agent or in PATH: give --sbom-program")
}

// removeTree removes a tree whose directories may lack permission bits.
func removeTree(dir string) error {
	if os.RemoveAll(dir) == nil {
		return nil
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(path, 0o700) // best effort: RemoveAll below has the last word
		}
		return nil
	})
	return os.RemoveAll(dir)
}
