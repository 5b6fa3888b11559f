package bounded

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Position is a place in a text: line and column from 1.
type Position struct{ Line, Column int }

// Positions maps paths such as workloads[0].image to where they were written.
type Positions map[string]Position

// Locate fills in the position of a *FieldError that has none, from its path or
// the nearest parent that was written. Other errors are left alone.
//
// An error that wraps err by text keeps its old text: wrap after locating.
func (w Positions) Locate(err error) {
	var f *FieldError
	if !errors.As(err, &f) || f.Line != 0 {
		return
	}
	for path := f.Path; ; {
		if at, ok := w[path]; ok {
			f.Line, f.Column = at.Line, at.Column
			return
		}
		cut := strings.LastIndexAny(path, ".[")
		if cut < 0 {
			f.Line, f.Column = 1, 1
			return
		}
		path = path[:cut]
	}
}

// DecodeYAML decodes one YAML document into v as strictly as DecodeJSON, and
// returns where each value was written. What YAML has beyond JSON and comments
// is refused: aliases, anchors, merge keys, tags, directives, several
// documents, keys that are no strings, empty values, numbers not written as in
// JSON, and plain scalars that YAML 1.1 and 1.2 read differently (yes, no, on,
// off …), since the reader and the machine could disagree about each.
func DecodeYAML(data []byte, v any, l Limits) (Positions, error) {
	l = l.orDefaults()
	text, where, err := yamlToJSON(data, l)
	if err != nil {
		return nil, err
	}
	// The JSON is ours and may be longer than the YAML: quotes, escapes.
	l.Bytes = int64(len(text))
	l.String = len(text)
	if err := DecodeJSON(text, v, l); err != nil {
		var f *FieldError
		if errors.As(err, &f) {
			f.Line = 0 // that of the JSON, which nobody has seen
			f.Path = bracketed.ReplaceAllString(f.Path, "[$1]")
		}
		where.Locate(err)
		return nil, err
	}
	return where, nil
}

// bracketed finds the indices in the paths of encoding/json, workloads.0.name.
var bracketed = regexp.MustCompile(`\.(\d+)\b`)

const maxYAMLIndent = 256 // columns; block nesting costs at least one each

type yamlWalker struct {
	out    bytes.Buffer
	where  Positions
	limits Limits
	nodes  int
	path   []string
}

func yamlToJSON(data []byte, l Limits) ([]byte, Positions, error) {
	w := &yamlWalker{where: Positions{}, limits: l, nodes: l.Nodes}
	if int64(len(data)) > l.Bytes {
		return nil, nil, &FieldError{Line: 1, Column: 1, Err: ErrTooLarge,
			Msg: fmt.Sprintf("%d bytes, at most %d are accepted", len(data), l.Bytes)}
	}
	if !utf8.Valid(data) {
		return nil, nil, (&walker{data: data}).fail(firstInvalid(data), nil, "invalid UTF-8")
	}
	if i := bytes.IndexFunc(data, func(r rune) bool { return r < ' ' && r != '\n' && r != '\r' && r != '\t' }); i >= 0 {
		return nil, nil, (&walker{data: data}).fail(i, nil, "control character")
	}
	tokens := lexer.Tokenize(string(data))
	if err := w.checkTokens(tokens); err != nil {
		return nil, nil, err
	}
	file, err := parser.Parse(tokens, 0)
	if err != nil {
		var at interface {
			GetMessage() string
			GetToken() *token.Token
		}
		if errors.As(err, &at) && at.GetToken() != nil {
			return nil, nil, w.fail(at.GetToken(), nil, "not YAML: %s", at.GetMessage())
		}
		return nil, nil, &FieldError{Line: 1, Column: 1, Msg: "not YAML"}
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		return nil, nil, &FieldError{Line: 1, Column: 1, Msg: fmt.Sprintf("%d documents, expected one that is not empty", len(file.Docs))}
	}
	if err := w.value(file.Docs[0].Body, 0); err != nil {
		return nil, nil, err
	}
	return w.out.Bytes(), w.where, nil
}

// checkTokens bounds the nesting before the parser recurses into it, and
// refuses the tokens that we never accept.
func (w *yamlWalker) checkTokens(tokens token.Tokens) error {
	depth := 0
	for _, t := range tokens {
		switch t.Type {
		case token.MappingStartType, token.SequenceStartType:
			if depth++; depth > w.limits.Depth {
				return w.fail(t, ErrDepth, "nested deeper than %d", w.limits.Depth)
			}
		case token.MappingEndType, token.SequenceEndType:
			depth--
		case token.SequenceEntryType, token.MappingKeyType:
			if t.Position.Column > maxYAMLIndent {
				return w.fail(t, ErrDepth, "indented beyond column %d", maxYAMLIndent)
			}
			if t.Type == token.MappingKeyType {
				return w.fail(t, nil, "complex keys (?) are not accepted")
			}
		case token.AnchorType, token.AliasType, token.MergeKeyType, token.TagType, token.DirectiveType:
			return w.fail(t, nil, "%q: aliases, anchors, merge keys, tags and directives are not accepted", t.Value)
		case token.InvalidType:
			return w.fail(t, nil, "not YAML: %s", t.Error)
		}
	}
	return nil
}

