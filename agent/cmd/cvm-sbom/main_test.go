package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "hello"), []byte("hello\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		exit int
		says string
	}{
		"no command":       {nil, exitUsage, "usage"},
		"unknown command":  {[]string{"sbom"}, exitUsage, "usage"},
		"no root":          {[]string{"scan"}, exitUsage, "--root"},
		"root not there":   {[]string{"scan", "--root", root + "/x"}, exitFailed, "no such file"},
		"too many files":   {[]string{"scan", "--root", root, "--max-files", "1"}, exitLimit, "more than 1 files"},
		"too many bytes":   {[]string{"scan", "--root", root, "--max-bytes", "1"}, exitLimit, "more than 1 bytes"},
		"no digests there": {[]string{"scan", "--root", root, "--file-digests", root + "/x"}, exitFailed, "file digests"},
	} {
		t.Run(name, func(t *testing.T) {
			var out, errs bytes.Buffer
			if got := run(context.Background(), c.args, &out, &errs); got != c.exit || !strings.Contains(errs.String(), c.says) || out.Len() > 0 {
				t.Errorf("exit %d, stderr %q, stdout %q", got, &errs, &out)
			}
		})
	}
}

func TestOneRootGivesOneDocument(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "hello"), []byte("hello\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var docs [2]bytes.Buffer
	for i := range docs {
		var errs bytes.Buffer
		if code := run(context.Background(), []string{"scan", "--root", root, "--name", "x"}, &docs[i], &errs); code != exitOK {
			t.Fatalf("exit %d: %s", code, &errs)
		}
	}
	if !bytes.Equal(docs[0].Bytes(), docs[1].Bytes()) {
		t.Error("two scans differ")
	}
	var doc struct{ SPDXVersion, DocumentNamespace string }
	if err := json.Unmarshal(docs[0].Bytes(), &doc); err != nil || doc.SPDXVersion != "SPDX-2.3" {
		t.Errorf("not SPDX 2.3: %+v, %v", doc, err)
	}
	if want := "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"; !strings.Contains(docs[0].String(), want) {
		t.Error("the file's SHA-256 is missing")
	}
}
