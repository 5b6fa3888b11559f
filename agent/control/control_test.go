package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// TestMain lets a copy of the test binary be a client under another user.
func TestMain(m *testing.M) {
	if spec := os.Getenv("CONTROL_TEST_CLIENT"); spec != "" { // uid group socket method path
		f := strings.Fields(spec)
		uid, _ := strconv.Atoi(f[0])
		gid, _ := strconv.Atoi(f[1])
		if err := syscall.Setgroups([]int{gid}); err != nil {
			panic(err)
		}
		if err := syscall.Setgid(uid); err != nil {
			panic(err)
		}
		if err := syscall.Setuid(uid); err != nil {
			panic(err)
		}
		c := NewClient(f[2])
		req, _ := http.NewRequest(f[3], "http://x"+f[4], nil)
		resp, err := c.http.Do(req)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(resp.StatusCode)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var discard = slog.New(slog.DiscardHandler)

// agent is a scripted Agent.
type agent struct {
	mu       sync.Mutex
	events   []Event
	more     chan struct{}
	rules    Rules
	identity Identity
	order    []byte
	upgrade  func(ctx context.Context) error
	destroy  func(ctx context.Context) error
}

func newAgent() *agent { return &agent{more: make(chan struct{}), rules: Rules{OperatorGID: -1}} }

func (a *agent) emit(phase string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.events = append(a.events, Event{Seq: uint64(len(a.events) + 1), Phase: Phase{Name: phase, Outcome: OK}})
	close(a.more)
	a.more = make(chan struct{})
}

func (a *agent) Status() Status {
	return Status{State: StateReady, Policy: &Policy{Name: "p", Version: 3}}
}
func (a *agent) Rules() Rules {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rules
}
func (a *agent) Identity() Identity { return a.identity }
func (a *agent) Events(after uint64) ([]Event, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.events[min(after, uint64(len(a.events))):], a.more
}
func (a *agent) Upgrade(ctx context.Context, order []byte) error {
	a.mu.Lock()
	a.order = order
	a.mu.Unlock()
	return a.upgrade(ctx)
}
func (a *agent) Destroy(ctx context.Context) error { return a.destroy(ctx) }

// serve starts a server and returns its socket.
func serve(t *testing.T, a Agent) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "control.sock")
	l, err := Listen(socket, -1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(a, discard).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(dir)
	})
	return socket
}

