package broker

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

// What every backend does with reference documents and instances.
func TestReferencesAndInstancesOnBackends(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) *Store{
		"bbolt": func(t *testing.T) *Store {
			s, err := openStore(t, filepath.Join(t.TempDir(), "db"), 1)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			return s
		},
		"PostgreSQL": func(t *testing.T) *Store { return openDatabase(t, database(t), 1) },
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			testReferences(t, s)
			testInstances(t, s)
		})
	}
}

func markAt(version uint64, digit string) ReferenceMark {
	return ReferenceMark{Version: version, Digest: "sha256:" + strings.Repeat(digit, 64)}
}

func testReferences(t *testing.T, s *Store) {
	unrecorded := func() error { return errors.New("no record") }
	holds := func(what, name string, want ReferenceMark, text string) {
		t.Helper()
		got, m, err := s.Reference(name)
		if err != nil || m != want || string(got) != text {
			t.Errorf("%s: %q %+v, %v; expected %q %+v", what, got, m, err, text, want)
		}
	}
	owner := func(path string) string {
		t.Helper()
		var found *StoredReference
		err := s.backend.view(func(tx transaction) (err error) {
			found, err = s.referenceFor(tx, mustURI(t, "kbs:///"+path))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if found == nil {
			return ""
		}
		return found.Name
	}
	put := func(name string, m ReferenceMark, text string, paths ...string) error {
		return s.PutReference(name, m, paths, []byte(text), onRecord)
	}
	two := markAt(2, "2")
	if err := put("rules", two, "two", "a/b/1", "a/b/2"); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"a lower version":           put("rules", markAt(1, "1"), "one", "a/b/1"),
		"the version, changed":      put("rules", markAt(2, "3"), "two again", "a/b/1"),
		"another's resource":        put("others", markAt(1, "1"), "other", "c/d/1", "a/b/2"),
		"a change without a record": s.PutReference("rules", markAt(3, "3"), []string{"a/b/3"}, []byte("three"), unrecorded),
	} {
		if err == nil {
			t.Errorf("%s was stored", what)
		}
	}
	holds("after what was refused", "rules", two, "two")
	if _, _, err := s.Reference("others"); !errors.Is(err, errNotFound) {
		t.Errorf("a refused document is there: %v", err)
	}
	if owner("a/b/1") != "rules" || owner("a/b/2") != "rules" || owner("a/b/3") != "" || owner("c/d/1") != "" {
		t.Error("the index is not of the document that is there")
	}
	// A higher version lets go of what it no longer names.
	three := markAt(3, "3")
	if err := put("rules", three, "three", "a/b/2", "a/b/3"); err != nil {
		t.Fatal(err)
	}
	if err := put("others", markAt(1, "1"), "other", "a/b/1"); err != nil {
		t.Fatal(err)
	}
	if owner("a/b/1") != "others" || owner("a/b/2") != "rules" || owner("a/b/3") != "rules" {
		t.Error("the index is not of the new documents")
	}
	if names, err := s.References(); err != nil || len(names) != 2 {
		t.Errorf("%v, %v", names, err)
	}
	if err := s.DeleteReference("rules", unrecorded); err == nil {
		t.Error("deleted without a record")
	}
	holds("not deleted", "rules", three, "three")
	if err := s.DeleteReference("rules", onRecord); err != nil {
		t.Fatal(err)
	}
	if err := put("rules", two, "two", "a/b/2"); cause.Of(err) != cause.PolicyBelowFloor || owner("a/b/2") != "" {
		t.Errorf("the mark went with its document: %v", err)
	}

	// Whatever order concurrent admins come in, mark and document are of one
	// version, the highest that was stored.
	var wg sync.WaitGroup
	for v := uint64(4); v < 12; v++ {
		wg.Go(func() {
			if err := put("rules", markAt(v, "4"), strings.Repeat("x", int(v)), "a/b/2"); err != nil && cause.Of(err) != cause.PolicyBelowFloor {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	holds("after a race", "rules", markAt(11, "4"), strings.Repeat("x", 11))
}

func testInstances(t *testing.T, s *Store) {
	a, err := s.Instance("tpm:aa", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Instance("snp:bb", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetTombstone(a.ID, func() error { return errors.New("no record") }); err == nil {
		t.Error("a tombstone without a record")
	}
	if i, err := s.InstanceByID(a.ID); err != nil || i.Tombstone || i.Identity != "tpm:aa" {
		t.Errorf("%+v, %v", i, err)
	}
	if err := s.SetTombstone(a.ID, onRecord); err != nil {
		t.Fatal(err)
	}
	if err := s.SetTombstone(strings.Repeat("0", 32), onRecord); !errors.Is(err, errNotFound) {
		t.Errorf("nobody's tombstone: %v", err)
	}
	if again, err := s.Instance("tpm:aa", time.Now()); err != nil || !again.Tombstone || again.ID != a.ID {
		t.Errorf("attesting again brought it back: %+v, %v", again, err)
	}
	list, err := s.Instances()
	if err != nil || len(list) != 2 || !list[1].Tombstone || list[0].Tombstone || list[0].ID != b.ID {
		t.Errorf("%+v, %v", list, err)
	}
}

// Who signs rules is read strictly: what cannot be used stops the start.
func TestRuleSignersConfiguration(t *testing.T) {
	dir := t.TempDir()
	if err := Init(InitOptions{Dir: filepath.Join(dir, "b"), Hosts: []string{"127.0.0.1"}, Listen: "127.0.0.1:0", Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "b", FileConfig)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	one, two := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519")
	for name, data := range map[string]string{"one.pub": one.PEM, "two.pub": two.PEM, "both.pub": one.PEM + two.PEM, "key": string(one.PKCS8)} {
		if err := os.WriteFile(filepath.Join(dir, "b", name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	load := func(more string) (*RuleSigners, error) {
		if err := os.WriteFile(path, append(text[:len(text):len(text)], more...), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := LoadConfig(path)
		if err != nil {
			return nil, err
		}
		s, err := c.ruleSigners()
		if err == nil && s != nil {
			_, err = newDocuments(*s)
		}
		return s, err
	}
	if s, err := load(""); err != nil || s != nil {
		t.Errorf("none: %+v, %v", s, err)
	}
	for _, good := range []string{"keys: [one.pub]", "keys: [one.pub, two.pub], threshold: 2", "keys: [both.pub], threshold: 2"} {
		if s, err := load("ruleSigners: {" + good + "}\n"); err != nil || len(s.Keys) < s.Threshold || s.Threshold < 1 {
			t.Errorf("%s: %+v, %v", good, s, err)
		}
	}
	for _, bad := range []string{
		"", "keys: []", "threshold: 1", "keys: [one.pub], threshold: 2", "keys: [one.pub, one.pub], threshold: 2", "keys: [one.pub], threshold: -1",
		"keys: [nowhere.pub]", "keys: [key]", "keys: [" + one.Fingerprint + "]", "keys: [one.pub], anyone: true",
	} {
		if s, err := load("ruleSigners: {" + bad + "}\n"); err == nil {
			t.Errorf("%s: accepted as %+v", bad, s)
		}
	}
}
