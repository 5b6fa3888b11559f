package scan

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"time"

	"github.com/anchore/syft/syft/format/common/spdxhelpers"
	"github.com/anchore/syft/syft/sbom"
	"github.com/spdx/tools-golang/spdx"
)

// namespace is the prefix of SPDX 2.3 §6.5 document namespaces. The rest is
// the document's name and a digest of the files and packages: syft's own
// namespace has a random part, and equal scans must give equal bytes.
const namespace = "https://github.com/cc-runtime/cvm-agent/spdx/"

// encode writes the SPDX 2.3 JSON form of s. The long lists are written element
// by element: the document of a large image never exists in memory as JSON.
func encode(out io.Writer, s *sbom.SBOM, created time.Time) error {
	doc := spdxhelpers.ToFormatModel(*s)
	if doc == nil {
		return fmt.Errorf("encode: the scan gave no document")
	}
	doc.CreationInfo.Created = created.Format("2006-01-02T15:04:05Z")
	doc.DocumentNamespace = namespace + url.PathEscape(doc.DocumentName) + "-" + contentID(doc)

	packages, files, relationships := doc.Packages, doc.Files, doc.Relationships
	doc.Packages, doc.Files, doc.Relationships = nil, nil, nil
	head, err := json.Marshal(doc)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	w := &document{w: bufio.NewWriterSize(out, 64<<10)}
	w.raw(string(head[:len(head)-1]))
	list(w, "packages", packages)
	list(w, "files", files)
	list(w, "relationships", relationships)
	w.raw("}\n")
	if w.err == nil {
		w.err = w.w.Flush()
	}
	if w.err != nil {
		return fmt.Errorf("encode: %w", w.err)
	}
	return nil
}

// document writes JSON and keeps the first error.
type document struct {
	w   *bufio.Writer
	err error
}

func (d *document) raw(s string) {
	if d.err == nil {
		_, d.err = d.w.WriteString(s)
	}
}

func list[T any](d *document, name string, elements []T) {
	d.raw(`,"` + name + `":[`)
	for i, e := range elements {
		if i > 0 {
			d.raw(",")
		}
		b, err := json.Marshal(e)
		if err != nil && d.err == nil {
			d.err = err
		}
		d.raw(string(b))
	}
	d.raw("]")
}

// contentID digests what the document says: identifiers of packages, which
// syft derives from their content, and paths and checksums of files.
func contentID(doc *spdx.Document) string {
	h := sha256.New()
	for _, p := range doc.Packages {
		fmt.Fprintf(h, "p %q %q %q\n", p.PackageSPDXIdentifier, p.PackageName, p.PackageVersion)
	}
	for _, f := range doc.Files {
		fmt.Fprintf(h, "f %q %v\n", f.FileName, f.Checksums)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
