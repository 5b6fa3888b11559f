package unpack

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"hash/maphash"
	"io"
	"path"
	"strings"
	"time"

	"go.podman.io/storage/pkg/archive"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// pathKey stands for a path in a map: 16 bytes under random seeds, so that a
// million entries fit in memory and nobody can aim a collision.
type pathKey [2]uint64

// filter reads a layer's tar, judges each entry, digests each regular file and
// writes the tar again for the unpacker: in one form (PAX, no sparse files, no
// times but the modification time), without opaque markers, which are for the
// caller to set, and without attributes that a layer must not have.
type filter struct {
	limits       Limits
	seeds        [2]maphash.Seed
	digests      map[pathKey][32]byte // of regular files, last entry wins
	links        map[pathKey]struct{} // paths that are, or once were, symbolic links
	opaque       []string
	rootMode     *uint32
	throughLinks bool // some entry's path leads through a symbolic link
	lastDir      string
}

func newFilter(l Limits) *filter {
	return &filter{
		limits:  l,
		seeds:   [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()},
		digests: map[pathKey][32]byte{}, links: map[pathKey]struct{}{},
	}
}

func (f *filter) key(p string) pathKey {
	return pathKey{maphash.String(f.seeds[0], p), maphash.String(f.seeds[1], p)}
}

func malformed(format string, args ...any) error {
	return cause.New(cause.LayerMalformed, format, args...)
}

func (f *filter) run(in io.Reader, out io.Writer) error {
	tr, tw := tar.NewReader(in), tar.NewWriter(out)
	buf := make([]byte, chunkSize)
	sum := sha256.New()
	files, logical := 0, int64(0)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return keepOwn(err, "tar")
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if files++; files > f.limits.MaxFiles {
			return cause.New(cause.ImageLimits, "the layer has more than %d files", f.limits.MaxFiles)
		}
		// Sparse files have a size that their archive does not.
		if h.Size < 0 || h.Size > f.limits.MaxBytes-logical {
			return cause.New(cause.ImageLimits, "the layer's files have more than %d bytes", f.limits.MaxBytes)
		}
		logical += h.Size
		n, err := f.entry(h)
		if err != nil {
			return err
		}
		if n == nil {
			continue
		}
		if err := tw.WriteHeader(n); err != nil {
			return keepOwn(err, "entry "+printable(h.Name))
		}
		if n.Typeflag != tar.TypeReg {
			continue
		}
		sum.Reset()
		if _, err := io.CopyBuffer(io.MultiWriter(sum, tw), struct{ io.Reader }{tr}, buf); err != nil {
			return keepOwn(err, "entry "+printable(h.Name))
		}
		var d [32]byte
		sum.Sum(d[:0])
		f.digests[f.key(n.Name)] = d
	}
	return keepOwn(tw.Close(), "tar")
}

// keepOwn leaves errors of the pipeline as they are and calls others malformed.
func keepOwn(err error, what string) error {
	var c *cause.Error
	if err == nil || errors.Is(err, errStopped) || errors.As(err, &c) {
		return err
	}
	return malformed("%s: %w", what, err)
}

// entry judges one header and returns the one to write, or nil for none.
func (f *filter) entry(h *tar.Header) (*tar.Header, error) {
	p, err := clean(h.Name)
	if err != nil {
		return nil, err
	}
	f.noteLinks(p)
	dir, base := path.Split(p)
	if base == archive.WhiteoutOpaqueDir {
		if len(f.opaque) == maxOpaque {
			return nil, cause.New(cause.ImageLimits, "the layer has more than %d opaque directories", maxOpaque)
		}
		f.opaque = append(f.opaque, path.Clean(dir))
		return nil, nil
	}
	if strings.HasPrefix(base, archive.WhiteoutMetaPrefix) {
		return nil, nil // aufs's own bookkeeping
	}
	n := &tar.Header{
		Name: p, Typeflag: h.Typeflag, Mode: h.Mode & 0o7777, Uid: h.Uid, Gid: h.Gid,
		ModTime: h.ModTime, Format: tar.FormatPAX,
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= 1<<32-1 || int64(h.Gid) >= 1<<32-1 {
		return nil, malformed("owner %d:%d of %s is out of range", h.Uid, h.Gid, printable(h.Name))
	}
	if y := h.ModTime.Year(); y < 1800 || y > 2200 {
		n.ModTime = time.Unix(0, 0)
	}
	key := f.key(p)
	delete(f.digests, key)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		n.Typeflag, n.Size = tar.TypeReg, h.Size
	case tar.TypeDir:
		if p == "." {
			mode := uint32(n.Mode)
			f.rootMode = &mode
		}
	case tar.TypeSymlink:
		n.Linkname = h.Linkname
		f.links[key] = struct{}{}
	case tar.TypeLink:
		target, err := clean(h.Linkname)
		if err != nil {
			return nil, err
		}
		f.noteLinks(target)
		n.Linkname = target
		if d, ok := f.digests[f.key(target)]; ok {
			f.digests[key] = d
		}
		if _, ok := f.links[f.key(target)]; ok {
			f.links[key] = struct{}{}
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		n.Devmajor, n.Devminor = h.Devmajor, h.Devminor
		if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
			return nil, malformed("%s is a raw whiteout device", printable(h.Name))
		}
	default:
		return nil, malformed("%s has the unknown type %q", printable(h.Name), h.Typeflag)
	}
	if p == "." && h.Typeflag != tar.TypeDir {
		return nil, malformed("the root is not a directory")
	}
	n.PAXRecords, err = attributes(h)
	return n, err
}

// attributes returns the extended attributes that a layer may have.
func attributes(h *tar.Header) (map[string]string, error) {
	var out map[string]string
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, archive.PaxSchilyXattr)
		if !ok || name == "security.selinux" {
			continue
		}
		if !strings.HasPrefix(name, "user.") && name != "security.capability" &&
			name != "system.posix_acl_access" && name != "system.posix_acl_default" {
			return nil, malformed("%s has the attribute %s, which a layer must not set", printable(h.Name), printable(name))
		}
		if out == nil {
			out = map[string]string{}
		}
		if out[k] = v; len(out) > 48 {
			return nil, malformed("%s has more than 48 attributes", printable(h.Name))
		}
	}
	return out, nil
}

// noteLinks remembers whether an entry's parent directories include a symbolic
// link of this layer: then the digests by path are void.
func (f *filter) noteLinks(p string) {
	dir := path.Dir(p)
	if f.throughLinks || len(f.links) == 0 || dir == f.lastDir {
		return
	}
	for d := dir; d != "."; d = path.Dir(d) {
		if _, ok := f.links[f.key(d)]; ok {
			f.throughLinks = true
			return
		}
	}
	f.lastDir = dir
}

// clean makes a tar name relative and clean and refuses one that climbs.
func clean(name string) (string, error) {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", malformed("the path %s climbs", printable(name))
		}
	}
	if len(name) > 4096 || strings.IndexByte(name, 0) >= 0 {
		return "", malformed("a path of %d bytes", len(name))
	}
	p := path.Clean("/" + name)[1:]
	if p == "" {
		return ".", nil
	}
	return p, nil
}