func TestReadsAndStreams(t *testing.T) {
	a := newAgent()
	socket := serve(t, a)
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	c := NewClient(socket)
	st, err := c.Status(t.Context())
	if err != nil || st.Policy.Version != 3 {
		t.Fatalf("%+v, %v", st, err)
	}
	a.emit("policy")
	a.emit("attest")
	var names []string
	if err := c.Events(t.Context(), false, func(e Event) error { names = append(names, e.Name); return nil }); err != nil || strings.Join(names, " ") != "policy attest" {
		t.Errorf("%v, %v", names, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	names = nil
	if err := c.Events(ctx, true, func(e Event) error {
		names = append(names, e.Name)
		switch len(names) {
		case 2:
			go a.emit("resolve")
		case 3:
			cancel()
		}
		return nil
	}); err != nil || strings.Join(names, " ") != "policy attest resolve" {
		t.Errorf("%v, %v", names, err)
	}
}

func TestOrders(t *testing.T) {
	a := newAgent()
	socket := serve(t, a)
	c := NewClient(socket)
	for name, tc := range map[string]struct {
		upgrade func(context.Context) error
		code    cause.Code
		events  string
	}{
		"an upgrade that works streams its steps": {func(context.Context) error { a.emit("stage"); a.emit("commit"); return nil }, "", "stage commit"},
		"one that rolls back ends with its cause": {func(context.Context) error { a.emit("stage"); return cause.New(cause.UpgradeRolledBack, "unhealthy") }, cause.UpgradeRolledBack, "stage"},
		"one that is not admitted says why":       {func(context.Context) error { return cause.New(cause.Busy, "an upgrade is under way") }, cause.Busy, ""},
		"one before the launch is ready":          {func(context.Context) error { return cause.New(cause.NotReady, "launch is at fetch") }, cause.NotReady, ""},
	} {
		t.Run(name, func(t *testing.T) {
			a.upgrade = tc.upgrade
			var events []string
			err := c.Upgrade(t.Context(), []byte("policy"), func(e Event) { events = append(events, e.Name) })
			if cause.Of(err) != tc.code || strings.Join(events, " ") != tc.events {
				t.Errorf("%v with events %v, expected %q and %q", err, events, tc.code, tc.events)
			}
			if string(a.order) != "policy" {
				t.Errorf("order %q", a.order)
			}
		})
	}
	t.Run("an order goes on when its caller leaves", func(t *testing.T) {
		begun, finished := make(chan struct{}), make(chan error, 1)
		leave, cancel := context.WithCancel(t.Context())
		a.upgrade = func(ctx context.Context) error {
			close(begun)
			<-leave.Done()
			time.Sleep(50 * time.Millisecond)
			finished <- ctx.Err()
			return nil
		}
		go func() { <-begun; cancel() }()
		if err := c.Upgrade(leave, []byte("x"), nil); err == nil {
			t.Error("expected an error for the caller that left")
		}
		if err := <-finished; err != nil {
			t.Errorf("the order was cancelled: %v", err)
		}
	})
}

func TestRefusals(t *testing.T) {
	a := newAgent()
	socket := serve(t, a)
	a.upgrade = func(context.Context) error { t.Error("an order got through"); return nil }
	a.destroy = a.upgrade
	c := NewClient(socket)
	for name, tc := range map[string]struct {
		method, path string
		body         io.Reader
		status       int
	}{
		"an unknown path":           {"GET", "/v1/other", nil, 404},
		"a wrong method":            {"GET", "/v1/upgrade", nil, 405},
		"an unknown parameter":      {"GET", "/v1/events?tail=1", nil, 400},
		"a bad parameter":           {"GET", "/v1/events?follow=yes", nil, 400},
		"an empty upgrade":          {"POST", "/v1/upgrade", nil, 400},
		"a body too large, chunked": {"POST", "/v1/upgrade", struct{ io.Reader }{bytes.NewReader(make([]byte, MaxOrder+1))}, 413},
		"a destroy with a body":     {"POST", "/v1/destroy", strings.NewReader("{}"), 400},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequest(tc.method, "http://x"+tc.path, tc.body)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != tc.status {
				t.Errorf("status %d, expected %d", resp.StatusCode, tc.status)
			}
		})
	}
}

func TestRules(t *testing.T) {
	r := Rules{OperatorGID: 500, Control: policy.Control{ReadUIDs: []uint32{1}, OrderUIDs: []uint32{2}}}
	for name, tc := range map[string]struct {
		c           Caller
		read, order bool
	}{
		"root":                               {Caller{Transport: TransportUnix, UID: 0}, true, true},
		"a reader":                           {Caller{Transport: TransportUnix, UID: 1}, true, false},
		"an orderer":                         {Caller{Transport: TransportUnix, UID: 2}, true, true},
		"an operator by supplementary group": {Caller{Transport: TransportUnix, UID: 9, Groups: []uint32{100, 500}}, true, true},
		"the host, on a serial port":         {Caller{Transport: TransportSerial, UID: 0}, false, false},
		"root on a transport of no name":     {Caller{UID: 0}, false, false},
		"anybody else":                       {Caller{Transport: TransportUnix, UID: 9, Groups: []uint32{100}}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			if r.MayRead(tc.c) != tc.read || r.MayOrder(tc.c) != tc.order {
				t.Errorf("read %v, order %v", r.MayRead(tc.c), r.MayOrder(tc.c))
			}
		})
	}
	if (Rules{OperatorGID: -1}).MayOrder(Caller{Transport: TransportUnix, UID: 9, Groups: []uint32{0, 4294967295}}) {
		t.Error("without an operator group nobody is a member")
	}
}

