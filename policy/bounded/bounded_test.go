package bounded

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

type inner struct {
	Name string   `json:"name"`
	Tags []string `json:"tags,omitempty"`
}

type doc struct {
	Version uint64            `json:"version"`
	Small   uint16            `json:"small,omitempty"`
	On      bool              `json:"on,omitempty"`
	Ratio   float64           `json:"ratio,omitempty"`
	Blob    []byte            `json:"blob,omitempty"`
	Items   []inner           `json:"items,omitempty"`
	One     *inner            `json:"one,omitempty"`
	Env     map[string]string `json:"env,omitempty"`
	Any     json.RawMessage   `json:"any,omitempty"`
	Fixed   [2]int            `json:"fixed,omitempty"`
	When    *time.Time        `json:"when,omitempty"`
}

func TestDecodeJSONRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		in, want string
		is       error
		limits   Limits
	}{
		"an unknown field":                  {in: `{"version":1,"x":2}`, want: "line 1, column 14: x: unknown field", is: ErrUnknownField},
		"an unknown field deep inside":      {in: "{\"items\":[{\"name\":\"a\"},\n {\"name\":\"b\",\"id\":1}]}", want: "line 2, column 14: items[1].id: unknown field", is: ErrUnknownField},
		"a name in another case":            {in: `{"Version":1}`, want: "Version: unknown field", is: ErrUnknownField},
		"a name with the Kelvin sign":       {in: `{"bloK":""}`, want: "unknown field", is: ErrUnknownField},
		"a duplicate key":                   {in: `{"version":1,"version":2}`, want: "version: duplicate key", is: ErrDuplicateKey},
		"a duplicate key by escape":         {in: `{"version":1,"\u0076ersion":2}`, want: "version: duplicate key", is: ErrDuplicateKey},
		"a duplicate key in a map":          {in: `{"env":{"A":"1","A":"2"}}`, want: "env.A: duplicate key", is: ErrDuplicateKey},
		"a duplicate key in a raw message":  {in: `{"any":{"a":1,"a":2}}`, want: "any.a: duplicate key", is: ErrDuplicateKey},
		"trailing data":                     {in: `{"version":1} {}`, want: "not JSON"},
		"a string for a number":             {in: `{"version":"1"}`, want: "version: a string, expected an unsigned integer of 64 bits"},
		"a number for a string":             {in: `{"one":{"name":1}}`, want: "one.name: a number, expected a string"},
		"a fraction for an integer":         {in: `{"version":1.5}`, want: "version: 1.5 does not fit"},
		"a negative unsigned":               {in: `{"version":-1}`, want: "version: -1 does not fit"},
		"an overflow":                       {in: `{"small":65536}`, want: "small: 65536 does not fit an unsigned integer of 16 bits"},
		"an array for an object":            {in: `{"one":[]}`, want: "one: an array, expected an object"},
		"an object for an array":            {in: `{"items":{}}`, want: "items: an object, expected an array"},
		"a number for a boolean":            {in: `{"on":1}`, want: "on: a number, expected a boolean"},
		"null for a number":                 {in: `{"version":null}`, want: "version: null, expected"},
		"null for a string":                 {in: `{"one":{"name":null}}`, want: "one.name: null, expected a string"},
		"an array of bytes as numbers":      {in: `{"blob":[1,2]}`, want: "blob: an array, expected a base64 string"},
		"bad base64":                        {in: `{"blob":"!"}`, want: "illegal base64"},
		"a wrong fixed array":               {in: `{"fixed":[1]}`, want: "an array of 1, expected 2"},
		"a value that its own type refuses": {in: `{"items":[],"when":"noon"}`, want: "line 1, column 20: when: parsing time"},
		"a top-level array":                 {in: `[]`, want: "an array, expected an object"},
		"nothing":                           {in: ``, want: "not JSON"},
		"invalid UTF-8":                     {in: "{\"env\":{\"a\":\"\xff\"}}", want: "line 1, column 14: invalid UTF-8"},
		"a lone high surrogate":             {in: `{"env":{"a":"\ud800"}}`, want: "lone surrogate"},
		"a lone low surrogate":              {in: `{"env":{"a":"\udc00"}}`, want: "lone surrogate"},
		"a high surrogate before a normal":  {in: `{"env":{"a":"\ud800\u0041"}}`, want: "lone surrogate"},
		"a document over the byte limit":    {in: `{"version":1}`, want: "at most 5", is: ErrTooLarge, limits: Limits{Bytes: 5}},
		"nesting over the limit":            {in: `{"any":[[[1]]]}`, want: "any[0][0]: nested deeper than 3", is: ErrDepth, limits: Limits{Depth: 3}},
		"more values than the limit":        {in: `{"any":[1,2,3,4]}`, want: "more than 5 values", is: ErrTooLarge, limits: Limits{Nodes: 5}},
		"a string over the limit":           {in: `{"env":{"a":"abcdef"}}`, want: "a string of 6 bytes", is: ErrTooLarge, limits: Limits{String: 5}},
		"a very deep document":              {in: strings.Repeat("[", 100000), want: "not JSON"},
		"a deep but closed document":        {in: `{"any":` + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + `}`, want: "nested deeper", is: ErrDepth},
		"a byte order mark":                 {in: "\xef\xbb\xbf{}", want: "not JSON"},
		"a comment":                         {in: "{} // x", want: "not JSON"},
		"NaN":                               {in: `{"ratio":NaN}`, want: "not JSON"},
		"a float that overflows":            {in: `{"ratio":1e999}`, want: "does not fit"},
		"an escaped key that is not known":  {in: `{"\u0078":1}`, want: "unknown field", is: ErrUnknownField},
		"a syntax error on the second line": {in: "{\n \"version\": x}", want: "line 2, column 13"},
	} {
		t.Run(name, func(t *testing.T) {
			var d doc
			err := DecodeJSON([]byte(c.in), &d, c.limits)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, expected %q", err, c.want)
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Fatalf("error %v is not %v", err, c.is)
			}
			var f *FieldError
			if !errors.As(err, &f) || f.Line < 1 || f.Column < 1 {
				t.Fatalf("error %#v names no position", err)
			}
		})
	}
}

