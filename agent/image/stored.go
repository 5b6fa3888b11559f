package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"go.podman.io/storage"

	"github.com/cc-runtime/cvm-agent/agent/image/filetable"
	"github.com/cc-runtime/cvm-agent/agent/image/unpack"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// verifyLayer reads a published layer again, in a confined child, and compares
// it with what was recorded when its signed digests had been checked.
func (c *Client) verifyLayer(ctx context.Context, id string, l unpack.Limits) error {
	rec := c.records.load(id)
	if rec == nil {
		return cause.New(cause.CacheTampered, "layer %s has no record", id)
	}
	dir, err := c.store.DifferTarget(id)
	if err != nil {
		return fmt.Errorf("finding a layer: %w", err)
	}
	tampered := func(what string) error {
		return cause.New(cause.CacheTampered, "layer %s in storage is not what was verified: %s", id, what)
	}
	sum := sha256.New()
	if _, err := unpack.Walk(ctx, dir, l, sum); err != nil {
		if ctx.Err() == nil && cause.Of(err) == cause.LayerMalformed {
			return tampered(err.Error())
		}
		return err
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != rec.Table {
		return tampered("its files have digest " + got + ", expected " + rec.Table)
	}
	opaque, err := overlayMarks(dir)
	if err != nil {
		return tampered(err.Error())
	}
	if !slices.Equal(opaque, rec.Opaque) {
		return tampered("other directories are opaque")
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if m := uint32(st.Mode().Perm()); m != rec.RootMode {
		return tampered(fmt.Sprintf("its root has mode %o, expected %o", m, rec.RootMode))
	}
	return nil
}

// Stored is a verified image in podman's storage.
type Stored struct {
	ImageID      string // the configuration's digest, 64 hex digits: what podman calls the image
	Ref          string // the policy's reference
	SignedDigest string // sha256:… of the manifest that was signed
	c            *Client
	layers       []string
}

// Mount mounts the image read-only and returns where.
func (s *Stored) Mount(ctx context.Context) (dir string, unmount func() error, err error) {
	if err := ctx.Err(); err != nil {
		return "", nil, cause.Wrap(cause.DeadlineExceeded, err)
	}
	dir, err = s.c.store.MountImage(s.ImageID, nil, "")
	if err != nil {
		return "", nil, storageError("", fmt.Errorf("mounting the image: %w", err))
	}
	return dir, func() error {
		_, err := s.c.store.UnmountImage(s.ImageID, true)
		return err
	}, nil
}

// FileDigests returns the SHA-256 of every regular file of the image by path
// (relative, clean), as it was computed while unpacking: layers merged,
// whiteouts applied.
func (s *Stored) FileDigests() (map[string][32]byte, error) {
	out := map[string][32]byte{}
	for _, id := range s.layers {
		own, hidden := map[string][32]byte{}, map[string]bool{}
		rec, err := s.c.readTable(id, func(e filetable.Entry) {
			if e.Type == filetable.Regular {
				own[e.Path] = e.SHA256
			}
			if e.Type != filetable.Dir {
				hidden[e.Path] = true
			} else {
				delete(out, e.Path) // a directory in place of a file
			}
		})
		if err != nil {
			return nil, err
		}
		for _, d := range rec.Opaque {
			hidden[d] = true
		}
		for p := range out {
			for d := p; ; d = path.Dir(d) {
				if hidden[d] {
					delete(out, p)
				}
				if d == "." {
					break
				}
			}
		}
		maps.Copy(out, own)
	}
	return out, nil
}

// readTable reads a layer's recorded table, whose digest it checks.
func (c *Client) readTable(id string, yield func(filetable.Entry)) (*record, error) {
	rec := c.records.load(id)
	if rec == nil {
		return nil, cause.New(cause.CacheTampered, "layer %s has no record", id)
	}
	f, err := os.Open(c.records.table(id))
	if err != nil {
		return nil, storageError("", err)
	}
	defer f.Close()
	sum := sha256.New()
	err = filetable.Read(f, rec.Files, func(line []byte, e filetable.Entry) error {
		sum.Write(line)
		yield(e)
		return nil
	})
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); err != nil || got != rec.Table {
		return nil, cause.New(cause.CacheTampered, "the file table of layer %s is not the recorded one", id)
	}
	return rec, nil
}

// Remove removes the image and the layers that only it uses, with their
// records. An image that is not there is no error.
func (c *Client) Remove(ctx context.Context, imageID string) error {
	if err := ctx.Err(); err != nil {
		return cause.Wrap(cause.DeadlineExceeded, err)
	}
	layers, err := c.store.DeleteImage(imageID, true)
	if errors.Is(err, storage.ErrImageUnknown) || errors.Is(err, storage.ErrNotAnImage) {
		return nil
	}
	if err != nil {
		return cause.Wrap(cause.StorageFailed, fmt.Errorf("removing image %s: %w", imageID, err))
	}
	for _, l := range layers {
		c.records.remove(l)
	}
	return nil
}

// RemoveAll removes every image that a client with this state directory has put
// into storage under its name. Others, and what podman pulled, stay.
func (c *Client) RemoveAll(ctx context.Context) error {
	images, err := c.store.Images()
	if err != nil {
		return storageError("", err)
	}
	for _, i := range images {
		ours := slices.ContainsFunc(i.Names, func(n string) bool { return strings.HasSuffix(n, nameMark+i.ID[:12]) })
		if ours && c.records.load(i.TopLayer) != nil {
			err = errors.Join(err, c.Remove(ctx, i.ID))
		}
	}
	return err
}

// PruneUncommitted removes what a killed fetch left: staging directories, and
// recorded layers that no image uses. It must not run beside a fetch.
func (c *Client) PruneUncommitted(ctx context.Context) error {
	staging := filepath.Join(c.store.GraphRoot(), "overlay", "staging")
	if dirs, err := os.ReadDir(staging); err == nil {
		for _, d := range dirs {
			if err := os.RemoveAll(filepath.Join(staging, d.Name())); err != nil {
				return storageError("", err)
			}
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return storageError("", err)
	}
	known, err := os.ReadDir(c.records.dir)
	if err != nil {
		return storageError("", err)
	}
	layers, err := c.store.Layers()
	if err != nil {
		return storageError("", err)
	}
	parents, tops := map[string]string{}, map[string]bool{}
	for _, l := range layers {
		parents[l.ID] = l.Parent
	}
	images, err := c.store.Images()
	if err != nil {
		return storageError("", err)
	}
	for _, i := range images {
		for l := i.TopLayer; l != ""; l = parents[l] {
			tops[l] = true
		}
	}
	for again := true; again && ctx.Err() == nil; { // children before parents
		again = false
		for _, e := range known {
			// A table without its record is of a layer that a kill left between
			// its publication and its record; other names are cut-off spools.
			id, known := strings.CutSuffix(e.Name(), ".json")
			if !known {
				id, known = strings.CutSuffix(e.Name(), ".table")
			}
			if !known {
				_ = os.Remove(filepath.Join(c.records.dir, e.Name()))
				continue
			}
			_, there := parents[id]
			if tops[id] {
				continue
			}
			if there {
				if c.store.DeleteLayer(id) != nil {
					continue
				}
				delete(parents, id)
				again = true
			}
			c.records.remove(id)
		}
	}
	return nil
}
