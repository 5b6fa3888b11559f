package bounded

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// Limits bounds a JSON document. Zero means the default.
type Limits struct {
	Bytes  int64 // of the document; default 1 MiB
	Depth  int   // of nesting; default 32
	Nodes  int   // values and keys; default 65536
	String int   // bytes of one string as written; default that of Bytes
}

func (l Limits) orDefaults() Limits {
	if l.Bytes == 0 {
		l.Bytes = 1 << 20
	}
	if l.Depth == 0 {
		l.Depth = 32
	}
	if l.Nodes == 0 {
		l.Nodes = 1 << 16
	}
	if l.String == 0 {
		l.String = int(l.Bytes)
	}
	return l
}

// FieldError says what is wrong and where.
type FieldError struct {
	Path   string // such as workloads[0].image; empty for the document itself
	Line   int    // from 1; 0 where the text is not at hand
	Column int    // from 1, in bytes
	Msg    string
	Err    error // a sentinel of this package, or nil
}

func (e *FieldError) Error() string {
	where := ""
	if e.Line > 0 {
		where = fmt.Sprintf("line %d, column %d: ", e.Line, e.Column)
	}
	if e.Path != "" {
		where += e.Path + ": "
	}
	return OneLine(where + e.Msg)
}

// OneLine makes text that may hold a peer's bytes, such as the name of an
// unknown field, one line of at most 1 KiB: it ends up in logs and terminals.
func OneLine(s string) string {
	const most = 1 << 10
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == utf8.RuneError {
			return ' '
		}
		return r
	}, s)
}

func (e *FieldError) Unwrap() error { return e.Err }

// DecodeJSON decodes one JSON document into v, which must be a pointer. Field
// names are compared with case; unknown and duplicate names, trailing data,
// wrong types, null where v has no pointer, slice, map or interface, invalid
// UTF-8, lone surrogates and anything over the limits are refused with a
// *FieldError.
func DecodeJSON(data []byte, v any, l Limits) error {
	t := reflect.TypeOf(v)
	if t == nil || t.Kind() != reflect.Pointer {
		return fmt.Errorf("bounded: DecodeJSON needs a pointer, not %T", v)
	}
	if err := check(data, t.Elem(), l); err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return located(data, err)
	}
	return nil
}

// CheckJSON applies the limits and refuses duplicate keys, invalid UTF-8, lone
// surrogates and trailing data, but knows no fields.
func CheckJSON(data []byte, l Limits) error { return check(data, nil, l) }

// FindJSON is CheckJSON, and says where the value is that a path of member
// names leads to: data[from:to] without the space around it. Both are 0 when
// there is none.
func FindJSON(data []byte, l Limits, path ...string) (from, to int, err error) {
	w := &walker{data: data, limits: l.orDefaults(), wanted: path}
	if err := w.check(nil); err != nil {
		return 0, 0, err
	}
	return w.from, w.to, nil
}

func check(data []byte, t reflect.Type, l Limits) error {
	return (&walker{data: data, limits: l.orDefaults()}).check(t)
}

func (w *walker) check(t reflect.Type) error {
	data := w.data
	if int64(len(data)) > w.limits.Bytes {
		return &FieldError{Line: 1, Column: 1, Err: ErrTooLarge,
			Msg: fmt.Sprintf("%d bytes, at most %d are accepted", len(data), w.limits.Bytes)}
	}
	w.nodes = w.limits.Nodes
	if !utf8.Valid(data) {
		return w.fail(firstInvalid(data), nil, "invalid UTF-8")
	}
	// jsontext says the same in a quarter of the time, but of lone surrogates,
	// which the walker names. What it refuses encoding/json decides.
	if !jsontext.Value(data).IsValid(jsontext.AllowDuplicateNames(true)) && !json.Valid(data) {
		// json.Valid gives no position; Unmarshal's first pass does.
		var raw json.RawMessage
		return located(data, json.Unmarshal(data, &raw))
	}
	// From here the syntax is known to be good: the walker only finds borders.
	return w.value(t, 0)
}

