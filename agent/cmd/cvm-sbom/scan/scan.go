// Package scan makes the SPDX 2.3 document of an unpacked image root with the
// syft library.
//
// It promises the packages, files and relationships that the stock syft finds
// in the same image through a registry with file selection `all`, and the same
// bytes for the same root and options. It does not promise a sandbox: that is
// the caller's.
package scan

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/anchore/syft/syft"
	"github.com/anchore/syft/syft/cataloging"
	"github.com/anchore/syft/syft/cataloging/filecataloging"
	"github.com/anchore/syft/syft/file"
	"github.com/anchore/syft/syft/source"
	"github.com/anchore/syft/syft/source/directorysource"

	_ "modernc.org/sqlite" // the RPM database cataloger needs a driver or the whole scan fails
)

// Options say what to scan and how far to go.
type Options struct {
	Root        string    // directory that stands for the image's /
	Name        string    // name of the document and root package; base name of Root when empty
	Version     string    // version of the root package
	Created     time.Time // creation time to record
	FileDigests string    // NDJSON of known digests; "" for none, "-" for stdin
	SHA1        bool      // also record SHA-1
	MaxFiles    int64     // entries of any kind
	MaxBytes    int64     // bytes in regular files
}

// LimitError says which limit of Options the root exceeds.
type LimitError struct {
	What  string // "files" or "bytes"
	Limit int64
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("the root holds more than %d %s", e.Limit, e.What)
}

// Run scans the root and writes the document to out. The error is a *LimitError
// when a limit is exceeded; nothing has been written then.
//
// The root is not touched before FileDigests have been read to their end. What
// does not depend on the root is done meanwhile: a caller that starts the scan
// early and gives the digests when the root is there pays for none of it.
func Run(ctx context.Context, o Options, out io.Writer) error {
	cfg := syft.DefaultCreateSBOMConfig().
		WithTool("syft", ScannerVersion()).
		WithCatalogerSelection(cataloging.NewSelectionRequest().WithDefaults("image")).
		WithFilesConfig(filecataloging.DefaultConfig().WithSelection(file.AllFilesSelection).WithHashers())
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	scanCtx, build, err := lateMatcher(ctx, cfg.Licenses.Coverage)
	if err != nil {
		return fmt.Errorf("licence matcher: %w", err)
	}
	arrived := make(chan struct{})
	if o.FileDigests == "-" {
		// An image that is long in coming is large, and large ones have texts to
		// match: there is time. A small one is not held up by it.
		go func() {
			select {
			case <-arrived:
			case <-time.After(time.Second):
				build()
				debug.FreeOSMemory() // what building it has left
			}
		}()
	}
	known, err := loadDigests(o.FileDigests)
	close(arrived)
	if err != nil {
		return err
	}
	root, err := filepath.Abs(o.Root)
	if err == nil {
		root, err = filepath.EvalSymlinks(root)
	}
	if err != nil {
		return fmt.Errorf("root: %w", err)
	}
	tree, err := survey(root, o.MaxFiles, o.MaxBytes)
	if err != nil {
		return err
	}

	// Digests are made beside the scan, one read per file, and only where none
	// is known.
	digested := make(chan error, 1)
	go func() { digested <- tree.digest(ctx, root, known, o.SHA1) }()

	name := o.Name
	if name == "" {
		name = filepath.Base(root)
	}
	dir, err := directorysource.New(directorysource.Config{
		Path:  root,
		Base:  root,
		Alias: source.Alias{Name: name, Version: o.Version},
	})
	if err != nil {
		return err
	}
	defer dir.Close()
	src := &listing{Source: dir, root: root}
	// The source keeps the index of the root (file types by content) for
	// CreateSBOM.
	if _, err := src.FileResolver(cfg.Search.Scope); err != nil {
		cancel()
		return errors.Join(fmt.Errorf("index: %w", err), <-digested)
	}
	found, err := syft.CreateSBOM(scanCtx, src, cfg)
	if err != nil {
		cancel()
		return errors.Join(fmt.Errorf("scan: %w", err), <-digested)
	}
	if err := <-digested; err != nil {
		return err
	}
	found.Artifacts.FileDigests = tree.fileDigests(o.SHA1)
	return encode(out, found, o.Created)
}

// ScannerVersion returns the version of the syft library in this program.
func ScannerVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "github.com/anchore/syft" {
				return d.Version
			}
		}
	}
	return "unknown"
}
