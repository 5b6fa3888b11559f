package eventlog

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// register is a PCR in memory. Each fault happens once.
type register struct {
	mu      sync.Mutex
	value   [32]byte
	extends int
	fault   string // "extend-lost", "answer-lost", "killed-before", "killed-after"
	dead    bool
}

var errInjected = errors.New("injected")

func (r *register) Name() string { return "pcr14" }
func (r *register) Index() int   { return IndexPCR14 }

func (r *register) Read(context.Context) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dead {
		return nil, errInjected
	}
	v := r.value
	return v[:], nil
}

func (r *register) Extend(_ context.Context, d map[crypto.Hash][]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	fault := r.fault
	r.fault = ""
	switch fault {
	case "extend-lost":
		return errInjected
	case "killed-before":
		r.dead = true
		return errInjected
	}
	r.value = sha256.Sum256(append(r.value[:], d[crypto.SHA256]...))
	r.extends++
	switch fault {
	case "answer-lost":
		return errInjected
	case "killed-after":
		r.dead = true
		return errInjected
	}
	return nil
}

func hex64(c string) string { return strings.Repeat(c, 64) }

func policyEvent(kind Kind, version uint64) Event {
	e := Event{Kind: kind, Policy: "web", PolicyVersion: version, PolicyDigest: "sha256:" + hex64(fmt.Sprint(version))}
	if kind == KindPolicy || kind == KindPolicyStaged {
		e.Signers = []string{hex64("b"), hex64("a")}
	}
	return e
}

func imageEvent(kind Kind, workload, digit string) Event {
	return Event{Kind: kind, Workload: workload, Image: "registry.example/web@sha256:" + hex64(digit)}
}

