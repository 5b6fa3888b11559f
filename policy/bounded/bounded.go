// Package bounded is the one reader for everything hostile: files, streams and
// JSON that come from outside are bounded in bytes, depth, count and string
// length before anything looks at their meaning.
//
// DecodeJSON is for documents of our own (signed policies, envelopes, orders,
// protocol messages): whatever it does not know is an error. CheckJSON is for
// formats of others, whose unknown fields have to be tolerated.
//
// encoding/json alone would accept field names in another case, duplicate keys
// (the last one wins), invalid UTF-8 and lone surrogates (silently replaced)
// and null for any type. Each of these lets two readers of the same signed
// bytes see two different documents, so each is refused here.
package bounded

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Sentinels for errors.Is.
var (
	ErrTooLarge     = errors.New("too large")
	ErrDepth        = errors.New("nested too deeply")
	ErrUnknownField = errors.New("unknown field")
	ErrDuplicateKey = errors.New("duplicate key")
	ErrNotRegular   = errors.New("not a regular file")
	ErrReadable     = errors.New("only its owner may read it")
	ErrChanged      = errors.New("file changed while it was read")
)

// ReadFile reads a regular file of at most max bytes. The last element of path
// must not be a symbolic link. The size is checked before and after, so a file
// that grows or is replaced in place meanwhile is refused. A file that exceeds
// max is ErrTooLarge, anything that is not a file ErrNotRegular.
func ReadFile(path string, max int64) ([]byte, error) {
	f, before, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return read(f, before, max)
}

// ReadSecret is ReadFile for a file that nobody but its owner may read;
// otherwise the error is ErrReadable. What is judged is the file that is read.
func ReadSecret(path string, max int64) ([]byte, error) {
	f, before, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readSecret(f, before, max)
}

func openFile(path string) (*os.File, fs.FileInfo, error) {
	f, info, err := open(path, unix.O_NOFOLLOW)
	if errors.Is(err, unix.ELOOP) {
		err = fmt.Errorf("%s is a symbolic link: %w", path, ErrNotRegular)
	}
	return f, info, err
}

// ReadNamed is ReadFile for a file that whoever runs the program names on its
// command line: it may be a symbolic link, as those of distributions and of
// mounted secrets are. A service's files and all that others may have placed
// are ReadFile's.
func ReadNamed(path string, max int64) ([]byte, error) {
	f, before, err := OpenNamed(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return read(f, before, max)
}

// ReadNamedSecret is ReadSecret for a file that the command line names, as
// ReadNamed: what is judged is the file that is read, not a link to it.
func ReadNamedSecret(path string, max int64) ([]byte, error) {
	f, before, err := OpenNamed(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readSecret(f, before, max)
}

func readSecret(f *os.File, before fs.FileInfo, max int64) ([]byte, error) {
	if before.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %s: %w", f.Name(), before.Mode(), ErrReadable)
	}
	return read(f, before, max)
}

// OpenNamed opens a file as ReadNamed does, for one that is too large to be
// held. What is said of it is said of the open file.
func OpenNamed(path string) (*os.File, fs.FileInfo, error) { return open(path, 0) }

func open(path string, flags int) (*os.File, fs.FileInfo, error) {
	// O_NONBLOCK: opening a FIFO that somebody placed there must not hang.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w", path, ErrNotRegular)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

func read(f *os.File, before fs.FileInfo, max int64) ([]byte, error) {
	if before.Size() > max {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are accepted: %w", f.Name(), before.Size(), max, ErrTooLarge)
	}
	data, err := ReadAll(f, max)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	after, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) || int64(len(data)) != after.Size() {
		return nil, fmt.Errorf("%s: %w", f.Name(), ErrChanged)
	}
	return data, nil
}

// ReadAll reads r to its end, which must come within max bytes; otherwise the
// error is ErrTooLarge and no more than max+1 bytes have been read.
func ReadAll(r io.Reader, max int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("more than %d bytes: %w", max, ErrTooLarge)
	}
	return data, nil
}
