// Package lessons holds the table of README.md, "What went wrong elsewhere",
// against the tree: each test that it names is there.
package lessons

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const root = "../.."

// attestation are the rows that evidence, the broker and their tools must not
// be without.
var attestation = []int{3, 4, 5, 9, 10, 11, 12, 13, 20, 25, 30, 31, 33, 35, 38}

// named is one test of the table.
type named struct {
	row  int
	dir  string
	name string
}

// table reads the rows "| N | fault | `dir` TestLessonNN_…, …; `dir` … |".
func table(t *testing.T) (list []named) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "tests/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile(`(?m)^\| ([0-9]+) \| [^|]+ \| ([^|]+) \|$`)
	part := regexp.MustCompile("^`([a-z0-9/-]+)` (TestLesson[0-9A-Za-z_]+(?:, TestLesson[0-9A-Za-z_]+)*)$")
	last := 0
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil || n <= last {
			t.Fatalf("row %s is not after row %d", m[1], last)
		}
		last = n
		for _, p := range strings.Split(m[2], "; ") {
			q := part.FindStringSubmatch(p)
			if q == nil {
				t.Fatalf("row %d: %q is not `folder` and names of tests", n, p)
			}
			for _, name := range strings.Split(q[2], ", ") {
				list = append(list, named{n, q[1], name})
			}
		}
	}
	return list
}

// tests are the functions TestLesson… of a folder's test files.
func tests(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "TestLesson") {
				names = append(names, fn.Name.Name)
			}
		}
	}
	return names
}

func TestEveryNamedTestExists(t *testing.T) {
	list := table(t)
	if len(list) < 40 {
		t.Fatalf("only %d tests were read from the table", len(list))
	}
	number := regexp.MustCompile(`^TestLesson([0-9]{2})[_A-Z]`)
	have := map[string][]string{}
	for _, n := range list {
		if have[n.dir] == nil {
			have[n.dir] = tests(t, n.dir)
		}
		if !slices.Contains(have[n.dir], n.name) {
			t.Errorf("row %d: %s has no %s", n.row, n.dir, n.name)
		}
		if m := number.FindStringSubmatch(n.name); m == nil || m[1] != strconv.Itoa(n.row/10)+strconv.Itoa(n.row%10) {
			t.Errorf("row %d names %s", n.row, n.name)
		}
	}
	for _, row := range attestation {
		if !slices.ContainsFunc(list, func(n named) bool { return n.row == row }) {
			t.Errorf("row %d has no test", row)
		}
	}
}

// Lesson 30: report_data is the KBS protocol's and nobody else's to choose. In
// all of the agent only the broker's client asks an attester for evidence.
func TestLesson30_OnlyTheBrokersClientAsksForEvidence(t *testing.T) {
	var callers []string
	err := filepath.WalkDir(filepath.Join(root, "agent"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		dir, _ := filepath.Rel(root, filepath.Dir(path))
		parsed, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if s, ok := call.Fun.(*ast.SelectorExpr); ok && s.Sel.Name == "Evidence" && !slices.Contains(callers, dir) {
				callers = append(callers, dir)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// The platform's own folder holds one device's evidence inside another's (Azure).
	callers = slices.DeleteFunc(callers, func(dir string) bool { return strings.HasPrefix(dir, "agent/platform") })
	if !slices.Equal(callers, []string{"agent/keyrelease"}) {
		t.Errorf("evidence is asked for by %v, expected agent/keyrelease alone", callers)
	}
}
