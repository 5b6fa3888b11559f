package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func TestMain(m *testing.M) {
	Reexec()
	os.Exit(m.Run())
}

var limits = Limits{MaxFiles: 1000, MaxBytes: 64 << 20, MaxRatio: 100}

type entry struct {
	h    tar.Header
	body string
}

func file(name, body string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body))}, body}
}

func archiveOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if err := w.WriteHeader(&e.h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipped(t *testing.T, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests lay out layers with owners and devices: run them as root")
	}
}

func TestALayerBecomesFilesAndATable(t *testing.T) {
	needRoot(t)
	data := archiveOf(t,
		entry{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, ""},
		entry{tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}, ""},
		file("etc/passwd", "root:x:0:0\n"),
		entry{tar.Header{Name: "etc/hard", Mode: 0o644, Typeflag: tar.TypeLink, Linkname: "etc/passwd"}, ""},
		entry{tar.Header{Name: "lib", Typeflag: tar.TypeSymlink, Linkname: "usr/lib"}, ""},
		entry{tar.Header{Name: "bin/su", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 7, Gid: 8, Size: 2, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}}, "su"},
		entry{tar.Header{Name: "dev/sda", Typeflag: tar.TypeBlock, Mode: 0o600, Devmajor: 8}, ""},
		file("etc/.wh.gone", ""),
		file("var/.wh..wh..opq", ""),
	)
	sum := sha256.Sum256(data)
	for name, in := range map[string][]byte{"plain": data, "gzip": zipped(t, data)} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var table, again bytes.Buffer
			r, err := Run(context.Background(), dir, limits, bytes.NewReader(in), &table)
			if err != nil {
				t.Fatal(err)
			}
			if want := "sha256:" + hex.EncodeToString(sum[:]); r.DiffID != want || r.Bytes != int64(len(data)) {
				t.Errorf("diff ID %s of %d bytes, want %s of %d", r.DiffID, r.Bytes, want, len(data))
			}
			if len(r.Opaque) != 1 || r.Opaque[0] != "var" || r.RootMode == nil || *r.RootMode != 0o755 {
				t.Errorf("opaque %v, root mode %v", r.Opaque, r.RootMode)
			}
			var st unix.Stat_t
			if err := unix.Lstat(filepath.Join(dir, "bin/su"), &st); err != nil || st.Mode&0o7777 != 0o4755 || st.Uid != 7 || st.Gid != 8 {
				t.Errorf("bin/su: %o %d:%d (%v)", st.Mode, st.Uid, st.Gid, err)
			}
			if err := unix.Lstat(filepath.Join(dir, "etc/gone"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
				t.Errorf("whiteout: %o %d (%v)", st.Mode, st.Rdev, err)
			}
			if !strings.Contains(table.String(), fmt.Sprintf("f\tetc/hard\t644\t0\t0\t0.000000000\t11\t%x\n", sha256.Sum256([]byte("root:x:0:0\n")))) {
				t.Errorf("table lacks the digest of the hard link:\n%s", table.String())
			}
			w, err := Walk(context.Background(), dir, limits, &again)
			if err != nil || w.Files != r.Files || again.String() != table.String() {
				t.Errorf("walk (err %v) differs:\n%s\n%s", err, table.String(), again.String())
			}
			if err := os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("root:x:0:1\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			again.Reset()
			if _, err := Walk(context.Background(), dir, limits, &again); err != nil || again.String() == table.String() {
				t.Errorf("a changed file does not change the table (err %v)", err)
			}
		})
	}
}

func TestDigestsAreOfWhatIsOnDiskWhenAPathLeadsThroughALink(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	var table, again bytes.Buffer
	data := archiveOf(t, file("usr/lib/a", "old"),
		entry{tar.Header{Name: "lib", Typeflag: tar.TypeSymlink, Linkname: "usr/lib"}, ""}, file("lib/a", "new"))
	if _, err := Run(context.Background(), dir, limits, bytes.NewReader(data), &table); err != nil {
		t.Fatal(err)
	}
	if _, err := Walk(context.Background(), dir, limits, &again); err != nil || again.String() != table.String() {
		t.Errorf("table is not of what is on disk (%v):\n%s\n%s", err, table.String(), again.String())
	}
}

func TestHostileLayersAreRefusedWithTheirCause(t *testing.T) {
	needRoot(t)
	bomb := zipped(t, make([]byte, 48<<20))
	many := make([]entry, 1001)
	for i := range many {
		many[i] = file(fmt.Sprintf("f%d", i), "")
	}
	good := archiveOf(t, file("a", "b"))
	for name, c := range map[string]struct {
		in   []byte
		code cause.Code
	}{
		"a name that climbs":                 {archiveOf(t, file("../../etc/x", "")), cause.LayerMalformed},
		"a hard link that climbs":            {archiveOf(t, entry{tar.Header{Name: "a", Typeflag: tar.TypeLink, Linkname: "../../etc/passwd"}, ""}), cause.LayerMalformed},
		"an overlay redirect":                {archiveOf(t, entry{tar.Header{Name: "a/", Typeflag: tar.TypeDir, PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.redirect": "/etc"}}, ""}), cause.LayerMalformed},
		"a raw whiteout":                     {archiveOf(t, entry{tar.Header{Name: "a", Typeflag: tar.TypeChar}, ""}), cause.LayerMalformed},
		"a root that is a link":              {archiveOf(t, entry{tar.Header{Name: "./", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, ""}), cause.LayerMalformed},
		"no tar at all":                      {[]byte(strings.Repeat("garbage ", 1000)), cause.LayerMalformed},
		"gzip that ends early":               {zipped(t, good)[:40], cause.LayerMalformed},
		"tar that ends early":                {good[:400], cause.LayerMalformed},
		"a decompression bomb":               {bomb, cause.ImageLimits},
		"more files than allowed":            {archiveOf(t, many...), cause.ImageLimits},
		"a file larger than everything else": {archiveOf(t, file("a", strings.Repeat("x", 65<<20))), cause.ImageLimits},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Run(context.Background(), t.TempDir(), limits, bytes.NewReader(c.in), io.Discard)
			if cause.Of(err) != c.code {
				t.Errorf("got %v, want %s", err, c.code)
			}
		})
	}
}

func TestTheStreamsOwnErrorComesFirst(t *testing.T) {
	needRoot(t)
	want := cause.New(cause.LayerMismatch, "digest")
	for name, in := range map[string]io.Reader{
		"after good bytes": io.MultiReader(bytes.NewReader(archiveOf(t, file("a", "b"))), errReader{want}),
		"after garbage":    io.MultiReader(strings.NewReader(strings.Repeat("garbage ", 1<<20)), errReader{want}),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Run(context.Background(), t.TempDir(), limits, in, io.Discard); !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
		})
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func TestACancelledRunEnds(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	go func() {
		_, _ = w.Write(make([]byte, 10))
		cancel()
		w.CloseWithError(context.Canceled)
	}()
	if _, err := Run(ctx, t.TempDir(), limits, r, io.Discard); err == nil {
		t.Error("no error")
	}
}
