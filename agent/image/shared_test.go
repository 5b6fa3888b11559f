package image

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage"
	"golang.org/x/sync/errgroup"
)

// The workloads of one policy are fetched side by side, and images are built on
// the same base.
func TestImagesThatShareLayersAreFetchedSideBySide(t *testing.T) {
	reg := startRegistry(t)
	base := tarOf(t, map[string]string{"base": strings.Repeat("b", 1<<20)})
	var all []*published
	for n := range 3 {
		all = append(all, push(t, fmt.Sprintf("%s/app%d", reg, n), false, base, tarOf(t, map[string]string{"own": fmt.Sprint(n)})))
	}
	all = append(all, all[0]) // two workloads of one image
	for range 3 {
		c := client(t, t.TempDir(), plain(reg))
		var g errgroup.Group
		for _, p := range all {
			g.Go(func() error {
				s, err := fetch1(c, t, p)
				if err != nil {
					return err
				}
				_, err = s.FileDigests()
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		if images, _ := c.store.Images(); len(images) != 3 {
			t.Errorf("%d images, expected 3", len(images))
		}
		for _, p := range all { // every layer has kept its record: a hit
			if s, err := fetch1(c, t, p); err != nil {
				t.Error(err)
			} else if _, err := s.FileDigests(); err != nil {
				t.Error(err)
			}
		}
	}
}

// withAnnotations publishes an image whose manifest carries annotations.
func withAnnotations(t *testing.T, repo string, a map[string]string) *published {
	t.Helper()
	raw := tarOf(t, map[string]string{"a": "b"})
	layer := static.NewLayer(gzipped(t, raw), types.OCILayer)
	config, err := json.Marshal(v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{
		Type: "layers", DiffIDs: []v1.Hash{{Algorithm: "sha256", Hex: digest.FromBytes(raw).Encoded()}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	conf := static.NewLayer(config, types.OCIConfigJSON)
	of := func(l v1.Layer, mt types.MediaType) v1.Descriptor {
		h, _ := l.Digest()
		size, _ := l.Size()
		return v1.Descriptor{MediaType: mt, Digest: h, Size: size}
	}
	return &published{ref: pushManifest(t, repo, v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Annotations: a,
		Config: of(conf, types.OCIConfigJSON), Layers: []v1.Descriptor{of(layer, types.OCILayer)},
	}, []v1.Layer{conf, layer})}
}

func storedManifest(t *testing.T, c *Client, id string) ocispec.Manifest {
	t.Helper()
	raw, err := c.store.ImageBigData(id, storage.ImageDigestBigDataKey)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// Podman before version 5 hands an image's annotations to the OCI runtime, for
// which some are orders: a systemd property can open a device.
func TestAnImagesAnnotationsAreNoOrdersToTheRuntime(t *testing.T) {
	reg := startRegistry(t)
	p := withAnnotations(t, reg+"/app", map[string]string{
		"org.systemd.property.DeviceAllow": "[('/dev/tpmrm0', 'rw')]", "run.oci.handler": "krun",
		ocispec.AnnotationTitle: "an app",
	})
	c := client(t, t.TempDir(), plain(reg))
	s, err := fetch1(c, t, p)
	if err != nil {
		t.Fatal(err)
	}
	if a := storedManifest(t, c, s.ImageID).Annotations; len(a) != 1 || a[ocispec.AnnotationTitle] == "" {
		t.Errorf("annotations handed over: %v", a)
	}
	if s.SignedDigest != p.ref[strings.Index(p.ref, "@")+1:] {
		t.Errorf("signed digest %s", s.SignedDigest)
	}

	// A record that says otherwise, as podman's own pull or a hostile disk
	// leaves it, is put right before the image is used.
	evil := storedManifest(t, c, s.ImageID)
	evil.Annotations = map[string]string{"run.oci.handler": "krun"}
	raw, _ := json.Marshal(evil)
	if err := c.store.SetImageBigData(s.ImageID, storage.ImageDigestBigDataKey, raw, func(b []byte) (digest.Digest, error) { return digest.FromBytes(b), nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := fetch1(c, t, p); err != nil {
		t.Fatal(err)
	}
	if a := storedManifest(t, c, s.ImageID).Annotations; len(a) != 1 || a[ocispec.AnnotationTitle] == "" {
		t.Errorf("annotations of a cached image: %v", a)
	}
}

// A kill between the publication of a layer and its record.
func TestALayerPublishedWithoutItsRecordIsPruned(t *testing.T) {
	reg := startRegistry(t)
	p := push(t, reg+"/app", false, tarOf(t, map[string]string{"a": "b"}))
	c := client(t, t.TempDir(), plain(reg))
	s, err := fetch1(c, t, p)
	if err != nil {
		t.Fatal(err)
	}
	must(t, c.Remove(t.Context(), s.ImageID))
	if _, err := c.store.CreateLayer(s.layers[0], "", nil, "", false, nil); err != nil {
		t.Fatal(err)
	}
	must(t, os.WriteFile(c.records.table(s.layers[0]), nil, 0o600))
	if err := os.WriteFile(c.records.dir+"/."+s.layers[0]+".table42", nil, 0o600); err != nil { // a spool that was cut off
		t.Fatal(err)
	}
	if err := c.PruneUncommitted(ctx(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	assertEmpty(t, c)
}
