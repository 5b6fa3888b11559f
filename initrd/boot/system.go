package boot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/initrd/disk"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// mount is one mount; its target is made first.
type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.source, m.target, err)
	}
	return nil
}

// kernelMounts come first and move into the root as they are.
var kernelMounts = []mount{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=20%"},
}

func (s *stage) mounts(context.Context) error {
	for _, m := range kernelMounts {
		if err := m.do(); err != nil {
			return cause.Wrap(cause.EarlyFailed, err)
		}
	}
	return nil
}

// loadModules loads modules in the order given. Not an error: that one is there
// already (EEXIST), has no hardware here (ENODEV), or needs one that had none
// (ENOENT, an unknown symbol). What then lacks is missed by the step that needs
// it.
func loadModules(dir string, names []string) error {
	files, err := moduleFiles(dir)
	if err != nil {
		return cause.Wrap(cause.EarlyFailed, err)
	}
	for _, name := range names {
		path, found := files[moduleName(name)]
		if !found {
			return cause.New(cause.Config, "module %q is not below %s", name, dir)
		}
		f, err := os.Open(path)
		if err != nil {
			return cause.Wrap(cause.EarlyFailed, err)
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
			return cause.New(cause.EarlyFailed, "load module %s: %w", name, err)
		}
	}
	return nil
}

// modaliases returns what sysfs shows of the devices that patterns can name: a
// modalias begins with its bus. Others are not read: a machine has hundreds.
func modaliases(sys string, patterns []string) []string {
	files := map[string][]string{}
	for _, p := range patterns {
		bus, _, _ := strings.Cut(p, ":")
		bus = strings.TrimSuffix(bus, "*") // "acpi*:VMBUS:*"
		if _, done := files[bus]; done {
			continue
		}
		if files[bus] = []string{sys + "/devices/system/cpu/modalias"}; bus != "cpu" {
			files[bus], _ = filepath.Glob(sys + "/bus/" + bus + "/devices/*/modalias") // the pattern is sound
		}
	}
	var out []string
	for _, list := range files {
		for _, file := range list {
			if alias, err := os.ReadFile(file); err == nil { // the kernel bounds it; or unplugged
				out = append(out, strings.TrimSpace(string(alias)))
			}
		}
	}
	return out
}

// fits says whether one of the patterns fits one of the modaliases.
func fits(patterns, shown []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		return slices.ContainsFunc(shown, func(alias string) bool {
			ok, _ := path.Match(p, alias)
			return ok
		})
	})
}

// moduleFiles maps the names of modules to their files.
func moduleFiles(dir string) (map[string]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(path, ".ko") {
			files[moduleName(path)] = path
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return files, nil
	}
	return files, err
}

// moduleName is a module's name as the kernel knows it.
func moduleName(path string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(path), ".ko"), "-", "_")
}

// root opens the verity root and puts a tmpfs over it: what is written there
// is in protected memory and gone at power off.
func (s *stage) root(ctx context.Context) error {
	hash := s.config.rootHash()
	data, hashes, err := disk.Linux.VerityPartitions(hash)
	if err != nil {
		return err
	}
	if data == "" || hashes == "" {
		return cause.New(cause.VerityFailed, "no disk has partitions with the root hash's two halves as UUIDs")
	}
	node, err := disk.OpenVerity("cvm-root", data, hashes, hash)
	if err != nil {
		return err
	}
	lower, upper := earlyDir+"/root", earlyDir+"/over"
	for _, m := range []mount{
		{node, lower, "squashfs", unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID, ""},
		{"tmpfs", upper, "tmpfs", unix.MS_NODEV | unix.MS_NOSUID, "mode=0700,size=20%"},
	} {
		if err := m.do(); err != nil {
			return cause.Wrap(cause.VerityFailed, err)
		}
	}
	for _, dir := range []string{upper + "/upper", upper + "/work"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return cause.Wrap(cause.EarlyFailed, err)
		}
	}
	return cause.Wrap(cause.EarlyFailed, mount{"overlay", sysroot, "overlay", unix.MS_NODEV | unix.MS_NOSUID,
		fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, upper, upper)}.do())
}

