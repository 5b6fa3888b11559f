// Package lessons holds the table of README.md, "What went wrong elsewhere",
// against the tree: each test and each boot that it names is there. Whether a
// test is any good it cannot say.
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

// guest are the rows that the guest image must not be without, booted those of
// them that a boot or a look at the built image must show.
var (
	guest  = []int{1, 2, 5, 6, 7, 28, 36, 41, 42}
	booted = []int{1, 2, 6, 7, 28, 36, 41, 42}
)

// e2e stands in the table for the checks of make e2e, which are no Go tests;
// built is the folder of the tests that look at a built image.
const (
	e2e   = "make e2e"
	built = "image-build/guest"
)

// named is one test of the table, or one check of make e2e.
type named struct {
	row  int
	dir  string
	name string
}

// table reads the rows "| N | fault | `dir` TestLessonNN_…, …; `make e2e` check, … |".
func table(t *testing.T) (list []named) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "tests/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile(`(?m)^\| ([0-9]+) \| [^|]+ \| ([^|]+) \|$`)
	part := regexp.MustCompile("^`([a-z0-9/-]+)` (TestLesson[0-9A-Za-z_]+(?:, TestLesson[0-9A-Za-z_]+)*)$" +
		"|^`(" + e2e + ")` ([a-z0-9-]+(?:, [a-z0-9-]+)*)$")
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
				t.Fatalf("row %d: %q is not `folder` and names of tests, or `%s` and names of checks", n, p, e2e)
			}
			for _, name := range strings.Split(q[2]+q[4], ", ") {
				list = append(list, named{n, q[1] + q[3], name})
			}
		}
	}
	return list
}

// tests are the functions TestLesson… of a folder's test files, whatever their
// build tags.
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

// checks are the names of what make e2e checks: in tests/e2e, the first string
// of every check{…}, and of every element or call in a []check{…}.
func checks(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, "tests/e2e/*.go"))
	if err != nil {
		t.Fatal(err)
	}
	first := func(args []ast.Expr) {
		if len(args) == 0 {
			return
		}
		if text, ok := args[0].(*ast.BasicLit); ok && text.Kind == token.STRING {
			name, err := strconv.Unquote(text.Value)
			if err != nil || slices.Contains(names, name) {
				t.Errorf("tests/e2e: the check %s is there twice, or %v", text.Value, err)
			}
			names = append(names, name)
		}
	}
	isCheck := func(e ast.Expr) bool {
		id, ok := e.(*ast.Ident)
		return ok && id.Name == "check"
	}
	for _, f := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			literal, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			if isCheck(literal.Type) {
				first(literal.Elts)
			}
			array, ok := literal.Type.(*ast.ArrayType)
			if !ok || !isCheck(array.Elt) {
				return true
			}
			for _, element := range literal.Elts {
				switch e := element.(type) {
				case *ast.CompositeLit:
					if e.Type == nil { // the others are seen on their own
						first(e.Elts)
					}
				case *ast.CallExpr:
					first(e.Args)
				}
			}
			return true
		})
	}
	if len(names) < 20 {
		t.Fatalf("only %d checks were found in tests/e2e: %v", len(names), names)
	}
	return names
}

func TestEveryNamedTestExists(t *testing.T) {
	list := table(t)
	if len(list) < 40 {
		t.Fatalf("only %d tests were read from the table", len(list))
	}
	number := regexp.MustCompile(`^TestLesson([0-9]{2})[_A-Z]`)
	have := map[string][]string{e2e: checks(t)}
	for _, n := range list {
		if have[n.dir] == nil {
			have[n.dir] = tests(t, n.dir)
		}
		if !slices.Contains(have[n.dir], n.name) {
			t.Errorf("row %d: %s has no %s", n.row, n.dir, n.name)
		}
		if m := number.FindStringSubmatch(n.name); n.dir != e2e && (m == nil || m[1] != strconv.Itoa(n.row/10)+strconv.Itoa(n.row%10)) {
			t.Errorf("row %d names %s", n.row, n.name)
		}
	}
	for _, row := range slices.Concat(attestation, guest) {
		if !slices.ContainsFunc(list, func(n named) bool { return n.row == row }) {
			t.Errorf("row %d has no test", row)
		}
	}
	for _, row := range booted {
		if !slices.ContainsFunc(list, func(n named) bool { return n.row == row && (n.dir == e2e || n.dir == built) }) {
			t.Errorf("row %d has neither a boot nor a test of the built image", row)
		}
	}
}

// A lesson's test that the table does not name is one that nobody finds.
func TestEveryTestIsNamed(t *testing.T) {
	list := table(t)
	dirs := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != ".." || d.Name() == "bin" || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if err == nil && strings.HasSuffix(path, "_test.go") {
			dir, relErr := filepath.Rel(root, filepath.Dir(path))
			dirs[filepath.ToSlash(dir)], err = true, relErr
		}
		return err
	})
	if err != nil || len(dirs) < 20 {
		t.Fatalf("%d folders with tests, %v", len(dirs), err)
	}
	for dir := range dirs {
		for _, name := range tests(t, dir) {
			if !slices.ContainsFunc(list, func(n named) bool { return n.dir == dir && n.name == name }) {
				t.Errorf("%s %s is not in the table of tests/README.md", dir, name)
			}
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
