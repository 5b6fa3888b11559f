package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/order"
)

// pair returns the two ends of a stream.
func pair(t testing.TB) (guest, host net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "port")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	return ends[0], ends[1]
}

// servePair serves a port and returns the host's end of it.
func servePair(t testing.TB, a Agent) net.Conn {
	t.Helper()
	guest, host := pair(t)
	ctx, cancel := context.WithCancel(context.Background())
	s := NewServer(a, discard)
	done := make(chan struct{})
	go func() { defer close(done); s.ServeSerial(ctx, once(guest)) }()
	t.Cleanup(func() { cancel(); _ = host.Close(); <-done; _ = s.http.Close() })
	return host
}

// once opens a port that can be opened once.
func once(p Port) func() (Port, error) {
	return func() (Port, error) {
		if p == nil {
			return nil, errors.New("no port")
		}
		port := p
		p = nil
		return port, nil
	}
}

// serveSerial plays QEMU's socket: one client at a time on the host's side, and
// no sign of it on the guest's.
func serveSerial(t *testing.T, a Agent) (path string) {
	t.Helper()
	host := servePair(t, a)
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "serial.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(); _ = os.RemoveAll(dir) })
	var mu sync.Mutex
	var client net.Conn
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := host.Read(buf)
			if err != nil {
				return
			}
			mu.Lock()
			if client != nil {
				_, _ = client.Write(buf[:n])
			}
			mu.Unlock()
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			client = c
			mu.Unlock()
			_, _ = io.Copy(struct{ io.Writer }{host}, c)
			_ = c.Close()
		}
	}()
	return path
}

func TestSerialReads(t *testing.T) {
	a, _ := signing(t)
	c := NewSerialClient(serveSerial(t, a), 0)
	a.emit("policy")
	a.emit("attest")
	for range 3 {
		if st, err := c.Status(t.Context()); err != nil || st.Policy.Version != 3 {
			t.Fatalf("%+v, %v", st, err)
		}
		var names []string
		if err := c.Events(t.Context(), false, func(e Event) error { names = append(names, e.Name); return nil }); err != nil || strings.Join(names, " ") != "policy attest" {
			t.Fatalf("%v, %v", names, err)
		}
	}
	// A follower that leaves makes room for the next request.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := c.Events(ctx, true, func(Event) error { return io.EOF }); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if _, err := c.Status(ctx); err != nil {
		t.Error(err)
	}
}

// Whatever is in the stream, the next that begins anew is answered.
func TestSerialResynchronises(t *testing.T) {
	a, _ := signing(t)
	a.upgrade = func(context.Context) error { t.Error("an order got through"); return nil }
	a.destroy = a.upgrade
	host := servePair(t, a)
	r := bufio.NewReader(host)
	for name, before := range map[string]string{
		"nothing":                             "",
		"half a request line":                 "GET /v1/sta",
		"half a head":                         "GET /v1/status HTTP/1.1\r\nHost:",
		"half a body":                         "POST /v1/upgrade HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
		"half a signed order":                 "POST /v1/destroy HTTP/1.1\r\nHost: x\r\nContent-Type: " + order.PayloadType + "\r\nContent-Length: 1000\r\n\r\n{",
		"half a chunk":                        "POST /v1/upgrade HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n10000\r\nx",
		"a follower that hangs":               "GET /v1/events?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n",
		"a whole request, its answer unread":  "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
		"garbage":                             strings.Repeat("\xff\xfe\r\n{", 20000),
		"a long head":                         "GET / HTTP/1.1\r\nX: " + strings.Repeat("a", 100000),
		"a NUL":                               "\x00",
		"half a tag":                          "\x00abc",
		"a tag that is too long":              "\x00" + strings.Repeat("a", 40) + "\n",
		"somebody else's request with a tag":  "\x00cafe\nGET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
		"an unsigned destroy with more after": "POST /v1/destroy HTTP/1.1\r\nHost: x\r\n\r\nPOST /v1/destroy HTTP/1.1\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			_ = host.SetDeadline(time.Now().Add(time.Minute))
			go func() {
				_, _ = io.WriteString(host, before)
				_, _ = io.WriteString(host, "\x00f00d\nGET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
			}()
			expectStatus(t, r, "\x00f00d\n")
		})
	}
}

