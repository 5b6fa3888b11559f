package audit

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A log that somebody else kept: what is accepted is whole, and not one byte of
// it can be another.
func FuzzVerify(f *testing.F) {
	path := filepath.Join(f.TempDir(), "audit.ndjson")
	log, err := Open(path, func() time.Time { return time.Unix(1750000000, 0) })
	if err != nil {
		f.Fatal(err)
	}
	for _, op := range []string{"start", "attest", "stop"} {
		if err := log.Write(Record{Op: op, Outcome: "ok"}); err != nil {
			f.Fatal(err)
		}
	}
	if err := log.Close(); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		head, err := Verify(bytes.NewReader(b))
		if err != nil {
			return
		}
		if int(head.Records) != bytes.Count(b, []byte("\n")) || len(head.Hash) != 64 {
			t.Fatalf("%+v of %q", head, b)
		}
	})
}
