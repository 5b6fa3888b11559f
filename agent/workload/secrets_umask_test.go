package workload

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy"
)

// The agent's umask lets nobody else in: a workload's user must get in all the
// same, and no further than its own mode says.
func TestSecretsCanBeEnteredWhateverTheUmaskIs(t *testing.T) {
	s := &Secrets{root: t.TempDir()}
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	dir, err := s.Write("c", "1000", []policy.Secret{{Name: "a", Mode: "0444"}}, map[string][]byte{"a": []byte("value")})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{dir: 0o755, filepath.Join(dir, "a"): 0o444} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, expected %v", path, info, err, want)
		}
	}
}
