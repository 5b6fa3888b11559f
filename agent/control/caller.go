package control

import (
	"net"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy"
)

// Caller is who asks, as the transport proved it. Authorisation looks at a
// Caller and never at a connection, so that a transport without peer
// credentials can bring other proof.
type Caller struct {
	Transport string // one of the constants; of no other are UID and Groups known than of TransportUnix
	PID       int32
	UID       uint32
	Groups    []uint32 // primary and supplementary
}

// Transports.
const (
	TransportUnix   = "unix"
	TransportSerial = "virtio-serial"
)

// peer asks the kernel who opened the connection. The answer dates from the
// connect(2), so a program cannot gain rights by passing its socket on, and
// loses none of them.
func peer(conn *net.UnixConn) (Caller, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var caller Caller
	var credErr error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr != nil {
			return
		}
		caller = Caller{Transport: TransportUnix, PID: cred.Pid, UID: cred.Uid, Groups: append([]uint32{cred.Gid}, peerGroups(fd)...)}
	})
	if err == nil {
		err = credErr
	}
	return caller, err
}

// peerGroups returns the supplementary groups (SO_PEERGROUPS), none when the
// kernel does not say: a caller then has the rights of its primary group.
func peerGroups(fd uintptr) []uint32 {
	groups := make([]uint32, 256)
	size := uint32(len(groups) * 4)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return nil
	}
	return groups[:size/4]
}

// Rules say who may do what.
type Rules struct {
	OperatorGID int64 // members may read and order; negative: no such group
	Control     policy.Control
}

// MayRead allows root, the operator group and the uids that the policy names;
// on the serial port, which only the host can reach, whoever is there, if the
// policy opens it.
func (r Rules) MayRead(c Caller) bool {
	switch c.Transport {
	case TransportUnix:
		return r.MayOrder(c) || slices.Contains(r.Control.ReadUIDs, c.UID)
	case TransportSerial:
		return r.Control.VirtioSerial
	}
	return false
}

// MayOrder allows root, the operator group and the uids that the policy names
// for orders. It speaks for the local socket alone: elsewhere an order's
// signature decides.
func (r Rules) MayOrder(c Caller) bool {
	if c.Transport != TransportUnix {
		return false
	}
	if c.UID == 0 {
		return true
	}
	if r.OperatorGID >= 0 && slices.Contains(c.Groups, uint32(r.OperatorGID)) {
		return true
	}
	return slices.Contains(r.Control.OrderUIDs, c.UID)
}
