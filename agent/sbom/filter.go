package sbom

import (
	"errors"
	"os"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// allowedCalls is all that a Go program needs to read files, compute with
// threads and write to open descriptors. Load-bearing absences:
//
//	socket, connect, bind, io_uring_*      second layer under the empty network namespace
//	open_by_handle_at, name_to_handle_at   with CAP_DAC_READ_SEARCH they reach files outside the mount namespace
//	ptrace, process_vm_*, pidfd_*, kcmp    second layer under the pid namespace
//	fork, vfork, clone3, clone (process)   no process but the one that the limits were set on
//	mount, fsopen, pivot_root, chroot, setns, unshare, bpf, keyctl, userfaultfd, perf_event_open
//	memfd_create                           with noexec mounts, nothing can be made executable but in memory
var allowedCalls = []string{
	// files
	"open", "openat", "openat2", "close", "read", "readv", "pread64", "lseek", "fstat", "stat", "lstat",
	"newfstatat", "fstatat", "statx", "statfs", "fstatfs", "getdents64", "readlink", "readlinkat", "access", "faccessat",
	"faccessat2", "getcwd", "fcntl", "flock", "fadvise64", "dup", "dup3", "pipe2", "poll", "ppoll",
	// /tmp and the output
	"write", "writev", "pwrite64", "ftruncate", "fsync", "fdatasync", "fchmod", "mkdir", "mkdirat",
	"unlink", "unlinkat", "rmdir", "rename", "renameat", "renameat2",
	// memory
	"mmap", "munmap", "mprotect", "madvise", "mremap", "brk", "mincore",
	// threads, signals and time
	"futex", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "tgkill",
	"gettid", "getpid", "getppid", "sched_yield", "sched_getaffinity", "nanosleep", "clock_nanosleep", "clock_gettime",
	"clock_getres", "gettimeofday", "setitimer", "timer_create", "timer_settime", "timer_delete", "set_robust_list",
	"set_tid_address", "rseq", "membarrier", "arch_prctl", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait",
	"eventfd2", "exit", "exit_group",
	// about itself
	"getuid", "geteuid", "getgid", "getegid", "uname", "getrandom", "getrlimit",
	// the stage becoming cvm-sbom; after that, /cvm-sbom is the one file that can be executed
	"execve",
}

// setFilter denies every call that is not listed, and finds that it does.
func setFilter() error {
	info, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	var names []string
	for _, n := range allowedCalls {
		if _, ok := info.SyscallNames[n]; ok {
			names = append(names, n) // arm64 lacks the older of two spellings
		}
	}
	filter := seccomp.Filter{
		NoNewPrivs: true,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionErrno, // EPERM
			Syscalls: []seccomp.SyscallGroup{
				{Action: seccomp.ActionAllow, Names: names},
				{Action: seccomp.ActionAllow, NamesWithCondtions: []seccomp.NameWithConditions{
					{Name: "clone", Conditions: seccomp.ArgumentConditions{{Argument: 0, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD}}},
					// Reading or lowering the limits of this process, no other's.
					{Name: "prlimit64", Conditions: seccomp.ArgumentConditions{{Argument: 0, Operation: seccomp.Equal, Value: 0}}},
				}},
			},
		},
	}
	if err := seccomp.LoadFilter(filter); err != nil {
		return err
	}
	if fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0); !errors.Is(err, unix.EPERM) {
		if err == nil {
			unix.Close(fd)
		}
		return errors.New("socket is not denied")
	}
	if err := unix.Kill(os.Getpid(), 0); !errors.Is(err, unix.EPERM) {
		return errors.New("kill is not denied")
	}
	return nil
}
