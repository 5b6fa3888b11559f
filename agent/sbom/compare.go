package sbom

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The modes of Compare, as the policy's field sbom.compare writes them.
const (
	Normal = "normal" // as far as the signed document goes
	Strict = "strict" // and it must go as far as the found one
)

// The kinds of difference.
const (
	PackageAdded      = "package added"   // found, not signed
	PackageRemoved    = "package removed" // signed, not found
	PackageChanged    = "package changed"
	FileAdded         = "file added"
	FileRemoved       = "file removed"
	FileChanged       = "file changed"
	FileUncomparable  = "file not comparable"  // no common checksum algorithm
	FileNotCovered    = "file not covered"     // strict: the signed document has no checksum
	CoverageLess      = "coverage less"        // strict: the signed document leaves out a whole class
	RelationAdded     = "relationship added"   // found, not signed
	RelationRemoved   = "relationship removed" // signed, not found
	maxNamed          = 5
	maxDifferenceText = 160
)

// A Difference is one thing in which two documents differ. What names it;
// Signed and Found are the two values, where there are two.
type Difference struct {
	Kind   string `json:"kind"`
	What   string `json:"what"`
	Signed string `json:"signed,omitempty"`
	Found  string `json:"found,omitempty"`
}

func (d Difference) String() string {
	s := d.Kind + ": " + d.What
	if d.Signed != "" || d.Found != "" {
		s += fmt.Sprintf(" (signed %s, found %s)", cmp.Or(d.Signed, "none"), cmp.Or(d.Found, "none"))
	}
	return s
}

// Compare is CompareDocuments on two documents in memory.
func Compare(signed, found []byte, mode string) ([]Difference, error) {
	var s, f *Document
	var read errgroup.Group
	for _, in := range []struct {
		name string
		data []byte
		doc  **Document
	}{{"signed", signed, &s}, {"found", found, &f}} {
		read.Go(func() (err error) {
			if *in.doc, err = decode(in.data); err != nil {
				return fmt.Errorf("%s document: %w", in.name, err)
			}
			return nil
		})
	}
	if err := read.Wait(); err != nil {
		return nil, err
	}
	return CompareDocuments(s, f, mode)
}

// CompareDocuments reports in what found, the SBOM made of the image at hand,
// differs from signed, the SBOM that was attested for it. No difference means
// that every package, file and relationship that the signed document records is
// there, unchanged, and that there is no package and no recorded kind of file
// beyond them.
//
// Differences are sorted by kind and name. The error is cause.PolicyInvalid for
// an unknown mode. Neither document is changed, but for notes in signed.
func CompareDocuments(s, f *Document, mode string) ([]Difference, error) {
	if mode != Normal && mode != Strict {
		return nil, cause.New(cause.PolicyInvalid, "sbom comparison mode is %q, want %q or %q", clip(mode), Normal, Strict)
	}
	if s.attributed == nil {
		s.allFiles = s.listsAllFiles(f)
	}
	out := comparePackages(s, f)
	out = append(out, compareFiles(s, f, mode)...)
	out = append(out, compareRelations(s, f)...)
	if mode == Strict {
		out = append(out, compareCoverage(s, f)...)
	}
	slices.SortFunc(out, func(a, b Difference) int {
		return cmp.Or(strings.Compare(a.Kind, b.Kind), strings.Compare(a.What, b.What), strings.Compare(a.Signed, b.Signed), strings.Compare(a.Found, b.Found))
	})
	return out, nil
}

// comparePackages compares multisets: the same package twice is a difference
// from once.
func comparePackages(s, f *Document) []Difference {
	details := s.hasDetails && f.hasDetails
	count := map[packageKey]int{}
	add := func(from map[packageKey]int, sign int) {
		for k, n := range from {
			if !details {
				k = k.identity()
			}
			count[k] += sign * n
		}
	}
	add(s.packages, -1)
	add(f.packages, +1)

	// A package that is gone and one of the same name and kind that came are
	// one change.
	type slot struct{ name, kind string }
	slotOf := func(k packageKey) slot {
		kind, _, _ := strings.Cut(k.purl, "/")
		return slot{k.name, kind}
	}
	removed, added := map[slot][]packageKey{}, map[slot][]packageKey{}
	for k, n := range count {
		for ; n < 0; n++ {
			removed[slotOf(k)] = append(removed[slotOf(k)], k)
		}
		for ; n > 0; n-- {
			added[slotOf(k)] = append(added[slotOf(k)], k)
		}
	}
	var out []Difference
	byText := func(a, b packageKey) int {
		return cmp.Or(strings.Compare(a.String(), b.String()), strings.Compare(a.details, b.details))
	}
	for sl, gone := range removed {
		came := added[sl]
		slices.SortFunc(gone, byText)
		slices.SortFunc(came, byText)
		pairs := min(len(gone), len(came))
		for i := range pairs {
			d := Difference{Kind: PackageChanged, What: clip(sl.name), Signed: clip(gone[i].String()), Found: clip(came[i].String())}
			if gone[i].identity() == came[i].identity() {
				d.What = clip(gone[i].String())
				d.Signed, d.Found = clip(gone[i].details), clip(came[i].details)
			}
			out = append(out, d)
		}
		for _, k := range gone[pairs:] {
			out = append(out, Difference{Kind: PackageRemoved, What: clip(k.String())})
		}
		added[sl] = came[pairs:]
	}
	for _, came := range added {
		for _, k := range came {
			out = append(out, Difference{Kind: PackageAdded, What: clip(k.String())})
		}
	}
	return out
}

