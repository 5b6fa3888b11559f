package unpack

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Reexec does the child's work and exits, if this process is a child of Run or
// Walk. It must come before anything else in main.
func Reexec() {
	if len(os.Args) != 2 || os.Args[0] != childName {
		return
	}
	r, err := child(os.Args[1])
	if err != nil {
		r = &Result{Error: err.Error(), Code: string(code(err))}
	}
	out, jerr := json.Marshal(r)
	if jerr == nil {
		_, jerr = os.NewFile(fdResult, "result").Write(out)
	}
	if err != nil || jerr != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func child(arg string) (*Result, error) {
	var o order
	if err := bounded.DecodeJSON([]byte(arg), &o, bounded.Limits{Bytes: 1 << 14}); err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	if !filepath.IsAbs(o.Dir) || o.Limits.MaxFiles <= 0 || o.Limits.MaxBytes <= 0 || o.Limits.MaxRatio <= 0 {
		return nil, cause.New(cause.Internal, "incomplete order to the unpacker")
	}
	time.Local = time.UTC // or the runtime would read a zone file inside the layer
	if err := confine(o.Dir, o.Limits); err != nil {
		return nil, cause.New(cause.SandboxUnavailable, "confining the unpacker: %w", err)
	}
	table := os.NewFile(fdTable, "table")
	switch o.Mode {
	case modeWalk:
		n, err := walk("/", o.Limits.MaxFiles, nil, table)
		if err != nil {
			return nil, err
		}
		return &Result{Files: n}, nil
	case modeUnpack:
		return unpackLayer(os.Stdin, o.Limits, table)
	}
	return nil, cause.New(cause.Internal, "unknown order %q", o.Mode)
}

func unpackLayer(in io.Reader, l Limits, table io.Writer) (*Result, error) {
	s := newSplitter(in, l)
	f := newFilter(l)
	diffID, total, err := s.run(f)
	if err != nil {
		return nil, err
	}
	for _, dir := range f.opaque {
		// Only a whiteout said that the directory exists.
		if _, err := os.Lstat("/" + dir); errors.Is(err, os.ErrNotExist) {
			if err := os.MkdirAll("/"+dir, 0o755); err != nil {
				return nil, err
			}
		}
	}
	r := &Result{DiffID: "sha256:" + fmt.Sprintf("%x", diffID), Bytes: total, Opaque: f.opaque, RootMode: f.rootMode}
	known := f
	if f.throughLinks {
		known = nil // the paths of the archive are not those on disk
	}
	if r.Files, err = walk("/", l.MaxFiles, known, table); err != nil {
		return nil, err
	}
	return r, nil
}

// code gives an error of the child its cause.
func code(err error) cause.Code {
	if c := cause.Of(err); c != cause.Internal {
		return c
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return cause.StorageFull
	case errors.Is(err, unix.EFBIG), errors.Is(err, unix.ENOMEM):
		return cause.ImageLimits
	case errors.Is(err, unix.EIO), errors.Is(err, unix.EROFS):
		return cause.StorageFailed
	}
	return cause.LayerMalformed
}
