package kek

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestFileAndCredential(t *testing.T) {
	dir := t.TempDir()
	want := bytes.Repeat([]byte{7}, Size)
	write(t, filepath.Join(dir, "kek"), string(want), 0o600)
	for what, c := range map[string]Config{"file": {File: filepath.Join(dir, "kek")}, "credential": {Credential: "kek"}} {
		s, err := c.Open(dir)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		key, keep, err := s.DataKey(nil)
		if err != nil || keep != nil || !bytes.Equal(key, want) {
			t.Errorf("%s: %x, %x, %v", what, key, keep, err)
		}
		if _, _, err := s.DataKey([]byte("wrapped by a token")); err == nil {
			t.Errorf("%s: it opened what a token wrapped", what)
		}
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write(t, path("short"), "short", 0o600)
	write(t, path("long"), strings.Repeat("x", Size+1), 0o600)
	write(t, path("open"), strings.Repeat("x", Size), 0o640)
	write(t, path("good"), strings.Repeat("x", Size), 0o600)
	if err := os.Symlink(path("good"), path("link")); err != nil {
		t.Fatal(err)
	}
	token := func(change func(*PKCS11)) Config {
		p := PKCS11{Module: "/m.so", Token: "t", Key: "k", PINFile: path("good")}
		change(&p)
		return Config{PKCS11: &p}
	}
	for what, c := range map[string]struct {
		Config
		want string
	}{
		"nothing":                 {Config{}, "exactly one"},
		"two":                     {Config{File: path("good"), Credential: "good"}, "exactly one"},
		"a short file":            {Config{File: path("short")}, "5 bytes"},
		"a long file":             {Config{File: path("long")}, "too large"},
		"a file others can read":  {Config{File: path("open")}, "only its owner"},
		"a link":                  {Config{File: path("link")}, "symbolic link"},
		"a file that is not":      {Config{File: path("none")}, "no such file"},
		"a credential with a way": {Config{Credential: "../good"}, "not a name"},
		"a credential unset":      {Config{Credential: "none"}, "no such file"},
		"a token without key":     {token(func(p *PKCS11) { p.Key = "" }), "module, token and key"},
		"a token without PIN":     {token(func(p *PKCS11) { p.PINFile = "" }), "pinFile and pinCredential"},
		"a token with two PINs":   {token(func(p *PKCS11) { p.PINCredential = "good" }), "pinFile and pinCredential"},
	} {
		if _, err := c.Open(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := (Config{Credential: "good"}).Open(""); err == nil || !strings.Contains(err.Error(), "no credentials directory") {
		t.Errorf("no credentials directory: %v", err)
	}
}
