//go:build image

package guest

import (
	"encoding/json"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestLesson30_ContainersHaveTheFencedProfile: what a container gets is made by
// seccomp.jq, which agent/workload tries in a container, and there is no other.
func TestLesson30_ContainersHaveTheFencedProfile(t *testing.T) {
	var profile struct {
		DefaultAction string
		ArchMap       []struct {
			Architecture     string
			SubArchitectures []string
		}
		Syscalls []struct {
			Names  []string
			Action string
			Args   []struct {
				Index, Value, ValueTwo uint64
				Op                     string
			}
		}
	}
	if err := json.Unmarshal([]byte(read(t, root(t, "usr/share/containers/seccomp.json"))), &profile); err != nil {
		t.Fatal(err)
	}
	if len(profile.ArchMap) != 1 || len(profile.ArchMap[0].SubArchitectures) != 0 || profile.DefaultAction != "SCMP_ACT_ERRNO" {
		t.Errorf("the default is %s, the architectures are %v: expected x86-64 alone", profile.DefaultAction, profile.ArchMap)
	}
	never := []string{"socketcall", "clone3", "unshare", "setns", "mount", "umount", "umount2", "pivot_root", "open_tree", "move_mount", "fsopen", "fsmount", "fsconfig", "fspick",
		"mount_setattr", "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd"}
	var families []string
	clones, allowed := 0, 0
	for _, rule := range profile.Syscalls {
		if rule.Action != "SCMP_ACT_ALLOW" {
			continue
		}
		allowed += len(rule.Names)
		for _, name := range rule.Names {
			switch {
			case slices.Contains(never, name):
				t.Errorf("%s is allowed", name)
			case name == "socket":
				if len(rule.Args) == 0 || rule.Args[0].Index != 0 || rule.Args[0].Op != "SCMP_CMP_EQ" {
					t.Fatalf("socket is allowed by %+v", rule)
				}
				families = append(families, map[uint64]string{1: "unix", 2: "inet", 10: "inet6", 16: "netlink"}[rule.Args[0].Value])
			case name == "clone":
				if clones++; len(rule.Args) != 1 || rule.Args[0].Op != "SCMP_CMP_MASKED_EQ" || rule.Args[0].Value != 0x7e020000 || rule.Args[0].ValueTwo != 0 {
					t.Errorf("clone is allowed by %+v", rule)
				}
			}
		}
	}
	equal(t, "families of sockets", families, []string{"unix", "inet", "inet6", "netlink", "netlink"})
	if clones != 1 || allowed < 300 {
		t.Errorf("%d rules allow clone, %d calls are allowed", clones, allowed)
	}
	config := read(t, root(t, "etc/containers/containers.conf"))
	if !strings.Contains(config, "\nseccomp_profile = \"/usr/share/containers/seccomp.json\"\n") {
		t.Error("containers.conf names no profile")
	}
}

// TestModulesThatNobodyNeeds: sockets to the host; and efivarfs above all, since
// systemd reads EFI variables, which are not measured, as words of the command line.
func TestModulesThatNobodyNeeds(t *testing.T) {
	gone := regexp.MustCompile(`/(efivarfs|efi-pstore|efi_pstore|vsock|vsock_[a-z]+|vmw_[a-z_]+|hv_sock|qemu_fw_cfg|cuse|virtiofs)\.ko`)
	modules := 0
	look := func(path string, info fs.FileInfo) {
		if strings.Contains(path, "/modules/") && strings.Contains(path, ".ko") {
			modules++
			if gone.MatchString(path) {
				t.Errorf("%s: a module that nobody needs", path)
			}
		}
	}
	files(t, look)
	walk(t, initrd(t), 10, look)
	builtin := read(t, root(t, "usr/lib/modules", readManifest(t).Kernel, "modules.builtin"))
	if m := regexp.MustCompile(`.*/(efivarfs|vsock|hv_sock)\.ko`).FindString(builtin); m != "" || len(builtin) < 1000 {
		t.Errorf("%q is built into the kernel", m)
	}
	if modules < 100 {
		t.Errorf("only %d modules were seen", modules)
	}
}
