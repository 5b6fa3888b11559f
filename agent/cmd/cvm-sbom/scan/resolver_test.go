package scan

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/anchore/syft/syft/file"
	"github.com/anchore/syft/syft/source"
	"github.com/anchore/syft/syft/source/directorysource"
)

// The answers about a directory are those of syft's own index.
func TestListingAnswersAsTheIndexDoes(t *testing.T) {
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"a/lib/LICENSE", "a/lib/.hidden", "a/lib/sub/x", "b/lib/LICENSE", "b/lib/y", "c/lib/z", "we[ir]d/lib/w", "top"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, f), []byte(f), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{
		"a/lib/file": "LICENSE", "a/lib/0first": "../../b/lib/y", "a/lib/again": "/b/lib/y", "a/lib/dir": "../../b", "a/lib/gone": "nowhere",
		"a/lib/loop": "loop", "b/lib/back": "/a/lib", "d": "a", "e": "/b/lib", "c/lib/out": "../../../../../../etc/hostname", "c/lib/top": "/top",
	} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	src, err := directorysource.New(directorysource.Config{Path: root, Base: root})
	if err != nil {
		t.Fatal(err)
	}
	index, err := src.FileResolver(source.SquashedScope)
	if err != nil {
		t.Fatal(err)
	}
	own, err := (&listing{Source: src, root: root}).FileResolver(source.SquashedScope)
	if err != nil {
		t.Fatal(err)
	}
	text := func(ls []file.Location, err error) (out []string) {
		if err != nil {
			return []string{err.Error()}
		}
		for _, l := range ls {
			out = append(out, fmt.Sprintf("%s via %s (%v)", l.RealPath, l.AccessPath, l.Reference()))
		}
		return out
	}
	for _, pattern := range []string{"/a/lib/*", "/b/lib/*", "/c/lib/*", "/d/lib/*", "/e/*", "/a/lib/dir/lib/*", "/we[ir]d/lib/*", "/nowhere/*", "/a/*", "/*", "**/lib/*", "/a/lib/sub/*", "/top/*"} {
		got, want := text(own.FilesByGlob(pattern)), text(index.FilesByGlob(pattern))
		if !slices.Equal(got, want) {
			t.Errorf("%s:\n got %q\nwant %q", pattern, got, want)
		}
	}
}
