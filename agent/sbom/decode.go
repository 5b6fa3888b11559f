package sbom

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Read reads an SPDX 2.x or CycloneDX JSON document to its end and keeps its
// normal form, a fraction of its size. Unknown fields are tolerated, as both
// formats are extended by their tools; duplicate keys, invalid UTF-8, trailing
// data and documents beyond the limits are not. The error is
// cause.SBOMMalformed, or r's own if that carries a cause.
func Read(r io.Reader) (*Document, error) {
	dec := jsontext.NewDecoder(&limitReader{r: r, room: MaxDocument})
	var version, format string
	spdx, cdx := newSPDXReader(), newCDXReader()
	err := members(dec, func(name string) (bool, error) {
		switch name {
		case "spdxVersion":
			return true, json.UnmarshalDecode(dec, &version)
		case "bomFormat":
			return true, json.UnmarshalDecode(dec, &format)
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
		var own *cause.Error
		if errors.As(err, &own) {
			return nil, err
		}
		return nil, cause.New(cause.SBOMMalformed, "the SBOM cannot be decoded: %w", err)
	}
	if isSPDX {
		return spdx.doc, nil
	}
	return (*Document)(cdx), nil
}

func decode(data []byte) (*Document, error) { return Read(bytes.NewReader(data)) }

// limitReader refuses the byte after the last one that it has room for.
type limitReader struct {
	r    io.Reader
	room int64
}

func (l *limitReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.room -= int64(n); l.room < 0 {
		return 0, fmt.Errorf("%w: more than %d bytes", bounded.ErrTooLarge, int64(MaxDocument))
	}
	return n, err
}

// members calls visit for every member of the top-level object, with the
// decoder in front of its value; visit says whether it has consumed it. Lists
// are so decoded element by element, and never exist in memory as a whole.
func members(dec *jsontext.Decoder, visit func(name string) (bool, error)) error {
	t, err := dec.ReadToken()
	if err != nil {
		return err
	}
	if t.Kind() != '{' {
		return fmt.Errorf("want an object, found %v", t.Kind())
	}
	for dec.PeekKind() != '}' {
		t, err := dec.ReadToken()
		if err != nil {
			return err
		}
		name := t.String()
		used, err := visit(name)
		if err == nil && !used {
			err = skip(dec)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", clip(name), err)
		}
	}
	if _, err := dec.ReadToken(); err != nil {
		return err
	}
	if _, err := dec.ReadToken(); err == nil {
		return errors.New("trailing data")
	} else if !errors.Is(err, io.EOF) {
		return fmt.Errorf("trailing data: %w", err)
	}
	return nil
}

// skip passes over one value.
func skip(dec *jsontext.Decoder) error {
	for depth := dec.StackDepth(); ; {
		if _, err := dec.ReadToken(); err != nil {
			return err
		}
		switch now := dec.StackDepth(); {
		case now > maxDepth:
			return fmt.Errorf("nested deeper than %d", maxDepth)
		case now == depth:
			return nil
		}
	}
}

// elements decodes a list element by element; null stands for an empty one.
func elements[T any](dec *jsontext.Decoder, each func(*T) error) error {
	t, err := dec.ReadToken()
	if err != nil || t.Kind() == 'n' {
		return err
	}
	if t.Kind() != '[' {
		return fmt.Errorf("want a list, found %v", t.Kind())
	}
	for n := 0; dec.PeekKind() != ']'; n++ {
		if n == maxElements {
			return fmt.Errorf("more than %d elements", maxElements)
		}
		raw, err := dec.ReadValue()
		if err != nil {
			return err
		}
		if len(raw) > maxElement {
			return fmt.Errorf("an element has more than %d bytes", maxElement)
		}
		if nesting(raw) > maxDepth {
			return fmt.Errorf("nested deeper than %d", maxDepth)
		}
		var e T
		if err := json.Unmarshal(raw, &e); err != nil {
			return err
		}
		if err := each(&e); err != nil {
			return err
		}
	}
	_, err = dec.ReadToken()
	return err
}

// nesting returns how deep a value of good syntax goes.
func nesting(raw []byte) int {
	depth, deepest, quoted := 0, 0, false
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			depth++
			deepest = max(deepest, depth)
		case c == '}' || c == ']':
			depth--
		}
	}
	return deepest
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