// expectStatus passes over everything before mark and reads a status after it.
func expectStatus(t testing.TB, r *bufio.Reader, mark string) {
	t.Helper()
	for seen := ""; !strings.HasSuffix(seen, mark); {
		b, err := r.ReadByte()
		if err != nil {
			t.Fatalf("no answer: %v", err)
		}
		if seen += string(b); len(seen) > 2*len(mark) {
			seen = seen[len(seen)-len(mark):]
		}
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || !bytes.Contains(body, []byte(`"ready"`)) {
		t.Fatalf("status %d, %s, %v", resp.StatusCode, body, err)
	}
}

// Without NUL bytes it is plain HTTP/1.1, one request after the other; half a
// request ends by its time.
func TestSerialPlain(t *testing.T) {
	a, _ := signing(t)
	host := servePair(t, a)
	r := bufio.NewReader(host)
	_ = host.SetDeadline(time.Now().Add(time.Minute))
	for range 3 {
		_, _ = io.WriteString(host, "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
		expectStatus(t, r, "")
	}
	_, _ = io.WriteString(host, "GET /v1/sta")
	time.Sleep(headerTimeout + 2*serialSilence + time.Second)
	_, _ = io.WriteString(host, "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
	expectStatus(t, r, "\r\n\r\n400 Bad Request")
}

// partings is a port that tells of a client's parting late: its next reads say so,
// after the successor's request has been read.
type partings struct {
	Port
	left atomic.Int32
}

func (p *partings) Read(b []byte) (int, error) {
	if p.left.Add(-1) >= 0 {
		return 0, io.EOF
	}
	return p.Port.Read(b)
}

func TestSerialPartingToldLate(t *testing.T) {
	a, _ := signing(t)
	guest, host := pair(t)
	port := &partings{Port: guest}
	l := &line{port: port, conns: make(chan net.Conn), done: make(chan struct{})}
	l.framer.to = l
	s := NewServer(a, discard)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() { defer close(served); _ = s.http.Serve(l) }()
	t.Cleanup(func() { cancel(); _ = host.Close(); _ = s.http.Close(); <-served })

	// Half of a request is there when the kernel says that nobody is.
	request := "\x00cafe\nGET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"
	l.framer.feed([]byte(request[:len(request)-10]))
	port.left.Store(int32(serialAway/serialGone) - 1)
	go func() { _ = l.read(ctx) }()
	_, _ = io.WriteString(host, request[len(request)-10:])
	_ = host.SetDeadline(time.Now().Add(time.Minute))
	expectStatus(t, bufio.NewReader(host), "\x00cafe\n")

	// Nobody for longer than that: what has begun is void.
	first := bufio.NewReader(host)
	_, _ = io.WriteString(host, "GET /v1/sta")
	time.Sleep(2 * serialGone)
	port.left.Store(int32(serialAway / serialGone))
	_, _ = io.WriteString(host, "x") // ends the read that waits
	time.Sleep(serialAway + 3*serialGone)
	_, _ = io.WriteString(host, "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
	expectStatus(t, first, "")
}

// A host that asks and never reads is left after its time, and its next
// question is answered. An order that it gave goes on.
func TestSerialSlowReader(t *testing.T) {
	a, k := signing(t)
	finished := make(chan error, 1)
	begun := make(chan struct{})
	a.destroy = func(ctx context.Context) error {
		close(begun)
		for range 3000 { // more than the stream holds
			a.emit(strings.Repeat("x", 400))
		}
		finished <- ctx.Err()
		return nil
	}
	host := servePair(t, a)
	ch := challengeOver(t, host)
	document := answer(t, k, ch, order.Destroy, nil)
	_, _ = fmt.Fprintf(host, "POST /v1/destroy HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", order.PayloadType, len(document), document)
	<-begun
	if err := <-finished; err != nil {
		t.Errorf("the order was cancelled: %v", err)
	}
	// It comes back and begins anew, with all that it left unread before it.
	_ = host.SetDeadline(time.Now().Add(time.Minute))
	go func() { _, _ = io.WriteString(host, "\x00abcd\nGET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n") }()
	expectStatus(t, bufio.NewReader(host), "\x00abcd\n")
}

func challengeOver(t *testing.T, host net.Conn) *order.Challenge {
	t.Helper()
	_, _ = io.WriteString(host, "GET /v1/challenge HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(host), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var ch order.Challenge
	if err := json.NewDecoder(resp.Body).Decode(&ch); err != nil {
		t.Fatal(err)
	}
	return &ch
}

// The port is open only while the policy in force says so.
func TestSerialByPolicy(t *testing.T) {
	a, _ := signing(t)
	set := func(on bool) {
		a.mu.Lock()
		a.rules.Control.VirtioSerial = on
		a.mu.Unlock()
		a.emit("policy")
	}
	set(false)
	guest, host := pair(t)
	opened := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	open := once(guest)
	go func() {
		defer close(done)
		NewServer(a, discard).ServeSerial(ctx, func() (Port, error) { opened <- struct{}{}; return open() })
	}()
	select {
	case <-opened:
		t.Error("opened without a policy that says so")
	case <-time.After(100 * time.Millisecond):
	}
	set(true)
	<-opened
	_ = host.SetDeadline(time.Now().Add(time.Minute))
	_, _ = io.WriteString(host, "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
	r := bufio.NewReader(host)
	expectStatus(t, r, "")
	set(false)
	if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("the port is open against the policy: %v", err)
	}
	cancel()
	<-done
}

func TestOpenPortRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, file + "x"} {
		if p, err := OpenPort(path); err == nil {
			_ = p.Close()
			t.Errorf("%s was opened", path)
		}
	}
}

func TestSerialClientWithoutAgent(t *testing.T) {
	_, err := NewSerialClient(filepath.Join(t.TempDir(), "none"), 0).Status(t.Context())
	if cause.Of(err) != cause.AgentUnavailable {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "mute")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := NewSerialClient(path, 50*time.Millisecond).Status(t.Context()); cause.Of(err) != cause.AgentUnavailable {
		t.Errorf("a guest that does not answer: %v", err)
	}
}

// parts writes down what a framer says.
type parts struct{ text strings.Builder }

func (p *parts) anew()           { p.text.WriteString("|") }
func (p *parts) tagged(s string) { p.text.WriteString("<" + s + ">") }
func (p *parts) data(b []byte)   { p.text.Write(b) }

func TestFramer(t *testing.T) {
	for in, want := range map[string]string{
		"GET":                                   "GET",
		"\x00ab1\nGET":                          "|<ab1>GET",
		"GE\x00ab1\nGET\x00\x00c\n":             "GE|<ab1>GET||<c>",
		"\x00GET":                               "|GET",
		"\x00abG":                               "|abG",
		"\x00\nx":                               "|\nx",
		"\x00" + strings.Repeat("a", 33) + "\n": "|" + strings.Repeat("a", 33) + "\n",
	} {
		for cut := range len(in) + 1 {
			p := &parts{}
			f := framer{to: p}
			f.feed([]byte(in[:cut]))
			f.feed([]byte(in[cut:]))
			if p.text.String() != want {
				t.Errorf("%q cut at %d: %q, expected %q", in, cut, &p.text, want)
			}
		}
	}
}

// However the stream is cut, its parts are the same, and no data holds a NUL.
func FuzzFramer(f *testing.F) {
	f.Add([]byte("GE\x00ab1\nGET / HTTP/1.1\r\n\r\n\x00\x00c\n"), 3)
	f.Add([]byte("\x00"+strings.Repeat("a", 40)), 33)
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		whole, pieces := &parts{}, &parts{}
		(&framer{to: whole}).feed(in)
		cut := framer{to: pieces}
		size = max(1, size&0xff)
		for rest := in; len(rest) > 0; rest = rest[min(size, len(rest)):] {
			cut.feed(rest[:min(size, len(rest))])
		}
		if whole.text.String() != pieces.text.String() {
			t.Fatalf("%q in one, %q in pieces of %d", &whole.text, &pieces.text, size)
		}
		if strings.Contains(whole.text.String(), "\x00") {
			t.Fatal("a NUL in the data")
		}
	})
}

// Whatever a host sends, no order gets through and the next request is answered.
func FuzzSerial(f *testing.F) {
	f.Add([]byte("POST /v1/destroy HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"))
	f.Add([]byte("POST /v1/upgrade HTTP/1.1\r\nHost: x\r\nContent-Type: " + order.PayloadType + "\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"ord"))
	f.Add([]byte("GET /v1/events?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n\x00\x00ab\n"))
	a := newAgent()
	a.rules.Control.VirtioSerial = true
	a.identity = Identity{Policy: "shop", BootID: testBoot}
	a.destroy = func(context.Context) error { panic("an order got through") }
	a.upgrade = a.destroy
	host := servePair(f, a)
	r := bufio.NewReader(host)
	n := 0
	f.Fuzz(func(t *testing.T, in []byte) {
		n++
		mark := fmt.Sprintf("\x00%032x\n", n)
		_ = host.SetDeadline(time.Now().Add(time.Minute))
		go func() {
			_, _ = host.Write(append(bytes.Clone(in), mark+"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"...))
		}()
		expectStatus(t, r, mark)
	})
}
