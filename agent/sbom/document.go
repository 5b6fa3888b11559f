// Package sbom knows what makes two software bills of materials equal, and runs
// the program that makes one from a mounted image in a sandbox.
//
// Read reduces a document to its normal form while it comes in, and
// CompareDocuments names every difference of two. What the normal form keeps
// and drops, and why, is tabled in README.md; a textual comparison would report
// thousands of differences for one image.
// Sandbox.Scan runs cvm-sbom (a program of its own, see agent/cmd/cvm-sbom)
// with no rights but to read the image; it refuses to run it with less
// protection than that.
//
// The package does not verify signatures: the caller hands over a document that
// it has authenticated, and a document that it has made.
package sbom

import (
	"net/url"
	"slices"
	"strings"
)

// Bounds of one document. The SBOM of a 780 MB image with 44 000 paths is
// 34 MB; a document beyond these limits is refused with cause.SBOMMalformed.
const (
	MaxDocument = 64 << 20 // bytes
	maxDepth    = 32
	maxElement  = 8 << 20 // bytes of one package, file or relationship
	maxElements = 2_000_000
)

// A Document is the normal form: what is left of an SBOM when everything that
// depends on who scanned when, from where and under which name is gone.
type Document struct {
	packages  map[packageKey]int // how often each occurs
	files     map[string]sums    // by absolute path
	relations map[relation]struct{}

	// What the format or the tool records at all: a difference in something
	// that one side never records is none.
	hasRelations bool
	hasDetails   bool
	// allFiles: the document lists files that no package owns, so a file that
	// it does not list was not there.
	allFiles bool
	// attributed are the files that a package contains or was found by.
	attributed map[string]struct{}
}

// A packageKey is all that identifies a package. Two packages that differ in
// any of it are two packages.
type packageKey struct {
	name, version, purl string
	details             string // licences, supplier, origin, checksums; "" where not compared
}

// identity drops what some formats do not record.
func (k packageKey) identity() packageKey { k.details = ""; return k }

func (k packageKey) String() string {
	s := k.name
	if k.version != "" {
		s += " " + k.version
	}
	if k.purl != "" {
		s += " (" + k.purl + ")"
	}
	return s
}

// sums holds a file's checksums in lowercase hex by algorithm strength. A path
// with none is a directory, a link or a file that the tool did not read.
type sums [len(algorithms)]string

// algorithms, strongest first, by their SPDX 2.3 §8.4 names. MD5 and weaker are
// no evidence and not read.
var algorithms = [...]string{"SHA512", "SHA384", "SHA256", "SHA1"}

func (s *sums) add(algorithm, value string) {
	name := strings.ToUpper(strings.ReplaceAll(algorithm, "-", ""))
	i := slices.Index(algorithms[:], name)
	// syft writes a SHA-1 of zeros where the SPDX schema wants a checksum and
	// there is none.
	if i < 0 || strings.Trim(value, "0") == "" {
		return
	}
	s[i] = strings.ToLower(value)
}

func (s sums) covered() bool { return s != sums{} }

// strongestCommon returns the strongest algorithm that both have.
func strongestCommon(a, b sums) (algorithm, va, vb string, ok bool) {
	for i, name := range algorithms {
		if a[i] != "" && b[i] != "" {
			return name, a[i], b[i], true
		}
	}
	return "", "", "", false
}

// A relation between packages and files, by what they are and not by
// document-local identifiers.
type relation struct {
	kind, from, to string
}

// element keys in relations.
func packageElement(k packageKey) string { return "package " + k.identity().String() }
func fileElement(path string) string     { return "file " + path }

// pathOf returns the path of a file's element key, "" for a package's.
func pathOf(element string) string {
	p, ok := strings.CutPrefix(element, "file ")
	if !ok {
		return ""
	}
	return p
}

// filePath makes a file name absolute: tools write usr/bin/x, /usr/bin/x and
// ./usr/bin/x for one file. The scanned directory itself is "/".
func filePath(name string) string {
	name = strings.TrimPrefix(name, "./")
	name = "/" + strings.TrimLeft(name, "/")
	if name == "/." {
		return "/"
	}
	return name
}

// normalPURL gives a package URL one spelling: scheme and type in lowercase,
// qualifiers in order, escapes as net/url writes them. A text that is no
// package URL stays as it is.
func normalPURL(s string) string {
	rest, ok := strings.CutPrefix(s, "pkg:")
	if !ok {
		return s
	}
	rest = strings.TrimLeft(rest, "/")
	rest, fragment, hasFragment := strings.Cut(rest, "#")
	rest, query, _ := strings.Cut(rest, "?")
	kind, path, ok := strings.Cut(rest, "/")
	if !ok {
		return s
	}
	qualifiers := make([]string, 0, 4)
	for q := range strings.SplitSeq(query, "&") {
		k, v, _ := strings.Cut(q, "=")
		if v == "" {
			continue
		}
		if plain, err := url.PathUnescape(v); err == nil {
			v = url.QueryEscape(plain)
		}
		qualifiers = append(qualifiers, strings.ToLower(k)+"="+v)
	}
	slices.Sort(qualifiers)
	if plain, err := url.PathUnescape(path); err == nil {
		path = (&url.URL{Path: plain}).EscapedPath()
	}
	out := "pkg:" + strings.ToLower(kind) + "/" + path
	if len(qualifiers) > 0 {
		out += "?" + strings.Join(qualifiers, "&")
	}
	if hasFragment {
		out += "#" + fragment
	}
	return out
}
