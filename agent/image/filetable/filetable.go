// Package filetable is the list of everything that one image layer puts into
// storage: one line per path, in the order of a sorted walk, so that equal
// content gives equal bytes and the SHA-256 of the table stands for the layer.
//
// The table is written by a confined child that has read hostile content, so
// Parse is strict and bounded. It records what a container can see: type, mode,
// owner, modification time, size, SHA-256 of regular files, link targets,
// device numbers and extended attributes. It leaves out `security.selinux`
// (the host's label) and `trusted.*` (see agent/image, which checks these
// itself), access times and link counts.
//
// Line format: fields separated by one TAB, ended by LF. Path, link target and
// attribute values are escaped like mtree(5): a byte outside 0x21–0x7e, and the
// backslash, is \ooo (three octal digits).
//
//	type path mode uid gid mtime [size sha256 | target | major:minor] [xattr=value…]
//
// type is f (regular), d, l (symlink), c, b or p (fifo); mode is octal with
// the set-id and sticky bits; mtime is seconds.nanoseconds with nine digits,
// and "-" for a link's or the root's; sha256 is 64 lowercase hex digits. The
// root of the layer is the path ".", whose mode is not part of the table.
package filetable

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Bounds of one line; longer is an error. Linux allows 4096-byte paths and
// 64 KiB attribute values.
const (
	MaxLine   = 512 << 10 // bytes
	MaxXattrs = 64
	maxPath   = 4096
)

// ErrMalformed is wrapped by every error about the bytes of a table.
var ErrMalformed = errors.New("malformed file table")

// Type is the kind of a file.
type Type byte

// The types that a layer can hold.
const (
	Regular Type = 'f'
	Dir     Type = 'd'
	Symlink Type = 'l'
	Char    Type = 'c'
	Block   Type = 'b'
	FIFO    Type = 'p'
)

// Xattr is one extended attribute.
type Xattr struct{ Name, Value string }

// Entry is one line.
type Entry struct {
	Type         Type
	Path         string // slash-separated, relative, clean; "." for the root
	Mode         uint32 // permission, set-id and sticky bits
	UID, GID     uint32
	MTime        int64 // nanoseconds since 1970; regular files, devices and directories
	Size         int64 // regular files, bytes
	SHA256       [32]byte
	Target       string // symlinks, as stored
	Major, Minor uint32
	Xattrs       []Xattr // sorted by name
}

// Whiteout says whether the entry deletes its path from the layers below
// (overlayfs: a character device 0:0).
func (e *Entry) Whiteout() bool { return e.Type == Char && e.Major == 0 && e.Minor == 0 }

// Append appends the entry's line, with its LF, to b.
func (e *Entry) Append(b []byte) []byte {
	b = append(b, byte(e.Type), '\t')
	b = escape(b, e.Path)
	b = append(b, '\t')
	b = strconv.AppendUint(b, uint64(e.Mode), 8)
	b = append(b, '\t')
	b = strconv.AppendUint(b, uint64(e.UID), 10)
	b = append(b, '\t')
	b = strconv.AppendUint(b, uint64(e.GID), 10)
	b = append(b, '\t')
	if e.Type == Symlink || e.Path == "." {
		b = append(b, '-')
	} else {
		b = appendTime(b, e.MTime)
	}
	switch e.Type {
	case Regular:
		b = append(b, '\t')
		b = strconv.AppendInt(b, e.Size, 10)
		b = append(b, '\t')
		b = hex.AppendEncode(b, e.SHA256[:])
	case Symlink:
		b = append(b, '\t')
		b = escape(b, e.Target)
	case Char, Block:
		b = append(b, '\t')
		b = strconv.AppendUint(b, uint64(e.Major), 10)
		b = append(b, ':')
		b = strconv.AppendUint(b, uint64(e.Minor), 10)
	}
	for _, x := range e.Xattrs {
		b = append(b, '\t')
		b = escape(b, x.Name)
		b = append(b, '=')
		b = escape(b, x.Value)
	}
	return append(b, '\n')
}

