package sbom

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// built is the directory of the program, "" until it is built.
var built string

// cvmSBOM builds the real program once: it is a module of its own.
var cvmSBOM = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "cvm-sbom-test-")
	if err != nil {
		return "", err
	}
	built = dir
	program := filepath.Join(dir, "cvm-sbom")
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, ".")
	cmd.Dir = filepath.Join("..", "cmd", "cvm-sbom")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return program, nil
})

func realSandbox(t *testing.T) *Sandbox {
	t.Helper()
	s, _ := testSandbox(t)
	program, err := cvmSBOM()
	if err != nil {
		t.Fatal(err)
	}
	s.Program, s.MemoryMax, s.MaxOutput, s.TempMax = program, 1<<30, MaxDocument, DefaultTempMax
	return s
}

// unpack makes the root of testdata/image.tar.
func unpack(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	archive := tar.NewReader(bytes.NewReader(recorded(t, "image.tar")))
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return root
		}
		if err != nil {
			t.Fatal(err)
		}
		p := filepath.Join(root, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(p, 0o755)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, p)
		case tar.TypeReg:
			var b []byte
			if b, err = io.ReadAll(archive); err == nil {
				err = os.WriteFile(p, b, os.FileMode(h.Mode))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestLesson23_TenScansOfOneImageAreEqual(t *testing.T) {
	s, root := realSandbox(t), unpack(t)
	var first []byte
	for range 10 {
		found, err := s.Scan(context.Background(), root, ScanOptions{Name: "image", SHA1: true})
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = found
		} else if !bytes.Equal(first, found) {
			t.Error("two scans of one root differ in bytes")
		}
	}
	for _, signed := range []string{"registry-all-1.57.0.spdx.json", "registry-all-1.56.0.spdx.json", "oci-dir-all-1.57.0.spdx.json", ours} {
		compareEqual(t, recorded(t, signed), first, Strict)
	}
}

func TestLesson23_AChangedImageIsNamed(t *testing.T) {
	for name, c := range map[string]struct {
		change func(root string) error
		want   string
	}{
		"a file that no package owns": {func(root string) error {
			return os.WriteFile(filepath.Join(root, "srv/unowned.txt"), []byte("changed"), 0o644)
		}, "file changed: /srv/unowned.txt"},
		"a file for root alone": {func(root string) error {
			return os.WriteFile(filepath.Join(root, "root/private"), []byte("changed"), 0o600)
		}, "file changed: /root/private"},
		"a package": {func(root string) error {
			f, err := os.OpenFile(filepath.Join(root, "var/lib/dpkg/status"), os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteString("Package: backdoor\nStatus: install ok installed\nArchitecture: amd64\nVersion: 6.6\nMaintainer: x <x@example.org>\nDescription: x\n\n")
			return err
		}, "package added: backdoor 6.6"},
	} {
		t.Run(name, func(t *testing.T) {
			s, root := realSandbox(t), unpack(t)
			if err := c.change(root); err != nil {
				t.Fatal(err)
			}
			found, err := s.Scan(context.Background(), root, ScanOptions{Name: "image"})
			if err != nil {
				t.Fatal(err)
			}
			ds, err := Compare(recorded(t, "registry-all-1.57.0.spdx.json"), found, Normal)
			if err != nil || cause.Of(Differs(ds)) != cause.SBOMDiffers || !strings.Contains(fmt.Sprint(ds), c.want) {
				t.Fatalf("got %v (%v), want %q", ds, err, c.want)
			}
		})
	}
}

func TestLesson43_StockSyftNowAndHereIsEqual(t *testing.T) {
	tools := os.Getenv("CVM_TOOLS")
	if tools == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			t.Fatal(err)
		}
		tools = filepath.Join(home, ".cache/cvm-agent/tools")
	}
	s, root := realSandbox(t), unpack(t)
	found, err := s.Scan(context.Background(), root, ScanOptions{Name: "image"})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(tools, "bin", "syft"), "scan", "-q", "-o", "spdx-json", "--source-name", "another",
		"--override-default-catalogers", "image", "--base-path", root, "dir:"+root)
	cmd.Env = append(os.Environ(), "SYFT_CHECK_FOR_APP_UPDATE=false", "SYFT_FILE_METADATA_SELECTION=all")
	stock, err := cmd.Output()
	if err != nil {
		t.Fatalf("stock syft (make deps installs it): %v", err)
	}
	compareEqual(t, stock, found, Strict)
}

func TestKnownDigestsAreTakenOver(t *testing.T) {
	s, root := realSandbox(t), unpack(t)
	known := fmt.Sprintf("{\"path\":\"/srv/unowned.txt\",\"sha256\":%q}\n", strings.Repeat("ab", 32))
	found, err := s.Scan(context.Background(), root, ScanOptions{Name: "image", FileDigests: strings.NewReader(known)})
	if err != nil {
		t.Fatal(err)
	}
	ds, err := Compare(recorded(t, ours), found, Normal)
	if err != nil || len(ds) != 1 || ds[0].What != "/srv/unowned.txt" || ds[0].Found != "sha256:"+strings.Repeat("ab", 32) {
		t.Fatalf("got %v, %v", ds, err)
	}
	_, err = s.Scan(context.Background(), root, ScanOptions{Name: "image", FileDigests: strings.NewReader("{\"path\":\"srv\"}\n")})
	if cause.Of(err) != cause.SBOMScanFailed {
		t.Fatalf("bad digests: got %v", err)
	}
}

func TestLesson22_ImagesBeyondTheLimitsAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		make  func(root string) error
		tune  func(*Sandbox)
		words string
	}{
		"too many files": {func(root string) error {
			for i := range 3000 {
				if err := os.WriteFile(filepath.Join(root, fmt.Sprintf("f%d", i)), nil, 0o644); err != nil {
					return err
				}
			}
			return nil
		}, func(s *Sandbox) { s.MaxFiles = 2000 }, "more than 2000 files"},
		"a sparse bomb": {func(root string) error {
			f, err := os.Create(filepath.Join(root, "bomb"))
			if err != nil {
				return err
			}
			defer f.Close()
			return f.Truncate(1 << 40)
		}, func(*Sandbox) {}, "more than 68719476736 bytes"},
		"too large a document": {func(string) error { return nil }, func(s *Sandbox) { s.MaxOutput = 1000 }, "wrote more than"},
		"too little memory":    {func(string) error { return nil }, func(s *Sandbox) { s.MemoryMax = 12 << 20 }, "memory"},
	} {
		t.Run(name, func(t *testing.T) {
			s, root := realSandbox(t), unpack(t)
			c.tune(s)
			if err := c.make(root); err != nil {
				t.Fatal(err)
			}
			_, err := s.Scan(context.Background(), root, ScanOptions{Name: "image"})
			if cause.Of(err) != cause.SBOMScanLimits || !strings.Contains(err.Error(), c.words) {
				t.Fatalf("got %v, want %s with %q", err, cause.SBOMScanLimits, c.words)
			}
		})
	}
}

// removeProgram deletes what cvmSBOM built.
func removeProgram() {
	if built != "" {
		os.RemoveAll(built)
	}
}
