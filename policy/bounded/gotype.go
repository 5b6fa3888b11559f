package bounded

import (
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
)

var (
	jsonUnmarshaler = reflect.TypeFor[json.Unmarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
	jsonNumber      = reflect.TypeFor[json.Number]()
)

var rawMessage = reflect.TypeFor[json.RawMessage]()

// selfDecoding returns the type behind t's pointers if it has its own decoder
// that may refuse a value, or nil.
func selfDecoding(t reflect.Type) reflect.Type {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil || t == rawMessage || t.Kind() == reflect.Interface {
		return nil
	}
	if p := reflect.PointerTo(t); p.Implements(jsonUnmarshaler) || p.Implements(textUnmarshaler) {
		return t
	}
	return nil
}

// concrete strips pointers, and returns nil for types that decode themselves.
func concrete(t reflect.Type) reflect.Type {
	for t != nil {
		if t.Kind() == reflect.Interface || reflect.PointerTo(t).Implements(jsonUnmarshaler) ||
			reflect.PointerTo(t).Implements(textUnmarshaler) {
			return nil
		}
		if t.Kind() != reflect.Pointer {
			return t
		}
		t = t.Elem()
	}
	return nil
}

func nullable(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Pointer, reflect.Interface, reflect.Map, reflect.Slice:
		return true
	}
	return false
}

func isBytes(t reflect.Type) bool {
	return t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Uint8
}

func isNumber(t reflect.Type) bool {
	return (t.Kind() >= reflect.Int && t.Kind() <= reflect.Float64) || t == jsonNumber
}

func fits(t reflect.Type, num string) (err error) {
	switch k := t.Kind(); {
	case k >= reflect.Int && k <= reflect.Int64:
		_, err = strconv.ParseInt(num, 10, t.Bits())
	case k >= reflect.Uint && k <= reflect.Uint64:
		_, err = strconv.ParseUint(num, 10, t.Bits())
	case k == reflect.Float32 || k == reflect.Float64:
		_, err = strconv.ParseFloat(num, t.Bits())
	}
	if err != nil {
		return fmt.Errorf("%s does not fit %s", clip(num), describe(t))
	}
	return nil
}

func clip(s string) string {
	if len(s) > 32 {
		return s[:32] + "…"
	}
	return s
}

// describe names a type for a person.
func describe(t reflect.Type) string {
	switch k := t.Kind(); {
	case isBytes(t):
		return "a base64 string"
	case k == reflect.String:
		return "a string"
	case k == reflect.Bool:
		return "a boolean"
	case k == reflect.Slice, k == reflect.Array:
		return "an array"
	case k == reflect.Struct, k == reflect.Map:
		return "an object"
	case k >= reflect.Int && k <= reflect.Int64:
		return fmt.Sprintf("an integer of %d bits", t.Bits())
	case k >= reflect.Uint && k <= reflect.Uint64:
		return fmt.Sprintf("an unsigned integer of %d bits", t.Bits())
	case isNumber(t):
		return "a number"
	case k == reflect.Pointer:
		return describe(t.Elem())
	}
	return t.String()
}

var fieldCache sync.Map // reflect.Type → map[string]reflect.Type

// fieldsOf lists the JSON names of a struct as encoding/json sees them.
func fieldsOf(t reflect.Type) map[string]reflect.Type {
	if m, ok := fieldCache.Load(t); ok {
		return m.(map[string]reflect.Type)
	}
	m := map[string]reflect.Type{}
	for _, f := range reflect.VisibleFields(t) {
		name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" && opts == "" {
			continue
		}
		if f.Anonymous && name == "" && concrete(f.Type) != nil && concrete(f.Type).Kind() == reflect.Struct {
			continue // its fields are visible by themselves
		}
		if !f.IsExported() {
			continue
		}
		if name == "" {
			name = f.Name
		}
		ft := f.Type
		if strings.Contains(","+opts+",", ",string,") {
			ft = reflect.TypeFor[any]()
		}
		if len(f.Index) > 1 {
			if _, shadowed := m[name]; shadowed {
				continue
			}
		}
		m[name] = ft
	}
	fieldCache.Store(t, m)
	return m
}
