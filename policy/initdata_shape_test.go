package policy_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Each of these kept the TOML library busy for seconds (quadratic in the number
// of keys; minutes at 2 MiB), before any signature or register was looked at.
func TestHostileInitdataIsRefusedInLinearTime(t *testing.T) {
	fill := func(format string) string {
		var b strings.Builder
		for i := 0; b.Len() < policy.MaxInitdata-64; i++ {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	for name, doc := range map[string]string{
		"unknown keys":       fill("a%d=1\n"),
		"dotted keys":        fill("a.b.c.d.e%d=1\n"),
		"tables":             fill("[a%d]\n"),
		"arrays of tables":   fill("[[a]]\n#%d\n"),
		"entries of data":    "[data]\n" + fill("a%d='x'\n"),
		"a key of many dots": strings.Repeat("a.", policy.MaxInitdata/2-8) + "b=1",
		"nested arrays":      "x=" + strings.Repeat("[1,", policy.MaxInitdata/3-8),
		"nested tables":      "x=" + strings.Repeat("{a=", policy.MaxInitdata/3-8),
		"keys after quotes":  "a=\"\"\"x\"\"\"\"\"\n" + fill("a%d=1\n"),
		"keys after escapes": "a=\"\\\\\"\nb='\\'\n" + fill("a%d=1\n"),
		"one long key":       strings.Repeat("a", policy.MaxInitdata-8) + "=1",
		"comments":           fill("#%d\n"),
	} {
		begun := time.Now()
		_, err := policy.ParseInitdata([]byte(doc))
		if cause.Of(err) != cause.InitdataMalformed {
			t.Errorf("%s: %v", name, err)
		} else if len(err.Error()) > 1200 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
		if took := time.Since(begun); took > 10*time.Second {
			t.Errorf("%s: took %s", name, took)
		}
	}
}

// A million numbers took the library 130 MB, only to be refused as no string.
func TestALongArrayIsRefusedBeforeItIsParsed(t *testing.T) {
	head := "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n"
	if _, err := policy.ParseInitdata([]byte(head + "a = [" + strings.Repeat("1,", 1_000_000) + "1]\n")); !errors.Is(err, bounded.ErrTooLarge) {
		t.Errorf("%v", err)
	}
	// An inline table has as many entries as any other.
	inline := "version = \"0.1.0\"\nalgorithm = \"sha256\"\ndata = { "
	for i := range 62 {
		inline += fmt.Sprintf("k%d = 'x', ", i)
	}
	if in, err := policy.ParseInitdata([]byte(inline + "last = 'x' }\n")); err != nil || len(in.Data) != 63 {
		t.Errorf("63 entries of an inline table: %v", err)
	}
}

// What is inside strings and comments is text: it is not counted.
func TestInitdataStringsMayHoldAnything(t *testing.T) {
	const odd = "[[[{{{===... \" ' # \\ "
	data := map[string]string{"a": strings.Repeat(odd, 100), "b.c": "line\n" + strings.Repeat("x = [1]\n", 500), "d": `ends with quotes ""`, "e": "'''", "f": `"""`}
	raw, err := policy.PackInitdata("sha256", data)
	if err != nil {
		t.Fatal(err)
	}
	raw = append(raw, []byte("# "+strings.Repeat("a=[", 500)+"\nm = \"\"\"x\"\"\"\"\"\nn = '''"+strings.Repeat("=[", 500)+"'''''\n")...)
	in, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range data {
		if in.Data[k] != v {
			t.Errorf("%s is %q", k, in.Data[k])
		}
	}
	if in.Data["m"] != `x""` || in.Data["n"] != strings.Repeat("=[", 500)+"''" {
		t.Errorf("quotes at the end of a string: %q, %.20q…", in.Data["m"], in.Data["n"])
	}
}
