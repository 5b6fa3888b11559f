//go:build image

// Package guest holds a built image to what README.md promises. It looks at an
// image, so it runs after one is built: make image-check.
package guest

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// root is the unpacked root file system, initrd the unpacked initrd, image the
// directory of the artefacts; image-build/guest/check.sh sets them.
func root(t *testing.T, path ...string) string   { return under(t, "CVM_IMAGE_ROOT", path) }
func initrd(t *testing.T, path ...string) string { return under(t, "CVM_IMAGE_INITRD", path) }
func image(t *testing.T, path ...string) string  { return under(t, "CVM_IMAGE", path) }

func under(t *testing.T, env string, path []string) string {
	t.Helper()
	dir := os.Getenv(env)
	if dir == "" {
		t.Fatalf("%s is not set: run make image-check", env)
	}
	return filepath.Join(append([]string{dir}, path...)...)
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// files calls f for everything in the root, by path in it.
func files(t *testing.T, f func(path string, info fs.FileInfo)) {
	t.Helper()
	walk(t, root(t), 1000, f)
}

// walk calls f for everything below top, which must be at least so many.
func walk(t *testing.T, top string, least int, f func(path string, info fs.FileInfo)) {
	t.Helper()
	seen := 0
	err := filepath.Walk(top, func(path string, info fs.FileInfo, err error) error {
		if err == nil {
			seen++
			f(strings.TrimPrefix(path, top), info)
		}
		return err
	})
	if err != nil || seen < least {
		t.Fatalf("walked %d files of %s, %v", seen, filepath.Base(top), err)
	}
}

func equal(t *testing.T, what string, got, want []string) {
	t.Helper()
	slices.Sort(got)
	slices.Sort(want)
	for _, g := range got {
		if !slices.Contains(want, g) {
			t.Errorf("%s: %s is there and not expected", what, g)
		}
	}
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("%s: %s is expected and not there", what, w)
		}
	}
}

func TestNothingInstallsPackages(t *testing.T) {
	files(t, func(path string, _ fs.FileInfo) {
		dir, name := filepath.Split(path)
		if bin := strings.HasSuffix(strings.TrimSuffix(dir, "/"), "bin"); bin && regexp.MustCompile(`^(apt|dpkg|perl|pip|gcc|make|curl|wget|gpg|debconf)`).MatchString(name) {
			t.Errorf("%s: a package manager, or what only one needs", path)
		}
		for _, state := range []string{"/var/lib/dpkg", "/var/lib/apt", "/etc/apt", "/var/cache/apt", "/usr/share/debconf"} {
			if path == state {
				t.Errorf("%s: state of a package manager", path)
			}
		}
	})
}

// TestLesson41_NoCredentialsFromTheHost: systemd is told so on the measured line,
// which has the words of README.md and no other: none for a shell, a target, an init.
func TestLesson41_NoCredentialsFromTheHost(t *testing.T) {
	line := read(t, image(t, "cmdline"))
	want := []string{"console=ttyS0", "roothash=" + read(t, image(t, "roothash")), "ro", "systemd.import_credentials=no", "systemd.gpt_auto=no",
		"lockdown=integrity", "ds=nocloud;s=file:///run/cvm-agent/seed/", "panic=-1", "no_timer_check"}
	if strings.Contains(line, "cvm.debug=1") {
		want = append(want, "cvm.debug=1", "systemd.journald.forward_to_console=1", "systemd.show_status=yes")
	} else {
		want = append(want, "quiet")
	}
	equal(t, "words of the command line", strings.Fields(line), want)
	if !strings.Contains(read(t, image(t, "uki.efi")), line) {
		t.Error("the UKI does not hold the command line")
	}
	var early struct{ Cmdline string }
	if err := json.Unmarshal([]byte(read(t, initrd(t, "etc/cvm-agent/early.json"))), &early); err != nil || early.Cmdline != line {
		t.Errorf("the early stage expects %q, %v", early.Cmdline, err)
	}
	for _, store := range []string{"etc/credstore", "etc/credstore.encrypted", "usr/lib/credstore", "usr/lib/credstore.encrypted"} {
		if entries, err := os.ReadDir(root(t, store)); len(entries) != 0 || err != nil && !os.IsNotExist(err) {
			t.Errorf("/%s holds credentials: %v, %v", store, entries, err)
		}
	}
}

