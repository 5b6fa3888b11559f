package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containers/ocicrypt/blockcipher"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cc-runtime/cvm-agent/policy"
)

func TestMain(m *testing.M) {
	Reexec()
	os.Exit(m.Run())
}

// tool finds a stock tool that `make deps` has installed.
func tool(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("CVM_TOOLS")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			t.Fatal(err)
		}
		dir = filepath.Join(home, ".cache/cvm-agent/tools")
	}
	p := filepath.Join(dir, "bin", name)
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v: run make deps", err)
	}
	return p
}

// startRegistry runs the stock registry and returns its host:port.
func startRegistry(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	conf := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp: {addr: %q}\n", dir, addr)
	if err := os.WriteFile(dir+"/config.yml", []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "registry"), "serve", dir+"/config.yml")
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for range 600 {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return addr
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("registry does not come up")
	return ""
}

func tarOf(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for n, body := range files {
		h := &tar.Header{Name: n, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(body))}
		if strings.HasSuffix(n, "/") {
			h.Typeflag, h.Size = tar.TypeDir, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// published is an image in a registry.
type published struct {
	ref  string
	priv map[digest.Digest][]byte // private options by encrypted layer digest
}

func (p *published) unwrap(_ context.Context, _ map[string]string, d ocispec.Descriptor) ([]byte, error) {
	k, ok := p.priv[d.Digest]
	if !ok {
		return nil, fmt.Errorf("no key for %s", d.Digest)
	}
	return bytes.Clone(k), nil
}

// push publishes an image of the given tar layers.
func push(t testing.TB, repo string, encrypt bool, layers ...[]byte) *published {
	t.Helper()
	p := &published{priv: map[digest.Digest][]byte{}}
	cfg := v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"}, Config: v1.Config{Cmd: []string{"/hello"}}}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	blobs := []v1.Layer{}
	for _, raw := range layers {
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, v1.Hash{Algorithm: "sha256", Hex: digest.FromBytes(raw).Encoded()})
		data, mt, ann := gzipped(t, raw), types.OCILayer, map[string]string(nil)
		if encrypt {
			plain := digest.FromBytes(data)
			h, err := blockcipher.NewLayerBlockCipherHandler()
			if err != nil {
				t.Fatal(err)
			}
			r, fin, err := h.Encrypt(bytes.NewReader(data), blockcipher.AES256CTR)
			if err != nil {
				t.Fatal(err)
			}
			if data, err = io.ReadAll(r); err != nil {
				t.Fatal(err)
			}
			opts, err := fin()
			if err != nil {
				t.Fatal(err)
			}
			opts.Private.Digest = plain
			pub, _ := json.Marshal(opts.Public)
			priv, _ := json.Marshal(opts.Private)
			p.priv[digest.FromBytes(data)] = priv
			ann = map[string]string{
				pubOptsAnnotation: base64.StdEncoding.EncodeToString(pub),
				"org.opencontainers.image.enc.keys.provider.attestation-agent": base64.StdEncoding.EncodeToString([]byte(`{"kid":"kbs://evil.example/a/b/c"}`)),
			}
			mt += encSuffix
		}
		l := static.NewLayer(data, mt)
		h, _ := l.Digest()
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: mt, Digest: h, Size: int64(len(data)), Annotations: ann})
		blobs = append(blobs, l)
	}
	raw, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	conf := static.NewLayer(raw, types.OCIConfigJSON)
	h, _ := conf.Digest()
	m.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: h, Size: int64(len(raw))}
	p.ref = pushManifest(t, repo, m, append(blobs, conf))
	return p
}

type rawManifest []byte

func (r rawManifest) RawManifest() ([]byte, error)        { return r, nil }
func (r rawManifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

func pushManifest(t testing.TB, repo string, m v1.Manifest, blobs []v1.Layer) string {
	t.Helper()
	r, err := name.NewRepository(repo, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blobs {
		if err := remote.WriteLayer(r, b); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(raw).String()
	if err := remote.Put(r.Digest(d), rawManifest(raw)); err != nil {
		t.Fatal(err)
	}
	return repo + "@" + d
}

// client opens a storage of its own in dir.
func client(t testing.TB, dir string, change func(*Config)) *Client {
	t.Helper()
	cfg := Config{GraphRoot: dir + "/graph", RunRoot: dir + "/run", StateDir: dir + "/state", StallsAfter: 2 * time.Second}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := c.store.Shutdown(true); err != nil {
			t.Error(err)
		}
	})
	return c
}

func plain(hosts ...string) func(*Config) {
	return func(c *Config) {
		for _, h := range hosts {
			c.Registries = append(c.Registries, policy.Registry{Host: h, PlainHTTP: true})
		}
	}
}

// empty asserts that a storage has no residue.
func assertEmpty(t *testing.T, c *Client) {
	t.Helper()
	images, _ := c.store.Images()
	layers, _ := c.store.Layers()
	staged, _ := os.ReadDir(filepath.Join(c.store.GraphRoot(), "overlay/staging"))
	recs, _ := os.ReadDir(c.records.dir)
	if len(images)+len(layers)+len(staged)+len(recs) > 0 {
		t.Errorf("residue: %d images, %d layers, %d staged, records %v", len(images), len(layers), len(staged), recs)
	}
}

// liar puts a proxy in front of a registry that lies as told.
func liar(t *testing.T, registry string, lie func(w http.ResponseWriter, r *http.Request, honest http.Handler)) string {
	t.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { lie(w, r, proxy) }))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// at moves a reference to another host.
func at(ref, host string) string {
	_, rest, _ := strings.Cut(ref, "/")
	return host + "/" + rest
}

func ctx(t testing.TB, d time.Duration) context.Context {
	c, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return c
}
