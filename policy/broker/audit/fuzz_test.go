package audit

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A log that verifies is one that Open continues; one that does not is not.
func FuzzVerify(f *testing.F) {
	path := filepath.Join(f.TempDir(), "log")
	l, err := OpenAs("b1", path, func() time.Time { return time.Unix(1000, 0) })
	if err != nil {
		f.Fatal(err)
	}
	for _, r := range []Record{{Op: "start", Outcome: "ok"}, {Op: "attest", Outcome: "refused", Reason: "nonce: é\u2028"}, {Op: "release", Outcome: "ok", Resource: "kbs:///a/b/c"}} {
		if err := l.Write(r); err != nil {
			f.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:len(whole)-1])
	f.Add(bytes.Replace(whole, []byte(`"seq":2`), []byte(`"seq":3`), 1))
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		head, err := Verify(bytes.NewReader(b))
		if err == nil && int(head.Records) != bytes.Count(b, []byte("\n")) {
			t.Fatalf("%d records in %d lines", head.Records, bytes.Count(b, []byte("\n")))
		}
		if err == nil && len(b) > 0 && b[len(b)-1] != '\n' {
			t.Fatal("an incomplete last line verified")
		}
	})
}
