package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage"
	graphdriver "go.podman.io/storage/drivers"
	"go.podman.io/storage/pkg/archive"
	"golang.org/x/sync/errgroup"

	"github.com/cc-runtime/cvm-agent/agent/image/unpack"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Progress is told while an image is fetched; calls do not overlap.
type Progress struct {
	Layer, Layers int   // 1-based
	Done, Total   int64 // signed bytes of the whole image
	Cached        bool  // this layer was already there and is verified again
}

// layer is one layer on its way into storage.
type layer struct {
	n       int
	id      string
	diffID  digest.Digest
	desc    ocispec.Descriptor
	cached  bool
	staged  *graphdriver.DriverWithDifferOutput
	result  *unpack.Result
	table   *tableWriter
	created bool
}

// Fetch brings the image into storage in one pass over each layer, or verifies
// again what is there. unwrap may be nil for a plain image. On error, nothing
// that this call added stays.
func (i *Image) Fetch(ctx context.Context, unwrap Unwrap, progress func(Progress)) (_ *Stored, err error) {
	f := &fetch{i: i, c: i.c, unwrap: unwrap, progress: progress, total: i.Size()}
	ids := chainIDs(i.diffIDs)
	for n, d := range i.manifest.Layers {
		f.layers = append(f.layers, &layer{n: n, id: ids[n], diffID: i.diffIDs[n], desc: d})
	}
	// Images that share a layer share their first one. They are fetched one
	// after the other: what one is about to publish is no stranger's to drop.
	unlock, err := i.c.bases.lock(ctx, ids[0])
	if err != nil {
		return nil, cause.Wrap(cause.DeadlineExceeded, fmt.Errorf("waiting for another image with the same base: %w", err))
	}
	defer unlock() // after cleanUp
	defer func() {
		f.cleanUp(err != nil)
	}()
	if err := f.dropUnknown(ids); err != nil {
		return nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(i.c.cfg.Parallel)
	for _, l := range f.layers {
		g.Go(func() error {
			if gctx.Err() != nil {
				return gctx.Err()
			}
			if err := f.bring(gctx, l); err != nil {
				return storageError(i.c.store.GraphRoot(), err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		if cerr := context.Cause(ctx); cerr != nil && errors.Is(err, cerr) {
			return nil, cause.Wrap(cause.DeadlineExceeded, fmt.Errorf("fetching %s: %w", i.ref, err))
		}
		return nil, cause.Wrap(cause.Internal, err)
	}
	if err := f.checkTotals(); err != nil {
		return nil, err
	}
	if err := f.publish(); err != nil {
		return nil, storageError(i.c.store.GraphRoot(), err)
	}
	return &Stored{ImageID: i.ImageID(), Ref: i.Ref(), SignedDigest: i.Digest(), c: i.c, layers: ids}, nil
}

type fetch struct {
	i        *Image
	c        *Client
	unwrap   Unwrap
	progress func(Progress)
	layers   []*layer
	total    int64
	mu       sync.Mutex
	done     int64
	told     int64
}

func (f *fetch) tell(l *layer, n int64, force bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done += n
	if f.progress == nil || !force && f.done-f.told < 1<<20 {
		return
	}
	f.told = f.done
	f.progress(Progress{Layer: l.n + 1, Layers: len(f.layers), Done: f.done, Total: f.total, Cached: l.cached})
}

// dropUnknown decides for each layer whether it is a cache hit. One in storage
// that this agent has no record of was verified by nobody: it goes, with the
// image that uses it, and is fetched again.
func (f *fetch) dropUnknown(ids []string) error {
	fresh := false
	for _, l := range f.layers {
		_, err := f.c.store.Layer(l.id)
		if err != nil && !errors.Is(err, storage.ErrLayerUnknown) {
			return storageError(f.c.store.GraphRoot(), fmt.Errorf("looking for a layer: %w", err))
		}
		rec := f.c.records.load(l.id)
		l.cached = err == nil && rec != nil && rec.DiffID == l.diffID.String() && !fresh
		fresh = fresh || !l.cached
	}
	if !fresh {
		return nil
	}
	if err := f.c.Remove(context.Background(), f.i.ImageID()); err != nil {
		return err
	}
	for n := len(ids) - 1; n >= 0 && !f.layers[n].cached; n-- {
		err := f.c.store.DeleteLayer(ids[n])
		if err != nil && !errors.Is(err, storage.ErrLayerUnknown) && !errors.Is(err, storage.ErrNotALayer) {
			return cause.New(cause.CacheTampered, "layer %s is in storage, unverified and in use: %w", ids[n], err)
		}
		f.c.records.remove(ids[n])
	}
	// Removing the image may have taken layers that were hits.
	for _, l := range f.layers {
		if _, err := f.c.store.Layer(l.id); err != nil {
			l.cached = false
		}
	}
	return nil
}

// bring verifies a cached layer or stages a new one.
func (f *fetch) bring(ctx context.Context, l *layer) error {
	if l.cached {
		f.tell(l, 0, true)
		parent := ""
		if l.n > 0 {
			parent = f.layers[l.n-1].id
		}
		if known, err := f.c.store.Layer(l.id); err != nil || known.Parent != parent {
			return cause.New(cause.CacheTampered, "layer %s in storage does not lie on %q", l.id, parent)
		}
		err := f.c.verifyLayer(ctx, l.id, f.unpackLimits())
		f.tell(l, l.desc.Size, true)
		return err
	}
	var err error
	if l.table, err = f.c.records.newTable(l.id); err != nil {
		return fmt.Errorf("keeping the file table: %w", err)
	}
	l.staged, err = f.c.store.PrepareStagedLayer(&graphdriver.ApplyDiffWithDifferOpts{}, &differ{ctx: ctx, f: f, l: l})
	if err != nil {
		return err
	}
	f.tell(l, 0, true)
	return nil
}

func (f *fetch) unpackLimits() unpack.Limits {
	l := f.i.limits
	return unpack.Limits{MaxFiles: l.MaxFiles, MaxBytes: int64(l.MaxBytes), MaxRatio: l.MaxRatio}
}

// differ is how the storage library lets others fill a staging directory
// outside of its locks.
type differ struct {
	ctx context.Context
	f   *fetch
	l   *layer
}

func (d *differ) Close() error { return nil }

func (d *differ) ApplyDiff(dest string, o *archive.TarOptions, do *graphdriver.DifferOptions) (graphdriver.DriverWithDifferOutput, error) {
	// A layer need not list its root. Storage makes it by our umask, which may be
	// tighter than what the workload's user can enter.
	if err := os.Chmod(dest, 0o555); err != nil {
		return graphdriver.DriverWithDifferOutput{}, err
	}
	out := graphdriver.DriverWithDifferOutput{Differ: d}
	if do.Format != graphdriver.DifferOutputFormatDir || o.WhiteoutFormat != archive.OverlayWhiteoutFormat ||
		o.ForceMask != nil || len(o.UIDMaps) > 0 || len(o.GIDMaps) > 0 {
		return out, cause.New(cause.StorageFailed, "the storage is set up for composefs, a force mask or ID maps: not supported")
	}
	r, err := d.stream(dest)
	if err != nil {
		return out, err
	}
	if r.DiffID != d.l.diffID.String() {
		return out, cause.New(cause.LayerMismatch, "layer %s unpacks to diff ID %s, expected %s", d.l.desc.Digest, r.DiffID, d.l.diffID)
	}
	if err := markOpaque(dest, r.Opaque); err != nil {
		return out, err
	}
	d.l.result = r
	out.Size, out.UncompressedDigest = r.Bytes, d.l.diffID
	if !encrypted(d.l.desc.MediaType) {
		out.CompressedDigest = d.l.desc.Digest
	}
	if r.RootMode != nil {
		m := os.FileMode(*r.RootMode) & os.ModePerm
		out.RootDirMode = &m
	}
	return out, nil
}

// stream runs registry → digest → decryption → confined child.
func (d *differ) stream(dest string) (*unpack.Result, error) {
	ctx, cancel := context.WithCancel(d.ctx)
	defer cancel()
	blob := d.f.i.ends[d.f.i.via].layer(ctx, d.l.desc, d.f.c.cfg.OnWait)
	a := newAhead(blob)
	defer a.close()
	var in io.Reader = &countReader{r: a, f: d.f, l: d.l}
	if encrypted(d.l.desc.MediaType) {
		var err error
		if in, err = decrypter(ctx, in, d.l.desc, d.f.unwrap); err != nil {
			return nil, err
		}
	}
	return unpack.Run(ctx, dest, d.f.unpackLimits(), in, d.l.table)
}

type countReader struct {
	r io.Reader
	f *fetch
	l *layer
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.f.tell(c.l, int64(n), false)
	return n, err
}

// checkTotals holds the sums over all layers against the policy's limits.
func (f *fetch) checkTotals() error {
	files, size := 0, int64(0)
	for _, l := range f.layers {
		if l.result != nil {
			files, size = files+l.result.Files, size+l.result.Bytes
		} else if rec := f.c.records.load(l.id); rec != nil {
			files, size = files+rec.Files, size+rec.Bytes
		}
	}
	if files > f.i.limits.MaxFiles {
		return cause.New(cause.ImageLimits, "the image has %d files, the limit is %d", files, f.i.limits.MaxFiles)
	}
	if uint64(size) > f.i.limits.MaxBytes {
		return cause.New(cause.ImageLimits, "the image unpacks to %d bytes, the limit is %d", size, f.i.limits.MaxBytes)
	}
	return nil
}

// publish makes the staged layers and then the image visible.
func (f *fetch) publish() error {
	parent := ""
	for _, l := range f.layers {
		if l.cached {
			parent = l.id
			continue
		}
		if err := l.table.commit(); err != nil {
			return err
		}
		_, err := f.c.store.ApplyStagedLayer(storage.ApplyStagedLayerOptions{
			ID: l.id, ParentLayer: parent, DiffOutput: l.staged, DiffOptions: &graphdriver.ApplyDiffWithDifferOpts{},
			LayerOptions: &storage.LayerOptions{OriginalDigest: l.staged.CompressedDigest, UncompressedDigest: l.diffID},
		})
		if err != nil {
			return fmt.Errorf("publishing a layer: %w", err)
		}
		l.staged, l.created = nil, true
		dir, err := f.c.store.DifferTarget(l.id)
		if err != nil {
			return err
		}
		st, err := os.Stat(dir)
		if err != nil {
			return err
		}
		slices.Sort(l.result.Opaque)
		rec := &record{
			Version: 1, DiffID: l.diffID.String(), Table: l.table.digest(), Files: l.result.Files,
			Bytes: l.result.Bytes, RootMode: uint32(st.Mode().Perm()), Opaque: slices.Compact(l.result.Opaque),
		}
		if err := f.c.records.save(l.id, rec); err != nil {
			return err
		}
		parent = l.id
	}
	return f.c.createImage(f.i, f.layers)
}

// cleanUp removes what is staged and, if the fetch failed, the layers that it
// created, top first; one that another image uses by now stays.
func (f *fetch) cleanUp(failed bool) {
	for _, l := range slices.Backward(f.layers) {
		if l.table != nil {
			_ = l.table.f.Cleanup()
		}
		if l.staged != nil && l.staged.Target != "" {
			if err := f.c.store.CleanupStagedLayer(l.staged); err != nil {
				f.c.cfg.Logger.Warn("removing a staged layer", "error", err)
			}
		}
		if failed && !l.cached {
			if l.created {
				if err := f.c.store.DeleteLayer(l.id); err != nil {
					f.c.cfg.Logger.Warn("removing a layer of a failed image", "error", err)
					continue
				}
			}
			f.c.records.remove(l.id)
		}
	}
}

// nameMark, before 12 digits of the ID, ends the name of an image from here.
const nameMark = ":cvm-"

// createImage writes the image record as podman's own pull does. The manifest
// of a plain image is the signed one. An encrypted one's describes what is
// stored, in terms that were verified: plain archives by their diff IDs; the
// signed manifest is kept beside it under its digest.
func (c *Client) createImage(i *Image, layers []*layer) error {
	raw, rawDigest := i.raw, i.digest
	if given := annotations(i.manifest.Annotations); i.Encrypted() || len(given) < len(i.manifest.Annotations) {
		m := ocispec.Manifest{Versioned: i.manifest.Versioned, MediaType: ocispec.MediaTypeImageManifest, Config: i.manifest.Config, Annotations: given}
		for _, l := range layers {
			size := int64(0)
			if l.result != nil {
				size = l.result.Bytes
			} else if rec := c.records.load(l.id); rec != nil {
				size = rec.Bytes
			}
			m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.diffID, Size: size})
		}
		var err error
		if raw, err = json.Marshal(m); err != nil {
			return cause.Wrap(cause.Internal, err)
		}
		rawDigest = digest.FromBytes(raw)
	}
	config := i.manifest.Config.Digest
	data := []storage.ImageBigDataOption{
		{Key: config.String(), Data: i.config, Digest: config},
		{Key: storage.ImageDigestBigDataKey, Data: raw, Digest: rawDigest},
		{Key: storage.ImageDigestManifestBigDataNamePrefix + "-" + rawDigest.String(), Data: raw, Digest: rawDigest},
	}
	if rawDigest != i.digest {
		data = append(data, storage.ImageBigDataOption{Key: storage.ImageDigestManifestBigDataNamePrefix + "-" + i.digest.String(), Data: i.raw, Digest: i.digest})
	}
	var created ocispec.Image
	if err := json.Unmarshal(i.config, &created); err != nil {
		return malformed("configuration: %w", err)
	}
	opts := &storage.ImageOptions{BigData: data, Digest: rawDigest}
	if created.Created != nil {
		opts.CreationDate = *created.Created
	}
	names := []string{i.ref.Context().Name() + nameMark + config.Encoded()[:12]}
	// A name is for people. One that another image has got does not keep this
	// one out.
	if other, err := c.store.Image(names[0]); err == nil && other.ID != i.ImageID() {
		if err := c.store.RemoveNames(other.ID, names); err != nil {
			return fmt.Errorf("taking back the name %s: %w", names[0], err)
		}
	}
	_, err := c.store.CreateImage(i.ImageID(), names, layers[len(layers)-1].id, "", opts)
	if errors.Is(err, storage.ErrDuplicateID) {
		img, gerr := c.store.Image(i.ImageID())
		if gerr == nil && img.TopLayer == layers[len(layers)-1].id {
			return c.checkRecord(i, raw)
		}
	}
	if err != nil {
		return fmt.Errorf("creating the image record: %w", err)
	}
	return nil
}

// checkRecord compares the configuration of an image that is already there with
// the signed one, and puts manifest in the place of whatever names another:
// podman takes command, environment and annotations from these.
func (c *Client) checkRecord(i *Image, manifest []byte) error {
	b, err := c.store.ImageBigData(i.ImageID(), i.manifest.Config.Digest.String())
	if err != nil || digest.FromBytes(b) != i.manifest.Config.Digest {
		return cause.New(cause.CacheTampered, "the configuration of image %s in storage is not the signed one", i.ImageID())
	}
	b, err = c.store.ImageBigData(i.ImageID(), storage.ImageDigestBigDataKey)
	if err == nil && bytes.Equal(b, manifest) {
		return nil
	}
	sum := func(b []byte) (digest.Digest, error) { return digest.FromBytes(b), nil }
	if err := c.store.SetImageBigData(i.ImageID(), storage.ImageDigestBigDataKey, manifest, sum); err != nil {
		return fmt.Errorf("putting the image's manifest right: %w", err)
	}
	return nil
}

// annotations returns those that describe. Podman before version 5 hands an
// image's annotations to the OCI runtime, where others are orders: a
// org.systemd.property.DeviceAllow opens a device.
func annotations(all map[string]string) map[string]string {
	var out map[string]string
	for k, v := range all {
		if !strings.HasPrefix(k, "org.opencontainers.image.") {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[k] = v
	}
	return out
}
