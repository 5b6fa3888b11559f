package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// hello is a static program for FROM-scratch images.
func hello(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	src := "package main\nfunc main() { println(\"hello from the image\") }\n"
	if err := os.WriteFile(dir+"/main.go", []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", dir+"/hello", dir+"/main.go")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(dir + "/hello")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func podman(t *testing.T, dir string, args ...string) (string, error) {
	t.Helper()
	conf := dir + "/containers.conf"
	text := "[containers]\ndefault_ulimits=[\"nofile=1024:1024\",\"nproc=4096:4096\",\"memlock=8388608:8388608\"]\nnetns=\"host\"\n[engine]\nruntime=\"runc\"\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("podman", append([]string{"--root", dir + "/graph", "--runroot", dir + "/run", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "--storage-driver", "overlay"}, args...)...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+conf)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func fetch1(c *Client, t testing.TB, p *published) (*Stored, error) {
	i, err := c.Resolve(ctx(t, time.Minute), p.ref)
	if err != nil {
		return nil, err
	}
	return i.Fetch(ctx(t, 5*time.Minute), p.unwrap, nil)
}

func TestLesson17_WhatRunsIsTheDigestThatWasVerified(t *testing.T) {
	reg := startRegistry(t)
	base := tarOf(t, map[string]string{"hello": hello(t), "etc/": "", "etc/old": "x"})
	top := tarOf(t, map[string]string{"etc/new": "y", "etc/.wh.old": ""})
	for name, enc := range map[string]bool{"plain": false, "encrypted": true} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "img") // podman wants short paths
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			c := client(t, dir, plain(reg))
			p := push(t, reg+"/app", enc, base, top)
			i, err := c.Resolve(ctx(t, time.Minute), p.ref)
			if err != nil {
				t.Fatal(err)
			}
			if i.Encrypted() != enc {
				t.Errorf("encrypted: %v", i.Encrypted())
			}
			if err := i.CheckEncryption("required"); (err == nil) != enc {
				t.Errorf("encryption required: %v", err)
			}
			var last Progress
			s, err := i.Fetch(ctx(t, time.Minute), p.unwrap, func(p Progress) { last = p })
			if err != nil {
				t.Fatal(err)
			}
			if last.Done != last.Total || last.Layers != 2 {
				t.Errorf("last progress %+v", last)
			}
			if s.SignedDigest != p.ref[strings.Index(p.ref, "@")+1:] {
				t.Errorf("signed digest %s", s.SignedDigest)
			}
			out, err := podman(t, dir, "run", "--rm", "--network=host", s.ImageID)
			if err != nil || !strings.Contains(out, "hello from the image") {
				t.Fatalf("podman run: %v: %s", err, out)
			}
			if out, err := podman(t, dir, "image", "inspect", "--format", "{{.Id}}", s.ImageID); err != nil || strings.TrimSpace(out) != s.ImageID {
				t.Errorf("podman inspect: %v: %s", err, out)
			}
			m, unmount, err := s.Mount(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(m + "/etc/old"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("whiteout is not effective: %v", err)
			}
			if err := unmount(); err != nil {
				t.Error(err)
			}
			f, err := s.FileDigests()
			if err != nil || len(f) != 2 || f["etc/new"] == [32]byte{} {
				t.Errorf("file digests %v (%v)", f, err)
			}
			if s, err = i.Fetch(ctx(t, time.Minute), nil, func(p Progress) { last = p }); err != nil || !last.Cached {
				t.Errorf("second fetch: %v, %+v", err, last)
			}
			if err := c.Remove(t.Context(), s.ImageID); err != nil {
				t.Error(err)
			}
			assertEmpty(t, c)
		})
	}
}

