package sbom

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

type spdxChecksum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

// spdxPackage is the part of SPDX 2.3 §7 that the normal form is made of.
type spdxPackage struct {
	ID               string         `json:"SPDXID"`
	Name             string         `json:"name"`
	Version          string         `json:"versionInfo"`
	Supplier         string         `json:"supplier"`
	Originator       string         `json:"originator"`
	DownloadLocation string         `json:"downloadLocation"`
	SourceInfo       string         `json:"sourceInfo"`
	LicenseDeclared  string         `json:"licenseDeclared"`
	LicenseConcluded string         `json:"licenseConcluded"`
	Checksums        []spdxChecksum `json:"checksums"`
	ExternalRefs     []struct {
		Type    string `json:"referenceType"`
		Locator string `json:"referenceLocator"`
	} `json:"externalRefs"`
}

type spdxFile struct {
	ID        string         `json:"SPDXID"`
	Name      string         `json:"fileName"`
	Checksums []spdxChecksum `json:"checksums"`
}

type spdxRelation struct {
	From string `json:"spdxElementId"`
	To   string `json:"relatedSpdxElement"`
	Type string `json:"relationshipType"`
}

const spdxDocument = "SPDXRef-DOCUMENT"

// spdxReader collects a document. SPDX puts no order on its lists, so relations
// are resolved at the end; until then an SPDXID is a number.
type spdxReader struct {
	doc      *Document
	numbers  map[string]uint32 // by SPDXID, from its first mention
	elements []spdxElement     // by number
	kinds    map[string]uint32
	pending  []pendingRelation
	roots    []string // SPDXIDs that the document describes
}

// spdxElement is what an SPDXID names.
type spdxElement struct {
	key string      // "" for one that was only mentioned
	pkg *packageKey // nil for files
}

// pendingRelation has numbers of a kind and of elements.
type pendingRelation struct{ kind, from, to uint32 }

func newSPDXReader() *spdxReader {
	return &spdxReader{
		doc: &Document{
			packages: map[packageKey]int{}, files: map[string]sums{}, relations: map[relation]struct{}{},
			attributed:   map[string]struct{}{},
			hasRelations: true, hasDetails: true,
		},
		numbers: map[string]uint32{}, kinds: map[string]uint32{},
	}
}

func (r *spdxReader) number(id string) uint32 {
	n, ok := r.numbers[id]
	if !ok {
		n = uint32(len(r.elements)) //nolint:gosec // maxElements is less
		r.numbers[strings.Clone(id)] = n
		r.elements = append(r.elements, spdxElement{})
	}
	return n
}

// member reads one top-level member of the document, or says that it is not
// needed.
func (r *spdxReader) member(name string, dec *jsontext.Decoder) (bool, error) {
	switch name {
	case "packages":
		return true, elements(dec, r.addPackage)
	case "files":
		return true, elements(dec, r.addFile)
	case "relationships":
		return true, elements(dec, r.addRelation)
	case "documentDescribes":
		return true, elements(dec, func(id *string) error {
			r.describe(*id)
			return nil
		})
	}
	return false, nil
}

func (r *spdxReader) claim(id string, e spdxElement) error {
	if id == "" {
		return fmt.Errorf("%s has no SPDXID", clip(e.key))
	}
	n := r.number(id)
	if r.elements[n].key != "" {
		return fmt.Errorf("SPDXID %q names two elements", clip(id))
	}
	r.elements[n] = e
	return nil
}

func (r *spdxReader) addPackage(p *spdxPackage) error {
	var purls []string
	for _, ref := range p.ExternalRefs {
		if ref.Type == "purl" {
			purls = append(purls, normalPURL(ref.Locator))
		}
	}
	slices.Sort(purls)
	var checksums []string
	for _, c := range p.Checksums {
		checksums = append(checksums, strings.ToUpper(c.Algorithm)+":"+strings.ToLower(c.Value))
	}
	slices.Sort(checksums)
	k := packageKey{
		name: p.Name, version: p.Version, purl: strings.Join(purls, " "),
		details: strings.Join([]string{
			"licence " + asserted(p.LicenseDeclared), asserted(p.LicenseConcluded),
			"supplier " + asserted(p.Supplier), "originator " + asserted(p.Originator),
			"from " + asserted(p.DownloadLocation), strings.Join(checksums, " "),
		}, "; "),
	}
	// syft: "acquired package info from DPKG DB: /a, /b".
	if _, list, ok := strings.Cut(p.SourceInfo, ": "); ok {
		for s := range strings.SplitSeq(list, ", ") {
			r.doc.attributed[filePath(s)] = struct{}{}
		}
	}
	return r.claim(p.ID, spdxElement{packageElement(k), &k})
}