// appendTime writes floor seconds and the non-negative rest, so that times
// before 1970 have one form too.
func appendTime(b []byte, ns int64) []byte {
	sec, rest := ns/1e9, ns%1e9
	if rest < 0 {
		sec, rest = sec-1, rest+1e9
	}
	b = strconv.AppendInt(b, sec, 10)
	return fmt.Appendf(b, ".%09d", rest)
}

func escape(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c > 0x20 && c < 0x7f && c != '\\' && c != '=' {
			b = append(b, c)
		} else {
			b = append(b, '\\', '0'+c>>6, '0'+c>>3&7, '0'+c&7)
		}
	}
	return b
}

func unescape(s []byte) (string, error) {
	if bytes.IndexByte(s, '\\') < 0 {
		for _, c := range s {
			if c <= 0x20 || c >= 0x7f || c == '=' {
				return "", fmt.Errorf("%w: byte %#x is not escaped", ErrMalformed, c)
			}
		}
		return string(s), nil
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c != '\\' {
			if c <= 0x20 || c >= 0x7f || c == '=' {
				return "", fmt.Errorf("%w: byte %#x is not escaped", ErrMalformed, c)
			}
			out = append(out, c)
			continue
		}
		if i+3 >= len(s) {
			return "", fmt.Errorf("%w: escape is cut off", ErrMalformed)
		}
		v := 0
		for _, d := range s[i+1 : i+4] {
			if d < '0' || d > '7' {
				return "", fmt.Errorf("%w: escape is not octal", ErrMalformed)
			}
			v = v*8 + int(d-'0')
		}
		if v > 0xff || (v > 0x20 && v < 0x7f && v != '\\' && v != '=') {
			return "", fmt.Errorf("%w: escape \\%03o is not needed or out of range", ErrMalformed, v)
		}
		out = append(out, byte(v))
		i += 3
	}
	return string(out), nil
}

