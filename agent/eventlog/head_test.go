package eventlog

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Where the platform has no register the log still replays after a restart,
// and one that was changed on its own does not.
func TestAHeadFindsALogThatChangedAlone(t *testing.T) {
	ctx := context.Background()
	policyEvent := Event{Kind: KindPolicy, Policy: "demo", PolicyVersion: 1, PolicyDigest: "sha256:" + strings.Repeat("ab", 32), Signers: []string{strings.Repeat("cd", 32)}}
	image := Event{Kind: KindImage, Workload: "web", Image: "registry.example/web@sha256:" + strings.Repeat("1", 64)}
	start := func(t *testing.T) (dir string, before []byte) {
		t.Helper()
		dir = t.TempDir()
		l, err := Open(ctx, dir, NewHead(dir))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Append(ctx, policyEvent); err != nil {
			t.Fatal(err)
		}
		before = l.Bytes()
		if err := l.Append(ctx, image); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return dir, before
	}
	for name, c := range map[string]struct {
		change func(t *testing.T, dir string, before []byte)
		events int // 0: refused
	}{
		"nothing": {func(*testing.T, string, []byte) {}, 2},
		"rolled back": {func(t *testing.T, dir string, before []byte) {
			write(t, filepath.Join(dir, FileName), before)
		}, 0},
		"gone": {func(t *testing.T, dir string, _ []byte) {
			if err := os.Remove(filepath.Join(dir, FileName)); err != nil {
				t.Fatal(err)
			}
		}, 0},
		"without its head": {func(t *testing.T, dir string, _ []byte) {
			if err := os.Remove(filepath.Join(dir, HeadFile)); err != nil {
				t.Fatal(err)
			}
		}, 0},
		"a head cut off":  {func(t *testing.T, dir string, _ []byte) { write(t, filepath.Join(dir, HeadFile), make([]byte, 31)) }, 0},
		"a head too long": {func(t *testing.T, dir string, _ []byte) { write(t, filepath.Join(dir, HeadFile), make([]byte, 33)) }, 0},
		// A kill between the record and the head.
		"one append ahead": {func(t *testing.T, dir string, before []byte) {
			r, err := Replay(before)
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, HeadFile), r.SHA256[:])
		}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			dir, before := start(t)
			c.change(t, dir, before)
			l, err := Open(ctx, dir, NewHead(dir))
			if c.events == 0 {
				if cause.Of(err) != cause.EventLogDiverged {
					t.Fatalf("got %v, expected %s", err, cause.EventLogDiverged)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			r, err := Replay(l.Bytes())
			if err != nil || len(r.Events) != c.events {
				t.Fatalf("%d events, %v", len(r.Events), err)
			}
			head, err := NewHead(dir).Read(ctx)
			if err != nil || !bytes.Equal(head, r.SHA256[:]) {
				t.Errorf("the head is %x, the log replays to %x, %v", head, r.SHA256, err)
			}
		})
	}
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
