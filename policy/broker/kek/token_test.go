//go:build pkcs11

package kek

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
)

// SoftHSM makes a SoftHSM token and returns a configuration for it.
func SoftHSM(t *testing.T) Config {
	t.Helper()
	const module = "/usr/lib/softhsm/libsofthsm2.so"
	dir := t.TempDir()
	tokens := filepath.Join(dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "softhsm2.conf")
	write(t, conf, "directories.tokendir = "+tokens+"\nlog.level = ERROR\n", 0o600)
	t.Setenv("SOFTHSM2_CONF", conf)
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "broker", "--so-pin", "87654321", "--pin", "123456").CombinedOutput()
	if err != nil {
		t.Fatalf("softhsm2-util: %v: %s", err, out)
	}
	pin := filepath.Join(dir, "pin")
	write(t, pin, "123456\n", 0o600)
	return Config{PKCS11: &PKCS11{Module: module, Token: "broker", Key: "kek", PINFile: pin}}
}

func dataKey(t *testing.T, c Config, kept []byte) ([]byte, []byte) {
	t.Helper()
	s, err := c.Open("")
	if err != nil {
		t.Fatal(err)
	}
	key, keep, err := s.DataKey(kept)
	if err != nil {
		t.Fatal(err)
	}
	return key, keep
}

func TestToken(t *testing.T) {
	c := SoftHSM(t)
	if _, err := c.Open(""); err == nil || !strings.Contains(err.Error(), "0 AES keys") {
		t.Fatalf("no key yet: %v", err)
	}
	if err := CreateTokenKey(c, ""); err != nil {
		t.Fatal(err)
	}
	if err := CreateTokenKey(c, ""); err == nil {
		t.Error("a second key of the same label was made")
	}
	key, keep := dataKey(t, c, nil)
	if len(key) != Size || bytes.Contains(keep, key) {
		t.Fatalf("a data key of %d bytes, kept as %d", len(key), len(keep))
	}
	if again, more := dataKey(t, c, keep); !bytes.Equal(again, key) || more != nil {
		t.Error("the kept key does not unwrap to itself")
	}
	if other, _ := dataKey(t, c, nil); bytes.Equal(other, key) {
		t.Error("two data keys are one")
	}
	s, err := c.Open("")
	if err != nil {
		t.Fatal(err)
	}
	for i := range keep {
		bad := bytes.Clone(keep)
		bad[i] ^= 1
		if _, _, err := s.DataKey(bad); err == nil {
			t.Errorf("byte %d of the wrapped key changed, and it unwrapped", i)
		}
	}
	if _, _, err := s.DataKey(keep[:len(keep)-1]); err == nil {
		t.Error("a cut key unwrapped")
	}

	two := *c.PKCS11
	two.Key = "other"
	if err := CreateTokenKey(Config{PKCS11: &two}, ""); err != nil {
		t.Fatal(err)
	}
	o, err := Config{PKCS11: &two}.Open("")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := o.DataKey(keep); err == nil {
		t.Error("another key of the token unwrapped it")
	}
}

func TestTokenRefused(t *testing.T) {
	c := SoftHSM(t)
	if err := CreateTokenKey(c, ""); err != nil {
		t.Fatal(err)
	}
	for what, x := range map[string]struct {
		want   string
		change func(p *PKCS11)
	}{
		"a module that is not there": {"cannot be loaded", func(p *PKCS11) { p.Module = "/nonexistent.so" }},
		"another token":              {"0 tokens", func(p *PKCS11) { p.Token = "x" }},
		"another key":                {"0 AES keys", func(p *PKCS11) { p.Key = "x" }},
		"a wrong PIN":                {"PIN", func(p *PKCS11) { p.PINFile = filepath.Join(t.TempDir(), "p"); write(t, p.PINFile, "999999", 0o600) }},
		"a PIN others can read":      {"only its owner", func(p *PKCS11) { p.PINFile = filepath.Join(t.TempDir(), "p"); write(t, p.PINFile, "123456", 0o644) }},
	} {
		p := *c.PKCS11
		x.change(&p)
		if _, err := (Config{PKCS11: &p}).Open(""); err == nil || !strings.Contains(err.Error(), x.want) || strings.Contains(err.Error(), "999999") {
			t.Errorf("%s: %v", what, err)
		}
	}
	// A key that can be taken out protects nothing.
	p := *c.PKCS11
	p.Key = "soft"
	ts := &tokenSource{p, "123456"}
	err := ts.with(func(ctx *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		_, err := ctx.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, append(ts.template(),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, Size), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (Config{PKCS11: &p}).Open(""); err == nil || !strings.Contains(err.Error(), "taken out") {
		t.Errorf("an extractable key: %v", err)
	}
}