// TestKernelSettings: what a host could start from the console's keyboard or by
// a crash, and a second kernel, are off; the last file that says so is ours.
func TestKernelSettings(t *testing.T) {
	var last string
	set := map[string]string{}
	for _, dir := range []string{"usr/lib/sysctl.d", "etc/sysctl.d", "usr/local/lib/sysctl.d"} {
		paths, err := filepath.Glob(root(t, dir, "*.conf"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			if filepath.Base(path) < last {
				t.Fatalf("%s is read before %s: this test expects one folder", path, last)
			}
			last = filepath.Base(path)
			for _, m := range regexp.MustCompile(`(?m)^-?([a-z0-9_.]+)\s*=\s*(.*)$`).FindAllStringSubmatch(read(t, path), -1) {
				set[m[1]] = m[2]
			}
		}
	}
	for key, want := range map[string]string{
		"kernel.kexec_load_disabled": "1", "kernel.sysrq": "0", "kernel.core_pattern": "|/bin/false", "fs.suid_dumpable": "0", "kernel.dmesg_restrict": "1",
		"kernel.kptr_restrict": "2", "kernel.yama.ptrace_scope": "2", "kernel.unprivileged_bpf_disabled": "1", "kernel.panic": "-1",
		"net.ipv4.conf.all.rp_filter": "1", "net.ipv4.conf.default.rp_filter": "1", "net.ipv4.conf.all.accept_redirects": "0", "net.ipv6.conf.all.forwarding": "0",
	} {
		if set[key] != want {
			t.Errorf("sysctl %s is %q, expected %s", key, set[key], want)
		}
	}
	if last != "60-cvm.conf" {
		t.Errorf("%s is the last word, expected 60-cvm.conf", last)
	}
	manager := read(t, root(t, "etc/systemd/system.conf.d/cvm.conf"))
	for _, line := range []string{"DumpCore=no", "CtrlAltDelBurstAction=none", "CrashAction=poweroff"} {
		if !strings.Contains(manager, line+"\n") {
			t.Errorf("systemd: %s is missing", line)
		}
	}
	files(t, func(path string, info fs.FileInfo) {
		if regexp.MustCompile(`/systemd/(system|user)\.conf(\.d/.*)?$`).MatchString(path) && info.Mode().IsRegular() &&
			regexp.MustCompile(`(?m)^(CrashShell|CrashChangeVT|ManagerEnvironment|DefaultEnvironment)=`).MatchString(read(t, root(t, path))) {
			t.Errorf("%s sets what gives a shell or an environment", path)
		}
	})
}

// TestLesson02_TheDatasourceIsPinned on the command line and in the only file.
func TestLesson02_TheDatasourceIsPinned(t *testing.T) {
	if line := read(t, image(t, "cmdline")); !strings.Contains(line, " ds=nocloud;s=file:///run/cvm-agent/seed/ ") {
		t.Errorf("the command line pins no datasource: %s", line)
	}
	config := read(t, root(t, "etc/cloud/cloud.cfg"))
	if !strings.Contains(config, "datasource_list: [NoCloud]\n") || !strings.Contains(config, "seedfrom: file:///run/cvm-agent/seed/\n") {
		t.Error("cloud.cfg does not name NoCloud and the checked copy alone")
	}
	for _, gone := range []string{"etc/cloud/cloud.cfg.d", "usr/lib/cloud-init/ds-identify"} {
		if _, err := os.Lstat(root(t, gone)); !os.IsNotExist(err) {
			t.Errorf("/%s is there: another word on the datasource, %v", gone, err)
		}
	}
}

// TestLesson01_SecondLayer: even a seed that got past the early stage finds no
// module that runs its code.
func TestLesson01_SecondLayer(t *testing.T) {
	modules, err := filepath.Glob(root(t, "usr/lib/python3/dist-packages/cloudinit/config/cc_*"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range modules {
		got = append(got, filepath.Base(m))
	}
	equal(t, "cloud-init's modules", got, []string{"cc_set_hostname.py", "cc_update_hostname.py", "cc_update_etc_hosts.py", "cc_ntp.py", "cc_timezone.py"})
}

// described is what the test reads of image.json and manifest.json.
type described struct {
	Debug bool
	Files map[string]struct{ Bytes int64 }
}

func TestSizes(t *testing.T) {
	var d described
	if err := json.Unmarshal([]byte(read(t, image(t, "image.json"))), &d); err != nil {
		t.Fatal(err)
	}
	for name, limit := range map[string]int64{"root.squashfs": 130e6, "uki.efi": 25e6} {
		info, err := os.Stat(image(t, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > limit || d.Files[name].Bytes != info.Size() {
			t.Errorf("%s has %d bytes, image.json says %d, the limit is %d", name, info.Size(), d.Files[name].Bytes, limit)
		}
	}
	if debug := strings.Contains(read(t, image(t, "cmdline")), "cvm.debug=1"); debug != d.Debug {
		t.Errorf("image.json says debug is %t, the command line %t", d.Debug, debug)
	}
}

// list reads a file of lines; # begins a comment.
func list(t *testing.T, path string) []string {
	t.Helper()
	var out []string
	for _, line := range strings.Split(read(t, path), "\n") {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			out = append(out, line)
		}
	}
	return out
}
