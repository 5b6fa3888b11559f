package unpack

import (
	"fmt"
	"net"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// keep are the capabilities that laying out a layer takes. There is no
// SYS_ADMIN: `trusted.*` attributes, with which a layer could redirect an
// overlay mount, cannot be written here.
var keep = []cap.Value{cap.CHOWN, cap.DAC_OVERRIDE, cap.FOWNER, cap.FSETID, cap.MKNOD, cap.SETFCAP}

// rlimits: addresses are generous because the Go runtime reserves them in
// large pieces; data is what it can really use.
func rlimits(l Limits) []struct {
	name  string
	which int
	max   uint64
} {
	return []struct {
		name  string
		which int
		max   uint64
	}{
		{"core", unix.RLIMIT_CORE, 0},
		{"file size", unix.RLIMIT_FSIZE, uint64(l.MaxBytes)},
		{"open files", unix.RLIMIT_NOFILE, 128},
		{"data", unix.RLIMIT_DATA, 1 << 30},
		{"address space", unix.RLIMIT_AS, 8 << 30},
		{"locked memory", unix.RLIMIT_MEMLOCK, 0},
	}
}

// confine locks this process, all its threads, into dir for good. Each step
// that cannot be taken is an error, and the ones that the kernel can be asked
// about are read back. The new namespaces come from the parent's clone flags.
func confine(dir string, l Limits) error {
	ifs, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("listing network interfaces: %w", err)
	}
	for _, i := range ifs {
		if i.Flags&net.FlagUp != 0 {
			return fmt.Errorf("network interface %s is up: not in an empty network namespace", i.Name)
		}
	}
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("asking to die with the parent: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbidding dumps: %w", err)
	}
	for _, r := range rlimits(l) {
		lim := unix.Rlimit{Cur: r.max, Max: r.max}
		if err := unix.Setrlimit(r.which, &lim); err != nil {
			return fmt.Errorf("limiting %s: %w", r.name, err)
		}
	}
	unix.Umask(0o022) // for directories that a layer uses but does not list

	// nodev is what makes CAP_MKNOD harmless: a device made here cannot be
	// opened here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s: %w", dir, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("remounting %s nodev: %w", dir, err)
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("entering %s: %w", dir, err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("changing root: %w", err)
	}
	if err := dropCapabilities(); err != nil {
		return err
	}
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	if err := filterSyscalls(); err != nil {
		return err
	}
	return verifyConfined()
}

func dropCapabilities() error {
	var drop []cap.Value
	for v := cap.Value(0); v < cap.MaxBits(); v++ {
		kept := false
		for _, k := range keep {
			kept = kept || k == v
		}
		if !kept {
			drop = append(drop, v)
		}
	}
	if err := cap.DropBound(drop...); err != nil {
		return fmt.Errorf("dropping the bounding set: %w", err)
	}
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("dropping ambient capabilities: %w", err)
	}
	set := cap.NewSet()
	for _, f := range []cap.Flag{cap.Permitted, cap.Effective} {
		if err := set.SetFlag(f, true, keep...); err != nil {
			return fmt.Errorf("choosing capabilities: %w", err)
		}
	}
	if err := set.SetProc(); err != nil {
		return fmt.Errorf("dropping capabilities: %w", err)
	}
	return nil
}

func verifyConfined() error {
	want := cap.NewSet()
	for _, f := range []cap.Flag{cap.Permitted, cap.Effective} {
		_ = want.SetFlag(f, true, keep...)
	}
	diff, err := cap.GetProc().Cf(want)
	if err != nil {
		return fmt.Errorf("reading capabilities back: %w", err)
	}
	if diff != 0 {
		return fmt.Errorf("capabilities are %q after the drop", cap.GetProc())
	}
	for _, q := range []struct {
		name string
		op   int
		want int
	}{{"no-new-privileges", unix.PR_GET_NO_NEW_PRIVS, 1}, {"the seccomp mode", unix.PR_GET_SECCOMP, unix.SECCOMP_MODE_FILTER}} {
		v, err := unix.PrctlRetInt(q.op, 0, 0, 0, 0)
		if err != nil {
			return fmt.Errorf("reading %s back: %w", q.name, err)
		}
		if v != q.want {
			return fmt.Errorf("%s reads back as %d, expected %d", q.name, v, q.want)
		}
	}
	return nil
}

// syscalls is what the Go runtime and the unpacking need; all else is EPERM.
// There is no socket, execve, mount, ptrace, bpf, io_uring, keyctl or process
// creation; names that an architecture lacks are left out.
var syscalls = []string{
	// runtime
	"futex", "mmap", "munmap", "mremap", "madvise", "mprotect", "brk", "mincore",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "tgkill",
	"getpid", "gettid", "sched_yield", "sched_getaffinity", "nanosleep",
	"clock_gettime", "clock_nanosleep", "restart_syscall", "getrandom", "exit",
	"exit_group", "set_robust_list", "rseq", "membarrier", "timer_create",
	"timer_settime", "timer_delete", "setitimer", "getrlimit", "prlimit64",
	"uname", "prctl", "capget", "arch_prctl",
	"epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "eventfd2", "pipe2", "poll", "ppoll",
	// reading and writing
	"read", "write", "readv", "writev", "pread64", "pwrite64", "lseek", "close",
	"fcntl", "fstat", "ftruncate", "fallocate", "fadvise64", "copy_file_range", "dup", "dup3",
	// the tree
	"open", "openat", "openat2", "stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2",
	"getdents64", "readlink", "readlinkat", "getcwd", "statfs", "fstatfs",
	"mkdir", "mkdirat", "mknod", "mknodat", "link", "linkat", "symlink", "symlinkat",
	"unlink", "unlinkat", "rmdir", "rename", "renameat", "renameat2",
	"chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchown", "fchownat", "utimensat", "utimes",
	"setxattr", "lsetxattr", "fsetxattr", "getxattr", "lgetxattr", "fgetxattr",
	"listxattr", "llistxattr", "flistxattr", "umask", "geteuid", "getuid", "getgid", "getegid",
}

func filterSyscalls() error {
	info, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	var names []string
	for _, n := range syscalls {
		if _, ok := info.SyscallNames[n]; ok {
			names = append(names, n)
		}
	}
	err = seccomp.LoadFilter(seccomp.Filter{
		NoNewPrivs: true,
		Flag:       seccomp.FilterFlagTSync, // all threads
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionErrno,
			Syscalls: []seccomp.SyscallGroup{{
				Action: seccomp.ActionAllow,
				Names:  names,
				// Threads, but no processes and no namespaces.
				NamesWithCondtions: []seccomp.NameWithConditions{{
					Name: "clone",
					Conditions: []seccomp.Condition{
						{Argument: 0, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD},
						{Argument: 0, Operation: seccomp.BitsNotSet, Value: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID},
					},
				}},
			}},
		},
	})
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	return nil
}
