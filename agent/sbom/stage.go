package sbom

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// stageName as argv[0] makes a program that calls Reexec the stage between the
// agent and cvm-sbom.
const stageName = "cvm-agent-sbom-stage"

// mountName makes it the process that puts the image into the sandbox.
const mountName = "cvm-agent-sbom-mount"

// Where things are inside the sandbox.
const (
	sandboxRoot    = "/rootfs"
	sandboxProgram = "/cvm-sbom"
)

// The stage's file descriptors beside the standard three.
const (
	orderFD  = 3
	reportFD = 4
)

// Those of the process that mounts.
const (
	mountsFD      = 3
	treeFD        = 4
	mountReportFD = 5
)

// A stageOrder is what the agent tells the stage: no user input is in it but
// the document's name in Args.
type stageOrder struct {
	Base       string            // empty directory to build the new root on
	Program    string            // cvm-sbom
	Args       []string          // its argv
	ID         int               // transient user and group
	TempMax    uint64            // bytes in /tmp
	DataMax    uint64            // RLIMIT_DATA; 0 where a control group limits memory
	Namespaces map[string]string // the agent's, to be different from ours
}

// Reexec turns this process into the sandbox's stage if it was started as one,
// and does not return then. It must be the first call of main.
func Reexec() {
	if len(os.Args) != 1 || (os.Args[0] != stageName && os.Args[0] != mountName) {
		return
	}
	// Credentials, capabilities, no_new_privs and the filter belong to a thread;
	// execve keeps those of the thread that calls it.
	runtime.LockOSThread()
	if os.Args[0] == mountName {
		if err := mountImage(); err != nil {
			fmt.Fprintf(os.NewFile(mountReportFD, "report"), "read-only image\n%v", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	report := os.NewFile(reportFD, "report")
	syscall.CloseOnExec(orderFD)
	syscall.CloseOnExec(reportFD)
	measure, err := stage(os.NewFile(orderFD, "order"))
	fmt.Fprintf(report, "%s\n%v", measure, err)
	os.Exit(1)
}

// stage puts every measure in place, reads it back, and becomes cvm-sbom. It
// returns only to name the measure that failed.
func stage(orders io.Reader) (measure string, err error) {
	var o stageOrder
	if err := json.NewDecoder(io.LimitReader(orders, 64<<10)).Decode(&o); err != nil {
		return "stage", err
	}
	for _, m := range []struct {
		name string
		set  func() error
	}{
		{"namespaces", func() error { return checkNamespaces(o.Namespaces) }},
		{"network namespace", checkNoNetwork},
		{"mount namespace", func() error { return isolate(o) }},
		{"read-only root", checkMounts},
		{"resource limits", func() error { return setLimits(o) }},
		{"transient user", func() error { return becomeUser(o.ID) }},
		{"capabilities", checkCapabilities},
		{"no_new_privs", setNoNewPrivs},
		{"death signal", setDeathSignal},
		{"system call filter", setFilter},
	} {
		if err := m.set(); err != nil {
			return m.name, err
		}
	}
	return "exec", syscall.Exec(sandboxProgram, o.Args, []string{})
}

func checkNamespaces(outside map[string]string) error {
	if len(outside) == 0 {
		return errors.New("the order names none")
	}
	for ns, id := range outside {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			return err
		}
		if own == id {
			return fmt.Errorf("%s namespace is the agent's own", ns)
		}
	}
	return nil
}

func checkNoNetwork() error {
	ifs, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range ifs {
		if i.Flags&net.FlagLoopback == 0 || i.Flags&net.FlagUp != 0 {
			return fmt.Errorf("interface %s is there", i.Name)
		}
	}
	return nil
}

// isolate builds a root on o.Base, with the program, /tmp and an empty directory
// for the image, and leaves the old one.
func isolate(o stageOrder) error {
	mount := func(source, target, fstype string, flags uintptr, data string) error {
		if err := unix.Mount(source, target, fstype, flags, data); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		return nil
	}
	in := func(p string) string { return filepath.Join(o.Base, p) }
	const closed = unix.MS_NOSUID | unix.MS_NODEV
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", o.Base, "tmpfs", closed, "mode=0755,size=64k,nr_inodes=16"); err != nil {
		return err
	}
	for _, dir := range []string{in(sandboxRoot), in("/tmp")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(in(sandboxProgram), nil, 0o755); err != nil {
		return err
	}
	if err := mount(o.Program, in(sandboxProgram), "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := mount("", in(sandboxProgram), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|closed, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", in("/tmp"), "tmpfs", closed|unix.MS_NOEXEC, fmt.Sprintf("mode=0700,uid=%d,gid=%d,size=%d,nr_inodes=65536", o.ID, o.ID, o.TempMax)); err != nil {
		return err
	}
	if err := mount("", o.Base, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|closed, ""); err != nil {
		return err
	}
	// pivot_root(2), "pivot_root(".", ".")": the old root is stacked on the new
	// one and can be let go without a directory for it.
	if err := unix.Chdir(o.Base); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	return unix.Chdir("/")
}

// checkMounts reads the mounts back from inside.
func checkMounts() error {
	for path, want := range map[string]int64{
		"/":            unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV,
		sandboxProgram: unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV,
		"/tmp":         unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC,
	} {
		if err := checkFlags(path, want); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	if len(entries) != 3 {
		return fmt.Errorf("the new root holds %d entries, want 3", len(entries))
	}
	return nil
}

// checkFlags reads the flags of the mount that path is on.
func checkFlags(path string, want int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if got := fs.Flags; got&want != want {
		return fmt.Errorf("%s has mount flags %#x, want %#x", path, got, want)
	}
	return nil
}

// mountImage enters the sandbox's mount namespace, puts the detached mount on
// the directory that waits for it there, and reads it back.
func mountImage() error {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	if its, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", mountsFD)); err != nil || its == own {
		return fmt.Errorf("the mount namespace %s is the agent's own (%w)", its, err)
	}
	// A mount namespace can be entered only with a root and working directory
	// that no other thread shares.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Setns(mountsFD, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("setns: %w", err)
	}
	if err := unix.MoveMount(treeFD, "", unix.AT_FDCWD, sandboxRoot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return checkFlags(sandboxRoot, unix.ST_RDONLY|unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC)
}

// setLimits sets hard limits, which an unprivileged process cannot raise.
func setLimits(o stageOrder) error {
	limits := map[int]uint64{
		unix.RLIMIT_CORE:     0,
		unix.RLIMIT_FSIZE:    o.TempMax,
		unix.RLIMIT_NOFILE:   1024,
		unix.RLIMIT_NPROC:    256, // threads: the filter allows no processes
		unix.RLIMIT_MEMLOCK:  0,
		unix.RLIMIT_MSGQUEUE: 0,
	}
	if o.DataMax != 0 {
		limits[unix.RLIMIT_DATA] = o.DataMax
	}
	for resource, max := range limits {
		want := unix.Rlimit{Cur: max, Max: max}
		if err := unix.Setrlimit(resource, &want); err != nil {
			return fmt.Errorf("resource %d: %w", resource, err)
		}
		var got unix.Rlimit
		if err := unix.Getrlimit(resource, &got); err != nil || got != want {
			return fmt.Errorf("resource %d is %+v, want %+v (%w)", resource, got, want, err)
		}
	}
	return nil
}

// becomeUser takes the transient user and keeps the one capability that it
// takes to read an image's files, over execve as an ambient one.
func becomeUser(id int) error {
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	// The bounding set is dropped while CAP_SETPCAP is still there.
	for c := uintptr(0); ; c++ {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0); err != nil {
			break
		}
		if c == unix.CAP_DAC_READ_SEARCH {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	// Raw calls: they are for this thread, the one that calls execve.
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return fmt.Errorf("setgroups: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(id), uintptr(id), uintptr(id)); errno != 0 {
		return fmt.Errorf("setresgid: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(id), uintptr(id), uintptr(id)); errno != 0 {
		return fmt.Errorf("setresuid: %w", errno)
	}
	const bit = 1 << unix.CAP_DAC_READ_SEARCH
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: bit, Permitted: bit, Inheritable: bit}}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_DAC_READ_SEARCH, 0, 0); err != nil {
		return fmt.Errorf("ambient capability: %w", err)
	}
	var r, e, s [3]int
	r[0], e[0], s[0] = unix.Getresuid()
	r[1], e[1], s[1] = unix.Getresgid()
	for i := range 2 {
		if r[i] != id || e[i] != id || s[i] != id {
			return fmt.Errorf("ids are %d, %d, %d, want %d", r[i], e[i], s[i], id)
		}
	}
	if groups, err := unix.Getgroups(); err != nil {
		return fmt.Errorf("supplementary groups: %w", err)
	} else if len(groups) != 0 {
		return fmt.Errorf("supplementary groups are %v, want none", groups)
	}
	return nil
}

func checkCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	const bit = 1 << unix.CAP_DAC_READ_SEARCH
	if want := (unix.CapUserData{Effective: bit, Permitted: bit, Inheritable: bit}); data[0] != want || data[1] != (unix.CapUserData{}) {
		return fmt.Errorf("capabilities are %+v", data)
	}
	for c := uintptr(0); ; c++ {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if err != nil {
			return nil
		}
		if (in == 1) != (c == unix.CAP_DAC_READ_SEARCH) {
			return fmt.Errorf("capability %d in the bounding set: %d", c, in)
		}
	}
}

func setNoNewPrivs() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if on, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("reading back: %w", err)
	} else if on != 1 {
		return fmt.Errorf("reads back as %d", on)
	}
	return nil
}

// setDeathSignal renews what the agent set at the start: a change of
// credentials clears it.
func setDeathSignal() error {
	return unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
}
