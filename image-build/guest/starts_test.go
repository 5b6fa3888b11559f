//go:build image

package guest

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestEnabledUnits holds every .wants and .requires link to the list.
func TestEnabledUnits(t *testing.T) {
	var got []string
	files(t, func(path string, info fs.FileInfo) {
		if dir := filepath.Base(filepath.Dir(path)); strings.HasSuffix(dir, ".wants") || strings.HasSuffix(dir, ".requires") || strings.HasSuffix(dir, ".upholds") {
			got = append(got, dir+"/"+filepath.Base(path))
		}
	})
	equal(t, "enabled units", got, list(t, "testdata/enabled.txt"))
}

var (
	udevRuns  = regexp.MustCompile(`(?:RUN(?:\{program\})?|PROGRAM|IMPORT\{program\})\s*(?:\+=|:=|==|=)\s*"([^" ]+)`)
	udevWants = regexp.MustCompile(`SYSTEMD_(?:USER_)?WANTS\}\s*(?:\+=|:=|=)\s*"([^"]+)"`)
	busUnit   = regexp.MustCompile(`(?m)^SystemdService=(.+)$`)
	busExec   = regexp.MustCompile(`(?m)^Exec=(.+)$`)
)

// TestWhatTheHostCanStart: a device that the host plugs in, or a message on the
// bus, starts programs and units too, without any being enabled.
func TestWhatTheHostCanStart(t *testing.T) {
	unit := func(name string) bool {
		for _, dir := range []string{"etc/systemd/system", "usr/lib/systemd/system"} {
			if _, err := os.Lstat(root(t, dir, name)); err == nil {
				return true
			}
		}
		return false
	}
	seen := map[string]bool{}
	rules, buses := 0, 0
	files(t, func(path string, info fs.FileInfo) {
		switch {
		case !info.Mode().IsRegular():
		case strings.HasSuffix(path, ".rules") && strings.Contains(path, "/udev/"):
			rules++
			text := read(t, root(t, path))
			for _, m := range udevRuns.FindAllStringSubmatch(text, -1) {
				program := m[1]
				if !strings.HasPrefix(program, "/") && !strings.HasPrefix(program, "$") {
					program = "/usr/lib/udev/" + program
				}
				if _, err := os.Lstat(root(t, program)); err == nil || strings.HasPrefix(program, "$") {
					seen["device "+program] = true
				}
			}
			for _, m := range udevWants.FindAllStringSubmatch(text, -1) {
				for _, name := range strings.Fields(m[1]) {
					if unit(name) || strings.Contains(name, "$") && unit(regexp.MustCompile(`@.*\.`).ReplaceAllString(name, "@.")) {
						seen["device "+name] = true
					}
				}
			}
		case strings.HasPrefix(path, "/usr/share/dbus-1/") && strings.HasSuffix(path, ".service"), strings.HasPrefix(path, "/etc/dbus-1/") && strings.HasSuffix(path, ".service"):
			buses++
			text := read(t, root(t, path))
			if m := busExec.FindStringSubmatch(text); m == nil || m[1] != "/bin/false" {
				t.Errorf("%s: the bus itself runs a program: %q", path, m)
			}
			if m := busUnit.FindStringSubmatch(text); m != nil && unit(m[1]) {
				seen["bus "+m[1]] = true
			}
		}
	})
	if rules < 10 || buses < 3 {
		t.Errorf("only %d files of rules and %d of the bus were read", rules, buses)
	}
	var got []string
	for s := range seen {
		got = append(got, s)
	}
	equal(t, "what a device or the bus starts", got, list(t, "testdata/starts.txt"))
}

var (
	listens = regexp.MustCompile(`(?m)^Listen[A-Za-z]*=(.+)$`)
	// terminal is a unit that reads what somebody types, or hands a socket to a program as its input.
	terminal = regexp.MustCompile(`(?m)^StandardInput=(tty|socket|fd)|^PAMName=|^UtmpIdentifier=`)
	network  = regexp.MustCompile(`(^|[\s"'=])(tcp|udp|vsock)(-listen)?:|0\.0\.0\.0|\[::\]|--listen|--bind`)
)

// TestWhatListens: sockets of units, the programs that units start, and what
// networkd and resolved can be told to serve.
func TestWhatListens(t *testing.T) {
	var got []string
	units := 0
	files(t, func(path string, info fs.FileInfo) {
		if !strings.Contains(path, "/systemd/") || !info.Mode().IsRegular() || !regexp.MustCompile(`\.(socket|service|conf)$`).MatchString(path) {
			return
		}
		units++
		text := read(t, root(t, path))
		for _, m := range listens.FindAllStringSubmatch(text, -1) {
			if address := m[1]; !strings.HasPrefix(address, "/") && !strings.HasPrefix(address, "%t/") && !strings.HasPrefix(address, "kobject-uevent") && !strings.HasPrefix(address, "route ") {
				t.Errorf("%s listens on %s: expected paths and netlink alone", path, address)
			}
			got = append(got, filepath.Base(path)+" "+m[1])
		}
		if m := terminal.FindString(text); m != "" {
			t.Errorf("%s: %s: somebody's words are a program's input", path, m)
		}
		for _, command := range starts(text) {
			if network.MatchString(command) || regexp.MustCompile(`^(/usr)?(/bin/)?(ba|da)?sh( -[a-z]*[il][a-z]*)*$`).MatchString(command) {
				t.Errorf("%s starts %q: a listener or a shell", path, command)
			}
		}
	})
	if units < 40 {
		t.Errorf("only %d units were read", units)
	}
	equal(t, "sockets", got, list(t, "testdata/listens.txt"))
	resolved := read(t, root(t, "etc/systemd/resolved.conf.d/cvm.conf"))
	for _, off := range []string{"DNSStubListener=no", "LLMNR=no", "MulticastDNS=no"} {
		if !strings.Contains(resolved, off+"\n") {
			t.Errorf("resolved: %s is missing", off)
		}
	}
	serves := regexp.MustCompile(`(?m)^(DHCPServer|IPv6SendRA|EmitLLDP|LLMNR|MulticastDNS|DNSStubListener(Extra)?)\s*=\s*(.*)$`)
	var networks []string
	files(t, func(path string, info fs.FileInfo) {
		if !info.Mode().IsRegular() || !regexp.MustCompile(`/systemd/(network/.*\.(network|netdev)(\.d/.*)?|(resolved|networkd)\.conf(\.d/.*)?)$`).MatchString(path) {
			return
		}
		if strings.HasSuffix(path, ".network") || strings.HasSuffix(path, ".netdev") {
			networks = append(networks, path)
		}
		for _, m := range serves.FindAllStringSubmatch(read(t, root(t, path)), -1) {
			if !slices.Contains([]string{"no", "false", "off"}, m[3]) {
				t.Errorf("%s: %s", path, m[0])
			}
		}
	})
	equal(t, "networks", networks, []string{"/etc/systemd/network/99-default.network"})
}