func mustOpen(t *testing.T, dir string, reg Register) *Log {
	t.Helper()
	l, err := Open(t.Context(), dir, reg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func mustAppend(t *testing.T, l *Log, events ...Event) {
	t.Helper()
	for _, e := range events {
		if err := l.Append(t.Context(), e); err != nil {
			t.Fatalf("append %s: %v", e.Kind, err)
		}
	}
}

func requireConverged(t *testing.T, l *Log, reg *register, events int) {
	t.Helper()
	r, err := Replay(l.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if r.SHA256 != reg.value || len(r.Events) != events || reg.extends != events {
		t.Fatalf("replay %x with %d events, register %x with %d extends, expected %d events", r.SHA256, len(r.Events), reg.value, reg.extends, events)
	}
}

func TestLogReplaysToRegisterAcrossRestart(t *testing.T) {
	dir, reg := t.TempDir(), &register{}
	l := mustOpen(t, dir, reg)
	mustAppend(t, l, policyEvent(KindPolicy, 1), imageEvent(KindImage, "web", "c"))
	l.Close()
	l = mustOpen(t, dir, reg)
	requireConverged(t, l, reg, 2)
	if got := l.State().Signers; !reflect.DeepEqual(got, []string{hex64("a"), hex64("b")}) {
		t.Fatalf("signers %v are not in ascending order", got)
	}
}

// Row 8: event extended twice on failover, log no longer replays.
func TestLesson08_NothingIsExtendedTwice(t *testing.T) {
	events := []Event{policyEvent(KindPolicy, 1), imageEvent(KindImage, "web", "c"), policyEvent(KindPolicyStaged, 2)}
	for _, fault := range []string{"extend-lost", "answer-lost", "killed-before", "killed-after"} {
		for at := range events {
			t.Run(fmt.Sprintf("%s at event %d", fault, at), func(t *testing.T) {
				dir, reg := t.TempDir(), &register{}
				l := mustOpen(t, dir, reg)
				mustAppend(t, l, events[:at]...)
				reg.fault = fault
				err := l.Append(t.Context(), events[at])
				if (err == nil) != (fault == "answer-lost") {
					t.Fatalf("append: %v", err)
				}
				if err != nil && cause.Of(err) != cause.TPMUnavailable {
					t.Fatalf("cause %s", cause.Of(err))
				}
				if reg.dead { // killed: a new process, the same files and register
					reg.dead = false
					l.Close()
					l = mustOpen(t, dir, reg)
				} else if err := l.Append(t.Context(), events[at]); err != nil && fault == "extend-lost" {
					t.Fatalf("retry: %v", err)
				}
				requireConverged(t, l, reg, at+1)
				for _, e := range events { // the launch starts over
					if err := l.AppendOnce(t.Context(), e); err != nil {
						t.Fatalf("append once %s: %v", e.Kind, err)
					}
				}
				requireConverged(t, l, reg, len(events))
			})
		}
	}
}

func TestAnotherEventAfterALostExtendKeepsBoth(t *testing.T) {
	reg := &register{}
	l := mustOpen(t, t.TempDir(), reg)
	mustAppend(t, l, policyEvent(KindPolicy, 1))
	reg.fault = "extend-lost"
	if err := l.Append(t.Context(), imageEvent(KindImage, "a", "1")); err == nil {
		t.Fatal("lost extend not reported")
	}
	if r, err := Replay(l.Bytes()); err != nil || len(r.Events) != 1 {
		t.Fatalf("bytes of the log hold an event that is not extended: %v", err)
	}
	mustAppend(t, l, imageEvent(KindImage, "b", "2"))
	requireConverged(t, l, reg, 3)
}

// A register that somebody else used.
func TestForeignExtendIsDivergence(t *testing.T) {
	foreign := sha256.Sum256([]byte("foreign"))
	t.Run("before the log began", func(t *testing.T) {
		reg := &register{value: foreign}
		if _, err := Open(t.Context(), t.TempDir(), reg); cause.Of(err) != cause.EventLogDiverged {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("while the log is open, before an append", func(t *testing.T) {
		reg := &register{}
		l := mustOpen(t, t.TempDir(), reg)
		mustAppend(t, l, policyEvent(KindPolicy, 1))
		reg.value = foreign
		for range 2 {
			if err := l.Append(t.Context(), imageEvent(KindImage, "web", "c")); cause.Of(err) != cause.EventLogDiverged {
				t.Fatalf("got %v", err)
			}
		}
		if reg.extends != 1 {
			t.Fatal("extended after divergence")
		}
		if err := l.Check(t.Context()); cause.Of(err) != cause.EventLogDiverged {
			t.Fatalf("check: %v", err)
		}
	})
	t.Run("while no process had the log open", func(t *testing.T) {
		dir, reg := t.TempDir(), &register{}
		l := mustOpen(t, dir, reg)
		mustAppend(t, l, policyEvent(KindPolicy, 1))
		l.Close()
		reg.value = foreign
		if _, err := Open(t.Context(), dir, reg); cause.Of(err) != cause.EventLogDiverged {
			t.Fatalf("got %v", err)
		}
	})
}

func TestOpenRefusesAlteredFiles(t *testing.T) {
	alter := map[string]func(path string, b []byte) error{
		"removed":                     func(p string, _ []byte) error { return os.Remove(p) },
		"last record removed twice":   func(p string, b []byte) error { return os.WriteFile(p, b[:0], 0o600) },
		"cut in the middle":           func(p string, b []byte) error { return os.WriteFile(p, b[:len(b)-7], 0o600) },
		"one byte changed":            func(p string, b []byte) error { b[len(b)/2] ^= 1; return os.WriteFile(p, b, 0o600) },
		"a symlink to the same bytes": func(p string, b []byte) error { _ = os.Rename(p, p+".x"); return os.Symlink(p+".x", p) },
		"trailing byte":               func(p string, b []byte) error { return os.WriteFile(p, append(b, 0), 0o600) },
	}
	for name, f := range alter {
		t.Run(name, func(t *testing.T) {
			dir, reg := t.TempDir(), &register{}
			l := mustOpen(t, dir, reg)
			mustAppend(t, l, policyEvent(KindPolicy, 1), imageEvent(KindImage, "web", "c"))
			l.Close()
			path := filepath.Join(dir, FileName)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := f(path, b); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(t.Context(), dir, reg); cause.Of(err) != cause.EventLogDiverged {
				t.Fatalf("got %v", err)
			}
			if reg.extends != 2 {
				t.Fatal("the register was extended")
			}
		})
	}
}

func TestSecondProcessIsRefused(t *testing.T) {
	dir, reg := t.TempDir(), &register{}
	mustOpen(t, dir, reg)
	if _, err := Open(t.Context(), dir, reg); cause.Of(err) != cause.EventLogWrite {
		t.Fatalf("got %v", err)
	}
}

func TestUnwritableLogExtendsNothing(t *testing.T) {
	dir, reg := t.TempDir(), &register{}
	l := mustOpen(t, dir, reg)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(t.Context(), policyEvent(KindPolicy, 1)); cause.Of(err) != cause.EventLogWrite || reg.extends != 0 {
		t.Fatalf("got %v with %d extends", err, reg.extends)
	}
}

// Row 35 in the log's part: appends, reads and checks at once.
func TestLesson35_ConcurrentUse(t *testing.T) {
	reg := &register{}
	l := mustOpen(t, t.TempDir(), reg)
	mustAppend(t, l, policyEvent(KindPolicy, 1))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Add(2)
		go func() {
			defer wg.Done()
			if err := l.Append(t.Context(), imageEvent(KindImage, fmt.Sprintf("w%d", i), "d")); err != nil {
				t.Error(err)
			}
		}()
		go func() {
			defer wg.Done()
			if _, err := Replay(l.Bytes()); err != nil {
				t.Error(err)
			}
			if err := l.Check(t.Context()); err != nil {
				t.Error(err)
			}
			_ = l.State()
		}()
	}
	wg.Wait()
	requireConverged(t, l, reg, 9)
}
