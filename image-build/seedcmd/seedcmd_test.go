package seedcmd

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gowebpki/jcs"

	"github.com/cc-runtime/cvm-agent/initrd/seed"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// run runs the command in dir and returns what it printed.
func run(t *testing.T, dir string, args ...string) (string, error) {
	t.Helper()
	t.Chdir(dir)
	c := Command()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&out)
	c.SetArgs(args)
	c.SilenceUsage, c.SilenceErrors = true, true
	err := c.Execute()
	return out.String(), err
}

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func packed(t *testing.T, value string) string {
	t.Helper()
	raw, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: value})
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestASeedIsMadeAndAccepted(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"initdata.toml": packed(t, "{\"a\": \"b\"}\n\n  indented\n"),
		"net":           "version: 2\nethernets: {eth0: {dhcp4: true}}\n",
		"extra":         "timezone: Europe/Berlin\nntp: {servers: [192.0.2.1]}",
	})
	args := []string{"--initdata", "initdata.toml", "--hostname", "guest-1", "--network-config", "net", "--user-data-extra", "extra", "--out"}
	for _, out := range []string{"a.iso", "b.iso"} {
		if text, err := run(t, dir, append(args, out)...); err != nil || text != "" {
			t.Fatalf("%q, %v", text, err)
		}
	}
	a, err := os.ReadFile(filepath.Join(dir, "a.iso"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "b.iso"))
	if err != nil || !bytes.Equal(a, b) {
		t.Fatalf("two runs differ (%v)", err)
	}
	text, err := run(t, dir, "check", "--output", "json", "a.iso")
	var v Verdict
	if err != nil || json.Unmarshal([]byte(text), &v) != nil || !v.Accepted || v.Cause != nil || len(v.Files) != 3 {
		t.Fatalf("%s, %v", text, err)
	}
	if !strings.Contains(v.Sanitized["user-data"], `"timezone": "Europe/Berlin"`) || !strings.Contains(v.Sanitized["network-config"], "eth0") {
		t.Errorf("%v", v.Sanitized)
	}
	in, err := policy.ParseInitdata([]byte(packed(t, "{\"a\": \"b\"}\n\n  indented\n")))
	if err != nil || v.Initdata.Algorithm != "sha256" || v.Initdata.Digest != hex.EncodeToString(in.Digest()) {
		t.Errorf("%+v, %v", v.Initdata, err)
	}
	if err := os.Symlink("a.iso", filepath.Join(dir, "link.iso")); err != nil { // named, so it may be one
		t.Fatal(err)
	}
	if text, err = run(t, dir, "check", "link.iso"); err != nil || !strings.HasSuffix(text, "\naccepted\n") {
		t.Errorf("%s, %v", text, err)
	}
}

// Whatever initdata holds, its bytes are what the guest measures.
func TestInitdataSurvivesToTheByte(t *testing.T) {
	for name, text := range map[string]string{
		"as packed":           packed(t, "{}"),
		"no end":              strings.TrimSuffix(packed(t, "{}"), "\n"),
		"two ends":            packed(t, "{}") + "\n\n",
		"blanks in front":     "  " + packed(t, "{}"),
		"carriage returns":    strings.ReplaceAll(packed(t, "{}"), "\n", "\r\n"),
		"tabs":                strings.ReplaceAll(packed(t, "{}"), " = ", "\t=\t"),
		"blanks at the end":   strings.ReplaceAll(packed(t, "{}"), "\n", "  \n"),
		"a comment like YAML": "# --- !!x &y *z | > % @ `\n" + packed(t, "{}"),
		"other letters":       "# äöü\u2028\u0085\U0001F600<&>\n" + packed(t, "{}"),
	} {
		data, err := userData([]byte(text), "guest", nil, map[string][]string{"a": {"b"}})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		s, err := seed.Parse(seed.Files{seed.UserDataFile: data})
		if err != nil || string(s.Initdata) != text || s.UserData.CVMAgent.Mirrors["a"][0] != "b" {
			t.Errorf("%s: %v\n%q\n%q", name, err, data, text)
		}
	}
}

