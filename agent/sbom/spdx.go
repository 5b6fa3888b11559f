package sbom

import (
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"
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

// spdxReader collects a document; SPDX puts no order on its lists, so
// relations are resolved at the end.
type spdxReader struct {
	doc      *document
	byID     map[string]string // SPDXID to element key
	packages map[string]packageKey
	pending  []spdxRelation
	roots    []string // SPDXIDs that the document describes
}

func newSPDXReader() *spdxReader {
	return &spdxReader{
		doc: &document{
			packages: map[packageKey]int{}, files: map[string]sums{}, relations: map[relation]struct{}{},
			attributed:   map[string]struct{}{},
			hasRelations: true, hasDetails: true,
		},
		byID:     map[string]string{},
		packages: map[string]packageKey{},
	}
}

// member reads one top-level member of the document, or says that it is not
// needed.
func (r *spdxReader) member(name string, dec *json.Decoder) (bool, error) {
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

func (r *spdxReader) claim(id, element string) error {
	if id == "" {
		return fmt.Errorf("%s has no SPDXID", clip(element))
	}
	if _, twice := r.byID[id]; twice {
		return fmt.Errorf("SPDXID %q names two elements", clip(id))
	}
	r.byID[id] = element
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
	r.packages[p.ID] = k
	// syft: "acquired package info from DPKG DB: /a, /b".
	if _, list, ok := strings.Cut(p.SourceInfo, ": "); ok {
		for s := range strings.SplitSeq(list, ", ") {
			r.doc.attributed[filePath(s)] = struct{}{}
		}
	}
	return r.claim(p.ID, packageElement(k))
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
	if err := r.claim(f.ID, fileElement(p)); err != nil {
		return err
	}
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
		r.pending = append(r.pending, *rel)
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
	root := ""
	if len(r.roots) == 1 {
		if _, ok := r.packages[r.roots[0]]; ok {
			root = r.roots[0]
		}
	}
	for id, k := range r.packages {
		if id != root {
			r.doc.packages[k]++
		}
	}
	owns := false
	for _, rel := range r.pending {
		from, ok1 := r.byID[rel.From]
		to, ok2 := r.byID[rel.To]
		if rel.From == root || rel.To == root || rel.From == spdxDocument || rel.To == spdxDocument ||
			from == fileElement("/") || to == fileElement("/") {
			continue // says under which root things were found, and no more
		}
		if !ok1 || !ok2 {
			if special(rel.From) || special(rel.To) {
				continue
			}
			return fmt.Errorf("relationship %q names an unknown element", clip(rel.From+" "+rel.Type+" "+rel.To))
		}
		if path, ok := strings.CutPrefix(to, "file "); ok {
			r.doc.attributed[path] = struct{}{}
			owns = true
		}
		r.doc.relations[relation{kind: rel.Type, from: from, to: to}] = struct{}{}
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
