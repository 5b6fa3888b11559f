package sbom

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The documents in testdata are of one image, image.tar: see README.md.
func recorded(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const ours = "cvm-sbom.spdx.json"

func compareEqual(t *testing.T, signed, found []byte, mode string) {
	t.Helper()
	ds, err := Compare(signed, found, mode)
	if err != nil || Differs(ds) != nil {
		t.Fatalf("not equal: %v, %v", err, Differs(ds))
	}
}

func TestLesson43_OneImageUnderAnySourceNameIsEqual(t *testing.T) {
	for _, name := range []string{"registry-all-1.57.0.spdx.json", "oci-dir-all-1.57.0.spdx.json", "dir-all-1.57.0.spdx.json", ours} {
		for _, mode := range []string{Normal, Strict} {
			t.Run(name+" "+mode, func(t *testing.T) {
				compareEqual(t, recorded(t, name), recorded(t, ours), mode)
				compareEqual(t, recorded(t, ours), recorded(t, name), mode)
			})
		}
	}
}

func TestLesson23_TwoVersionsOfTheToolAreEqual(t *testing.T) {
	compareEqual(t, recorded(t, "registry-all-1.56.0.spdx.json"), recorded(t, ours), Strict)
	compareEqual(t, recorded(t, "registry-owned-1.56.0.spdx.json"), recorded(t, ours), Normal)
	compareEqual(t, recorded(t, "registry-all-1.56.0.spdx.json"), recorded(t, "oci-dir-all-1.57.0.spdx.json"), Strict)
}

func TestADocumentOfOwnedFilesIsComparedOnItsCoverage(t *testing.T) {
	for _, name := range []string{"registry-owned-1.57.0.spdx.json", "registry-owned-1.57.0.cdx.json"} {
		t.Run(name, func(t *testing.T) {
			compareEqual(t, recorded(t, name), recorded(t, ours), Normal)
			ds, err := Compare(recorded(t, name), recorded(t, ours), Strict)
			if err != nil || cause.Of(Differs(ds)) != cause.SBOMDiffers {
				t.Fatalf("strict accepts less coverage: %v, %v", ds, err)
			}
			if !slices.ContainsFunc(ds, func(d Difference) bool { return d.Kind == FileNotCovered && d.What == "/srv/unowned.txt" }) {
				t.Errorf("the file without coverage is not named: %v", ds)
			}
		})
	}
}

// edit changes one document as a tampered image would change its SBOM.
func edit(t *testing.T, data []byte, change func(doc map[string]any)) []byte {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	change(doc)
	out, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func elementNamed(t *testing.T, doc map[string]any, list, field, name string) map[string]any {
	t.Helper()
	for _, e := range doc[list].([]any) {
		if m := e.(map[string]any); strings.TrimPrefix(m[field].(string), "/") == name {
			return m
		}
	}
	t.Fatalf("no %s %s", list, name)
	return nil
}

func TestLesson23_EachChangeIsNamed(t *testing.T) {
	sum := func(v string) []any {
		return []any{map[string]any{"algorithm": "SHA256", "checksumValue": strings.Repeat(v, 64)}}
	}
	for name, c := range map[string]struct {
		signed string // document; "" is ours
		change func(t *testing.T, doc map[string]any)
		want   Difference
	}{
		"a package added": {"", func(_ *testing.T, doc map[string]any) {
			doc["packages"] = append(doc["packages"].([]any), map[string]any{"SPDXID": "SPDXRef-new", "name": "backdoor", "versionInfo": "6.6"})
		}, Difference{Kind: PackageAdded, What: "backdoor 6.6"}},
		"a package added, signed document of owned files": {"registry-owned-1.57.0.spdx.json", func(_ *testing.T, doc map[string]any) {
			doc["packages"] = append(doc["packages"].([]any), map[string]any{"SPDXID": "SPDXRef-new", "name": "backdoor", "versionInfo": "6.6"})
		}, Difference{Kind: PackageAdded, What: "backdoor 6.6"}},
		"a package added, signed CycloneDX": {"registry-owned-1.57.0.cdx.json", func(_ *testing.T, doc map[string]any) {
			doc["packages"] = append(doc["packages"].([]any), map[string]any{"SPDXID": "SPDXRef-new", "name": "backdoor", "versionInfo": "6.6"})
		}, Difference{Kind: PackageAdded, What: "backdoor 6.6"}},
		"a package's licence changed": {"", func(t *testing.T, doc map[string]any) {
			elementNamed(t, doc, "packages", "name", "pebble")["licenseDeclared"] = "MIT"
		}, Difference{Kind: PackageChanged, What: "pebble 2.0 (pkg:pypi/pebble@2.0)"}},
		"an unowned file changed": {"", func(t *testing.T, doc map[string]any) {
			elementNamed(t, doc, "files", "fileName", "srv/unowned.txt")["checksums"] = sum("a")
		}, Difference{Kind: FileChanged, What: "/srv/unowned.txt"}},
		"an owned file changed, signed CycloneDX": {"registry-owned-1.57.0.cdx.json", func(t *testing.T, doc map[string]any) {
			elementNamed(t, doc, "files", "fileName", "usr/bin/greet")["checksums"] = sum("a")
		}, Difference{Kind: FileChanged, What: "/usr/bin/greet"}},
		"an unowned file added": {"registry-all-1.57.0.spdx.json", func(_ *testing.T, doc map[string]any) {
			doc["files"] = append(doc["files"].([]any), map[string]any{"SPDXID": "SPDXRef-new", "fileName": "usr/bin/evil", "checksums": sum("b")})
		}, Difference{Kind: FileAdded, What: "/usr/bin/evil"}},
		"a file replaced by a link": {"", func(t *testing.T, doc map[string]any) {
			elementNamed(t, doc, "files", "fileName", "usr/bin/greet")["checksums"] = []any{map[string]any{"algorithm": "SHA1", "checksumValue": strings.Repeat("0", 40)}}
		}, Difference{Kind: FileRemoved, What: "/usr/bin/greet"}},
		"a file with no common algorithm": {"", func(t *testing.T, doc map[string]any) {
			elementNamed(t, doc, "files", "fileName", "usr/bin/greet")["checksums"] = []any{map[string]any{"algorithm": "SHA512", "checksumValue": strings.Repeat("a", 128)}}
		}, Difference{Kind: FileUncomparable, What: "/usr/bin/greet"}},
	} {
		t.Run(name, func(t *testing.T) {
			signed := ours
			if c.signed != "" {
				signed = c.signed
			}
			found := edit(t, recorded(t, ours), func(doc map[string]any) { c.change(t, doc) })
			ds, err := Compare(recorded(t, signed), found, Normal)
			if err != nil || len(ds) != 1 || ds[0].Kind != c.want.Kind || ds[0].What != c.want.What {
				t.Fatalf("got %v (%v), want one: %v", ds, err, c.want)
			}
			if text := Differs(ds).Error(); !strings.Contains(text, c.want.What) {
				t.Errorf("not named: %s", text)
			}
		})
	}
	t.Run("a relationship removed", func(t *testing.T) {
		found := edit(t, recorded(t, ours), func(doc map[string]any) {
			doc["relationships"] = slices.DeleteFunc(doc["relationships"].([]any), func(r any) bool {
				return r.(map[string]any)["relationshipType"] == "DEPENDENCY_OF"
			})
		})
		ds, err := Compare(recorded(t, ours), found, Normal)
		if err != nil || len(ds) != 1 || ds[0].Kind != RelationRemoved {
			t.Fatalf("got %v, %v", ds, err)
		}
	})
}

func TestMalformedDocumentsAreRefused(t *testing.T) {
	const spdx = `"spdxVersion":"SPDX-2.3"`
	for name, doc := range map[string]string{
		"no JSON":                "x",
		"a list":                 "[]",
		"neither format":         `{}`,
		"both formats":           `{` + spdx + `,"bomFormat":"CycloneDX"}`,
		"duplicate key":          `{` + spdx + `,"files":[],"files":[]}`,
		"too deep":               `{` + spdx + `,"x":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`,
		"trailing data":          `{` + spdx + `}{}`,
		"an SPDXID twice":        `{` + spdx + `,"packages":[{"SPDXID":"a","name":"x"},{"SPDXID":"a","name":"y"}]}`,
		"no SPDXID":              `{` + spdx + `,"packages":[{"name":"x"}]}`,
		"relationship to nobody": `{` + spdx + `,"relationships":[{"spdxElementId":"a","relatedSpdxElement":"b","relationshipType":"X"}]}`,
		"a path with two sums": `{` + spdx + `,"files":[{"SPDXID":"a","fileName":"f","checksums":[{"algorithm":"SHA256","checksumValue":"aa"}]},
			{"SPDXID":"b","fileName":"/f","checksums":[{"algorithm":"SHA256","checksumValue":"bb"}]}]}`,
		"files is a string": `{` + spdx + `,"files":"none"}`,
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Compare([]byte(doc), recorded(t, ours), Normal); cause.Of(err) != cause.SBOMMalformed {
				t.Fatalf("got %v", err)
			}
		})
	}
	if _, err := Compare(bytes.Repeat([]byte(" "), MaxDocument+1), recorded(t, ours), Normal); cause.Of(err) != cause.SBOMMalformed {
		t.Fatalf("too large: got %v", err)
	}
}

