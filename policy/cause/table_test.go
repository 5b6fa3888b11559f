package cause

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
)

// The constants, Table and README.md say the same. Set CAUSE_README=write to
// rewrite the README's table.
func TestTable(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "table.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	constants := map[string]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if ok && len(spec.Values) == 1 {
			if lit, ok := spec.Values[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
				constants[strings.Trim(lit.Value, `"`)] = true
			}
		}
		return true
	})
	seen := map[Code]bool{}
	var table strings.Builder
	table.WriteString("| code | exit | meaning |\n| --- | --- | --- |\n")
	for _, row := range Table {
		if seen[row.Code] {
			t.Errorf("%s has two rows", row.Code)
		}
		seen[row.Code] = true
		if !constants[string(row.Code)] {
			t.Errorf("%s is no constant", row.Code)
		}
		if row.Meaning == "" || strings.ContainsAny(row.Meaning, "\n|") {
			t.Errorf("%s: meaning %q is not one line", row.Code, row.Meaning)
		}
		fmt.Fprintf(&table, "| `%s` | %d | %s |\n", row.Code, row.Exit, row.Meaning)
	}
	for c := range constants {
		if !seen[Code(c)] {
			t.Errorf("%s has no row", c)
		}
	}

	const mark = "## The codes\n\n"
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	head, have, ok := strings.Cut(string(readme), mark)
	if !ok {
		t.Fatalf("README.md has no heading %q", strings.TrimSpace(mark))
	}
	if have == table.String() {
		return
	}
	if os.Getenv("CAUSE_README") == "write" {
		if err := os.WriteFile("README.md", []byte(head+mark+table.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Error("README.md is not in step with Table: run this test with CAUSE_README=write")
}

func TestErrors(t *testing.T) {
	inner := New(KeyRefused, "by rule %d", 3)
	for name, tc := range map[string]struct {
		err  error
		code Code
		exit int
	}{
		"nothing":                          {nil, "", ExitOK},
		"an error without a code":          {fmt.Errorf("x"), Internal, ExitInternal},
		"a code":                           {inner, KeyRefused, ExitRefused},
		"a code behind other text":         {fmt.Errorf("key phase: %w", inner), KeyRefused, ExitRefused},
		"the innermost code wins":          {Wrap(Internal, inner), KeyRefused, ExitRefused},
		"an error that gets a code":        {Wrap(StorageFull, fmt.Errorf("x")), StorageFull, ExitStorage},
		"wrapping nothing":                 {Wrap(StorageFull, nil), "", ExitOK},
		"a code from a newer program":      {New("not-yet-known", "x"), "not-yet-known", ExitInternal},
		"a workload that does not go well": {New(WorkloadUnhealthy, "x"), WorkloadUnhealthy, ExitWorkload},
	} {
		t.Run(name, func(t *testing.T) {
			if Of(tc.err) != tc.code || Exit(tc.err) != tc.exit {
				t.Errorf("%s %d, expected %s %d", Of(tc.err), Exit(tc.err), tc.code, tc.exit)
			}
		})
	}
}

// The help text of the programs and the README say the same about statuses.
func TestExitHelp(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(ExitHelp, "\n")[1:] {
		status, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		if row := fmt.Sprintf("| %s | %s |\n", status, strings.TrimSpace(text)); !strings.Contains(string(readme), row) {
			t.Errorf("README.md has no row %q", row)
		}
	}
}
