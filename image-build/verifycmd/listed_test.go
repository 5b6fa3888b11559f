package verifycmd

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// The files of a directory are nobody's word: a link in it is passed over, and
// one that took the place of a file after the listing is refused.
func TestLinksInADirectoryAreNotFollowed(t *testing.T) {
	dir := t.TempDir()
	elsewhere, cert, link := filepath.Join(t.TempDir(), "x.pem"), filepath.Join(dir, "a.pem"), filepath.Join(dir, "b.pem")
	for _, name := range []string{elsewhere, cert} {
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(elsewhere, link); err != nil {
		t.Fatal(err)
	}
	files, read, err := listed(dir, ".pem")
	if err != nil || len(files) != 1 || files[0] != cert {
		t.Fatalf("%q, %v", files, err)
	}
	if b, err := read(cert, 1); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	if err := os.Rename(link, cert); err != nil {
		t.Fatal(err)
	}
	if b, err := read(cert, 1); !errors.Is(err, bounded.ErrNotRegular) {
		t.Errorf("a link since the listing: %q, %v", b, err)
	}
	files, read, err = listed(cert)
	if err != nil || len(files) != 1 {
		t.Fatalf("%q, %v", files, err)
	}
	if b, err := read(files[0], 1); err != nil || string(b) != "x" {
		t.Errorf("a link that is named: %q, %v", b, err)
	}
}
