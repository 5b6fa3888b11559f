package sbom

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// A memoryGroup is a control group that holds one scan to its memory. A nil
// group does nothing: the limit is then RLIMIT_DATA, set by the stage.
type memoryGroup struct {
	dir string
	v2  bool
}

const cgroupRoot = "/sys/fs/cgroup"

// newMemoryGroup makes a control group with the limit, below the caller's own
// group where the kernel allows that and below the root otherwise, in version 2
// or 1. It returns nil where no memory controller can be used.
func newMemoryGroup(limit uint64, none bool) (*memoryGroup, error) {
	if none {
		return nil, nil
	}
	name := "cvm-sbom-" + rand.Text()
	var errs []error
	for _, parent := range groupParents() {
		g := &memoryGroup{dir: filepath.Join(parent.dir, name), v2: parent.v2}
		if err := os.Mkdir(g.dir, 0o700); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := g.limit(limit); err != nil {
			errs = append(errs, err)
			g.remove()
			continue
		}
		return g, nil
	}
	// Read-only or absent hierarchies are how a host says that it has none.
	for _, err := range errs {
		if !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) && !errors.Is(err, os.ErrNotExist) {
			return nil, errors.Join(errs...)
		}
	}
	return nil, nil
}

type groupParent struct {
	dir string
	v2  bool
}

// groupParents lists the directories that may take a group with a memory limit.
func groupParents() []groupParent {
	self := map[string]string{} // controller list to path
	if data, err := readKernelFile("/proc/self/cgroup", 64<<10); err == nil {
		for line := range strings.Lines(string(data)) {
			if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
				self[f[1]] = f[2]
			}
		}
	}
	var out []groupParent
	v2 := func(dir string) {
		data, err := readKernelFile(filepath.Join(dir, "cgroup.subtree_control"), 4096)
		if err == nil && slices.Contains(strings.Fields(string(data)), "memory") {
			out = append(out, groupParent{dir, true})
		}
	}
	v2(filepath.Join(cgroupRoot, self[""]))
	v2(cgroupRoot)
	v1 := filepath.Join(cgroupRoot, "memory")
	for _, dir := range []string{filepath.Join(v1, self["memory"]), v1} {
		if _, err := os.Stat(filepath.Join(dir, "memory.limit_in_bytes")); err == nil {
			out = append(out, groupParent{dir, false})
		}
	}
	return out
}

// limit writes the limit and reads it back: the kernel rounds to pages.
func (g *memoryGroup) limit(bytes uint64) error {
	file, swap := "memory.max", "memory.swap.max"
	swapValue := "0"
	if !g.v2 {
		file, swap = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
		swapValue = strconv.FormatUint(bytes, 10)
	}
	if err := g.write(file, strconv.FormatUint(bytes, 10)); err != nil {
		return err
	}
	// Absent where the kernel has no swap accounting; without swap it is void.
	if err := g.write(swap, swapValue); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	data, err := readKernelFile(filepath.Join(g.dir, file), 4096)
	if err != nil {
		return err
	}
	got, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	if err != nil || got > bytes || got+1<<20 < bytes {
		return fmt.Errorf("%s holds %q after writing %d", file, strings.TrimSpace(string(data)), bytes)
	}
	return nil
}

func (g *memoryGroup) write(file, value string) error {
	f, err := os.OpenFile(filepath.Join(g.dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// add moves the process into the group and finds it there.
func (g *memoryGroup) add(pid int) error {
	if g == nil {
		return nil
	}
	if err := g.write("cgroup.procs", strconv.Itoa(pid)); err != nil {
		return err
	}
	data, err := readKernelFile(filepath.Join(g.dir, "cgroup.procs"), 64<<10)
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(string(data)), strconv.Itoa(pid)) {
		return fmt.Errorf("process %d is not in its control group", pid)
	}
	return nil
}

// killed reports whether the kernel killed a process of the group for memory.
func (g *memoryGroup) killed() bool {
	if g == nil {
		return false
	}
	file := "memory.events"
	if !g.v2 {
		file = "memory.oom_control"
	}
	data, err := readKernelFile(filepath.Join(g.dir, file), 4096)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "oom_kill" && f[1] != "0" {
			return true
		}
	}
	return false
}

// readKernelFile reads a file that the kernel makes up while it is read: its size
// and times say nothing.
func readKernelFile(path string, max int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return bounded.ReadAll(f, max)
}

// remove deletes the group. The kernel refuses while the last process is on its
// way out.
func (g *memoryGroup) remove() {
	if g == nil {
		return
	}
	for range 50 {
		if err := os.Remove(g.dir); err == nil || !errors.Is(err, unix.EBUSY) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}
