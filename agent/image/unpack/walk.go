package unpack

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/agent/image/filetable"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const hashWorkers = 2

// walker writes the table of a tree in sorted depth-first order. Digests that
// are not known are computed by hashWorkers goroutines, ahead of the writer.
type walker struct {
	root    string
	max     int
	n       int
	digests *filter // its map; nil: hash everything
	jobs    chan *job
	order   chan *job
	stop    chan struct{}
}

type job struct {
	e    filetable.Entry
	err  error
	done chan struct{}
}

// walk writes the table of root to w and returns its number of entries.
// digests maps paths to known SHA-256 of regular files; nil: all are read.
func walk(root string, max int, known *filter, w io.Writer) (int, error) {
	k := &walker{
		root: root, max: max, digests: known,
		jobs: make(chan *job, 64), order: make(chan *job, 256), stop: make(chan struct{}),
	}
	var wg sync.WaitGroup
	for range hashWorkers {
		wg.Go(func() {
			buf, sum := make([]byte, chunkSize), sha256.New()
			for j := range k.jobs {
				j.e.SHA256, j.err = hashFile(path.Join(root, j.e.Path), j.e.Size, sum, buf)
				close(j.done)
			}
		})
	}
	var walkErr error
	wg.Go(func() {
		defer close(k.order)
		defer close(k.jobs)
		walkErr = k.visit(".")
	})
	bw := bufio.NewWriterSize(w, 64<<10)
	var line []byte
	var err error
	for j := range k.order {
		if j.done != nil {
			<-j.done
		}
		if err != nil {
			continue // drain
		}
		if err = j.err; err == nil {
			line = j.e.Append(line[:0])
			_, err = bw.Write(line)
		}
		if err != nil {
			close(k.stop)
		}
	}
	wg.Wait()
	if err == nil {
		err = walkErr
	}
	if err != nil {
		return 0, err
	}
	return k.n, bw.Flush()
}

func (k *walker) visit(p string) error {
	select {
	case <-k.stop:
		return nil
	default:
	}
	full := path.Join(k.root, p)
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return fmt.Errorf("looking at %s: %w", printable(p), err)
	}
	if k.n++; k.n > k.max {
		return cause.New(cause.ImageLimits, "the layer has more than %d files", k.max)
	}
	j := &job{e: filetable.Entry{
		Path: p, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, MTime: st.Mtim.Nano(),
	}}
	var err error
	if j.e.Xattrs, err = xattrs(full); err != nil {
		return fmt.Errorf("attributes of %s: %w", printable(p), err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		j.e.Type, j.e.Size = filetable.Regular, st.Size
		known := false
		if k.digests != nil {
			j.e.SHA256, known = k.digests.digests[k.digests.key(p)]
		}
		if !known {
			j.done = make(chan struct{})
			k.jobs <- j
		}
	case unix.S_IFDIR:
		j.e.Type = filetable.Dir
		if p == "." {
			j.e.Mode, j.e.MTime = 0, 0 // publishing sets them
		}
	case unix.S_IFLNK:
		j.e.Type, j.e.MTime = filetable.Symlink, 0
		if j.e.Target, err = os.Readlink(full); err != nil {
			return err
		}
	case unix.S_IFCHR:
		j.e.Type, j.e.Major, j.e.Minor = filetable.Char, unix.Major(st.Rdev), unix.Minor(st.Rdev)
		if j.e.Whiteout() {
			j.e.MTime = 0 // the unpacker sets none
		}
	case unix.S_IFBLK:
		j.e.Type, j.e.Major, j.e.Minor = filetable.Block, unix.Major(st.Rdev), unix.Minor(st.Rdev)
	case unix.S_IFIFO:
		j.e.Type = filetable.FIFO
	default:
		return malformed("%s is of a type that a layer cannot hold", printable(p))
	}
	k.order <- j
	if j.e.Type != filetable.Dir {
		return nil
	}
	names, err := os.ReadDir(full) // sorted
	if err != nil {
		return err
	}
	for _, d := range names {
		if err := k.visit(path.Join(p, d.Name())); err != nil {
			return err
		}
	}
	return nil
}

func hashFile(name string, size int64, sum hash.Hash, buf []byte) (d [32]byte, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NOATIME|syscall.O_NONBLOCK, 0)
	if err != nil {
		return d, err
	}
	defer f.Close()
	sum.Reset()
	n, err := io.CopyBuffer(onlyWriter{sum}, struct{ io.Reader }{f}, buf)
	if err == nil && n != size {
		err = fmt.Errorf("%s has %d bytes, expected %d", printable(name), n, size)
	}
	sum.Sum(d[:0])
	return d, err
}

// xattrs returns what the table records: not trusted.* (invisible without
// SYS_ADMIN anyway) and not the host's SELinux label.
func xattrs(name string) ([]filetable.Xattr, error) {
	var small [256]byte
	n, err := unix.Llistxattr(name, small[:])
	list := small[:max(n, 0)]
	if errors.Is(err, unix.ERANGE) {
		list = make([]byte, 64<<10)
		if n, err = unix.Llistxattr(name, list); err == nil {
			list = list[:n]
		}
	}
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []filetable.Xattr
	for _, a := range strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if a == "security.selinux" || strings.HasPrefix(a, "trusted.") {
			continue
		}
		v := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(name, a, v)
		if err != nil {
			return nil, err
		}
		if out = append(out, filetable.Xattr{Name: a, Value: string(v[:n])}); len(out) > filetable.MaxXattrs {
			return nil, malformed("%s has more than %d attributes", printable(name), filetable.MaxXattrs)
		}
	}
	filetable.SortXattrs(out)
	return out, nil
}
