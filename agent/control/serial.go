package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Bounds of the serial port, beside those of every request.
const (
	serialRetry   = 5 * time.Second        // until the port is looked for again
	serialGone    = 100 * time.Millisecond // until a host that went away is looked for again
	serialAway    = time.Second            // for which it must be away to have gone
	serialSilence = 100 * time.Millisecond // ends the rest of a request that was refused
	serialStall   = 5 * time.Second        // for a request that the server does not take
)

// Port is an open serial port. *os.File and net.Conn are such.
type Port interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// OpenPort opens a virtio-serial port, /dev/virtio-ports/NAME. The kernel lets
// it be open once.
func OpenPort(path string) (Port, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode()&fs.ModeCharDevice == 0 {
		err = fmt.Errorf("%s is no character device", path)
	}
	if err == nil {
		err = f.SetReadDeadline(time.Time{}) // a device that cannot be waited for
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// ServeSerial serves the port whenever the policy in force opens it, until ctx
// ends: one request at a time, of a host that proves nothing but by signatures.
func (s *Server) ServeSerial(ctx context.Context, open func() (Port, error)) {
	told := ""
	for s.awaitSerial(ctx, true) {
		port, err := open()
		if err == nil {
			s.log.Info("serving the serial port")
			s.servePort(ctx, port)
			told = ""
		} else if err.Error() != told { // once, not at every try
			told = err.Error()
			s.log.Warn("the policy opens the serial port, which cannot be opened", "error", err)
		}
		sleep(ctx, serialRetry)
	}
}

// awaitSerial waits until the policy in force opens the port, or does not. It
// returns false when ctx ended first. A policy comes into force in a phase, and
// every phase is an event.
func (s *Server) awaitSerial(ctx context.Context, want bool) bool {
	var after uint64
	for ctx.Err() == nil {
		list, more := s.agent.Events(after)
		if len(list) > 0 {
			after = list[len(list)-1].Seq
		}
		if s.agent.Rules().Control.VirtioSerial == want {
			return true
		}
		select {
		case <-ctx.Done():
		case <-more:
		}
	}
	return false
}

// servePort serves an open port until ctx ends, the policy closes it or it fails.
func (s *Server) servePort(ctx context.Context, port Port) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l := &line{port: port, conns: make(chan net.Conn), done: make(chan struct{})}
	l.framer.to = l
	stop := context.AfterFunc(ctx, func() { _ = port.Close() })
	defer stop()
	go func() {
		s.awaitSerial(ctx, false)
		cancel()
	}()
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.http.Serve(l)
	}()
	if err := l.read(ctx); err != nil && ctx.Err() == nil {
		s.log.Warn("the serial port failed", "error", err)
	}
	l.anew()
	_ = l.Close()
	_ = port.Close()
	<-served
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// line makes connections of a port: one at a time, each from its first byte
// until the peer begins anew or the server is done with it. It is the listener
// that the HTTP server accepts them from.
type line struct {
	port   Port
	framer framer
	conns  chan net.Conn
	done   chan struct{}
	once   sync.Once

	tag  string // of the connection to come; of the reading goroutine alone
	deaf bool   // what comes is the rest of something refused; likewise

	out     sync.Mutex // held while writing
	mu      sync.Mutex // guards current, and the port's write deadline
	current *serialConn
}

// serialConn is the server's end of a pipe; near is the line's.
type serialConn struct {
	net.Conn
	near   net.Conn
	prefix []byte // before its first answer
	closed atomic.Bool
}

func (c *serialConn) from() Caller { return Caller{Transport: TransportSerial, UID: 1<<32 - 1} }

func (c *serialConn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

func (l *line) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *line) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *line) Addr() net.Addr { return &net.UnixAddr{Name: TransportSerial, Net: TransportSerial} }

// read passes on what comes in until the port fails or is closed.
func (l *line) read(ctx context.Context) error {
	buf := make([]byte, 32<<10)
	var away time.Duration
	for {
		var deadline time.Time
		if l.deaf {
			deadline = time.Now().Add(serialSilence)
		}
		if err := l.port.SetReadDeadline(deadline); err != nil {
			return err
		}
		n, err := l.port.Read(buf)
		chunk := buf[:n]
		if i := bytes.LastIndexByte(chunk, anew); i > 0 {
			chunk = chunk[i:] // everything before it is void already
		}
		l.framer.feed(chunk)
		switch {
		case err == nil:
			away = 0
		case errors.Is(err, os.ErrDeadlineExceeded):
			l.deaf, away = false, 0
		case errors.Is(err, io.EOF):
			// Nobody is at the other end, says the guest's kernel, which learns
			// that by another queue than the data. So this may be the parting
			// of a client whose successor's request has been read already.
			if sleep(ctx, serialGone); ctx.Err() != nil {
				return nil
			}
			l.deaf = false // that was silence enough
			if away += serialGone; away >= serialAway {
				l.anew()
			}
		default:
			return err
		}
	}
}

// anew drops the connection there is, with what it has not written yet.
func (l *line) anew() {
	l.tag, l.deaf = "", false
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current != nil {
		_ = l.current.near.Close()
		l.current = nil
		_ = l.port.SetWriteDeadline(time.Now()) // a write that hangs ends
	}
}

func (l *line) tagged(tag string) { l.tag = tag }

// data gives bytes to the server, as a new connection if there is none.
func (l *line) data(p []byte) {
	if l.deaf {
		return
	}
	c := l.current // only this goroutine sets it
	if c == nil || c.closed.Load() {
		if c = l.open(); c == nil {
			return
		}
	}
	_ = c.near.SetWriteDeadline(time.Now().Add(serialStall))
	if _, err := c.near.Write(p); err != nil {
		// The server has refused the request, or waits for nothing: what
		// follows is not the beginning of another.
		if !c.closed.Load() {
			l.anew()
		}
		l.deaf = true
	}
}

func (l *line) open() *serialConn {
	server, near := net.Pipe()
	c := &serialConn{Conn: server, near: near}
	if l.tag != "" {
		c.prefix = append(append([]byte{anew}, l.tag...), '\n')
		l.tag = ""
	}
	l.mu.Lock()
	l.current = c
	l.mu.Unlock()
	select {
	case l.conns <- c:
		go l.write(c)
		return c
	case <-l.done:
		return nil
	}
}

// write carries a connection's answers to the port while it is the current one.
func (l *line) write(c *serialConn) {
	defer c.near.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := c.near.Read(buf)
		if n > 0 && !l.send(c, buf[:n]) {
			return
		}
		if err != nil {
			return
		}
	}
}

func (l *line) send(c *serialConn, p []byte) bool {
	l.out.Lock()
	defer l.out.Unlock()
	l.mu.Lock()
	mine := l.current == c
	if mine {
		_ = l.port.SetWriteDeadline(time.Now().Add(writeTimeout))
	}
	l.mu.Unlock()
	if !mine {
		return false
	}
	if c.prefix != nil {
		p = append(c.prefix, p...)
		c.prefix = nil
	}
	_, err := l.port.Write(p)
	return err == nil
}