func TestLesson16_TamperedCacheIsRefused(t *testing.T) {
	reg := startRegistry(t)
	p := push(t, reg+"/app", false, tarOf(t, map[string]string{"hello": "x", "etc/": "", "etc/a": "b"}))
	for name, tamper := range map[string]func(t *testing.T, diff string){
		"a changed byte": func(t *testing.T, d string) { must(t, os.WriteFile(d+"/etc/a", []byte("c"), 0o755)) },
		"a file more":    func(t *testing.T, d string) { must(t, os.WriteFile(d+"/etc/b", nil, 0o644)) },
		"a set-id bit":   func(t *testing.T, d string) { must(t, os.Chmod(d+"/hello", 0o4755|os.ModeSetuid)) },
		"a directory made opaque": func(t *testing.T, d string) {
			must(t, unix.Lsetxattr(d+"/etc", opaqueXattr, []byte("y"), 0))
		},
		"the root made writable": func(t *testing.T, d string) { must(t, os.Chmod(d, 0o777)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c := client(t, dir, plain(reg))
			s, err := fetch1(c, t, p)
			if err != nil {
				t.Fatal(err)
			}
			diff, err := c.store.DifferTarget(s.layers[0])
			if err != nil {
				t.Fatal(err)
			}
			tamper(t, diff)
			if _, err := fetch1(c, t, p); cause.Of(err) != cause.CacheTampered {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("a layer that this agent never verified is fetched again", func(t *testing.T) {
		c := client(t, t.TempDir(), plain(reg))
		s, err := fetch1(c, t, p)
		if err != nil {
			t.Fatal(err)
		}
		diff, _ := c.store.DifferTarget(s.layers[0])
		must(t, os.WriteFile(diff+"/etc/a", []byte("evil"), 0o644))
		c.records.remove(s.layers[0])
		if _, err = fetch1(c, t, p); err != nil {
			t.Fatal(err)
		}
		diff, _ = c.store.DifferTarget(s.layers[0])
		if b, _ := os.ReadFile(diff + "/etc/a"); string(b) != "b" {
			t.Errorf("content %q", b)
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func isLayer(r *http.Request, p *published) bool {
	return strings.Contains(r.URL.Path, "/blobs/") && p.priv[digest.Digest(filepath.Base(r.URL.Path))] != nil
}

func TestALyingRegistryIsRefusedAndLeavesNothing(t *testing.T) {
	reg := startRegistry(t)
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	p := push(t, reg+"/app", true, tarOf(t, map[string]string{"first": "ok"}), tarOf(t, map[string]string{"hello": string(big)}))
	var last digest.Digest
	other := liar(t, reg, func(w http.ResponseWriter, r *http.Request, h http.Handler) { h.ServeHTTP(w, r) })
	blob := func(r *http.Request) []byte {
		resp, err := http.Get("http://" + reg + r.URL.Path)
		if err != nil {
			return nil
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return b
	}
	for name, c := range map[string]struct {
		code cause.Code
		lie  func(w http.ResponseWriter, r *http.Request, h http.Handler)
	}{
		"a layer with a flipped bit": {cause.LayerMismatch, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			b := blob(r)
			b[len(b)/2] ^= 1
			_, _ = w.Write(b)
		}},
		"a layer cut off": {cause.LayerTruncated, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			b := blob(r)
			_, _ = w.Write(b[:len(b)-1])
		}},
		"a layer cut off without a length": {cause.LayerTruncated, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			b := blob(r)
			w.(http.Flusher).Flush()
			_, _ = w.Write(b[:len(b)-1])
		}},
		"an endless layer": {cause.LayerTooLarge, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			_, _ = w.Write(blob(r))
			w.(http.Flusher).Flush()
			for {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}},
		"a redirect elsewhere": {cause.RegistryRedirect, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			http.Redirect(w, r, "http://"+other+r.URL.Path, http.StatusTemporaryRedirect)
		}},
		"a layer that is gone": {cause.ImageNotFound, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			http.NotFound(w, r)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			host := liar(t, reg, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
				if isLayer(r, p) && digest.Digest(filepath.Base(r.URL.Path)) == last {
					c.lie(w, r, h)
					return
				}
				h.ServeHTTP(w, r)
			})
			cl := client(t, t.TempDir(), plain(host))
			i, err := cl.Resolve(ctx(t, time.Minute), at(p.ref, host))
			if err != nil {
				t.Fatal(err)
			}
			last = i.manifest.Layers[1].Digest
			_, err = i.Fetch(ctx(t, time.Minute), p.unwrap, nil)
			if cause.Of(err) != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
			assertEmpty(t, cl)
		})
	}
	t.Run("a manifest with another digest", func(t *testing.T) {
		host := liar(t, reg, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			if strings.Contains(r.URL.Path, "/manifests/") {
				b := append(blob(r), ' ')
				_, _ = w.Write(b)
				return
			}
			h.ServeHTTP(w, r)
		})
		if _, err := client(t, t.TempDir(), plain(host)).Resolve(ctx(t, time.Minute), at(p.ref, host)); cause.Of(err) != cause.ManifestMismatch {
			t.Errorf("got %v", err)
		}
	})
	t.Run("an endless manifest", func(t *testing.T) {
		host := liar(t, reg, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
			if strings.Contains(r.URL.Path, "/manifests/") {
				for {
					if _, err := w.Write(make([]byte, 1<<16)); err != nil {
						return
					}
				}
			}
			h.ServeHTTP(w, r)
		})
		if _, err := client(t, t.TempDir(), plain(host)).Resolve(ctx(t, time.Minute), at(p.ref, host)); cause.Of(err) != cause.ManifestMalformed {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the wrong key", func(t *testing.T) {
		cl := client(t, t.TempDir(), plain(reg))
		i, err := cl.Resolve(ctx(t, time.Minute), p.ref)
		if err != nil {
			t.Fatal(err)
		}
		_, err = i.Fetch(ctx(t, time.Minute), func(ctx context.Context, a map[string]string, d ocispec.Descriptor) ([]byte, error) {
			return p.unwrap(ctx, a, i.manifest.Layers[1])
		}, nil)
		if c := cause.Of(err); c != cause.LayerDecrypt {
			t.Errorf("got %v", err)
		}
		assertEmpty(t, cl)
	})
	t.Run("a key that the broker refuses", func(t *testing.T) {
		cl := client(t, t.TempDir(), plain(reg))
		i, err := cl.Resolve(ctx(t, time.Minute), p.ref)
		if err != nil {
			t.Fatal(err)
		}
		_, err = i.Fetch(ctx(t, time.Minute), func(context.Context, map[string]string, ocispec.Descriptor) ([]byte, error) {
			return nil, cause.New(cause.KeyRefused, "no")
		}, nil)
		if cause.Of(err) != cause.KeyRefused {
			t.Errorf("got %v", err)
		}
		assertEmpty(t, cl)
	})
	t.Run("an image that is not there", func(t *testing.T) {
		_, err := client(t, t.TempDir(), plain(reg)).Resolve(ctx(t, time.Minute), reg+"/app@sha256:"+strings.Repeat("0", 64))
		if cause.Of(err) != cause.ImageNotFound {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a tag", func(t *testing.T) {
		if _, err := client(t, t.TempDir(), plain(reg)).Resolve(ctx(t, time.Minute), reg+"/app:latest"); cause.Of(err) != cause.PolicyImageNotByDigest {
			t.Errorf("got %v", err)
		}
	})
}

func TestLesson20_ARegistryThatIsDownIsWaitedForVisibly(t *testing.T) {
	reg := startRegistry(t)
	p := push(t, reg+"/app", false, tarOf(t, map[string]string{"hello": strings.Repeat("x", 1<<20)}))
	start := time.Now()
	var breaks atomic.Int32
	host := liar(t, reg, func(w http.ResponseWriter, r *http.Request, h http.Handler) {
		if time.Since(start) < 2*time.Second {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		if strings.Contains(r.URL.Path, "/blobs/") && breaks.Add(1) == 2 {
			panic(http.ErrAbortHandler) // reset in the middle
		}
		h.ServeHTTP(w, r)
	})
	var waits atomic.Int32
	c := client(t, t.TempDir(), func(cfg *Config) {
		plain(host)(cfg)
		cfg.OnWait = func(err error, _ time.Duration) { waits.Add(1) }
	})
	i, err := c.Resolve(ctx(t, time.Minute), at(p.ref, host))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := i.Fetch(ctx(t, time.Minute), nil, nil); err != nil {
		t.Fatal(err)
	}
	if waits.Load() < 3 || time.Since(start) < 2*time.Second {
		t.Errorf("%d waits in %v", waits.Load(), time.Since(start))
	}
	t.Run("until the deadline", func(t *testing.T) {
		c := client(t, t.TempDir(), plain("127.0.0.1:1"))
		if _, err := c.Resolve(ctx(t, 3*time.Second), at(p.ref, "127.0.0.1:1")); cause.Of(err) != cause.RegistryUnavailable || !strings.Contains(err.Error(), "refused") {
			t.Errorf("got %v", err)
		}
	})
}

func TestLesson18_AMirrorChangesNothingButTheRoute(t *testing.T) {
	reg := startRegistry(t)
	p := push(t, reg+"/app", false, tarOf(t, map[string]string{"hello": "x"}))
	var hits atomic.Int32
	mirror := liar(t, reg, func(w http.ResponseWriter, r *http.Request, h http.Handler) { hits.Add(1); h.ServeHTTP(w, r) })
	ref := at(p.ref, "registry.example")
	for name, mirrors := range map[string][]string{"a mirror that works": {mirror}, "the first one is down": {"127.0.0.1:1", mirror}} {
		t.Run(name, func(t *testing.T) {
			c := client(t, t.TempDir(), func(cfg *Config) {
				plain(mirror, "127.0.0.1:1")(cfg)
				cfg.Registries = append(cfg.Registries, policy.Registry{Host: "registry.example", Mirrors: mirrors})
			})
			i, err := c.Resolve(ctx(t, time.Minute), ref)
			if err != nil {
				t.Fatal(err)
			}
			src, err := i.source(t.Context(), i.ends[i.via])
			if err != nil || src.Repository != "registry.example/app" {
				t.Errorf("signatures would be checked for %q (%v)", src.Repository, err)
			}
			if _, err := i.Fetch(ctx(t, time.Minute), nil, nil); err != nil || hits.Load() == 0 {
				t.Errorf("%v, %d hits", err, hits.Load())
			}
		})
	}
}

func TestLesson12_AnAnnotationNamesNoHost(t *testing.T) {
	reg := startRegistry(t)
	p := push(t, reg+"/app", true, tarOf(t, map[string]string{"hello": "x"}))
	c := client(t, t.TempDir(), plain(reg))
	i, err := c.Resolve(ctx(t, time.Minute), p.ref)
	if err != nil {
		t.Fatal(err)
	}
	for h := range i.ends[0].gate.hosts {
		if h != reg {
			t.Errorf("host %q is reachable", h)
		}
	}
	req, _ := http.NewRequest(http.MethodGet, "http://evil.example/", nil)
	if _, err := i.ends[0].gate.RoundTrip(req); cause.Of(err) != cause.RegistryRedirect {
		t.Errorf("got %v", err)
	}
	if _, err := i.Fetch(ctx(t, time.Minute), p.unwrap, nil); err != nil {
		t.Error(err)
	}
}

func TestLesson22_LimitsEachWithTheirOwnCause(t *testing.T) {
	reg := startRegistry(t)
	many := map[string]string{}
	for n := range 300 {
		many[fmt.Sprintf("f%d", n)] = ""
	}
	small := tarOf(t, map[string]string{"a": "b"})
	for name, c := range map[string]struct {
		layers [][]byte
		limits policy.ImageLimits
	}{
		"too many layers":      {[][]byte{small, small, small}, policy.ImageLimits{MaxLayers: 2}},
		"too many files":       {[][]byte{tarOf(t, many)}, policy.ImageLimits{MaxFiles: 299}},
		"a decompression bomb": {[][]byte{tarOf(t, map[string]string{"zero": strings.Repeat("\x00", 32<<20)})}, policy.ImageLimits{MaxRatio: 100}},
		"too many bytes":       {[][]byte{tarOf(t, map[string]string{"zero": strings.Repeat("\x00", 2<<20)})}, policy.ImageLimits{MaxBytes: 1 << 20, MaxRatio: 10000}},
	} {
		t.Run(name, func(t *testing.T) {
			p := push(t, reg+"/app", false, c.layers...)
			cl := client(t, t.TempDir(), plain(reg))
			i, err := cl.Resolve(ctx(t, time.Minute), p.ref)
			if err != nil {
				t.Fatal(err)
			}
			if err = i.Limit(c.limits); err == nil {
				_, err = i.Fetch(ctx(t, time.Minute), nil, nil)
			}
			if cause.Of(err) != cause.ImageLimits {
				t.Errorf("got %v", err)
			}
			assertEmpty(t, cl)
		})
	}
}

func TestLesson21_AFullStorageIsNamedWithItsSizes(t *testing.T) {
	reg := startRegistry(t)
	var body strings.Builder
	for n := range 400000 {
		fmt.Fprintf(&body, "%d-%x\n", n, n*2654435761)
	}
	p := push(t, reg+"/app", false, tarOf(t, map[string]string{"a": body.String(), "b": body.String(), "c": body.String()}))
	dir := t.TempDir()
	must(t, exec.Command("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", dir).Run())
	t.Cleanup(func() { _ = exec.Command("umount", "-l", dir).Run() })
	c := client(t, dir, plain(reg))
	_, err := fetch1(c, t, p)
	if cause.Of(err) != cause.StorageFull || !strings.Contains(err.Error(), "MiB") {
		t.Errorf("got %v", err)
	}
	assertEmpty(t, c)
}
