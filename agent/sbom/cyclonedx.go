package sbom

import (
	"fmt"

	"github.com/go-json-experiment/json/jsontext"
)

// cdxComponent is the part of a CycloneDX 1.x component that the normal form
// is made of.
type cdxComponent struct {
	Type    string `json:"type"`
	Group   string `json:"group"`
	Name    string `json:"name"`
	Version string `json:"version"`
	PURL    string `json:"purl"`
	Hashes  []struct {
		Algorithm string `json:"alg"`
		Content   string `json:"content"`
	} `json:"hashes"`
	Components []cdxComponent `json:"components"`
}

// A cdxReader collects packages and files. CycloneDX has neither file ownership
// nor SPDX's licence and origin fields, so those are not compared with a
// document of that format. The root, metadata.component, is not read.
type cdxReader Document

func newCDXReader() *cdxReader {
	return &cdxReader{packages: map[packageKey]int{}, files: map[string]sums{}, relations: map[relation]struct{}{}}
}

func (d *cdxReader) member(name string, dec *jsontext.Decoder) (bool, error) {
	if name != "components" {
		return false, nil
	}
	return true, elements(dec, d.addComponent)
}

func (d *cdxReader) addComponent(c *cdxComponent) error {
	switch c.Type {
	case "file":
		var s sums
		for _, h := range c.Hashes {
			s.add(h.Algorithm, h.Content)
		}
		p := filePath(c.Name)
		if old, twice := d.files[p]; twice && old != s {
			return fmt.Errorf("file %q is listed twice with different checksums", clip(p))
		}
		d.files[p] = s
	case "operating-system":
		// The distribution itself: every package's purl names it.
	default:
		name := c.Name
		if c.Group != "" {
			name = c.Group + "/" + name
		}
		d.packages[packageKey{name: name, version: c.Version, purl: normalPURL(c.PURL)}]++
	}
	for i := range c.Components {
		if err := d.addComponent(&c.Components[i]); err != nil {
			return err
		}
	}
	return nil
}

// listsAllFiles does for CycloneDX what the method of that name does for SPDX.
// The format has neither directories nor ownership, so the other document's
// ownership decides: a tool that reads owned files alone reaches few others
// (through links), one that reads all reaches many. Only an image whose
// packages changed as well could be told otherwise, and that is a difference.
func (d *Document) listsAllFiles(other *Document) bool {
	covered, unowned := 0, 0
	for p, s := range d.files {
		if !s.covered() {
			continue
		}
		covered++
		if _, ok := other.attributed[p]; !ok {
			unowned++
		}
	}
	return unowned > covered/100
}
