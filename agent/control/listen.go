package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
)

// Listen returns the control socket: the one that systemd passes, or else one
// made at path with mode 0660 and the group gid (negative: root's).
func Listen(path string, gid int64) (*net.UnixListener, error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take the socket from systemd: %w", err)
	}
	for _, l := range passed {
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false)
			return u, nil
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The mode must be right from the first moment on.
	old := syscall.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	syscall.Umask(old)
	if err != nil {
		return nil, err
	}
	if gid >= 0 {
		err = os.Chown(path, -1, int(gid))
	}
	if err == nil {
		err = os.Chmod(path, 0o660)
	}
	if err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// removeStale removes a socket that nobody listens on, and nothing else.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is no socket", path)
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = conn.Close()
		return fmt.Errorf("another agent listens on %s", path)
	}
	return os.Remove(path)
}

// GroupID resolves a group's name or number; a group that does not exist is
// -1: then nobody is a member.
func GroupID(name string) int64 {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int64(n)
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return -1
	}
	n, err := strconv.ParseUint(g.Gid, 10, 31)
	if err != nil {
		return -1
	}
	return int64(n)
}

// maxConns bounds the open connections of one uid. One more closes the oldest
// that does not carry an order, so the newest is always served and a client
// that hoards connections hurts only itself.
const maxConns = 32

// conns knows the open connections per uid, oldest first.
type conns struct {
	mu    sync.Mutex
	byUID map[uint32][]*conn
}

// conn is an accepted connection with its caller.
type conn struct {
	*net.UnixConn
	caller Caller
	set    *conns
	order  bool // carries an order: never closed to make room; guarded by set.mu
	once   sync.Once
}

func (c *conn) from() Caller { return c.caller }

func (s *conns) add(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := append(s.byUID[c.caller.UID], c)
	if len(list) > maxConns {
		for i, old := range list {
			if !old.order {
				list = append(list[:i], list[i+1:]...)
				_ = old.UnixConn.Close()
				break
			}
		}
	}
	s.byUID[c.caller.UID] = list
}

func (c *conn) setOrder(on bool) {
	c.set.mu.Lock()
	defer c.set.mu.Unlock()
	c.order = on
}

// Close forgets the connection and closes it.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.set.mu.Lock()
		defer c.set.mu.Unlock()
		list := c.set.byUID[c.caller.UID]
		for i, other := range list {
			if other == c {
				list = append(list[:i], list[i+1:]...)
				break
			}
		}
		if len(list) == 0 {
			delete(c.set.byUID, c.caller.UID)
		} else {
			c.set.byUID[c.caller.UID] = list
		}
	})
	return c.UnixConn.Close()
}

// listener accepts connections whose peer the kernel names.
type listener struct {
	*net.UnixListener
	set *conns
}

func (l listener) Accept() (net.Conn, error) {
	for {
		u, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		caller, err := peer(u)
		if err != nil {
			_ = u.Close()
			continue
		}
		c := &conn{UnixConn: u, caller: caller, set: l.set}
		l.set.add(c)
		return c, nil
	}
}
