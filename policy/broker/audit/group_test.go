package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Concurrent writers share fsyncs, and each record is there when its Write
// returns, in one whole chain.
func TestConcurrentRecordsAreDurableWhenWriteReturns(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := OpenAs("b1", path, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	const writers, each = 16, 50
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				name := fmt.Sprintf("w%d-%d", w, i)
				if err := l.Write(Record{Op: "release", Outcome: "ok", Session: name}); err != nil {
					t.Error(err)
					return
				}
				if i%10 != 0 {
					continue
				}
				if text, err := os.ReadFile(path); err != nil || !bytes.Contains(text, []byte(`"session":"`+name+`"`)) {
					t.Errorf("%s is not in the file: %v", name, err)
				}
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := Verify(bytes.NewReader(text)); err != nil || h.Records != writers*each {
		t.Errorf("%+v, %v", h, err)
	}
	if n := strings.Count(string(text), `"broker":"b1"`); n != writers*each {
		t.Errorf("%d records name the broker", n)
	}
}

// After one failed write nobody is told that a record is durable, also not
// those that were chained to it while it failed.
func TestAFailedWriteFailsAllThatFollow(t *testing.T) {
	l, err := Open(filepath.Join(t.TempDir(), "log"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.file.Close(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if err := l.Write(Record{Op: "attest", Outcome: "ok"}); err == nil {
				t.Error("a record that is nowhere was said to be durable")
			}
		})
	}
	wg.Wait()
	if err := l.Write(Record{Op: "attest", Outcome: "ok"}); err == nil {
		t.Error("a later record was accepted")
	}
}

const childLog = "CVM_AUDIT_TEST_LOG"

// TestMain lets the test binary be the writer that is killed.
func TestMain(m *testing.M) {
	path := os.Getenv(childLog)
	if path == "" {
		os.Exit(m.Run())
	}
	l, err := Open(path, time.Now)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for w := range 8 {
		go func() {
			for i := 0; ; i++ {
				name := fmt.Sprintf("w%d-%d", w, i)
				if l.Write(Record{Op: "release", Outcome: "ok", Session: name}) == nil {
					fmt.Println(name) // one write system call: whole or not at all
				}
			}
		}()
	}
	select {}
}

// What Write returned for is in the file after a kill, and the chain goes on.
func TestAKillLosesNothingThatWasAcknowledged(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "log")
	for round := range 3 {
		c := exec.Command(exe)
		c.Env = append(os.Environ(), childLog+"="+path)
		c.Stderr = os.Stderr
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		var acknowledged []string
		for in := bufio.NewScanner(out); in.Scan(); {
			if acknowledged = append(acknowledged, in.Text()); len(acknowledged) == 200 {
				if err := c.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		var exit *exec.ExitError
		if err := c.Wait(); !errors.As(err, &exit) {
			t.Fatalf("the writer ended by itself: %v", err)
		}
		l, err := Open(path, time.Now)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(acknowledged) < 200 {
			t.Fatalf("round %d: %d records were acknowledged", round, len(acknowledged))
		}
		for _, name := range acknowledged {
			if !bytes.Contains(text, []byte(`"session":"`+name+`"`)) {
				t.Errorf("round %d: %s was acknowledged and is gone", round, name)
			}
		}
	}
}

// BenchmarkWrite is the time for each record, one writer after another and
// sixteen at once.
func BenchmarkWrite(b *testing.B) {
	for name, each := range map[string]func(b *testing.B, write func()){
		"alone": func(b *testing.B, write func()) {
			for b.Loop() {
				write()
			}
		},
		"together": func(b *testing.B, write func()) {
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					write()
				}
			})
		},
	} {
		b.Run(name, func(b *testing.B) {
			l, err := Open(filepath.Join(b.TempDir(), "log"), time.Now)
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			each(b, func() {
				if err := l.Write(Record{Op: "release", Outcome: "ok"}); err != nil {
					b.Error(err)
				}
			})
		})
	}
}
