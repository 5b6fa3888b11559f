package filetable

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

var samples = []Entry{
	{Type: Dir, Path: ".", Mode: 0},
	{Type: Regular, Path: "usr/bin/ls", Mode: 0o4755, UID: 7, GID: 9, MTime: 1700000000123456789, Size: 3, SHA256: [32]byte{1, 2}},
	{Type: Regular, Path: "with space\tand\nlf\\=\xff", Mode: 0o644, MTime: -1},
	{Type: Symlink, Path: "bin", Target: "usr/bin"},
	{Type: Char, Path: "gone"},
	{Type: Block, Path: "dev/sda", Major: 8, Minor: 1},
	{Type: FIFO, Path: "run/p"},
	{Type: Dir, Path: "d", Xattrs: []Xattr{{"security.capability", "\x01\x00"}, {"user.a", ""}}},
}

func TestEveryEntryComesBackFromItsLine(t *testing.T) {
	var table []byte
	for _, e := range samples {
		table = e.Append(table)
	}
	var again []byte
	i := 0
	err := Read(bytes.NewReader(table), 100, func(_ []byte, e Entry) error {
		if e.Path != samples[i].Path || e.SHA256 != samples[i].SHA256 || e.MTime != samples[i].MTime {
			t.Errorf("entry %d: got %+v, want %+v", i, e, samples[i])
		}
		i++
		again = e.Append(again)
		return nil
	})
	if err != nil || !bytes.Equal(table, again) {
		t.Fatalf("table changed on its way (err %v):\n%s\n%s", err, table, again)
	}
	if !samples[4].Whiteout() || samples[5].Whiteout() {
		t.Error("only a character device 0:0 is a whiteout")
	}
}

func TestBadLinesAreRefused(t *testing.T) {
	sha := strings.Repeat("0", 64)
	for name, line := range map[string]string{
		"empty line":                 "",
		"absolute path":              "d\t/etc\t755\t0\t0\t1.000000000",
		"path that climbs":           "d\t../etc\t755\t0\t0\t1.000000000",
		"path not clean":             "d\ta//b\t755\t0\t0\t1.000000000",
		"unknown type":               "x\ta\t755\t0\t0\t1.000000000",
		"mode with a type bit":       "d\ta\t100755\t0\t0\t1.000000000",
		"leading zero in a mode":     "d\ta\t0755\t0\t0\t1.000000000",
		"regular file, no digest":    "f\ta\t644\t0\t0\t1.000000000\t3",
		"upper-case digest":          "f\ta\t644\t0\t0\t1.000000000\t3\t" + strings.Replace(sha, "0", "A", 1),
		"negative size":              "f\ta\t644\t0\t0\t1.000000000\t-3\t" + sha,
		"needless escape":            "d\t\\141\t755\t0\t0\t1.000000000",
		"escape cut off":             "d\ta\\01\t755\t0\t0\t1.000000000",
		"escape not octal":           "d\ta\\089\t755\t0\t0\t1.000000000",
		"NUL in the path":            "d\ta\\000\t755\t0\t0\t1.000000000",
		"root that is a file":        "f\t.\t644\t0\t0\t-\t3\t" + sha,
		"attributes in wrong order":  "d\ta\t755\t0\t0\t1.000000000\tuser.b=\tuser.a=",
		"attribute twice":            "d\ta\t755\t0\t0\t1.000000000\tuser.a=\tuser.a=",
		"time without nanoseconds":   "d\ta\t755\t0\t0\t1",
		"time on a symbolic link":    "l\ta\t777\t0\t0\t1.000000000\tb",
		"device number out of range": "c\ta\t644\t0\t0\t1.000000000\t4294967296:0",
	} {
		t.Run(name, func(t *testing.T) {
			if e, err := Parse([]byte(line)); !errors.Is(err, ErrMalformed) {
				t.Errorf("accepted %q as %+v (err %v)", line, e, err)
			}
		})
	}
}

func TestReadIsBounded(t *testing.T) {
	line := samples[0].Append(nil)
	nop := func([]byte, Entry) error { return nil }
	if err := Read(bytes.NewReader(bytes.Repeat(line, 3)), 2, nop); !errors.Is(err, ErrMalformed) {
		t.Errorf("more entries than allowed: %v", err)
	}
	if err := Read(bytes.NewReader(bytes.Repeat([]byte{'a'}, MaxLine*2)), 2, nop); !errors.Is(err, ErrMalformed) {
		t.Errorf("endless line: %v", err)
	}
	if err := Read(bytes.NewReader(line[:len(line)-1]), 2, nop); !errors.Is(err, ErrMalformed) {
		t.Errorf("cut-off line: %v", err)
	}
}

func FuzzFileTable(f *testing.F) {
	for _, e := range samples {
		line := e.Append(nil)
		f.Add(line[:len(line)-1])
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := Parse(line)
		if err != nil {
			return
		}
		if got := e.Append(nil); string(got) != string(line)+"\n" {
			t.Fatalf("%q became %q", line, got)
		}
	})
}
