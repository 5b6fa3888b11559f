package launch

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Heap limits, in bytes; both are soft. A launch verifies and streams; an idle
// agent only answers.
const (
	launchMemory = 64 << 20
	idleMemory   = 24 << 20
)

// LimitMemory tunes the collector for a launch.
func LimitMemory() {
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(launchMemory)
}

// settleMemory returns to the system what the launch used: the heap, and the
// pages of the program itself. Most of the resident size of an idle agent is
// code that verified signatures and will do so again with the next upgrade
// only; it is read again from the file when it is needed.
func settleMemory() {
	debug.SetMemoryLimit(idleMemory)
	debug.FreeOSMemory()
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(maps)) {
		// address perms offset dev inode pathname; read-only mappings are clean.
		f := strings.Fields(line)
		if len(f) < 6 || f[5] != program || strings.Contains(f[1], "w") {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil && end > start {
			// A hint: a kernel that does not take it changes nothing.
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(end-start), unix.MADV_PAGEOUT)
		}
	}
}
