package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// records keeps, for every layer that this agent has published, what was
// verified then: ID.json (record) beside ID.table (package filetable).
// A layer in storage without its record counts as unknown.
type records struct{ dir string }

type record struct {
	Version  int      `json:"version"` // 1
	DiffID   string   `json:"diffID"`
	Table    string   `json:"table"` // sha256:<hex> of the table
	Files    int      `json:"files"`
	Bytes    int64    `json:"bytes"` // of the unpacked archive
	RootMode uint32   `json:"rootMode"`
	Opaque   []string `json:"opaque,omitempty"` // sorted
}

const maxRecord = 16 << 20

func (r records) table(id string) string { return filepath.Join(r.dir, id+".table") }
func (r records) json(id string) string  { return filepath.Join(r.dir, id+".json") }

// load returns nil if there is no usable record.
func (r records) load(id string) *record {
	data, err := bounded.ReadFile(r.json(id), maxRecord)
	if err != nil {
		return nil
	}
	var rec record
	if bounded.DecodeJSON(data, &rec, bounded.Limits{Bytes: maxRecord, Nodes: 1 << 17}) != nil || rec.Version != 1 {
		return nil
	}
	return &rec
}

func (r records) save(id string, rec *record) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return renameio.WriteFile(r.json(id), data, 0o600)
}

// remove removes a record first, so that a table never outlives it usefully.
func (r records) remove(id string) {
	_ = os.Remove(r.json(id))
	_ = os.Remove(r.table(id))
}

// tableWriter spools a table into the state directory while digesting it.
type tableWriter struct {
	f   *renameio.PendingFile
	buf bytes.Buffer
	sum hash.Hash
}

func (r records) newTable(id string) (*tableWriter, error) {
	f, err := renameio.NewPendingFile(r.table(id), renameio.WithPermissions(0o600))
	if err != nil {
		return nil, err
	}
	return &tableWriter{f: f, sum: sha256.New()}, nil
}

func (t *tableWriter) Write(p []byte) (int, error) {
	t.sum.Write(p)
	t.buf.Write(p)
	if t.buf.Len() < 64<<10 {
		return len(p), nil
	}
	return len(p), t.flush()
}

func (t *tableWriter) flush() error {
	_, err := t.buf.WriteTo(t.f)
	return err
}

func (t *tableWriter) digest() string { return "sha256:" + hex.EncodeToString(t.sum.Sum(nil)) }

func (t *tableWriter) commit() error {
	if err := t.flush(); err != nil {
		return err
	}
	return t.f.CloseAtomicallyReplace()
}

const opaqueXattr = "trusted.overlay.opaque"

// markOpaque makes dirs (paths in a layer, from the confined child) opaque.
// The child cannot: it takes CAP_SYS_ADMIN. No link is followed.
func markOpaque(root string, dirs []string) error {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, d := range dirs {
		how := &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		}
		dir, err := unix.Openat2(fd, d, how)
		if err != nil {
			return cause.New(cause.LayerMalformed, "an opaque directory of the layer is not a plain directory: %w", err)
		}
		err = unix.Fsetxattr(dir, opaqueXattr, []byte("y"), 0)
		unix.Close(dir)
		if err != nil {
			return err
		}
	}
	return nil
}

// overlayMarks lists the overlayfs attributes below root: the ones that change
// what a container sees and that a file table does not show. Anything but a
// plain opaque mark is an error.
func overlayMarks(root string) (opaque []string, err error) {
	list := make([]byte, 64<<10)
	err = filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n, err := unix.Llistxattr(p, list)
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return err
		}
		for name := range strings.SplitSeq(string(list[:max(n, 0)]), "\x00") {
			if !strings.HasPrefix(name, "trusted.") {
				continue
			}
			var v [8]byte
			n, err := unix.Lgetxattr(p, name, v[:])
			if name != opaqueXattr || err != nil || string(v[:n]) != "y" {
				return fmt.Errorf("unexpected attribute %q", name)
			}
			rel, err := filepath.Rel(root, p)
			if err != nil {
				return err
			}
			opaque = append(opaque, rel)
		}
		return nil
	})
	slices.Sort(opaque)
	return opaque, err
}

// storageError tells a full storage, with its sizes, from other failures.
func storageError(path string, err error) error {
	var c *cause.Error
	if errors.As(err, &c) && c.Code != cause.StorageFull {
		return err
	}
	if c != nil {
		err = c.Err // said already
	}
	if c == nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return cause.Wrap(cause.StorageFailed, err)
	}
	var s unix.Statfs_t
	if path == "" || unix.Statfs(path, &s) != nil {
		return cause.New(cause.StorageFull, "%w", err)
	}
	size := uint64(s.Bsize)
	return cause.New(cause.StorageFull, "%s is full: %d of %d MiB and %d of %d inodes are free: %w",
		path, s.Bavail*size>>20, s.Blocks*size>>20, s.Ffree, s.Files, err)
}
