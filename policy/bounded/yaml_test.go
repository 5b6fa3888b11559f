package bounded

import (
	"errors"
	"strings"
	"testing"
)

func TestDecodeYAMLRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		in, want string
		is       error
	}{
		"an unknown field":             {in: "version: 1\nx: 2\n", want: "line 2, column 1: x: unknown field", is: ErrUnknownField},
		"an unknown field deep inside": {in: "items:\n  - name: a\n  - name: b\n    id: c\n", want: "line 4, column 5: items[1].id: unknown field", is: ErrUnknownField},
		"a name in another case":       {in: "Version: 1\n", want: "line 1, column 1: Version: unknown field", is: ErrUnknownField},
		"a duplicate key":              {in: "version: 1\nversion: 2\n", want: "line 2, column 1"},
		"a wrong type":                 {in: "one:\n  name: 5\n", want: "line 2, column 3: one.name: a number, expected a string"},
		"an alias and anchor":          {in: "one: &a {name: x}\nitems: [*a]\n", want: "line 1, column 6"},
		"a merge key":                  {in: "one:\n  <<: {name: x}\n", want: "line 2, column 3"},
		"a tag":                        {in: "one: {name: !!str 5}\n", want: "not accepted"},
		"two documents":                {in: "version: 1\n---\nversion: 2\n", want: "2 documents"},
		"no document":                  {in: "# nothing\n", want: "expected one"},
		"an empty text":                {in: "", want: "expected one"},
		"a key that is a number":       {in: "1: a\n", want: "a key that is no string"},
		"a key that is a boolean":      {in: "true: a\n", want: "a key that is no string"},
		"a complex key":                {in: "? [a]\n: b\n", want: "complex keys"},
		"an empty value":               {in: "one:\nversion: 1\n", want: "one: an empty value"},
		"null":                         {in: "one: null\n", want: "one: an empty value"},
		"yes":                          {in: "on: yes\n", want: "means different things"},
		"NO as a string":               {in: "one: {name: NO}\n", want: "one.name: \"NO\" means different things"},
		"True":                         {in: "items: [{name: True}]\n", want: "write true or false"},
		"octal":                        {in: "one: {name: 0400}\n", want: "neither a plain decimal number"},
		"hexadecimal":                  {in: "version: 0x10\n", want: "neither a plain decimal number"},
		"underscores":                  {in: "version: 1_000\n", want: "version:"},
		"infinity":                     {in: "ratio: .inf\n", want: "not accepted"},
		"a deep flow":                  {in: "any: " + strings.Repeat("[", 40) + strings.Repeat("]", 40) + "\n", want: "nested deeper", is: ErrDepth},
		"a deep block":                 {in: "any: \n  " + strings.Repeat("- ", 40) + "x\n", want: "nested deeper", is: ErrDepth},
		"a very deep block":            {in: "any: \n  " + strings.Repeat("- ", 100000) + "x\n", want: "column 256", is: ErrDepth},
		"a control character":          {in: "one: {name: \"a\x01\"}\n", want: "control character"},
		"broken YAML":                  {in: "one: {name: x\n", want: "line 1"},
		"a directive":                  {in: "%YAML 1.1\n---\nversion: 1\n", want: "not accepted"},
		"a tab for indentation":        {in: "one:\n\tname: x\n", want: "line"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := DecodeYAML([]byte(c.in), new(doc), Limits{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, expected %q", err, c.want)
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Fatalf("error %v is not %v", err, c.is)
			}
		})
	}
}

func TestDecodeYAMLAccepts(t *testing.T) {
	in := "# comment\nversion: 3\n\"on\": true\n\"ratio\": 0.5\nitems:\n  - name: \"yes\"\n    tags: [a, 'b']\nenv:\n  A: \"0400\"\n  B: |\n    two\n    lines\n  C: ''\n"
	var d doc
	where, err := DecodeYAML([]byte(in), &d, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if d.Version != 3 || !d.On || d.Items[0].Name != "yes" || d.Env["B"] != "two\nlines\n" || d.Env["A"] != "0400" {
		t.Fatalf("decoded %+v", d)
	}
	if at := where["items[0].tags"]; at.Line != 7 || at.Column != 5 {
		t.Fatalf("items[0].tags is at %+v", at)
	}
}

func FuzzDecodeYAML(f *testing.F) {
	for _, s := range []string{"version: 1\n", "items:\n  - name: a\n", "a: &b c\nd: *b\n", "- - - -", "{[", "? a\n: b", "a: |\n  x\n", "'"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var d doc
		if _, err := DecodeYAML(data, &d, Limits{Bytes: 4096}); err != nil {
			var fe *FieldError
			if !errors.As(err, &fe) || fe.Line < 1 {
				t.Fatalf("error without a position: %v", err)
			}
		}
	})
}
