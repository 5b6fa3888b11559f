//go:build image

package guest

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"slices"
	"strings"
	"testing"
)

// spdx is what the tests read of sbom.spdx.json.
type spdx struct {
	Packages []struct {
		Name, VersionInfo string
		ExternalRefs      []struct{ ReferenceType, ReferenceLocator string }
	}
	Files []struct{ FileName string }
}

// bill is the SBOM: packages as "name version", and the same of those with a purl of a type.
func bill(t *testing.T) (all spdx, has map[string]bool, purls map[string]bool) {
	t.Helper()
	if err := json.Unmarshal([]byte(read(t, image(t, "sbom.spdx.json"))), &all); err != nil {
		t.Fatal(err)
	}
	has, purls = map[string]bool{}, map[string]bool{}
	for _, p := range all.Packages {
		has[p.Name+" "+p.VersionInfo] = true
		for _, r := range p.ExternalRefs {
			if kind, _, ok := strings.Cut(strings.TrimPrefix(r.ReferenceLocator, "pkg:"), "/"); ok && r.ReferenceType == "purl" {
				purls[kind+" "+p.Name+" "+p.VersionInfo] = true
			}
		}
	}
	return all, has, purls
}

type manifest struct {
	Lock, Kernel string
	Programs     map[string]string
	Packages     []struct{ Name, Version, DebSha256 string }
}

func readManifest(t *testing.T) (m manifest) {
	t.Helper()
	if err := json.Unmarshal([]byte(read(t, image(t, "manifest.json"))), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func digest(t *testing.T, path string) string {
	t.Helper()
	sum := sha256.Sum256([]byte(read(t, path)))
	return hex.EncodeToString(sum[:])
}

// TestEveryPackageIsInManifestAndSBOM: packages.lock's group root and one kernel,
// each with its version and the .deb's digest, and nothing else.
func TestEveryPackageIsInManifestAndSBOM(t *testing.T) {
	m := readManifest(t)
	if m.Lock != digest(t, "packages.lock") {
		t.Errorf("the manifest is of another packages.lock: %s", m.Lock)
	}
	kernels := 0
	var locked, listed []string
	for _, line := range list(t, "packages.lock") {
		f := strings.Fields(line)
		if len(f) != 6 {
			t.Fatalf("packages.lock: %q", line)
		}
		// Which of the kernels it is, the image says.
		if kernel := strings.HasPrefix(f[0], "kernel") && f[1] == "linux-image-"+m.Kernel; f[0] == "root" || kernel {
			locked = append(locked, strings.Join(f[1:4], " "))
			if kernel {
				kernels++
			}
		}
	}
	_, _, purls := bill(t)
	for _, p := range m.Packages {
		listed = append(listed, p.Name+" "+p.Version+" "+p.DebSha256)
		if !purls["deb "+p.Name+" "+p.Version] {
			t.Errorf("%s %s is missing in the SBOM, or is no Debian package there", p.Name, p.Version)
		}
	}
	equal(t, "packages of the manifest", listed, locked)
	if len(locked) < 100 || kernels != 1 {
		t.Errorf("%d packages in the lock, of which %d are this kernel", len(locked), kernels)
	}
	debs := 0
	for p := range purls {
		if strings.HasPrefix(p, "deb ") {
			debs++
		}
	}
	if debs != len(m.Packages) {
		t.Errorf("the SBOM has %d Debian packages, the manifest %d", debs, len(m.Packages))
	}
}

// TestEveryProgramOfOursIsNamed in the manifest by its digest, and the SBOM has
// the modules that it, and any other Go program of the image, was built of.
func TestEveryProgramOfOursIsNamed(t *testing.T) {
	_, has, purls := bill(t)
	var ours []string
	modules := func(name, path string) {
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			return // no Go program
		}
		if strings.HasPrefix(info.Main.Path, "github.com/cc-runtime/") || strings.HasPrefix(info.Path, "github.com/cc-runtime/") {
			ours = append(ours, name+" "+digest(t, path))
			if len(info.Deps) == 0 {
				t.Errorf("%s does not say what it was built of", name)
			}
			if !slices.ContainsFunc([]string{" UNKNOWN", " " + info.Main.Version, " (devel)"}, func(v string) bool { return has[info.Main.Path+v] }) {
				t.Errorf("%s: its module %s is missing in the SBOM", name, info.Main.Path)
			}
		}
		if !has["stdlib "+info.GoVersion] {
			t.Errorf("%s: the SBOM has no stdlib %s", name, info.GoVersion)
		}
		for _, d := range info.Deps {
			if d.Replace != nil {
				d = d.Replace
			}
			if !purls["golang "+d.Path+" "+d.Version] {
				t.Errorf("%s: %s %s is missing in the SBOM", name, d.Path, d.Version)
			}
		}
	}
	programs := func(top string) func(path string, info fs.FileInfo) {
		return func(path string, info fs.FileInfo) {
			if info.Mode().IsRegular() && info.Mode()&0o100 != 0 {
				modules(path, top+path)
			}
		}
	}
	files(t, programs(root(t)))
	walk(t, initrd(t), 10, programs(initrd(t)))
	var want []string
	for path, sum := range readManifest(t).Programs {
		want = append(want, path+" "+sum)
	}
	equal(t, "programs of ours, by digest", ours, want)
	equal(t, "programs of ours", slices.Collect(names(ours)), []string{"/init", "/usr/bin/cvm-agent", "/usr/lib/cvm-agent/cvm-sbom"})
}

func names(lines []string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for _, line := range lines {
			if name, _, _ := strings.Cut(line, " "); !yield(name) {
				return
			}
		}
	}
}

// TestEveryFileIsInTheSBOM: a file that is in the root and in no bill came from nowhere.
func TestEveryFileIsInTheSBOM(t *testing.T) {
	all, _, _ := bill(t)
	listed := map[string]bool{}
	for _, f := range all.Files {
		listed["/"+strings.TrimPrefix(f.FileName, "/")] = true
	}
	missing := 0
	files(t, func(path string, info fs.FileInfo) {
		if info.Mode().IsRegular() && !listed[path] {
			if missing++; missing <= 10 {
				t.Errorf("%s is missing in the SBOM", path)
			}
		}
	})
	if missing > 10 {
		t.Errorf("and %d more", missing-10)
	}
}