func TestPeerCredentials(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("needs root to act as other users")
	}
	a := newAgent()
	a.rules = Rules{OperatorGID: 45678, Control: policy.Control{ReadUIDs: []uint32{11111}, OrderUIDs: []uint32{22222}}}
	a.destroy = func(context.Context) error { return nil }
	socket := serve(t, a)
	// The mode of the socket is the outer wall; open it to see the inner one.
	for path, mode := range map[string]os.FileMode{filepath.Dir(socket): 0o755, socket: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct{ who, read, order string }{
		"a uid that nobody named":            {"33333 33333", "403", "403"},
		"a reader":                           {"11111 11111", "200", "403"},
		"an orderer":                         {"22222 22222", "200", "200"},
		"an operator by supplementary group": {"33333 45678", "200", "200"},
	} {
		t.Run(name, func(t *testing.T) {
			for request, want := range map[string]string{"GET /v1/status": tc.read, "POST /v1/destroy": tc.order} {
				cmd := exec.Command("/proc/self/exe")
				cmd.Env = append(os.Environ(), "CONTROL_TEST_CLIENT="+tc.who+" "+socket+" "+request)
				out, err := cmd.CombinedOutput()
				if err != nil || strings.TrimSpace(string(out)) != want {
					t.Errorf("%s: %s (%v), expected %s", request, out, err, want)
				}
			}
		})
	}
}

// A slow client, a body of 1 GB and 10 000 connections are bounded, and others
// are still served.
func TestLesson32_BoundedSocket(t *testing.T) {
	a := newAgent()
	a.upgrade = func(context.Context) error { t.Error("an order got through"); return nil }
	socket := serve(t, a)
	served := func(what string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := NewClient(socket).Status(ctx); err != nil {
			t.Errorf("%s: not served: %v", what, err)
		}
	}

	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	for i := range 10_000 {
		c, err := net.Dial("unix", socket)
		// A full backlog is the kernel's bound; on a busy machine it is met.
		for wait := time.Now(); errors.Is(err, syscall.EAGAIN) && time.Since(wait) < 30*time.Second; c, err = net.Dial("unix", socket) {
			time.Sleep(time.Millisecond)
		}
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		// Half of them begin a request and never end it.
		if i%2 == 0 {
			_, _ = io.WriteString(c, "GET /v1/status HTTP/1.1\r\nHost:")
		}
		if open = append(open, c); len(open) > 200 { // what the test itself holds
			_ = open[0].Close()
			open = open[1:]
		}
	}
	served("10 000 connections")
	alive := 0
	for _, c := range open {
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); err != nil && os.IsTimeout(err) {
			alive++
		}
	}
	if alive > maxConns {
		t.Errorf("%d connections are open, expected at most %d", alive, maxConns)
	}

	slow, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	_, _ = io.WriteString(slow, "POST /v1/upgrade HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
	served("a slow body")

	_ = slow.SetReadDeadline(time.Now().Add(bodyTimeout + 5*time.Second))
	big, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer big.Close()
	_, _ = fmt.Fprintf(big, "POST /v1/upgrade HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
	chunk := append([]byte("100000\r\n"), append(make([]byte, 1<<20), "\r\n"...)...)
	sent := 0
	for ; sent < 1<<30; sent += 1 << 20 {
		_ = big.SetWriteDeadline(time.Now().Add(5 * time.Second))
		if _, err := big.Write(chunk); err != nil {
			break
		}
	}
	if sent > 4*MaxOrder {
		t.Errorf("the server took %d MiB of a body, the limit is %d MiB", sent>>20, MaxOrder>>20)
	}
	served("a body of 1 GB")

	long, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer long.Close()
	_, _ = io.WriteString(long, "GET /v1/status HTTP/1.1\r\nX: "+strings.Repeat("a", 1<<20)+"\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(long), nil)
	if err == nil && resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of 1 MiB: status %d", resp.StatusCode)
	}
	served("a long header")
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.sock")
	l, err := Listen(path, -1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, -1); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("second listener: %v", err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	l, err = Listen(path, -1) // a stale socket is replaced
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file, -1); err == nil {
		t.Error("a regular file was replaced")
	}
}

// Names in JSON are an interface: scripts read them.
func TestStatusJSON(t *testing.T) {
	got, err := json.Marshal(Status{State: StateReady, Agent: "1", Workloads: []Workload{{Name: "web", Healthy: true}},
		Phases: []Phase{{Sequence: "launch", Name: "resolve", Workload: "web", Outcome: OK, DurationMS: 1.5}}})
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"state":"ready","agent":"1","workloads":[{"name":"web","image":"","imageId":"","container":"","healthy":true}],` +
		`"phases":[{"sequence":"launch","phase":"resolve","workload":"web","outcome":"ok","start":"0001-01-01T00:00:00Z","durationMs":1.5}]}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