func TestPackageURLsHaveOneSpelling(t *testing.T) {
	for in, want := range map[string]string{
		"pkg:DEB/debian/a@1?distro=debian-12&arch=amd64": "pkg:deb/debian/a@1?arch=amd64&distro=debian-12",
		"pkg:npm/%40babel/core@7":                        "pkg:npm/@babel/core@7",
		"pkg:npm/@babel/core@7":                          "pkg:npm/@babel/core@7",
		"pkg:golang/x@v1?type=#sub":                      "pkg:golang/x@v1#sub",
		"not a purl":                                     "not a purl",
	} {
		if got := normalPURL(in); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

func FuzzCompare(f *testing.F) {
	f.Add(recorded(f, ours), recorded(f, "registry-owned-1.57.0.cdx.json"))
	f.Add(recorded(f, "registry-all-1.57.0.spdx.json"), recorded(f, ours))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		ab, err := Compare(a, b, Normal)
		if err != nil {
			return
		}
		if again, _ := Compare(a, b, Normal); !slices.Equal(ab, again) {
			t.Error("the order of differences varies")
		}
		if same, err := Compare(a, a, Strict); err != nil || len(same) > 0 && !slices.ContainsFunc(same, func(d Difference) bool { return d.Kind == FileNotCovered }) {
			t.Errorf("a document differs from itself: %v, %v", same, err)
		}
	})
}

func FuzzDecodeSPDX(f *testing.F) {
	f.Add(recorded(f, ours))
	f.Add([]byte(`{"spdxVersion":"SPDX-2.3","packages":null,"documentDescribes":["a"]}`))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = decode(data) })
}

func FuzzDecodeCycloneDX(f *testing.F) {
	f.Add(recorded(f, "registry-owned-1.57.0.cdx.json"))
	f.Add([]byte(`{"bomFormat":"CycloneDX","components":[{"type":"file","name":"/a","components":[{}]}]}`))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = decode(data) })
}
