package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// recipe is part of the stamp of cached images: raise it when a change here
// makes other images.
const recipe = "1"

// The large image: about 500 MB of Debian, one layer.
const (
	debianSuite    = "bookworm"
	debianVariant  = "important"
	debianPackages = "python3,perl,gcc"
)

// The small image: the server and this much made-up data.
const (
	dataFiles    = 150
	dataFileSize = 100 << 10
)

// source is an image to measure with, as an OCI layout in the cache.
type source struct {
	Name       string `json:"name"`
	Layout     string `json:"-"`
	Unpacked   int64  `json:"unpackedBytes"`   // of the layer's tar archive
	Compressed int64  `json:"compressedBytes"` // of the layer
	Entries    int    `json:"entries"`         // of the archive
}

// sources makes the images that are not in the cache, and describes all.
func (b *bench) sources(ctx context.Context, names []string) ([]source, error) {
	app, err := b.stage.BuildApp(ctx, rig.App{Name: "bench", Version: "v1"})
	if err != nil {
		return nil, err
	}
	root, err := rig.Root()
	if err != nil {
		return nil, err
	}
	server, err := os.ReadFile(filepath.Join(root, "tests", "demo", "app", "main.go"))
	if err != nil {
		return nil, err
	}
	// Keyed by source, not by binary: paths in a binary would make a new
	// image for every checkout.
	sum := sha256.Sum256([]byte(strings.Join([]string{recipe, debianSuite, debianVariant, debianPackages,
		fmt.Sprint(dataFiles, dataFileSize), runtime.Version(), runtime.GOARCH, string(server)}, "\n")))
	stamp := hex.EncodeToString(sum[:6])
	var out []source
	for _, name := range names {
		dir := filepath.Join(b.cache, name+"-"+stamp)
		if _, err := os.Stat(dir); err != nil {
			b.say("making the %s image in %s (once)", name, b.cache)
			if err := b.makeSource(ctx, name, filepath.Join(app, "root"), dir); err != nil {
				return nil, fmt.Errorf("making the %s image: %w", name, err)
			}
		}
		s, err := describe(name, dir)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		out = append(out, s)
	}
	return out, nil
}

// makeSource writes the layout beside its place and renames it there, so that
// what the cache has is whole; older ones of the name go.
func (b *bench) makeSource(ctx context.Context, name, app, dir string) (err error) {
	old, err := filepath.Glob(filepath.Join(b.cache, name+"-*"))
	if err != nil {
		return err
	}
	for _, d := range old {
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(b.cache, 0o755); err != nil {
		return err
	}
	temp, err := os.MkdirTemp(b.cache, ".making-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	blob := filepath.Join(temp, "layer.tar.gz")
	file, err := os.Create(blob)
	if err != nil {
		return err
	}
	zip := gzip.NewWriter(file)
	if name == large {
		err = debian(ctx, zip, app)
	} else {
		err = static(zip, app)
	}
	if err == nil {
		err = zip.Close()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	layer, err := tarball.LayerFromFile(blob, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return err
	}
	config := v1.Config{Entrypoint: []string{"/server"}, User: "1000:1000", WorkingDir: "/"}
	image, err := mutate.Config(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), config)
	if err == nil {
		image, err = mutate.AppendLayers(image, layer)
	}
	if err != nil {
		return err
	}
	var described *v1.ConfigFile
	if described, err = image.ConfigFile(); err != nil {
		return err
	}
	described = described.DeepCopy()
	described.OS, described.Architecture = "linux", runtime.GOARCH
	if image, err = mutate.ConfigFile(image, described); err != nil {
		return err
	}
	path, err := layout.Write(filepath.Join(temp, "layout"), empty.Index)
	if err != nil {
		return err
	}
	if err := path.AppendImage(image); err != nil {
		return err
	}
	return os.Rename(string(path), dir)
}

// debian writes a tree made by stock mmdebstrap, with the server in it.
func debian(ctx context.Context, out io.Writer, app string) error {
	args := []string{"--quiet", "--variant=" + debianVariant, "--include=" + debianPackages, "--skip=output/dev"}
	for _, f := range []string{"/server", "/srv/greeting", "/srv/health"} {
		args = append(args, fmt.Sprintf("--customize-hook=upload %s %s", filepath.Join(app, f), f))
	}
	args = append(args, `--customize-hook=chmod 0755 "$1/server"`, debianSuite, "-")
	cmd := exec.CommandContext(ctx, "mmdebstrap", args...)
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = out, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mmdebstrap: %w: %s", err, lastLines(stderr.String(), 4))
	}
	return nil
}

// static writes the server's files and data that compresses about two to one,
// the same bytes every time.
func static(out io.Writer, app string) error {
	archive := tar.NewWriter(out)
	if err := archive.AddFS(os.DirFS(app)); err != nil {
		return err
	}
	random := rand.NewChaCha8([32]byte{})
	half := make([]byte, dataFileSize/2)
	for i := range dataFiles {
		_, _ = random.Read(half) // never fails
		if err := archive.WriteHeader(&tar.Header{Name: fmt.Sprintf("srv/data-%03d", i), Mode: 0o644, Size: dataFileSize}); err != nil {
			return err
		}
		if _, err := io.WriteString(archive, hex.EncodeToString(half)); err != nil {
			return err
		}
	}
	return archive.Close()
}

// describe reads a layout of one image with one layer.
func describe(name, dir string) (s source, err error) {
	s = source{Name: name, Layout: dir}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return s, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return s, err
	}
	if len(manifest.Manifests) != 1 {
		return s, fmt.Errorf("%d images, expected 1", len(manifest.Manifests))
	}
	image, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		return s, err
	}
	layers, err := image.Layers()
	if err != nil {
		return s, err
	}
	if len(layers) != 1 {
		return s, fmt.Errorf("%d layers, expected 1", len(layers))
	}
	if s.Compressed, err = layers[0].Size(); err != nil {
		return s, err
	}
	plain, err := layers[0].Uncompressed()
	if err != nil {
		return s, err
	}
	defer plain.Close()
	counted := &counter{r: plain}
	archive := tar.NewReader(counted)
	for {
		if _, err := archive.Next(); err == io.EOF {
			break
		} else if err != nil {
			return s, err
		}
		s.Entries++
	}
	_, err = io.Copy(io.Discard, counted) // the padding
	s.Unpacked = counted.n
	return s, err
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// cacheDir follows tests/deps.sh: CVM_CACHE, or the user's own.
func cacheDir() (string, error) {
	if dir := os.Getenv("CVM_CACHE"); dir != "" {
		return filepath.Join(dir, "bench"), nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "cvm-agent", "bench"), err
}
