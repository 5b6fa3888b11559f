package sbom

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// decode reads an SPDX 2.x or CycloneDX JSON document into its normal form.
// Unknown fields are tolerated, as both formats are extended by their tools;
// duplicate keys and documents beyond the limits are not.
func decode(data []byte) (*document, error) {
	if err := bounded.CheckJSON(data, limits); err != nil {
		return nil, cause.New(cause.SBOMMalformed, "the SBOM cannot be decoded: %w", err)
	}
	var version, format string
	spdx, cdx := newSPDXReader(), newCDXReader()
	err := members(data, func(name string, dec *json.Decoder) (bool, error) {
		switch name {
		case "spdxVersion":
			return true, dec.Decode(&version)
		case "bomFormat":
			return true, dec.Decode(&format)
		}
		if used, err := spdx.member(name, dec); used || err != nil {
			return used, err
		}
		return cdx.member(name, dec)
	})
	isSPDX := strings.HasPrefix(version, "SPDX-2.") && format == ""
	isCDX := format == "CycloneDX" && version == ""
	switch {
	case err != nil:
	case isSPDX:
		err = spdx.finish()
	case isCDX:
		delete(cdx.files, "/")
	default:
		err = fmt.Errorf("it is neither SPDX 2 nor CycloneDX (spdxVersion %q, bomFormat %q)", clip(version), clip(format))
	}
	if err != nil {
		return nil, cause.New(cause.SBOMMalformed, "the SBOM cannot be decoded: %w", err)
	}
	if isSPDX {
		return spdx.doc, nil
	}
	return (*document)(cdx), nil
}

// members calls visit for every member of the top-level object, with the
// decoder in front of its value; visit says whether it has consumed it. Lists
// are so decoded element by element, and never exist in memory as a whole.
func members(data []byte, visit func(name string, dec *json.Decoder) (bool, error)) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	t, err := dec.Token()
	if err != nil {
		return err
	}
	if t != json.Delim('{') {
		return fmt.Errorf("want an object, found %v", t)
	}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return err
		}
		name, _ := t.(string)
		used, err := visit(name, dec)
		if err == nil && !used {
			err = skip(dec)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", clip(name), err)
		}
	}
	return nil
}

// skip passes over one value.
func skip(dec *json.Decoder) error {
	depth := 0
	for {
		t, err := dec.Token()
		if err != nil {
			return err
		}
		switch t {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
		if depth == 0 {
			return nil
		}
	}
}

// elements decodes a list element by element; null stands for an empty one.
func elements[T any](dec *json.Decoder, each func(*T) error) error {
	t, err := dec.Token()
	if err != nil || t == nil {
		return err
	}
	if t != json.Delim('[') {
		return fmt.Errorf("want a list, found %v", t)
	}
	for n := 0; dec.More(); n++ {
		if n == maxElements {
			return fmt.Errorf("more than %d elements", maxElements)
		}
		var e T
		if err := dec.Decode(&e); err != nil {
			return err
		}
		if err := each(&e); err != nil {
			return err
		}
	}
	_, err = dec.Token()
	return err
}

// clip makes a text from a document fit for one line of an error.
func clip(s string) string {
	if len(s) > 120 {
		s = s[:120] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}
