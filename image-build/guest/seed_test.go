//go:build image

package guest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/initrd/seed"
)

// fullest uses every key that the allow-list has; TestCloudInitTakes… holds it to that.
var fullest = seed.Files{
	seed.UserDataFile: []byte("#cloud-config\nhostname: guest-1\nfqdn: guest-1.example.org\ntimezone: Europe/Berlin\nlocale: C.UTF-8\n" +
		"ntp: {servers: [192.0.2.1, time.example.org, \"2001:db8::1\"]}\n" +
		"cvm_agent:\n  initdata: |\n    version = \"0.1.0\"\n  mirrors: {registry.example.org: [mirror.example.org]}\n"),
	seed.MetaDataFile: []byte("instance-id: i-1\nlocal-hostname: guest-1\n"),
	seed.NetworkConfigFile: []byte("network:\n  version: 2\n  ethernets:\n" +
		"    lan:\n      match: {macaddress: \"52:54:00:12:34:56\"}\n      set-name: eth0\n      dhcp4: false\n      dhcp6: false\n" +
		"      addresses: [192.0.2.7/24, \"2001:db8::7/64\"]\n      gateway4: 192.0.2.1\n      gateway6: \"2001:db8::1\"\n      mtu: 1400\n      optional: true\n" +
		"      routes: [{to: default, via: 192.0.2.1, metric: 100}, {to: 198.51.100.0/24, via: 192.0.2.2}]\n" +
		"      nameservers: {addresses: [192.0.2.3, \"2001:db8::3\"], search: [example.org]}\n" +
		"    others:\n      match: {name: \"en*\"}\n      dhcp4: true\n"),
}

var least = seed.Files{seed.UserDataFile: []byte("#cloud-config\ncvm_agent: {initdata: x}\n")}

// TestCloudInitTakesTheCheckedCopy: the image's own cloud-init, in the image's
// root as the guest has it (read-only, memory over /run and /tmp, no network),
// finds what the early stage writes valid. Its schema is whole, whichever modules the
// build deleted; of meta-data cloud-init has no schema.
func TestCloudInitTakesTheCheckedCopy(t *testing.T) {
	usesEveryKey(t, fullest)
	for name, files := range map[string]seed.Files{"the fullest": fullest, "the least": least} {
		s, err := seed.Parse(files)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		clean, err := s.Sanitized()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for file, kind := range map[string]string{seed.UserDataFile: "cloud-config", seed.NetworkConfigFile: "network-config"} {
			text, there := clean[file]
			if !there {
				if file == seed.NetworkConfigFile && name == "the least" {
					continue
				}
				t.Fatalf("%s has no %s", name, file)
			}
			if valid, out := schema(t, kind, text); !valid {
				t.Errorf("%s, %s: %s\n%s", name, file, out, text)
			}
			// The counter-check: a key that no schema has, and a value of another type.
			for names, broken := range map[string]string{
				"nonsense":                     strings.Replace(string(text), "{", "{\"nonsense\": 1,", 1),
				"[7] is not of type 'string'":  strings.Replace(string(text), "\"guest-1\"", "[7]", 1),
				"'x' is not of type 'integer'": strings.Replace(string(text), "1400", "\"x\"", 1),
			} {
				broken = strings.Replace(broken, ",}", "}", 1)
				if broken == string(text) {
					continue // there is no such value
				}
				if valid, out := schema(t, kind, []byte(broken)); valid || !strings.Contains(out, names) {
					t.Errorf("%s, %s, expected %q: %s\n%s", name, file, names, out, broken)
				}
			}
		}
	}
}

// schema asks the image's cloud-init.
func schema(t *testing.T, kind string, text []byte) (valid bool, out string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	const enter = `mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && mount -t proc proc "$0/proc" && mount -t tmpfs tmpfs "$0/dev" &&
		mount -t tmpfs tmpfs "$0/run" && mount -t tmpfs tmpfs "$0/tmp" && : >"$0/dev/null" && mount --bind /dev/null "$0/dev/null" &&
		mkdir "$0/tmp/seed" && mount --bind "$1" "$0/tmp/seed" && shift && exec chroot "$0" env -i PATH=/usr/sbin:/usr/bin "$@"`
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--net", "--ipc", "--uts", "--propagation", "private",
		"sh", "-c", enter, root(t), dir, "cloud-init", "schema", "--schema-type", kind, "--config-file", "/tmp/seed/file")
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	err := cmd.Run()
	said := strings.Contains(b.String(), "Valid schema /tmp/seed/file")
	refused := strings.Contains(b.String(), "Invalid ")
	if said == refused || said != (err == nil) {
		t.Fatalf("cloud-init schema gave no verdict: %v\n%s", err, b.String())
	}
	return said, b.String()
}

// usesEveryKey fails when the allow-list has a key that the files do not use.
func usesEveryKey(t *testing.T, files seed.Files) {
	t.Helper()
	s, err := seed.Parse(files)
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{
		// The other way to write the file.
		"NetworkConfig.Version": true, "NetworkConfig.Ethernets": true,
	}
	var walk func(v reflect.Value)
	walk = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Pointer:
			if !v.IsNil() {
				walk(v.Elem())
			}
		case reflect.Map:
			for _, k := range v.MapKeys() {
				walk(v.MapIndex(k))
			}
		case reflect.Slice:
			for i := range v.Len() {
				walk(v.Index(i))
			}
		case reflect.Struct:
			for i := range v.NumField() {
				key := v.Type().Name() + "." + v.Type().Field(i).Name
				used[key] = used[key] || !v.Field(i).IsZero()
				walk(v.Field(i))
			}
		}
	}
	walk(reflect.ValueOf(s.Document))
	if len(used) < 25 {
		t.Errorf("only %d keys were seen", len(used))
	}
	for key, is := range used {
		if !is {
			t.Errorf("the fullest seed does not use %s", key)
		}
	}
}
