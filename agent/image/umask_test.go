package image

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A layer that does not list its root gets one that any user of a workload can
// enter, whatever the agent's umask is.
func TestALayersRootCanBeEnteredWhateverTheUmaskIs(t *testing.T) {
	reg := startRegistry(t)
	c := client(t, t.TempDir(), plain(reg))
	p := push(t, reg+"/umask", false, tarOf(t, map[string]string{"hello": "x"}))
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	s, err := fetch1(c, t, p)
	if err != nil {
		t.Fatal(err)
	}
	root, unmount, err := s.Mount(ctx(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unmount() }()
	if info, err := os.Stat(root); err != nil || info.Mode().Perm()&0o055 != 0o055 {
		t.Errorf("the root: %v, %v", info.Mode(), err)
	}
}