// Parse reads one line (without its LF). It accepts only what Append writes:
// Append of the result gives the same bytes.
func Parse(line []byte) (Entry, error) {
	var e Entry
	if len(line) > MaxLine {
		return e, fmt.Errorf("%w: line of %d bytes, the limit is %d", ErrMalformed, len(line), MaxLine)
	}
	f := bytes.Split(line, []byte{'\t'})
	if len(f) < 6 || len(f) > 8+MaxXattrs || len(f[0]) != 1 {
		return e, fmt.Errorf("%w: %d fields", ErrMalformed, len(f))
	}
	e.Type = Type(f[0][0])
	var err error
	if e.Path, err = unescape(f[1]); err != nil {
		return e, err
	}
	if err := checkPath(e.Path); err != nil {
		return e, err
	}
	nums := [3]uint64{}
	for i, base := range []int{8, 10, 10} {
		if nums[i], err = strconv.ParseUint(string(f[2+i]), base, 32); err != nil {
			return e, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
	}
	if nums[0] > 0o7777 {
		return e, fmt.Errorf("%w: mode %o", ErrMalformed, nums[0])
	}
	e.Mode, e.UID, e.GID = uint32(nums[0]), uint32(nums[1]), uint32(nums[2])
	if e.Type == Symlink || e.Path == "." {
		if string(f[5]) != "-" {
			return e, fmt.Errorf("%w: time where none belongs", ErrMalformed)
		}
	} else if e.MTime, err = parseTime(string(f[5])); err != nil {
		return e, err
	}
	rest := f[6:]
	if rest, err = e.parseKind(rest); err != nil {
		return e, err
	}
	if len(rest) > MaxXattrs {
		return e, fmt.Errorf("%w: %d attributes", ErrMalformed, len(rest))
	}
	for _, x := range rest {
		name, value, ok := bytes.Cut(x, []byte{'='})
		if !ok {
			return e, fmt.Errorf("%w: attribute without value", ErrMalformed)
		}
		var a Xattr
		if a.Name, err = unescape(name); err != nil {
			return e, err
		}
		if a.Value, err = unescape(value); err != nil {
			return e, err
		}
		if n := len(e.Xattrs); a.Name == "" || n > 0 && e.Xattrs[n-1].Name >= a.Name {
			return e, fmt.Errorf("%w: attributes are not sorted", ErrMalformed)
		}
		e.Xattrs = append(e.Xattrs, a)
	}
	// One form only: leading zeros, signs and the like would let two tables
	// mean the same layer.
	if got := e.Append(make([]byte, 0, len(line)+1)); !bytes.Equal(got[:len(got)-1], line) {
		return e, fmt.Errorf("%w: line is not in its one form", ErrMalformed)
	}
	return e, nil
}

// parseKind reads the fields that depend on the type and returns the others.
func (e *Entry) parseKind(f [][]byte) ([][]byte, error) {
	need := map[Type]int{Regular: 2, Dir: 0, Symlink: 1, Char: 1, Block: 1, FIFO: 0}
	n, ok := need[e.Type]
	if !ok || len(f) < n {
		return nil, fmt.Errorf("%w: type %q with %d fields", ErrMalformed, e.Type, len(f))
	}
	if e.Path == "." && e.Type != Dir {
		return nil, fmt.Errorf("%w: the root is not a directory", ErrMalformed)
	}
	var err error
	switch e.Type {
	case Regular:
		if e.Size, err = strconv.ParseInt(string(f[0]), 10, 64); err != nil || e.Size < 0 {
			return nil, fmt.Errorf("%w: size %.20q", ErrMalformed, f[0])
		}
		if hex.DecodedLen(len(f[1])) != len(e.SHA256) {
			return nil, fmt.Errorf("%w: digest of %d characters", ErrMalformed, len(f[1]))
		}
		if _, err := hex.Decode(e.SHA256[:], f[1]); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
	case Symlink:
		if e.Target, err = unescape(f[0]); err != nil {
			return nil, err
		}
		if len(e.Target) > maxPath {
			return nil, fmt.Errorf("%w: link target of %d bytes", ErrMalformed, len(e.Target))
		}
	case Char, Block:
		major, minor, _ := strings.Cut(string(f[0]), ":")
		a, err1 := strconv.ParseUint(major, 10, 32)
		b, err2 := strconv.ParseUint(minor, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("%w: device number %.40q", ErrMalformed, f[0])
		}
		e.Major, e.Minor = uint32(a), uint32(b)
	}
	return f[n:], nil
}

func parseTime(s string) (int64, error) {
	sec, frac, ok := strings.Cut(s, ".")
	if !ok || len(frac) != 9 {
		return 0, fmt.Errorf("%w: time %.40q", ErrMalformed, s)
	}
	a, err1 := strconv.ParseInt(sec, 10, 64)
	b, err2 := strconv.ParseUint(frac, 10, 32)
	if err1 != nil || err2 != nil || a > 1<<33 || a < -1<<33 {
		return 0, fmt.Errorf("%w: time %.40q", ErrMalformed, s)
	}
	return a*1e9 + int64(b), nil
}

func checkPath(p string) error {
	if p == "" || len(p) > maxPath || p[0] == '/' || path.Clean(p) != p ||
		p == ".." || strings.HasPrefix(p, "../") || strings.IndexByte(p, 0) >= 0 {
		return fmt.Errorf("%w: path %.80q is not relative and clean", ErrMalformed, p)
	}
	return nil
}

// Read calls yield for each entry of a table, in order. It stops at the first
// error, its own or yield's, and refuses more than max entries.
func Read(r io.Reader, max int, yield func(line []byte, e Entry) error) error {
	br := bufio.NewReaderSize(r, 64<<10)
	var long []byte
	for n := 0; ; {
		part, err := br.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			if long = append(long, part...); len(long) > MaxLine {
				return fmt.Errorf("%w: line longer than %d bytes", ErrMalformed, MaxLine)
			}
			continue
		}
		if errors.Is(err, io.EOF) && len(part) == 0 && len(long) == 0 {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("%w: last line is cut off", ErrMalformed)
		}
		if err != nil {
			return err
		}
		line := part
		if len(long) > 0 {
			line = append(long, part...)
			long = long[:0]
		}
		if n++; n > max {
			return fmt.Errorf("%w: more than %d entries", ErrMalformed, max)
		}
		e, err := Parse(line[:len(line)-1])
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		if err := yield(line, e); err != nil {
			return err
		}
	}
}

// SortXattrs puts attributes into the table's order.
func SortXattrs(x []Xattr) {
	slices.SortFunc(x, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
}
