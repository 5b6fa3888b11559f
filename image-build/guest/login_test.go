//go:build image

package guest

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// Ways in that a Debian machine can have: programs by name wherever they are,
// units by name, and by path what configures a login or runs at a time or a start.
var (
	loginPrograms = regexp.MustCompile(`^(a?getty|login|sulogin|systemd-sulogin-shell|su|sudo|sudoedit|doas|pkexec|polkitd|runuser|passwd|chsh|newgrp|sg|` +
		`sshd?|sshd-session|ssh-keygen|dropbear|telnetd?|rlogind?|rshd?|vsftpd|systemd-ssh-proxy|cockpit-ws|` +
		`qemu-ga|spice-vdagentd?|vmtoolsd|waagent|google_guest_agent|amazon-ssm-agent|hv_(kvp|vss|fcopy)_daemon|xe-daemon|` +
		`useradd|usermod|chpasswd|run0|machinectl|loginctl|homectl|userdbctl|kexec|crond?|anacron|atd|inetd|xinetd|socat|screen|tmux|` +
		`systemd-(logind|homed|userdbd|machined|import[d]|portabled|storagetm|bsod|coredump|journal-(remote|gatewayd|upload)|nspawn|firstboot|sysinstall))$`)
	loginUnits = regexp.MustCompile(`(getty|ssh|debug-shell|rescue|guest-agent|cloud-init-hotplugd|ask-password|systemd-(logind|homed|userdbd|machined|run|firstboot|initctl|portabled|coredump)|` +
		`storagetm|sysext|confext|initrd|kexec|user@|user-runtime-dir|autovt|container-shell|serial)[^/]*\.(service|socket|path)$`)
	loginPaths = regexp.MustCompile(`^(/etc/(ssh|pam\.d|pam\.conf|securetty|shells|sudoers|doas|polkit-1|login\.defs|inittab|rc\.local|rc[0-9S]\.d|init\.d|cron|anacrontab|at\.|` +
		`xinetd|inetd|hosts\.equiv|profile|bash\.bashrc|skel|ld\.so\.preload|subuid|subgid|NetworkManager|wpa_supplicant)|` +
		`/usr/(lib|share)/(polkit-1|pam|pam-configs|openssh)|/var/spool/(cron|at)|/root/.|/home/.|/usr/local/s?bin/.|/opt/.|/srv/.)`)
)