// scratchDirs are the directories on the scratch storage, by where they belong.
// Layers are staged in /var/tmp before they are anything.
var scratchDirs = []struct {
	target string
	mode   os.FileMode
}{
	{"/var/lib/containers", 0o700},
	{"/var/lib/cvm-agent", 0o700},
	{"/var/tmp", 0o777 | os.ModeSticky},
}

// scratch makes the storage for images, containers and the agent's state.
func (s *stage) scratch(ctx context.Context) error {
	m := mount{"tmpfs", earlyDir + "/scratch", "tmpfs", unix.MS_NODEV, "mode=0711,size=70%"}
	if s.config.Scratch == scratchDisk {
		node, err := s.scratchDisk(ctx)
		if err != nil {
			return err
		}
		m = mount{node, m.target, "ext4", unix.MS_NODEV | unix.MS_NOATIME, "errors=panic"}
	}
	if err := m.do(); err != nil {
		return cause.Wrap(cause.ScratchFailed, err)
	}
	for _, d := range scratchDirs {
		at := filepath.Join(m.target, filepath.Base(d.target))
		if err := os.Mkdir(at, 0o700); err != nil {
			return cause.Wrap(cause.ScratchFailed, err)
		}
		if err := os.Chmod(at, d.mode); err != nil { // whatever the umask is
			return cause.Wrap(cause.ScratchFailed, err)
		}
		if err := (mount{at, sysroot + d.target, "", unix.MS_BIND, ""}).do(); err != nil {
			return cause.Wrap(cause.ScratchFailed, err)
		}
	}
	return nil
}

// scratchDisk makes the encrypted device and a file system on it, with the
// root's own mke2fs; the key is not in that program's reach. No journal: there
// is nothing to recover. No copies of the superblock: they are written in part,
// and a sector never written cannot be read to be completed.
func (s *stage) scratchDisk(ctx context.Context) (string, error) {
	var part string
	err := poll(ctx, settle, func() (bool, error) {
		var err error
		part, err = disk.Linux.FindScratch()
		return part != "", err
	})
	if err != nil {
		return "", err
	}
	if part == "" {
		return "", cause.New(cause.ScratchFailed, "no disk has a partition called %s", disk.ScratchLabel)
	}
	node, err := disk.MakeScratch("cvm-scratch", part)
	if err != nil {
		return "", err
	}
	if err := (mount{"/dev", sysroot + "/dev", "", unix.MS_BIND, ""}).do(); err != nil {
		return "", cause.Wrap(cause.ScratchFailed, err)
	}
	cmd := exec.CommandContext(ctx, "/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0",
		"-O", "^has_journal,^resize_inode,^sparse_super,sparse_super2", "-E", "nodiscard,lazy_itable_init=0,num_backup_sb=0", node)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: sysroot}
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/sbin:/usr/bin", "MKE2FS_SYNC=0"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", cause.New(cause.ScratchFailed, "mke2fs: %w: %.300q", err, out)
	}
	if err := unix.Unmount(sysroot+"/dev", 0); err != nil {
		return "", cause.New(cause.ScratchFailed, "unmount /dev in the root: %w", err)
	}
	return node, nil
}

// switchRoot moves the kernel's mounts into the root, empties the initrd and
// becomes systemd.
func switchRoot() error {
	for _, m := range kernelMounts {
		if err := os.MkdirAll(sysroot+m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.target, sysroot+m.target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m.target, err)
		}
	}
	// A rootfs cannot be unmounted; its files are memory.
	for _, path := range []string{"/init", "/etc", "/usr"} {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	if err := unix.Chdir(sysroot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	const init = "/sbin/init"
	return fmt.Errorf("%s: %w", init, unix.Exec(init, []string{init}, []string{"HOME=/", "TERM=linux", "PATH=/usr/sbin:/usr/bin"}))
}