func TestDecodeJSONAccepts(t *testing.T) {
	in := `{"version":18446744073709551615,"on":false,"ratio":0.5,"blob":"AQI=","items":[{"name":"\ud83d\ude00é"}],
	 "one":null,"env":{"A":"b","a":"c"},"any":{"x":[1,{"y":null}]},"fixed":[1,2]}`
	var d doc
	if err := DecodeJSON([]byte(in), &d, Limits{}); err != nil {
		t.Fatal(err)
	}
	if d.Items[0].Name != "😀é" || d.Env["a"] != "c" || len(d.Blob) != 2 {
		t.Fatalf("decoded %+v", d)
	}
}

func TestCheckJSONToleratesUnknownFieldsOnly(t *testing.T) {
	if err := CheckJSON([]byte(`{"a":{"b":[1,"2",null,true,false,-1.5e3]}}`), Limits{}); err != nil {
		t.Fatal(err)
	}
	if err := CheckJSON([]byte(`{"a":{"b":1,"b":1}}`), Limits{}); !errors.Is(err, ErrDuplicateKey) {
		t.Fatalf("duplicate key: %v", err)
	}
	many := "{"
	for i := range 40 {
		many += `"k` + strings.Repeat("x", i+1) + `":1,`
	}
	if err := CheckJSON([]byte(many+`"kxxx":2}`), Limits{}); !errors.Is(err, ErrDuplicateKey) {
		t.Fatalf("duplicate key in a large object: %v", err)
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := ReadFile(path, 5); err != nil || string(data) != "hello" {
		t.Fatalf("%q, %v", data, err)
	}
	if _, err := ReadFile(path, 4); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("over the limit: %v", err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFile(link, 5); !errors.Is(err, ErrNotRegular) {
		t.Fatalf("symbolic link: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{dir, fifo, "/dev/zero"} {
		if _, err := ReadFile(p, 5); !errors.Is(err, ErrNotRegular) {
			t.Fatalf("%s: %v", p, err)
		}
	}
	// A file of /proc says size 0 and yields bytes: not what was promised.
	if _, err := ReadFile("/proc/self/status", 1<<20); !errors.Is(err, ErrChanged) {
		t.Fatalf("file that yields more than its size: %v", err)
	}
}

// What an operator names may be a link; all else holds of the file behind it.
func TestReadNamedFollowsLinksToRegularFilesAlone(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, mode := range map[string]os.FileMode{"file": 0o644, "secret": 0o600} {
		if err := os.WriteFile(at(name), []byte("hello"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(at("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"link": "file", "link2": "link", "to-secret": "secret", "to-fifo": "fifo", "to-dir": dir, "to-device": "/dev/zero", "to-itself": "to-itself", "to-nothing": "nothing"} {
		if err := os.Symlink(to, at(link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"file", "link", "link2", "secret", "to-secret"} {
		if data, err := ReadNamed(at(name), 5); err != nil || string(data) != "hello" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
		if _, err := ReadNamed(at(name), 4); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s over the limit: %v", name, err)
		}
	}
	for _, name := range []string{"to-fifo", "to-dir", "to-device", "fifo", "."} {
		if _, err := ReadNamed(at(name), 5); !errors.Is(err, ErrNotRegular) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"to-itself", "to-nothing"} {
		if _, err := ReadNamed(at(name), 5); err == nil {
			t.Errorf("%s was read", name)
		}
	}
	// A link's own mode is 0777 and says nothing.
	for name, is := range map[string]error{"secret": nil, "to-secret": nil, "file": ErrReadable, "link": ErrReadable, "to-fifo": ErrNotRegular} {
		data, err := ReadNamedSecret(at(name), 5)
		if !errors.Is(err, is) || (is == nil && string(data) != "hello") || (is != nil && data != nil) {
			t.Errorf("secret %s: %q, %v", name, data, err)
		}
	}
	if _, err := ReadNamed("/proc/self/status", 1<<20); !errors.Is(err, ErrChanged) {
		t.Errorf("file that yields more than its size: %v", err)
	}
}

// Whoever owns the directory swaps the secret for a file that all may read, and
// back: what is read is what was judged.
func TestASecretIsJudgedWhereItIsRead(t *testing.T) {
	dir := t.TempDir()
	secret, open, link := filepath.Join(dir, "secret"), filepath.Join(dir, "open"), filepath.Join(dir, "link")
	for name, mode := range map[string]os.FileMode{secret: 0o600, open: 0o644} {
		if err := os.WriteFile(name, []byte(filepath.Base(name)), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("secret", link); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSecret(open, 9); !errors.Is(err, ErrReadable) {
		t.Errorf("a file that all may read: %v", err)
	}
	if _, err := ReadSecret(link, 9); !errors.Is(err, ErrNotRegular) {
		t.Errorf("a link: %v", err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, secret, unix.AT_FDCWD, open, unix.RENAME_EXCHANGE)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	read, refused := 0, 0
	for until := time.Now().Add(time.Minute); (read < 1000 || refused < 1000) && time.Now().Before(until); {
		for _, from := range []func(string, int64) ([]byte, error){ReadSecret, ReadNamedSecret} {
			switch data, err := from(secret, 9); {
			case err == nil && string(data) == "secret":
				read++
			case errors.Is(err, ErrReadable):
				refused++
			default:
				t.Fatalf("%q, %v", data, err)
			}
		}
	}
	if read == 0 || refused == 0 {
		t.Errorf("read %d times, refused %d times, expected both", read, refused)
	}
}

func TestReadAllStopsAtTheLimit(t *testing.T) {
	r := strings.NewReader("0123456789")
	if _, err := ReadAll(r, 4); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
	if r.Len() != 5 {
		t.Fatalf("%d bytes left, expected 5: more was read than the limit and one", r.Len())
	}
}

// A hostile field name ends up in logs and on terminals.
func TestErrorsAreOneShortLine(t *testing.T) {
	var v struct{}
	for _, name := range []string{`a\ncvm-agent: ok\u001b[2J`, strings.Repeat("x", 1<<19)} {
		err := DecodeJSON([]byte(`{"`+name+`":1}`), &v, Limits{})
		if !errors.Is(err, ErrUnknownField) || len(err.Error()) > 1100 || strings.ContainsAny(err.Error(), "\n\x1b") {
			t.Errorf("%.80q…: %d bytes: %.80q", name, len(err.Error()), err)
		}
	}
}

func FuzzDecodeJSON(f *testing.F) {
	for _, s := range []string{`{"version":1}`, `{"items":[{"name":"a","tags":["x"]}],"env":{"a":"\ud83d\ude00"}}`,
		`{"any":[[[]]]}`, `[`, `{"a":1,"a":2}`, `"\ud800"`, `nul`, "{\"blob\":\"AQI=\"}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		checked := CheckJSON(data, Limits{Bytes: 1 << 16, Depth: 16, Nodes: 1000})
		if checked == nil && !json.Valid(data) {
			t.Fatal("accepted what is not JSON")
		}
		var d doc
		if DecodeJSON(data, &d, Limits{Bytes: 1 << 16, Depth: 16, Nodes: 1000}) != nil {
			return
		}
		if checked != nil {
			t.Fatalf("decoded what CheckJSON refuses: %v", checked)
		}
		again, err := json.Marshal(d)
		if err != nil {
			t.Fatalf("what was decoded cannot be written: %v", err)
		}
		if err := DecodeJSON(again, new(doc), Limits{}); err != nil {
			t.Fatalf("does not round-trip: %v", err)
		}
	})
}

// Numbers of arrays are passed over where nothing is expected of them: what
// comes after and between them has its place all the same.
func TestCheckJSONPathsAmongNumbers(t *testing.T) {
	for text, want := range map[string]string{
		`{"a":[1,-2.5e+3,[30,{"b":1,"b":2}]]}`:        "a[2][1].b",
		`{"a":[1,2],"b":{"c":1,"c":2}}`:               "b.c",
		`{"a":[ 1 , "\ud800" , 3 ]}`:                  "a[1]",
		`{"a":[[],[1],[1,2],[1,2,3,4,5,6,7,8,9,10]]}`: "a[3][6]",
	} {
		err := CheckJSON([]byte(text), Limits{Nodes: 16})
		var at *FieldError
		if !errors.As(err, &at) || at.Path != want {
			t.Errorf("%s: %v, expected an error at %s", text, err, want)
		}
	}
	if err := CheckJSON([]byte(`[0,1,[2,3,[4]],5,true,6,null,7,"8",{"a":9},-0.1E-2]`), Limits{Nodes: 18}); err != nil {
		t.Error(err)
	}
	if err := CheckJSON([]byte(`[0,1,[2,3,[4]],5,true,6,null,7,"8",{"a":9},-0.1E-2]`), Limits{Nodes: 17}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("one value too many: %v", err)
	}
}

func TestFindJSON(t *testing.T) {
	for text, want := range map[string]string{
		`{"a":{"b":{"c":1}}}`:                          `{"c":1}`,
		`{"x":1,"a":{"y":[1,2],"b" : [1, {}] },"z":0}`: `[1, {}]`,
		" {\n\"a\" :\t{ \"b\" : \"text\" } } ":         `"text"`,
		`{"a":{"\u0062":-1e2}}`:                        `-1e2`,
		`{"a":{"b":null}}`:                             `null`,
		`{"a":{"c":1}}`:                                "",
		`{"a":[{"b":1}]}`:                              "",
		`{"a":"b","b":1}`:                              "",
		`{"a.b":1}`:                                    "",
		`{"A":{"b":1},"a":{"B":2}}`:                    "",
		`{"x":{"a":{"b":1}}}`:                          "",
		`[{"a":{"b":1}}]`:                              "",
		`"a"`:                                          "",
	} {
		from, to, err := FindJSON([]byte(text), Limits{}, "a", "b")
		if err != nil || text[from:to] != want {
			t.Errorf("%s: %q, %v, expected %q", text, text[from:to], err, want)
		}
	}
	for _, text := range []string{`{"a":{"b":1,"b":2}}`, `{"a":{"b":1}}x`, `{"a":{"b":1}`, `{"a":{"b":1},"c":"\ud800"}`} {
		if from, to, err := FindJSON([]byte(text), Limits{}, "a", "b"); err == nil || from != 0 || to != 0 {
			t.Errorf("%s: %d to %d, %v", text, from, to, err)
		}
	}
}

func TestDuplicateKeysInObjectsOfAnySize(t *testing.T) {
	for n := 1; n < 40; n++ {
		var keys []string
		for i := range n {
			keys = append(keys, fmt.Sprintf(`"k%d":0`, i))
		}
		text := "{" + strings.Join(keys, ",")
		if err := CheckJSON([]byte(text+"}"), Limits{}); err != nil {
			t.Errorf("%d members: %v", n, err)
		}
		for i := range n {
			if err := CheckJSON(fmt.Appendf(nil, `%s,"k%d":1}`, text, i), Limits{}); !errors.Is(err, ErrDuplicateKey) {
				t.Errorf("member %d of %d twice: %v", i, n, err)
			}
		}
	}
}
