package scan

import (
	"bufio"
	"context"
	"crypto/sha1" //nolint:gosec // SPDX 2.3 §8.4 requires a SHA-1 per file; nothing here trusts it
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/anchore/syft/syft/file"
)

// A known digest comes from whoever wrote the file under the root: the agent's
// unpacker, which has hashed the bytes on their way to the disk.
type known struct {
	Path   string `json:"path"`           // absolute in the root, /usr/bin/x
	SHA256 string `json:"sha256"`         // lowercase hex
	SHA1   string `json:"sha1,omitempty"` // lowercase hex
}

// maxKnownLine bounds one line of the digests file: a path has 4096 bytes at
// most, each six when escaped.
const maxKnownLine = 32 << 10

func loadDigests(path string) (map[string]known, error) {
	if path == "" {
		return nil, nil
	}
	in := io.ReadCloser(os.Stdin)
	if path != "-" {
		var err error
		if in, err = os.Open(path); err != nil {
			return nil, fmt.Errorf("file digests: %w", err)
		}
	}
	// Standard input too: nobody waits for a reader that has had enough.
	defer in.Close()
	out := map[string]known{}
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 4096), maxKnownLine)
	for n := 1; lines.Scan(); n++ {
		var k known
		if err := json.Unmarshal(lines.Bytes(), &k); err != nil {
			return nil, fmt.Errorf("file digests: line %d: %w", n, err)
		}
		if !filepath.IsAbs(k.Path) || filepath.Clean(k.Path) != k.Path || !isHex(k.SHA256, sha256.Size) ||
			(k.SHA1 != "" && !isHex(k.SHA1, sha1.Size)) {
			return nil, fmt.Errorf("file digests: line %d: want a clean absolute path and lowercase hex digests", n)
		}
		if _, twice := out[k.Path]; twice {
			return nil, fmt.Errorf("file digests: line %d: %q is named twice", n, k.Path)
		}
		out[k.Path] = k
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("file digests: %w", err)
	}
	return out, nil
}

func isHex(s string, bytes int) bool {
	if len(s) != 2*bytes {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// A tree lists the regular files of a root in walk order with their digests.
type tree struct {
	files []regular
}

type regular struct {
	path   string // absolute in the root
	sha256 [sha256.Size]byte
	sha1   [sha1.Size]byte
}

// survey lists the root's regular files and holds it to the limits. Nothing is
// opened but directories and no link is followed.
func survey(root string, maxFiles, maxBytes int64) (*tree, error) {
	t := &tree{}
	var entries, bytes int64
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entries++; entries > maxFiles {
			return &LimitError{What: "files", Limit: maxFiles}
		}
		if !d.Type().IsRegular() {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if bytes += info.Size(); bytes > maxBytes || bytes < 0 {
			return &LimitError{What: "bytes", Limit: maxBytes}
		}
		t.files = append(t.files, regular{path: path[len(root):]})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("survey: %w", err)
	}
	return t, nil
}

// digest fills in the digests: those that are known, and the rest by reading
// each file once.
func (t *tree) digest(ctx context.Context, root string, known map[string]known, withSHA1 bool) error {
	var next atomic.Int64
	var once sync.Once
	var first error
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			buf := make([]byte, 256<<10)
			h256, h1 := sha256.New(), sha1.New()
			for {
				i := next.Add(1) - 1
				if i >= int64(len(t.files)) || ctx.Err() != nil {
					return
				}
				f := &t.files[i]
				if k, ok := known[f.path]; ok && (k.SHA1 != "" || !withSHA1) {
					// The lengths were checked by loadDigests.
					_, _ = hex.Decode(f.sha256[:], []byte(k.SHA256))
					_, _ = hex.Decode(f.sha1[:], []byte(k.SHA1))
					continue
				}
				hashes := []hash.Hash{h256}
				if withSHA1 {
					hashes = append(hashes, h1)
				}
				if err := digestFile(root+f.path, buf, hashes); err != nil {
					once.Do(func() { first = err })
					return
				}
				h256.Sum(f.sha256[:0])
				if withSHA1 {
					h1.Sum(f.sha1[:0])
				}
			}
		})
	}
	wg.Wait()
	if first != nil {
		return fmt.Errorf("digest: %w", first)
	}
	return ctx.Err()
}

func digestFile(path string, buf []byte, hashes []hash.Hash) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, h := range hashes {
		h.Reset()
	}
	for {
		n, err := f.Read(buf)
		for _, h := range hashes {
			h.Write(buf[:n])
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// fileDigests returns the digests in syft's form.
func (t *tree) fileDigests(withSHA1 bool) map[file.Coordinates][]file.Digest {
	out := make(map[file.Coordinates][]file.Digest, len(t.files))
	for i := range t.files {
		f := &t.files[i]
		var d []file.Digest
		if withSHA1 {
			d = append(d, file.Digest{Algorithm: "sha1", Value: hex.EncodeToString(f.sha1[:])})
		}
		d = append(d, file.Digest{Algorithm: "sha256", Value: hex.EncodeToString(f.sha256[:])})
		out[file.Coordinates{RealPath: f.path}] = d
	}
	return out
}