// TestLesson36_NothingCanLogIn looks for every way in that a Debian machine has,
// in the root and in the initrd.
func TestLesson36_NothingCanLogIn(t *testing.T) {
	files(t, func(path string, info fs.FileInfo) {
		name := filepath.Base(path)
		switch {
		case loginPrograms.MatchString(name) && !info.IsDir() && (info.Mode()&0o111 != 0 || info.Mode()&fs.ModeSymlink != 0) && !strings.HasPrefix(path, "/usr/share/bash-completion/"):
			t.Errorf("%s: a way to log in, to become another user or to run what somebody sends", path)
		case strings.Contains(path, "/systemd/") && loginUnits.MatchString(path):
			t.Errorf("%s: a unit that lets somebody in", path)
		case strings.Contains(path, "-generators/"):
			t.Errorf("%s: a generator makes units out of what the host says", path)
		case loginPaths.MatchString(path), name == "authorized_keys", strings.HasPrefix(name, "pam_") && strings.HasSuffix(name, ".so"), name == ".rhosts", name == ".netrc":
			t.Errorf("%s: belongs to a login, or runs at one or at a time", path)
		}
	})
	for name, check := range map[string]func(f []string) bool{
		"passwd": func(f []string) bool {
			return len(f) == 7 && f[1] == "x" && f[6] == "/usr/sbin/nologin" && (f[2] == "0") == (f[0] == "root")
		},
		"shadow": func(f []string) bool { return len(f) == 9 && f[1] == "!*" },
		"group":  func(f []string) bool { return len(f) == 4 && f[1] == "x" && f[3] == "" },
		"gshadow": func(f []string) bool {
			return len(f) == 4 && slices.Contains([]string{"*", "!", "!*"}, f[1]) && f[2]+f[3] == ""
		},
	} {
		lines := strings.Split(strings.TrimSpace(read(t, root(t, "etc", name))), "\n")
		for _, line := range lines {
			if !check(strings.Split(line, ":")) {
				t.Errorf("%s: %s: expected no password, no shell, no member, no second root", name, line)
			}
		}
		if len(lines) < 10 {
			t.Errorf("%s has %d lines", name, len(lines))
		}
	}
	for _, name := range []string{"shadow", "gshadow"} {
		if info, err := os.Stat(root(t, "etc", name)); err != nil || info.Mode().Perm()&0o037 != 0 {
			t.Errorf("/etc/%s: %v, %v", name, info.Mode(), err)
		}
	}
	// Whoever is looked up is looked up in these files.
	for _, base := range []string{"passwd", "group", "shadow"} {
		if !regexp.MustCompile(`(?m)^` + base + `:\s+files$`).MatchString(read(t, root(t, "etc/nsswitch.conf"))) {
			t.Errorf("nsswitch.conf: %s is not looked up in files alone", base)
		}
	}
	emergency := read(t, root(t, "usr/lib/systemd/system/emergency.service"))
	if execs := starts(emergency); !slices.Equal(execs, []string{`/usr/bin/echo "cvm: the boot failed, power off"`, "/usr/bin/systemctl --no-block --force poweroff"}) {
		t.Errorf("emergency.service runs %q, expected a word and power off", execs)
	}
	if target, err := os.Readlink(root(t, "etc/systemd/system/ctrl-alt-del.target")); target != "/dev/null" {
		t.Errorf("ctrl-alt-del.target is %q, %v", target, err)
	}
	var got []string
	walk(t, initrd(t), 10, func(path string, info fs.FileInfo) {
		module := strings.HasPrefix(path, "/usr/lib/modules/") && strings.HasSuffix(path, ".ko") && info.Mode().IsRegular()
		if !info.IsDir() && !module {
			got = append(got, path+" "+info.Mode().String())
		}
	})
	equal(t, "files of the initrd", got, []string{"/init -rwxr-xr-x", "/etc/cvm-agent/early.json -rw-r--r--", "/etc/cvm-agent/agent.yaml -rw-r--r--"})
}

// starts are the command lines of a unit.
func starts(unit string) (lines []string) {
	for _, m := range regexp.MustCompile(`(?m)^Exec[A-Z][A-Za-z]*=[-@:+!|]*(.+)$`).FindAllStringSubmatch(unit, -1) {
		lines = append(lines, m[1])
	}
	return lines
}

// TestNoPrivilegeByFile: nobody but root runs programs outside containers, so
// none needs to gain anything by its file, and none is another's to change.
func TestNoPrivilegeByFile(t *testing.T) {
	var owned []string
	files(t, func(path string, info fs.FileInfo) {
		if info.Mode()&(fs.ModeSetuid|fs.ModeSetgid) != 0 && !info.IsDir() {
			t.Errorf("%s is %s", path, info.Mode())
		}
		if info.Mode()&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0 {
			t.Errorf("%s is %s", path, info.Mode())
		}
		if info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSymlink == 0 && (info.Mode()&fs.ModeSticky == 0 || !info.IsDir()) {
			t.Errorf("%s is %s: anybody may write it", path, info.Mode())
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			t.Fatal("no owners on this system")
		}
		if stat.Uid != 0 || stat.Gid != 0 && info.Mode().Perm()&0o020 != 0 && info.Mode()&fs.ModeSymlink == 0 {
			owned = append(owned, path)
		}
		var value [64]byte
		for _, name := range []string{"security.capability", "system.posix_acl_access"} {
			if info.Mode().IsRegular() {
				if n, err := syscall.Getxattr(root(t)+path, name, value[:]); err == nil {
					t.Errorf("%s has %s %x", path, name, value[:n])
				}
			}
		}
	})
	equal(t, "what others than root may write", owned, []string{"/var/lib/systemd/network", "/var/mail"})
}
