package workload

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Secrets is the tmpfs directory below which secrets are written, one
// directory per container. Nobody but root can enter it; a container sees only
// its own leaf, read-only.
type Secrets struct{ root string }

// OpenSecrets uses dir, which is created with mode 0700. When dir is not on a
// tmpfs one is mounted there, so that no secret reaches a disk; when that
// cannot be done the error is cause.StorageFailed.
func OpenSecrets(dir string) (*Secrets, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, cause.New(cause.StorageFailed, "create the secrets directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, cause.New(cause.StorageFailed, "protect the secrets directory: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, cause.New(cause.StorageFailed, "look at the secrets directory: %w", err)
	}
	if st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,size=16m"); err != nil {
			return nil, cause.New(cause.StorageFailed, "mount a tmpfs for secrets at %s: %w", dir, err)
		}
	}
	return &Secrets{root: dir}, nil
}

// Write puts the secrets of one container in place and returns the directory
// for Container.SecretDir. user is the one that the container runs as
// ("uid[:gid]" or a name): it owns its files. A name cannot be resolved without
// trusting the image's own passwd file, so with a name the files stay root's.
func (s *Secrets) Write(container, user string, rules []policy.Secret, values map[string][]byte) (path string, err error) {
	uid, gid, numeric := owner(user)
	dir := filepath.Join(s.root, container)
	defer func() {
		if err != nil { // those before the one that failed
			err = errors.Join(err, wipe(dir))
		}
	}()
	if err := wipe(dir); err != nil {
		return "", cause.New(cause.StorageFailed, "clear old secrets: %w", err)
	}
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chmod(dir, 0o755)); err != nil { // past the umask
		return "", cause.New(cause.StorageFailed, "create the secrets directory: %w", err)
	}
	for _, rule := range rules {
		mode := fs.FileMode(0o400)
		if rule.Mode != "" {
			m, err := strconv.ParseUint(rule.Mode, 8, 9)
			if err != nil {
				return "", cause.New(cause.PolicyInvalid, "mode %q of secret %s is not octal", rule.Mode, rule.Name)
			}
			mode = fs.FileMode(m)
		}
		if !numeric && mode&0o004 == 0 {
			return "", cause.New(cause.WorkloadStart, "secret %s with mode %04o cannot be given to user %q: name the user by number", rule.Name, mode, user)
		}
		value, ok := values[rule.Name]
		if !ok {
			return "", cause.New(cause.Internal, "secret %s was not released", rule.Name)
		}
		if err := writeSecret(filepath.Join(dir, filepath.Base(rule.Name)), value, mode, uid, gid); err != nil {
			return "", cause.New(cause.StorageFailed, "write secret %s: %w", rule.Name, err)
		}
	}
	return dir, nil
}

func writeSecret(path string, value []byte, mode fs.FileMode, uid, gid int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o400)
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	if err == nil {
		err = f.Chown(uid, gid)
	}
	if err == nil {
		err = f.Chmod(mode) // past the umask
	}
	return errors.Join(err, f.Close())
}

// owner reads "uid[:gid]"; an empty user is root. A name is owned by root.
func owner(user string) (uid, gid int, numeric bool) {
	u, g, both := strings.Cut(user, ":")
	if u == "" || u == "root" {
		return 0, 0, true
	}
	n, err := strconv.ParseUint(u, 10, 31)
	if err != nil {
		return 0, 0, false
	}
	uid = int(n)
	if both {
		m, err := strconv.ParseUint(g, 10, 31)
		if err != nil {
			return 0, 0, false
		}
		gid = int(m)
	}
	return uid, gid, true
}

// Wipe removes the secrets of one container.
func (s *Secrets) Wipe(container string) error {
	return wipe(filepath.Join(s.root, container))
}

// WipeAll removes all secrets.
func (s *Secrets) WipeAll() error {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		err = errors.Join(err, wipe(filepath.Join(s.root, e.Name())))
	}
	return err
}

// wipe overwrites before it removes: the pages of a tmpfs go back to the
// kernel as they are, and a container that still holds a file open sees zeros.
func wipe(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, statErr := os.Lstat(path)
		if statErr != nil || !info.Mode().IsRegular() {
			continue
		}
		f, openErr := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
		if openErr != nil {
			err = errors.Join(err, openErr)
			continue
		}
		_, writeErr := f.Write(make([]byte, info.Size()))
		err = errors.Join(err, writeErr, f.Close())
	}
	return errors.Join(err, os.RemoveAll(dir))
}
