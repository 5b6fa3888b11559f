package fault

import (
	"net"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// startIsolated starts cmd in a network namespace of its own whose only
// interface is the loopback, and where only the given loopback addresses lead
// anywhere: to the same addresses outside.
func startIsolated(cmd *exec.Cmd, reachable ...string) error {
	started := make(chan error)
	go func() {
		// The thread is in the other namespace for good and never given back to
		// the scheduler. Nor may it end: what it has started earlier, a podman
		// service say, gets a signal at its parent thread's death.
		runtime.LockOSThread()
		started <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := loopbackUp(); err != nil {
				return err
			}
			for _, address := range reachable {
				l, err := net.Listen("tcp", address) // a socket of this namespace
				if err != nil {
					return err
				}
				go func() { // on a thread of the outside
					defer l.Close()
					forward(l, "tcp", address, func(net.Conn, bool) {})
				}()
			}
			return cmd.Start()
		}()
		select {}
	}()
	return <-started
}

// loopbackUp is `ip link set lo up`.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}
