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
	ErrChanged      = errors.New("file changed while it was read")
)

// ReadFile reads a regular file of at most max bytes. The last element of path
// must not be a symbolic link. The size is checked before and after, so a file
// that grows or is replaced in place meanwhile is refused. A file that exceeds
// max is ErrTooLarge, anything that is not a file ErrNotRegular.
func ReadFile(path string, max int64) ([]byte, error) {
	// O_NONBLOCK: opening a FIFO that somebody placed there must not hang.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ELOOP) {
			return nil, fmt.Errorf("%s is a symbolic link: %w", path, ErrNotRegular)
		}
		return nil, err
	}
	defer f.Close()
	before, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !before.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", path, ErrNotRegular)
	}
	if before.Size() > max {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are accepted: %w", path, before.Size(), max, ErrTooLarge)
	}
	data, err := ReadAll(f, max)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	after, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) || int64(len(data)) != after.Size() {
		return nil, fmt.Errorf("%s: %w", path, ErrChanged)
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
