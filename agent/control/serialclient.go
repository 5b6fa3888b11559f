package control

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// maxStale bounds what a client passes over before its own answer, in bytes: an
// event history that somebody else asked for.
const maxStale = 16 << 20

// NewSerialClient returns a client of an agent's serial port as the host has
// it: a unix socket (of QEMU's -chardev socket,server=on), or a character
// device. patience is how long an answer may take to begin, which includes the
// guest's boot; 0 is a minute. One client at a time: another waits.
func NewSerialClient(path string, patience time.Duration) *Client {
	if patience <= 0 {
		patience = time.Minute
	}
	return &Client{http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives:     true,
		DisableCompression:    true,
		ResponseHeaderTimeout: patience,
		DialContext:           func(ctx context.Context, _, _ string) (net.Conn, error) { return dialSerial(ctx, path) },
	}}}
}

func dialSerial(ctx context.Context, path string) (net.Conn, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	var c net.Conn
	if info.Mode()&fs.ModeCharDevice != 0 {
		port, err := OpenPort(path)
		if err != nil {
			return nil, err
		}
		c = deviceConn{Port: port}
	} else if c, err = (&net.Dialer{}).DialContext(ctx, "unix", path); err != nil {
		return nil, err
	}
	var random [maxTag / 2]byte
	_, _ = rand.Read(random[:]) // never fails
	mark := append(append([]byte{anew}, hex.EncodeToString(random[:])...), '\n')
	if _, err := c.Write(mark); err != nil {
		_ = c.Close()
		return nil, err
	}
	return &markedConn{Conn: c, mark: mark}, nil
}

// markedConn passes over everything before the answer that begins with mark,
// and ends where another begins.
type markedConn struct {
	net.Conn
	mark    []byte
	held    []byte // read, and not yet given out or judged
	found   bool
	skipped int
}

func (c *markedConn) Read(p []byte) (int, error) {
	for {
		if c.found && len(c.held) > 0 {
			n := bytes.IndexByte(c.held, anew)
			if n == 0 {
				return 0, cause.New(cause.AgentUnavailable, "the agent began another answer: %w", io.ErrUnexpectedEOF)
			}
			if n < 0 {
				n = len(c.held)
			}
			n = copy(p, c.held[:n])
			c.held = c.held[n:]
			return n, nil
		}
		buf := make([]byte, 4096)
		n, err := c.Conn.Read(buf)
		c.held = append(c.held, buf[:n]...)
		if !c.found {
			if i := bytes.Index(c.held, c.mark); i >= 0 {
				c.found, c.held = true, c.held[i+len(c.mark):]
			} else if keep := len(c.mark) - 1; len(c.held) > keep {
				c.skipped += len(c.held) - keep
				c.held = c.held[len(c.held)-keep:]
			}
		}
		if c.skipped > maxStale {
			return 0, errors.New("the agent's answer does not begin")
		}
		if err != nil && (!c.found || len(c.held) == 0) {
			return 0, err
		}
	}
}

// deviceConn is a device as a connection.
type deviceConn struct{ Port }

func (deviceConn) LocalAddr() net.Addr {
	return &net.UnixAddr{Name: TransportSerial, Net: TransportSerial}
}
func (deviceConn) RemoteAddr() net.Addr {
	return &net.UnixAddr{Name: TransportSerial, Net: TransportSerial}
}
func (c deviceConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}
