package launch

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	orders "github.com/cc-runtime/cvm-agent/policy/order"
)

// runAgent runs the daemon and returns its client and its end.
func runAgent(t *testing.T, a *Agent) (*control.Client, chan error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "run")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "c.sock")
	l, err := control.Listen(socket, -1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx, l); close(ended) }()
	t.Cleanup(func() {
		cancel()
		<-ended
		_ = os.RemoveAll(dir)
	})
	return control.NewClient(socket), ended
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for range 12000 {
		if is() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal(what)
}

func TestPowerOffAfterDestroy(t *testing.T) {
	for name, tc := range map[string]struct {
		on       bool
		fail     string
		code     cause.Code
		poweroff bool
	}{
		"a destroy in the image ends the machine":               {true, "", "", true},
		"so does one that leaves something":                     {true, "wipe-all", cause.DestroyFailed, true},
		"on a plain host the machine is not the agent's to end": {false, "", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.policies["v1"] = testPolicy(1, "web")
			a, q := newTestAgent(t, w, t.TempDir())
			a.config.PowerOffOnDestroy, a.destroyGrace, a.destroyAgain = tc.on, 10*time.Millisecond, 10*time.Millisecond
			c, ended := runAgent(t, a)
			eventually(t, "not ready", func() bool { return a.Status().State == control.StateReady })
			if tc.fail != "" {
				w.mu.Lock()
				w.fail[tc.fail] = func() error { return cause.New(cause.DestroyFailed, "said so") }
				w.mu.Unlock()
			}
			if err := c.Destroy(t.Context(), nil); cause.Of(err) != tc.code {
				t.Fatalf("%v, expected %q", err, tc.code)
			}
			if !tc.poweroff {
				time.Sleep(100 * time.Millisecond)
				if q.has("POWEROFF") || a.Status().State != control.StateDestroyed {
					t.Errorf("powered off, or state %s", a.Status().State)
				}
				return
			}
			if err := <-ended; err != nil || !q.has("POWEROFF") {
				t.Errorf("ended with %v; powered off: %v", err, q.has("POWEROFF"))
			}
		})
	}
}

// An instance that was destroyed before ends its machine again at a restart of
// the daemon: it never stays up.
func TestPowerOffOfADestroyedInstance(t *testing.T) {
	a, w, _ := launched(t)
	if err := a.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, q := newTestAgent(t, w, strings.TrimSuffix(a.config.StateDir, "/state"))
	again.config.PowerOffOnDestroy, again.destroyGrace = true, 10*time.Millisecond
	_, ended := runAgent(t, again)
	if err := <-ended; err != nil || !q.has("POWEROFF") {
		t.Errorf("ended with %v; powered off: %v", err, q.has("POWEROFF"))
	}
}

func TestFailureWait(t *testing.T) {
	for name, tc := range map[string]struct {
		code  cause.Code
		waits bool
	}{
		"a refusal is shown for a while":        {cause.ManifestMismatch, true},
		"an outage ends at once, to be retried": {cause.StorageFull, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.policies["v1"] = testPolicy(1, "web")
			w.fail["resolve"] = func() error { return cause.New(tc.code, "said so") }
			a, _ := newTestAgent(t, w, t.TempDir())
			a.config.FailureWait = time.Hour
			c, ended := runAgent(t, a)
			if !tc.waits {
				if err := <-ended; cause.Of(err) != tc.code {
					t.Error(err)
				}
				return
			}
			eventually(t, "the cause does not show", func() bool { return a.Status().Cause == string(tc.code) })
			if err := c.Destroy(t.Context(), nil); cause.Of(err) != cause.NotReady {
				t.Errorf("an order to a launch that failed: %v", err)
			}
			select {
			case err := <-ended:
				t.Errorf("ended at once: %v", err)
			default:
			}
		})
	}
}

