package release

import (
	"fmt"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// DecodeYAML reads one YAML document of at most max bytes into v as strictly
// as JSON: unknown and duplicate keys, anchors, aliases, tags and merges are
// errors. JSON is YAML, so it reads both.
func DecodeYAML(data []byte, v any, max int) error {
	if len(data) > max {
		return fmt.Errorf("%d bytes, at most %d are read", len(data), max)
	}
	file, err := parser.ParseBytes(data, 0)
	if err != nil {
		return fmt.Errorf("not YAML: %s", yaml.FormatError(err, false, false))
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		return fmt.Errorf("%d YAML documents, expected one", len(file.Docs))
	}
	plain := &onlyPlain{}
	ast.Walk(plain, file.Docs[0].Body)
	if plain.err != nil {
		return plain.err
	}
	asJSON, err := yaml.YAMLToJSON(data)
	if err != nil {
		return fmt.Errorf("not YAML: %s", yaml.FormatError(err, false, false))
	}
	return bounded.DecodeJSON(asJSON, v, bounded.Limits{Bytes: int64(2*max + 1024), Depth: 16})
}

// onlyPlain refuses what makes one YAML text mean more than it shows.
type onlyPlain struct{ err error }

func (p *onlyPlain) Visit(n ast.Node) ast.Visitor {
	if p.err != nil {
		return nil
	}
	switch n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.TagNode, *ast.MergeKeyNode:
		at := n.GetToken().Position
		p.err = fmt.Errorf("line %d: YAML anchors, aliases, tags and merges are not read", at.Line)
		return nil
	}
	return p
}
