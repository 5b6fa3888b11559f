package image

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestLesson19_MemoryStaysBoundedForALayerOf1GB fetches in a process of its
// own and adds its peak to the largest of its children's: more than they ever
// really use together.
func TestLesson19_MemoryStaysBoundedForALayerOf1GB(t *testing.T) {
	if ref := os.Getenv("CVM_TEST_FETCH"); ref != "" {
		c := client(t, t.TempDir(), plain(strings.Split(ref, "/")[0]))
		if _, err := fetch1(c, t, &published{ref: ref}); err != nil {
			t.Fatal(err)
		}
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(status), "VmHWM:")
		own, err := strconv.Atoi(strings.Fields(rest)[0])
		if err != nil {
			t.Fatal(err)
		}
		var ru unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &ru); err != nil {
			t.Fatal(err)
		}
		fmt.Printf("peak %d %d KiB\n", own, ru.Maxrss)
		return
	}
	dir := t.TempDir()
	f, err := os.Create(dir + "/blob")
	if err != nil {
		t.Fatal(err)
	}
	blob, diff := sha256.New(), sha256.New()
	zw, _ := gzip.NewWriterLevel(io.MultiWriter(f, blob), gzip.NoCompression)
	tw := tar.NewWriter(io.MultiWriter(zw, diff))
	rng := rand.NewChaCha8([32]byte{1})
	const files, size = 64, 16 << 20
	for n := range files {
		must(t, tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("f%d", n), Typeflag: tar.TypeReg, Mode: 0o644, Size: size}))
		if _, err := io.CopyN(tw, rng, size); err != nil {
			t.Fatal(err)
		}
	}
	must(t, tw.Close())
	must(t, zw.Close())
	st, err := f.Stat()
	must(t, err)
	must(t, f.Close())

	blobs := map[string][]byte{}
	add := func(v any) ocispec.Descriptor {
		raw, err := json.Marshal(v)
		must(t, err)
		d := digest.FromBytes(raw)
		blobs[d.String()] = raw
		return ocispec.Descriptor{Digest: d, Size: int64(len(raw)), MediaType: ocispec.MediaTypeImageConfig}
	}
	config := add(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.NewDigest(digest.SHA256, diff)}},
	})
	layer := digest.NewDigest(digest.SHA256, blob)
	m := add(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: string(types.OCIManifestSchema1), Config: config,
		Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: layer, Size: st.Size()}},
	})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		last := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		if b, ok := blobs[last]; ok {
			_, _ = w.Write(b)
		} else if last == layer.String() {
			http.ServeFile(w, r, dir+"/blob")
		}
	}))
	defer s.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run", "TestLesson19_")
	cmd.Env = append(os.Environ(), "CVM_TEST_FETCH="+strings.TrimPrefix(s.URL, "http://")+"/big/image@"+m.Digest.String())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var own, child int
	if _, err := fmt.Sscanf(string(out), "peak %d %d KiB", &own, &child); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("peak: %d MiB and its child's %d MiB", own>>10, child>>10)
	if own+child > 100<<10 {
		t.Errorf("peak memory of %d KiB and %d KiB, the bar is 100 MiB", own, child)
	}
}