func firstInvalid(data []byte) int {
	for i := 0; i < len(data); {
		r, n := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return len(data)
}

// located turns an error of encoding/json into a FieldError.
func located(data []byte, err error) error {
	at := func(off int64, path, msg string) error {
		w := &walker{data: data}
		if path != "" {
			w.path = []step{{key: path}}
		}
		return w.fail(int(off), nil, "%s", msg)
	}
	var syn *json.SyntaxError
	var typ *json.UnmarshalTypeError
	var field *FieldError
	switch {
	case errors.As(err, &field):
		return err
	case errors.As(err, &syn):
		return at(max(syn.Offset-1, 0), "", "not JSON: "+syn.Error())
	case errors.As(err, &typ):
		return at(max(typ.Offset-1, 0), typ.Field, fmt.Sprintf("%s does not fit %s", typ.Value, typ.Type))
	default:
		return &FieldError{Line: 1, Column: 1, Msg: err.Error()}
	}
}

// walker visits a document whose syntax is valid, beside the Go type that it
// will be decoded into (nil where anything goes).
type walker struct {
	data   []byte
	pos    int
	limits Limits
	nodes  int
	path   []step

	wanted   []string // FindJSON's path
	from, to int      // and where it leads
}

// here says whether the value that comes next is the wanted one.
func (w *walker) here() bool {
	if len(w.wanted) == 0 || len(w.path) != len(w.wanted) {
		return false
	}
	for i, name := range w.wanted {
		if w.path[i].key != "."+name { // a place in an array has no key
			return false
		}
	}
	return true
}

// step is one step of a path, kept as it is until an error needs its text:
// evidence has arrays of thousands of numbers.
type step struct {
	key   string
	index int // of an array, when key is empty
}

func (s step) String() string {
	if s.key == "" {
		return "[" + strconv.Itoa(s.index) + "]"
	}
	return s.key
}

func (w *walker) fail(off int, sentinel error, format string, args ...any) error {
	off = min(off, len(w.data))
	head := w.data[:off]
	var path strings.Builder
	for _, p := range w.path {
		path.WriteString(p.String())
	}
	return &FieldError{
		Path:   strings.TrimPrefix(path.String(), "."),
		Line:   1 + bytes.Count(head, []byte("\n")),
		Column: off - bytes.LastIndexByte(head, '\n'),
		Msg:    fmt.Sprintf(format, args...),
		Err:    sentinel,
	}
}

func (w *walker) space() {
	for w.pos < len(w.data) {
		switch w.data[w.pos] {
		case ' ', '\t', '\r', '\n', ',', ':':
			w.pos++
		default:
			return
		}
	}
}

func (w *walker) count(start int) error {
	if w.nodes--; w.nodes < 0 {
		return w.fail(start, ErrTooLarge, "more than %d values", w.limits.Nodes)
	}
	return nil
}

func (w *walker) value(t reflect.Type, depth int) error {
	w.space()
	start := w.pos
	if err := w.count(start); err != nil {
		return err
	}
	if w.data[start] == 'n' {
		w.pos += len("null")
		if t != nil && !nullable(t) {
			return w.fail(start, nil, "null, expected %s", describe(t))
		}
		return nil
	}
	if own := selfDecoding(t); own != nil {
		// Walk it for budgets and duplicates, then let it judge, here where the
		// path is known.
		if err := w.structure(nil, start, depth); err != nil {
			return err
		}
		if err := json.Unmarshal(w.data[start:w.pos], reflect.New(own).Interface()); err != nil {
			return w.fail(start, nil, "%v", err)
		}
		return nil
	}
	return w.structure(concrete(t), start, depth)
}

// structure visits a value that is not null.
func (w *walker) structure(t reflect.Type, start, depth int) error {
	switch w.data[start] {
	case '{', '[':
		if depth++; depth > w.limits.Depth {
			return w.fail(start, ErrDepth, "nested deeper than %d", w.limits.Depth)
		}
		if w.data[start] == '{' {
			return w.object(t, start, depth)
		}
		return w.array(t, start, depth)
	case '"':
		if _, err := w.str(); err != nil {
			return err
		}
		if t != nil && t.Kind() != reflect.String && !isBytes(t) {
			return w.fail(start, nil, "a string, expected %s", describe(t))
		}
	case 't', 'f':
		w.pos += len("true")
		if w.data[start] == 'f' {
			w.pos++
		}
		if t != nil && t.Kind() != reflect.Bool {
			return w.fail(start, nil, "a boolean, expected %s", describe(t))
		}
	default:
		for w.pos < len(w.data) && inNumber(w.data[w.pos]) {
			w.pos++
		}
		if t != nil && !isNumber(t) {
			return w.fail(start, nil, "a number, expected %s", describe(t))
		}
		if t != nil {
			if err := fits(t, string(w.data[start:w.pos])); err != nil {
				return w.fail(start, nil, "%v", err)
			}
		}
	}
	return nil
}

func inNumber(b byte) bool {
	return b >= '0' && b <= '9' || b == '-' || b == '+' || b == '.' || b == 'e' || b == 'E'
}

func (w *walker) object(t reflect.Type, start, depth int) error {
	var fields map[string]reflect.Type
	var elem reflect.Type
	if t != nil {
		switch t.Kind() {
		case reflect.Struct:
			fields = fieldsOf(t)
		case reflect.Map:
			elem = t.Elem()
		default:
			return w.fail(start, nil, "an object, expected %s", describe(t))
		}
	}
	seen := keySet{}
	w.pos++
	for {
		if w.space(); w.data[w.pos] == '}' {
			w.pos++
			return nil
		}
		keyAt := w.pos
		if err := w.count(keyAt); err != nil {
			return err
		}
		key, err := w.str()
		if err != nil {
			return err
		}
		w.path = append(w.path, step{key: "." + key})
		if !seen.add(key) {
			return w.fail(keyAt, ErrDuplicateKey, "duplicate key")
		}
		ft := elem
		if fields != nil {
			var ok bool
			if ft, ok = fields[key]; !ok {
				return w.fail(keyAt, ErrUnknownField, "unknown field")
			}
		}
		w.space()
		from, here := w.pos, w.here()
		if err := w.value(ft, depth); err != nil {
			return err
		}
		if here {
			w.from, w.to = from, w.pos
		}
		w.path = w.path[:len(w.path)-1]
	}
}

func (w *walker) array(t reflect.Type, start, depth int) error {
	var elem reflect.Type
	if t != nil {
		if (t.Kind() != reflect.Slice && t.Kind() != reflect.Array) || isBytes(t) {
			return w.fail(start, nil, "an array, expected %s", describe(t))
		}
		elem = t.Elem()
	}
	w.pos++
	at := len(w.path)
	w.path = append(w.path, step{})
	for i := 0; ; i++ {
		if w.space(); w.data[w.pos] == ']' {
			w.pos++
			w.path = w.path[:at]
			if t != nil && t.Kind() == reflect.Array && i != t.Len() {
				return w.fail(start, nil, "an array of %d, expected %d", i, t.Len())
			}
			return nil
		}
		w.path[at].index = i
		if elem == nil && inNumber(w.data[w.pos]) {
			// Numbers of which nothing is expected are most of what evidence is
			// made of: they are counted and passed over.
			if err := w.count(w.pos); err != nil {
				return err
			}
			for w.pos < len(w.data) && inNumber(w.data[w.pos]) {
				w.pos++
			}
			continue
		}
		if err := w.value(elem, depth); err != nil {
			return err
		}
	}
}

// str consumes a string and returns it decoded.
func (w *walker) str() (string, error) {
	start := w.pos
	escaped := false
	for w.pos++; w.data[w.pos] != '"'; w.pos++ {
		if w.data[w.pos] != '\\' {
			continue
		}
		escaped = true
		at := w.pos
		if w.pos++; w.data[w.pos] != 'u' {
			continue
		}
		w.pos += 4
		if hi := unit(w.data[w.pos-3:]); hi >= 0xD800 && hi < 0xE000 {
			// A lone surrogate has no UTF-8 form; encoding/json would replace it.
			rest := w.data[w.pos+1:]
			if hi >= 0xDC00 || len(rest) < 6 || rest[0] != '\\' || rest[1] != 'u' || unit(rest[2:])&^0x3FF != 0xDC00 {
				return "", w.fail(at, nil, "lone surrogate in a string")
			}
			w.pos += 6
		}
	}
	w.pos++
	raw := w.data[start:w.pos]
	if len(raw)-2 > w.limits.String {
		return "", w.fail(start, ErrTooLarge, "a string of %d bytes, at most %d are accepted", len(raw)-2, w.limits.String)
	}
	if !escaped {
		return string(raw[1 : len(raw)-1]), nil
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", w.fail(start, nil, "%v", err)
	}
	return s, nil
}

func unit(hex []byte) uint64 {
	n, _ := strconv.ParseUint(string(hex[:4]), 16, 16)
	return n
}

// keySet is a set that stays off the heap for the usual small object.
type keySet struct {
	few  [8]string
	n    int
	many map[string]struct{}
}

func (s *keySet) add(k string) bool {
	if s.many == nil {
		for _, have := range s.few[:s.n] {
			if have == k {
				return false
			}
		}
		if s.n < len(s.few) {
			s.few[s.n] = k
			s.n++
			return true
		}
		s.many = make(map[string]struct{}, 64)
		for _, have := range s.few {
			s.many[have] = struct{}{}
		}
	}
	if _, dup := s.many[k]; dup {
		return false
	}
	s.many[k] = struct{}{}
	return true
}