func (w *yamlWalker) fail(t *token.Token, sentinel error, format string, args ...any) error {
	e := &FieldError{Path: w.at(), Line: 1, Column: 1, Msg: fmt.Sprintf(format, args...), Err: sentinel}
	if t != nil && t.Position != nil {
		e.Line, e.Column = max(t.Position.Line, 1), max(t.Position.Column, 1)
	}
	return e
}

func (w *yamlWalker) at() string { return strings.TrimPrefix(strings.Join(w.path, ""), ".") }

func (w *yamlWalker) value(n ast.Node, depth int) error {
	if n == nil {
		return w.fail(nil, nil, "an empty value")
	}
	tk := n.GetToken()
	if tk != nil && tk.Position != nil {
		if _, set := w.where[w.at()]; !set {
			w.where[w.at()] = Position{tk.Position.Line, tk.Position.Column}
		}
	}
	if w.nodes--; w.nodes < 0 {
		return w.fail(tk, ErrTooLarge, "more than %d values", w.limits.Nodes)
	}
	switch n := n.(type) {
	case *ast.MappingNode:
		return w.mapping(n.Values, tk, depth+1)
	case *ast.MappingValueNode:
		return w.mapping([]*ast.MappingValueNode{n}, tk, depth+1)
	case *ast.SequenceNode:
		return w.sequence(n, tk, depth+1)
	case *ast.LiteralNode:
		return w.str(tk, n.Value.Value)
	case *ast.StringNode:
		if n.Token.Type == token.StringType && ambiguous[strings.ToLower(n.Value)] {
			return w.fail(tk, nil, "%q means different things to different YAML readers: quote it, or write true or false", n.Value)
		}
		return w.str(tk, n.Value)
	case *ast.BoolNode:
		if n.Token.Value != "true" && n.Token.Value != "false" {
			return w.fail(tk, nil, "%q: write true or false", n.Token.Value)
		}
		w.out.WriteString(n.Token.Value)
	case *ast.IntegerNode:
		return w.number(n.Token)
	case *ast.FloatNode:
		return w.number(n.Token)
	case *ast.NullNode:
		return w.fail(tk, nil, "an empty value: leave the field out, or write \"\"")
	default:
		return w.fail(tk, nil, "%s is not accepted", n.Type())
	}
	return nil
}

// ambiguous are the booleans of YAML 1.1 that are strings in YAML 1.2.
var ambiguous = map[string]bool{"yes": true, "no": true, "on": true, "off": true, "y": true, "n": true}

var jsonNumberText = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$`)

func (w *yamlWalker) number(t *token.Token) error {
	if !jsonNumberText.MatchString(t.Value) {
		return w.fail(t, nil, "%q is neither a plain decimal number nor a quoted string", t.Value)
	}
	w.out.WriteString(t.Value)
	return nil
}

func (w *yamlWalker) str(t *token.Token, s string) error {
	if len(s) > w.limits.String {
		return w.fail(t, ErrTooLarge, "a string of %d bytes, at most %d are accepted", len(s), w.limits.String)
	}
	quoted, err := json.Marshal(s)
	if err != nil {
		return err
	}
	w.out.Write(quoted)
	return nil
}

func (w *yamlWalker) mapping(values []*ast.MappingValueNode, tk *token.Token, depth int) error {
	if depth > w.limits.Depth {
		return w.fail(tk, ErrDepth, "nested deeper than %d", w.limits.Depth)
	}
	seen := keySet{}
	w.out.WriteByte('{')
	for i, v := range values {
		key, ok := v.Key.(*ast.StringNode)
		if !ok {
			return w.fail(v.Key.GetToken(), nil, "a key that is no string: quote it")
		}
		if key.Token.Type == token.StringType && ambiguous[strings.ToLower(key.Value)] {
			return w.fail(key.Token, nil, "the key %q means different things to different YAML readers: quote it", key.Value)
		}
		w.path = append(w.path, "."+key.Value)
		if !seen.add(key.Value) {
			return w.fail(key.Token, ErrDuplicateKey, "duplicate key")
		}
		w.where[w.at()] = Position{key.Token.Position.Line, key.Token.Position.Column}
		if i > 0 {
			w.out.WriteByte(',')
		}
		if err := w.str(key.Token, key.Value); err != nil {
			return err
		}
		w.out.WriteByte(':')
		if err := w.value(v.Value, depth); err != nil {
			return err
		}
		w.path = w.path[:len(w.path)-1]
	}
	w.out.WriteByte('}')
	return nil
}

func (w *yamlWalker) sequence(n *ast.SequenceNode, tk *token.Token, depth int) error {
	if depth > w.limits.Depth {
		return w.fail(tk, ErrDepth, "nested deeper than %d", w.limits.Depth)
	}
	w.out.WriteByte('[')
	for i, v := range n.Values {
		if i > 0 {
			w.out.WriteByte(',')
		}
		w.path = append(w.path, "["+strconv.Itoa(i)+"]")
		if err := w.value(v, depth); err != nil {
			return err
		}
		w.path = w.path[:len(w.path)-1]
	}
	w.out.WriteByte(']')
	return nil
}
