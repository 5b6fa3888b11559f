package launch

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"io"
	"sync"

	"github.com/cc-runtime/cvm-agent/agent/sbom"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func (r real) Scanner(ctx context.Context, early bool) Scanner {
	ctx, cancel := context.WithCancel(ctx)
	s := &scanner{cancel: cancel, read: make(chan struct{})}
	sandbox := sbom.Sandbox{Program: r.config.SBOMProgram}
	s.start = sync.OnceValues(func() (*sbom.Prepared, error) { return sandbox.Start(ctx, sbom.ScanOptions{Name: "image"}) })
	if early {
		go func() { _, _ = s.start() }()
	}
	return s
}

// scanner is cvm-sbom in its sandbox, and the signed document beside it.
type scanner struct {
	cancel context.CancelFunc
	start  func() (*sbom.Prepared, error) // once; later calls get the same

	read      chan struct{} // closed when the next two are set
	signed    *sbom.Document
	signedErr error
}

func (s *scanner) Expect(signed []byte) {
	go func() {
		defer close(s.read)
		s.signed, s.signedErr = sbom.Read(bytes.NewReader(signed))
	}()
}

func (s *scanner) Compare(ctx context.Context, stored Stored, root string, rule policy.SBOM) (string, error) {
	program, err := s.start()
	if err != nil {
		return "", err
	}
	select {
	case <-s.read:
	case <-ctx.Done():
		return "", cause.Wrap(cause.DeadlineExceeded, ctx.Err())
	}
	if s.signedErr != nil {
		return "", s.signedErr
	}
	var digests io.Reader
	if i, ok := stored.(storedImage); ok {
		// The digests that the agent computed while it unpacked the very bytes.
		known, err := i.FileDigests()
		if err != nil {
			return "", err
		}
		lines := fileDigests(known)
		defer lines.Close() // ends the writer when the scanner does not read on
		digests = lines
	}
	found, err := program.Read(ctx, root, digests)
	if err != nil {
		return "", err
	}
	mode := rule.Compare
	if mode == "" {
		mode = sbom.Normal
	}
	differences, err := sbom.CompareDocuments(s.signed, found, mode)
	if err != nil {
		return "", err
	}
	if err := sbom.Differs(differences); err != nil {
		return "", err
	}
	return "equal to the signed one (" + mode + ")", nil
}

func (s *scanner) Close() {
	s.cancel() // a start that is under way, or to come, ends with an error
	if program, err := s.start(); err == nil {
		program.Close()
	}
}

// fileDigests writes NDJSON as the scanner reads it, without holding it whole.
func fileDigests(digests map[string][32]byte) *io.PipeReader {
	r, w := io.Pipe()
	go func() {
		out := bufio.NewWriterSize(w, 64<<10)
		enc := json.NewEncoder(out)
		for path, sum := range digests {
			line := struct {
				Path   string `json:"path"`
				SHA256 string `json:"sha256"`
			}{"/" + path, hex.EncodeToString(sum[:])}
			if err := enc.Encode(line); err != nil {
				return // the scanner has ended
			}
		}
		_ = w.CloseWithError(out.Flush())
	}()
	return r
}
