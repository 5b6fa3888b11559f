package scan

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/anchore/syft/syft/file"
	"github.com/anchore/syft/syft/source"
)

// listing is a directory source whose resolver answers the pattern DIR/* by
// looking into DIR. The catalogers of JavaScript and others ask it for each
// package, in search of licence files, and syft's index answers it by listing
// all directories of DIR's base name: a quarter of the time of a large image.
type listing struct {
	source.Source
	root string // absolute, no links

	mu sync.Mutex
	at *lister
}

func (l *listing) FileResolver(s source.Scope) (file.Resolver, error) {
	inner, err := l.Source.FileResolver(s)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.at == nil || l.at.Resolver != inner {
		l.at = &lister{Resolver: inner, root: l.root}
	}
	return l.at, nil
}

type lister struct {
	file.Resolver
	root string
}

// FilesByGlob gives what the index gives, in its order: the files that DIR's
// entries are or lead to, each once, plain names before links, then by name.
func (l *lister) FilesByGlob(patterns ...string) ([]file.Location, error) {
	if len(patterns) == 1 {
		if dir, ok := l.plain(patterns[0]); ok {
			return l.list(dir)
		}
	}
	return l.Resolver.FilesByGlob(patterns...)
}

// plain returns DIR of the pattern DIR/* if it is literal and no part of it is
// a link: through links more than DIR's entries may match.
func (l *lister) plain(pattern string) (dir string, ok bool) {
	dir, ok = strings.CutSuffix(pattern, "/*")
	if !ok || dir == "" || dir[0] != '/' || filepath.Clean(dir) != dir || strings.ContainsAny(dir, `*?[]{}\`) {
		return "", false
	}
	real, err := filepath.EvalSymlinks(l.root + dir)
	return dir, err == nil && real == l.root+dir
}

func (l *lister) list(dir string) ([]file.Location, error) {
	entries, err := os.ReadDir(l.root + dir)
	if err != nil {
		return l.Resolver.FilesByGlob(dir + "/*")
	}
	paths := make([]string, len(entries))
	for i, e := range entries {
		paths[i] = dir + "/" + e.Name()
	}
	found, err := l.FilesByPath(paths...)
	if err != nil {
		return nil, err
	}
	link := func(x file.Location) int {
		if x.RealPath == x.AccessPath {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(found, func(a, b file.Location) int {
		return cmp.Or(link(a)-link(b), strings.Compare(a.AccessPath, b.AccessPath))
	})
	seen := map[string]bool{} // in one tree a real path is a file
	return slices.DeleteFunc(found, func(x file.Location) bool {
		twice := seen[x.RealPath]
		seen[x.RealPath] = true
		return twice
	}), nil
}
