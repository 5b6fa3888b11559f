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
	"syscall"
	"testing"
)

// root is the unpacked root file system, image the directory of the artefacts;
// image-build/guest/check.sh sets both.
func root(t *testing.T, path ...string) string  { return under(t, "CVM_IMAGE_ROOT", path) }
func image(t *testing.T, path ...string) string { return under(t, "CVM_IMAGE", path) }

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
	top := root(t)
	seen := 0
	err := filepath.Walk(top, func(path string, info fs.FileInfo, err error) error {
		if err == nil {
			seen++
			f(strings.TrimPrefix(path, top), info)
		}
		return err
	})
	if err != nil || seen < 1000 {
		t.Fatalf("walked %d files of the root, %v", seen, err)
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

// TestLesson36_NothingCanLogIn looks for every way in that a Debian machine has.
func TestLesson36_NothingCanLogIn(t *testing.T) {
	banned := regexp.MustCompile(`^(a?getty|login|sulogin|su|sudo|doas|runuser|passwd|chsh|newgrp|sg|sshd?|dropbear|telnetd?|` +
		`qemu-ga|vmtoolsd|waagent|google_guest_agent|amazon-ssm-agent|cloud-id|hv_kvp_daemon|` +
		`useradd|usermod|chpasswd|run0|machinectl|loginctl|kexec)$`)
	units := regexp.MustCompile(`(getty|ssh|debug-shell|rescue|guest-agent|cloud-init-hotplugd|systemd-logind|systemd-run|storagetm|sysext|confext|initrd|kexec)[^/]*\.(service|socket)$`)
	files(t, func(path string, info fs.FileInfo) {
		dir, name := filepath.Split(path)
		switch {
		case strings.HasSuffix(strings.TrimSuffix(dir, "/"), "bin") && banned.MatchString(name) && name != "cloud-id":
			t.Errorf("%s: a way to log in or to become another user", path)
		case strings.Contains(path, "/systemd/") && units.MatchString(path):
			t.Errorf("%s: a unit that lets somebody in", path)
		case strings.Contains(path, "-generators/"):
			t.Errorf("%s: a generator makes units out of what the host says", path)
		case strings.HasPrefix(path, "/etc/ssh") || strings.HasPrefix(path, "/etc/pam.d") || path == "/etc/shells" || name == "authorized_keys":
			t.Errorf("%s: belongs to a login", path)
		}
	})
	for _, line := range strings.Split(strings.TrimSpace(read(t, root(t, "etc/passwd"))), "\n") {
		if f := strings.Split(line, ":"); len(f) != 7 || f[6] != "/usr/sbin/nologin" || f[1] != "x" {
			t.Errorf("passwd: %s: expected no shell and no password", line)
		}
	}
	for _, line := range strings.Split(strings.TrimSpace(read(t, root(t, "etc/shadow"))), "\n") {
		if f := strings.Split(line, ":"); len(f) < 2 || !strings.HasPrefix(f[1], "!") {
			t.Errorf("shadow: %s: expected a locked account", line)
		}
	}
	if emergency := read(t, root(t, "usr/lib/systemd/system/emergency.service")); !strings.Contains(emergency, "poweroff") || strings.Contains(emergency, "sulogin") {
		t.Error("emergency.service does not power off")
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

// TestNoPrivilegeByFile: nobody but root runs programs outside containers, so
// none needs to gain anything by its file.
func TestNoPrivilegeByFile(t *testing.T) {
	files(t, func(path string, info fs.FileInfo) {
		if info.Mode()&(fs.ModeSetuid|fs.ModeSetgid) != 0 && !info.IsDir() {
			t.Errorf("%s is %s", path, info.Mode())
		}
		if info.Mode()&fs.ModeDevice != 0 {
			t.Errorf("%s is a device", path)
		}
		if info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSymlink == 0 && info.Mode()&fs.ModeSticky == 0 {
			t.Errorf("%s is %s: anybody may write it", path, info.Mode())
		}
		var value [64]byte
		if info.Mode().IsRegular() {
			if n, err := syscall.Getxattr(root(t)+path, "security.capability", value[:]); err == nil {
				t.Errorf("%s has file capabilities %x", path, value[:n])
			}
		}
	})
}

// TestEnabledUnits holds every .wants and .requires link to the list.
func TestEnabledUnits(t *testing.T) {
	var got []string
	files(t, func(path string, info fs.FileInfo) {
		if dir := filepath.Base(filepath.Dir(path)); strings.HasSuffix(dir, ".wants") || strings.HasSuffix(dir, ".requires") {
			got = append(got, dir+"/"+filepath.Base(path))
		}
	})
	equal(t, "enabled units", got, list(t, "testdata/enabled.txt"))
}

var listens = regexp.MustCompile(`(?m)^Listen[A-Za-z]*=(.+)$`)

// TestWhatListens: sockets of units, and the programs whose configuration can make them listen.
func TestWhatListens(t *testing.T) {
	var got []string
	files(t, func(path string, info fs.FileInfo) {
		if !strings.HasSuffix(path, ".socket") || !strings.Contains(path, "/systemd/") || !info.Mode().IsRegular() {
			return
		}
		for _, m := range listens.FindAllStringSubmatch(read(t, root(t)+path), -1) {
			if address := m[1]; !strings.HasPrefix(address, "/") && !strings.HasPrefix(address, "%t/") && !strings.HasPrefix(address, "kobject-uevent") && !strings.HasPrefix(address, "route ") {
				t.Errorf("%s listens on %s: expected paths and netlink alone", path, address)
			}
			got = append(got, filepath.Base(path)+" "+m[1])
		}
	})
	equal(t, "sockets", got, list(t, "testdata/listens.txt"))
	resolved := read(t, root(t, "etc/systemd/resolved.conf.d/cvm.conf"))
	for _, off := range []string{"DNSStubListener=no", "LLMNR=no", "MulticastDNS=no"} {
		if !strings.Contains(resolved, off) {
			t.Errorf("resolved: %s is missing", off)
		}
	}
}

// TestLesson41_NoCredentialsFromTheHost: systemd is told so on the measured line.
func TestLesson41_NoCredentialsFromTheHost(t *testing.T) {
	words := strings.Fields(read(t, image(t, "cmdline")))
	for _, w := range []string{"systemd.import_credentials=no", "systemd.gpt_auto=no", "lockdown=integrity", "panic=-1", "ro", "roothash=" + read(t, image(t, "roothash"))} {
		if !slices.Contains(words, w) {
			t.Errorf("the command line has no %s", w)
		}
	}
	if !strings.Contains(read(t, image(t, "uki.efi")), read(t, image(t, "cmdline"))) {
		t.Error("the UKI does not hold the command line")
	}
	if sysctl := read(t, root(t, "usr/lib/sysctl.d/60-cvm.conf")); !strings.Contains(sysctl, "kernel.kexec_load_disabled = 1") {
		t.Error("kexec is not off")
	}
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

// TestEveryPackageIsInTheSBOM, and the manifest is the lock's.
func TestEveryPackageIsInTheSBOM(t *testing.T) {
	var manifest struct {
		Packages []struct{ Name, Version, DebSha256 string }
	}
	if err := json.Unmarshal([]byte(read(t, image(t, "manifest.json"))), &manifest); err != nil {
		t.Fatal(err)
	}
	var sbom struct {
		Packages []struct{ Name, VersionInfo string }
		Files    []struct{ FileName string }
	}
	if err := json.Unmarshal([]byte(read(t, image(t, "sbom.spdx.json"))), &sbom); err != nil {
		t.Fatal(err)
	}
	in := map[string]bool{}
	for _, p := range sbom.Packages {
		in[p.Name+" "+p.VersionInfo] = true
	}
	lock := read(t, "packages.lock")
	for _, p := range manifest.Packages {
		if !strings.Contains(lock, " "+p.Name+" "+p.Version+" "+p.DebSha256+" ") {
			t.Errorf("%s %s is not as packages.lock has it", p.Name, p.Version)
		}
		if !in[p.Name+" "+p.Version] && !strings.HasPrefix(p.Name, "linux-image-") {
			t.Errorf("%s %s is missing in the SBOM", p.Name, p.Version)
		}
	}
	if len(manifest.Packages) < 100 || len(sbom.Files) < 1000 {
		t.Errorf("%d packages in the manifest, %d files in the SBOM", len(manifest.Packages), len(sbom.Files))
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