func TestVSOCKIsRefused(t *testing.T) {
	w := newWorld()
	p := testPolicy(1, "web")
	p.Control.VSOCK = true
	w.policies["v1"] = p
	a, _ := newTestAgent(t, w, t.TempDir())
	if err := a.launch(t.Context()); cause.Of(err) != cause.PolicyInvalid || !strings.Contains(err.Error(), "vsock") {
		t.Errorf("at launch: %v", err)
	}
	if w.log.Log != nil && w.log.kinds() != "" {
		t.Errorf("measured: %s", w.log.kinds())
	}
	a, w, _ = launched(t)
	p = testPolicy(2, "web")
	p.Control.VSOCK = true
	w.policies["v2"] = p
	if err := a.Upgrade(t.Context(), []byte("v2")); cause.Of(err) != cause.PolicyInvalid {
		t.Errorf("at upgrade: %v", err)
	}
	if got := w.log.kinds(); got != "policy image" {
		t.Errorf("measured: %s", got)
	}
}

func TestMachineConfig(t *testing.T) {
	const trust = "trust: {signers: [" + "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + "]}\n"
	c, err := DecodeConfig([]byte(trust + "powerOffOnDestroy: true\nfailureWait: 60s\ncontrolSerial: \"\"\n"))
	if err != nil || !c.PowerOffOnDestroy || c.FailureWait != time.Minute || c.ControlSerial != "" {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err = DecodeConfig([]byte(trust)); err != nil || c.PowerOffOnDestroy || c.FailureWait != 0 || c.ControlSerial != "/dev/virtio-ports/org.cvm-agent.control" {
		t.Errorf("by default: %+v, %v", c, err)
	}
	for _, bad := range []string{"failureWait: 11m", "failureWait: -1s", "controlSerial: port", "powerOffOnDestroy: maybe"} {
		if _, err := DecodeConfig([]byte(trust + bad + "\n")); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}

// The whole way: a policy opens the port, the host asks and orders over it.
func TestSerialOrder(t *testing.T) {
	k := dssetest.New(t, "ecdsa")
	w := newWorld()
	p := testPolicy(1, "web")
	p.Control = policy.Control{VirtioSerial: true, OrderKeys: []policy.OrderKey{{Key: k.PEM, Orders: []string{"destroy"}}}}
	w.policies["v1"] = p
	a, _ := newTestAgent(t, w, t.TempDir())
	// A pty is a character device that can be waited for, as the port is.
	host, guest := openPTY(t)
	a.config.ControlSerial = guest
	_, _ = runAgent(t, a)
	eventually(t, "not ready", func() bool { return a.Status().State == control.StateReady })

	_ = host.SetDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReader(host)
	ask := func(request, body string) string {
		_, _ = fmt.Fprintf(host, "\x00ab\n%s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", request, orders.PayloadType, len(body), body)
		if _, err := r.ReadString(0); err != nil {
			t.Fatal(err)
		}
		if mark, err := r.ReadString('\n'); err != nil || mark != "ab\n" {
			t.Fatalf("%q, %v", mark, err)
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	id := a.Identity()
	if id.InstanceID != "i-1" || id.Policy != "shop" || id.BootID == "" {
		t.Errorf("%+v", id)
	}
	var ch orders.Challenge
	if err := json.Unmarshal([]byte(ask("GET /v1/challenge", "")), &ch); err != nil {
		t.Fatal(err)
	}
	document, err := orders.Sign(orders.Order{Operation: orders.Destroy, Policy: ch.Policy, InstanceID: ch.InstanceID, BootID: ch.BootID,
		Challenge: ch.Challenge, Expires: time.Now().Add(time.Minute).UTC().Format(time.RFC3339)}, nil, k)
	if err != nil {
		t.Fatal(err)
	}
	if got := ask("POST /v1/destroy", string(document)); !strings.Contains(got, `{"result":{"outcome":"ok"}}`) {
		t.Errorf("destroy: %s", got)
	}
	if a.Status().State != control.StateDestroyed {
		t.Error(a.Status().State)
	}
}

// openPTY returns a raw terminal's master and the path of its slave.
func openPTY(t *testing.T) (master *os.File, slave string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	number := 0
	if err := raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
		if err == nil {
			_, err = term.MakeRaw(int(fd))
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return master, fmt.Sprintf("/dev/pts/%d", number)
}
