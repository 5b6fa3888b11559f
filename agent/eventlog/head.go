package eventlog

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// NameHead is the Name of a Head.
const NameHead = "none"

// HeadFile is the file of a Head inside its directory.
const HeadFile = "eventlog.head"

// Head stands where a platform has no runtime register (plain SEV-SNP). It
// keeps what a register would hold in a file beside the log, so that a log
// which was cut off, rolled back or changed on its own is found, and an append
// is finished exactly once after a kill.
//
// It promises no more: who can write to the directory can write both files.
// The directory is memory of the guest, which the host cannot write. A
// verifier gets the log's worth from report_data, which covers it.
type Head struct{ path string }

// NewHead returns the head of the log in dir.
func NewHead(dir string) *Head { return &Head{filepath.Join(dir, HeadFile)} }

// Name implements Register.
func (h *Head) Name() string { return NameHead }

// Index implements Register: records have the form of PCR 14, which readers of
// the log know.
func (h *Head) Index() int { return IndexPCR14 }

// Extend implements Register.
func (h *Head) Extend(ctx context.Context, digests map[crypto.Hash][]byte) error {
	digest := digests[crypto.SHA256]
	if len(digest) != sha256.Size {
		return fmt.Errorf("digest of %d bytes, expected %d", len(digest), sha256.Size)
	}
	value, err := h.Read(ctx)
	if err != nil {
		return err
	}
	next := sha256.Sum256(append(value, digest...))
	if err := writeWhole(h.path, next[:]); err != nil {
		return cause.New(cause.EventLogWrite, "write the event log's head: %w", err)
	}
	return nil
}

// Read implements Register: zero before the first event.
func (h *Head) Read(context.Context) ([]byte, error) {
	value, err := bounded.ReadFile(h.path, sha256.Size)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return make([]byte, sha256.Size), nil
	case err != nil:
		return nil, cause.New(cause.EventLogDiverged, "read the event log's head: %w", err)
	case len(value) != sha256.Size:
		return nil, cause.New(cause.EventLogDiverged, "the event log's head has %d bytes, expected %d", len(value), sha256.Size)
	}
	return value, nil
}