// asserted gives the two SPDX ways to say nothing one spelling.
func asserted(s string) string {
	if s == "NOASSERTION" || s == "NONE" {
		return ""
	}
	return s
}

func (r *spdxReader) addFile(f *spdxFile) error {
	p := filePath(f.Name)
	key := fileElement(p)
	if err := r.claim(f.ID, spdxElement{key: key}); err != nil {
		return err
	}
	p = pathOf(key) // one string for both
	var s sums
	for _, c := range f.Checksums {
		s.add(c.Algorithm, c.Value)
	}
	// An archive's entries have paths of their own; a path that occurs twice
	// with two contents cannot be compared.
	if old, twice := r.doc.files[p]; twice && old != s && old.covered() && s.covered() {
		return fmt.Errorf("file %q is listed twice with different checksums", clip(p))
	} else if twice && !s.covered() {
		return nil
	}
	r.doc.files[p] = s
	return nil
}

func (r *spdxReader) addRelation(rel *spdxRelation) error {
	switch {
	case rel.From == spdxDocument && rel.Type == "DESCRIBES":
		r.describe(rel.To)
	case rel.To == spdxDocument && rel.Type == "DESCRIBED_BY":
		r.describe(rel.From)
	default:
		kind, ok := r.kinds[rel.Type]
		if !ok {
			kind = uint32(len(r.kinds)) //nolint:gosec // maxElements is less
			r.kinds[rel.Type] = kind
		}
		r.pending = append(r.pending, pendingRelation{kind, r.number(rel.From), r.number(rel.To)})
	}
	return nil
}

func (r *spdxReader) describe(id string) {
	if !slices.Contains(r.roots, id) && len(r.roots) < 2 {
		r.roots = append(r.roots, id)
	}
}

// finish drops the root and resolves the relations.
//
// The root is the one package that the document describes: it stands for the
// image, and its name, version and purl say under which name it was scanned. A
// document that describes several packages has no root, and loses none.
func (r *spdxReader) finish() error {
	const none = ^uint32(0)
	root := none
	if len(r.roots) == 1 {
		if n, ok := r.numbers[r.roots[0]]; ok && r.elements[n].pkg != nil {
			root = n
		}
	}
	for n, e := range r.elements {
		if e.pkg != nil && uint32(n) != root { //nolint:gosec // as above
			r.doc.packages[*e.pkg]++
		}
	}
	kinds, ids := make([]string, len(r.kinds)), make([]string, len(r.elements))
	for kind, n := range r.kinds {
		kinds[n] = kind
	}
	for id, n := range r.numbers {
		ids[n] = id
	}
	owns := false
	for _, rel := range r.pending {
		from, to := r.elements[rel.from].key, r.elements[rel.to].key
		if rel.from == root || rel.to == root || ids[rel.from] == spdxDocument || ids[rel.to] == spdxDocument ||
			from == fileElement("/") || to == fileElement("/") {
			continue // says under which root things were found, and no more
		}
		if from == "" || to == "" {
			if special(ids[rel.from]) || special(ids[rel.to]) {
				continue
			}
			return fmt.Errorf("relationship %q names an unknown element", clip(ids[rel.from]+" "+kinds[rel.kind]+" "+ids[rel.to]))
		}
		if path := pathOf(to); path != "" {
			r.doc.attributed[path] = struct{}{}
			owns = true
		}
		r.doc.relations[relation{kind: kinds[rel.kind], from: from, to: to}] = struct{}{}
	}
	r.doc.allFiles = r.listsAllFiles(owns)
	delete(r.doc.files, "/")
	return nil
}

// special are the SPDX 2.3 §11.1 targets that are no elements, and elements of
// other documents.
func special(id string) bool {
	return id == "NONE" || id == "NOASSERTION" || strings.HasPrefix(id, "DocumentRef-")
}

// listsAllFiles tells a document over every file from one over the files of
// packages, which is the stock tool's default: only the former lists
// directories (cvm-sbom always lists the root itself), or reads files in an
// image whose packages own none.
func (r *spdxReader) listsAllFiles(owns bool) bool {
	for p, s := range r.doc.files {
		if !s.covered() {
			continue
		}
		if !owns {
			return true
		}
		for dir := path.Dir(p); ; dir = path.Dir(dir) {
			if _, listed := r.doc.files[dir]; listed {
				return true
			}
			if dir == "/" {
				break
			}
		}
	}
	return false
}
