package policy

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"reflect"
	"strings"

	"github.com/invopop/jsonschema"
)

// SchemaID names the schema that Schema writes.
const SchemaID = "https://github.com/cc-runtime/cvm-agent/policy/examples/policy.schema.json"

// The descriptions in the schema are the comments in this file: one text for
// who reads the code and who writes a policy.
//
//go:embed document.go
var documentSource string

// Schema is the JSON Schema (2020-12) of the policy document, indented, for
// editors. It is derived from the types, and looser than Validate.
func Schema() ([]byte, error) {
	return SchemaOf(&Policy{}, SchemaID, "Launch policy of cvm-agent", func(t reflect.Type) *jsonschema.Schema {
		switch t {
		case reflect.TypeFor[Duration]():
			return &jsonschema.Schema{Type: "string", Pattern: `^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$`}
		case reflect.TypeFor[Platform]():
			return &jsonschema.Schema{Type: "string", Enum: []any{PlatformSNP, PlatformTDX, PlatformAzSNPvTPM, PlatformAzTDXvTPM, PlatformTPM}}
		}
		return nil
	}, documentSource)
}

// SchemaOf is the JSON Schema of the document type that document points to. Its
// descriptions are the comments in sources, the text of the Go files that
// declare the types; mapper, if not nil, describes types that decode themselves.
func SchemaOf(document any, id, title string, mapper func(reflect.Type) *jsonschema.Schema, sources ...string) ([]byte, error) {
	comments := map[string]string{}
	for _, source := range sources {
		more, err := fieldComments(source)
		if err != nil {
			return nil, fmt.Errorf("schema: %w", err)
		}
		maps.Copy(comments, more)
	}
	r := &jsonschema.Reflector{
		Anonymous:      true,
		ExpandedStruct: true,
		Mapper:         mapper,
		LookupComment: func(t reflect.Type, field string) string {
			if field == "" {
				return comments[t.Name()]
			}
			return comments[t.Name()+"."+field]
		},
	}
	s := r.Reflect(document)
	s.ID = jsonschema.ID(id)
	s.Title = title
	out, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("schema: %w", err)
	}
	var indented bytes.Buffer
	if err := json.Indent(&indented, out, "", "  "); err != nil {
		return nil, fmt.Errorf("schema: %w", err)
	}
	indented.WriteByte('\n')
	return indented.Bytes(), nil
}

// fieldComments maps Type and Type.Field to their comments, on one line each.
func fieldComments(source string) (map[string]string, error) {
	file, err := parser.ParseFile(token.NewFileSet(), "document.go", source, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	oneLine := func(groups ...*ast.CommentGroup) string {
		var words []string
		for _, g := range groups {
			words = append(words, strings.Fields(g.Text())...)
		}
		return strings.Join(words, " ")
	}
	out := map[string]string{}
	for _, d := range file.Decls {
		gen, ok := d.(*ast.GenDecl)
		if !ok || gen.Tok != token.TYPE {
			continue
		}
		for _, spec := range gen.Specs {
			typ := spec.(*ast.TypeSpec)
			out[typ.Name.Name] = oneLine(gen.Doc, typ.Doc)
			fields, ok := typ.Type.(*ast.StructType)
			if !ok {
				continue
			}
			for _, f := range fields.Fields.List {
				for _, name := range f.Names {
					out[typ.Name.Name+"."+name.Name] = oneLine(f.Doc, f.Comment)
				}
			}
		}
	}
	return out, nil
}