// compareFiles compares contents as far as the signed document covers them.
func compareFiles(s, f *Document, mode string) []Difference {
	var out []Difference
	for p, want := range s.files {
		if !want.covered() {
			continue
		}
		got, listed := f.files[p]
		if !listed || !got.covered() {
			out = append(out, Difference{Kind: FileRemoved, What: clip(p)})
			continue
		}
		algorithm, a, b, ok := strongestCommon(want, got)
		switch {
		case !ok:
			out = append(out, Difference{Kind: FileUncomparable, What: clip(p)})
		case a != b:
			out = append(out, Difference{Kind: FileChanged, What: clip(p), Signed: clip(strings.ToLower(algorithm) + ":" + a), Found: clip(strings.ToLower(algorithm) + ":" + b)})
		}
	}
	for p, got := range f.files {
		if !got.covered() || s.files[p].covered() {
			continue
		}
		_, listed := s.files[p]
		switch {
		case s.allFiles && !listed:
			out = append(out, Difference{Kind: FileAdded, What: clip(p)})
		case s.allFiles && listed, mode == Strict:
			out = append(out, Difference{Kind: FileNotCovered, What: clip(p)})
		}
	}
	return out
}

// compareRelations compares relations whose ends both documents list: an end
// that one lacks has been reported as a package or file, or is not covered.
func compareRelations(s, f *Document) []Difference {
	if !s.hasRelations || !f.hasRelations {
		return nil
	}
	known := func(d *Document) func(string) bool {
		packages := make(map[string]struct{}, len(d.packages))
		for k := range d.packages {
			packages[packageElement(k)] = struct{}{}
		}
		return func(element string) bool {
			if p, ok := strings.CutPrefix(element, "file "); ok {
				_, listed := d.files[p]
				return listed
			}
			_, listed := packages[element]
			return listed
		}
	}
	missing := func(a, b *Document, kind string) (out []Difference) {
		inB := known(b)
		for r := range a.relations {
			if _, ok := b.relations[r]; ok || !inB(r.from) || !inB(r.to) {
				continue
			}
			out = append(out, Difference{Kind: kind, What: clip(r.from) + " " + clip(r.kind) + " " + clip(r.to)})
		}
		return out
	}
	return append(missing(s, f, RelationRemoved), missing(f, s, RelationAdded)...)
}

// compareCoverage refuses a signed document that leaves out a class of facts
// that the found one has. Files are settled one by one in compareFiles.
func compareCoverage(s, f *Document) []Difference {
	var out []Difference
	if f.hasRelations && !s.hasRelations {
		out = append(out, Difference{Kind: CoverageLess, What: "the signed document records no relationships"})
	}
	if f.hasDetails && !s.hasDetails {
		out = append(out, Difference{Kind: CoverageLess, What: "the signed document records no licences and origins of packages"})
	}
	return out
}

// Differs returns nil for no differences, and cause.SBOMDiffers naming the
// first few otherwise.
func Differs(ds []Difference) error {
	if len(ds) == 0 {
		return nil
	}
	var named []string
	for _, d := range ds[:min(len(ds), maxNamed)] {
		text := d.String()
		if len(text) > 2*maxDifferenceText {
			text = text[:2*maxDifferenceText] + "…"
		}
		named = append(named, text)
	}
	more := ""
	if n := len(ds) - len(named); n > 0 {
		more = fmt.Sprintf("; and %d more", n)
	}
	return cause.New(cause.SBOMDiffers, "the image differs from its signed SBOM in %d places: %s%s", len(ds), strings.Join(named, "; "), more)
}