func TestSeedRefuses(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"initdata.toml": packed(t, "{}"), "broken.toml": "x", "run": "runcmd: [reboot]\n", "net1": "version: 1\nconfig: []\n",
		"ud": "#cloud-config\nhostname: a\nbootcmd: [x]\n", "script": "#!/bin/sh\n", "garbage": "\x00\x01",
	})
	seedOf := func(more ...string) []string {
		return append([]string{"--initdata", "initdata.toml", "--out", "x.iso"}, more...)
	}
	for name, c := range map[string]struct {
		args []string
		code cause.Code
		says string
	}{
		"no initdata":                {[]string{"--out", "x.iso"}, cause.Usage, "--initdata is missing"},
		"no output":                  {[]string{"--initdata", "initdata.toml"}, cause.Usage, "--out is missing"},
		"a file that is not there":   {[]string{"--initdata", "none", "--out", "x.iso"}, cause.Usage, "none"},
		"initdata that is none":      {[]string{"--initdata", "broken.toml", "--out", "x.iso"}, cause.InitdataMalformed, "broken.toml"},
		"a host name that is none":   {seedOf("--hostname", "a b"), cause.SeedRefused, "hostname"},
		"a host name that injects":   {seedOf("--hostname", "a\nruncmd: [x]"), cause.SeedRefused, "hostname"},
		"a mirror of nothing":        {seedOf("--mirror", "m1"), cause.Usage, "REGISTRY=MIRROR"},
		"a mirror that is none":      {seedOf("--mirror", "a=http://b/"), cause.SeedRefused, "mirrors.a[0]"},
		"a key that runs code":       {seedOf("--user-data-extra", "run"), cause.SeedRefused, "runcmd: not on the allow-list"},
		"a network of version 1":     {seedOf("--network-config", "net1"), cause.SeedRefused, "config: not on the allow-list"},
		"check: a key that runs":     {[]string{"check", "ud"}, cause.SeedRefused, "bootcmd: not on the allow-list"},
		"check: a script":            {[]string{"check", "script"}, cause.SeedRefused, "a script"},
		"check: garbage":             {[]string{"check", "garbage"}, cause.SeedRefused, "#cloud-config"},
		"check: nothing":             {[]string{"check", "none"}, cause.Usage, "none"},
		"check: an unknown format":   {[]string{"check", "--output", "xml", "ud"}, cause.Usage, "--output"},
		"check: a seed of no policy": {[]string{"check", "initdata.toml"}, cause.SeedRefused, "#cloud-config"},
	} {
		text, err := run(t, dir, c.args...)
		if cause.Of(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, expected %s with %q", name, err, c.code, c.says)
		}
		if c.args[0] == "check" && c.code == cause.SeedRefused && !strings.Contains(text, "refused: seed-refused: ") {
			t.Errorf("%s: printed %q", name, text)
		}
		if _, err := os.Stat(filepath.Join(dir, "x.iso")); !os.IsNotExist(err) {
			t.Fatalf("%s: there is an image", name)
		}
	}
	text, err := run(t, dir, "check", "--output", "json", "ud")
	var v Verdict
	if cause.Exit(err) != cause.ExitRefused || json.Unmarshal([]byte(text), &v) != nil || v.Accepted || v.Cause.Code != cause.SeedRefused || v.Sanitized != nil {
		t.Errorf("%s, %v", text, err)
	}
}

// A seed that the guest would refuse for its mirrors is not made, and not said
// to be good.
func TestMirrorsAreThePolicys(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "policy", "examples", "full.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.DecodeYAML(text)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := jcs.Transform(plain)
	if err != nil {
		t.Fatal(err)
	}
	envelope, err := json.Marshal(map[string]any{"payloadType": policy.PayloadType, "payload": payload, "signatures": []any{}})
	if err != nil {
		t.Fatal(err)
	}
	var host, mirror string
	for _, r := range p.Registries {
		if len(r.Mirrors) > 0 {
			host, mirror = r.Host, r.Mirrors[0]
		}
	}
	if mirror == "" {
		t.Fatal("the example has no mirrors")
	}
	dir := t.TempDir()
	write(t, dir, map[string]string{"initdata.toml": packed(t, string(envelope))})
	if _, err := run(t, dir, "--initdata", "initdata.toml", "--mirror", host+"="+mirror, "--out", "good.iso"); err != nil {
		t.Error(err)
	}
	if _, err := run(t, dir, "check", "good.iso"); err != nil {
		t.Error(err)
	}
	for _, other := range []string{host + "=other.example", "other.example=" + mirror} {
		if _, err := run(t, dir, "--initdata", "initdata.toml", "--mirror", other, "--out", "bad.iso"); cause.Of(err) != cause.SeedRefused || !strings.Contains(err.Error(), "the policy does not allow it") {
			t.Errorf("%s: %v", other, err)
		}
		registry, chosen, _ := strings.Cut(other, "=")
		data, err := json.Marshal(map[string]any{"cvm_agent": map[string]any{"initdata": packed(t, string(envelope)), "mirrors": map[string][]string{registry: {chosen}}}})
		if err != nil {
			t.Fatal(err)
		}
		write(t, dir, map[string]string{"ud": "#cloud-config\n" + string(data)})
		if _, err := run(t, dir, "check", "ud"); cause.Of(err) != cause.SeedRefused || !strings.Contains(err.Error(), "the policy does not allow it") {
			t.Errorf("check of %s: %v", other, err)
		}
	}
}
