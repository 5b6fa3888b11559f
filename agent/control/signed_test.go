package control

import (
	"bytes"
	"context"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/order"
)

const testBoot = "0f1e2d3c-0000-4000-8000-0123456789ab"

// signing returns an agent whose policy names the key for both orders, with the
// serial port open.
func signing(t *testing.T) (*agent, *dssetest.Key) {
	t.Helper()
	k := dssetest.New(t, "ecdsa")
	a := newAgent()
	a.identity = Identity{Policy: "shop", InstanceID: "i-1", BootID: testBoot}
	a.rules.Control = policy.Control{VirtioSerial: true, OrderKeys: []policy.OrderKey{{Key: k.PEM, Orders: []string{"upgrade", "destroy"}}}}
	return a, k
}

// answer makes the order that answers the challenge.
func answer(t *testing.T, k *dssetest.Key, ch *order.Challenge, operation string, carried []byte) []byte {
	t.Helper()
	data, err := order.Sign(order.Order{Operation: operation, Policy: ch.Policy, InstanceID: ch.InstanceID, BootID: ch.BootID,
		Challenge: ch.Challenge, Expires: time.Now().Add(5 * time.Minute).UTC().Format(time.RFC3339)}, carried, k)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// transports are the ways to a server that takes signed orders.
var transports = map[string]func(t *testing.T, a *agent) *Client{
	"the local socket": func(t *testing.T, a *agent) *Client { return NewClient(serve(t, a)) },
	"the serial port":  func(t *testing.T, a *agent) *Client { return NewSerialClient(serveSerial(t, a), 0) },
}

func TestSignedOrders(t *testing.T) {
	for transport, connect := range transports {
		t.Run(transport, func(t *testing.T) {
			a, k := signing(t)
			var destroyed, upgraded atomic.Int32
			a.destroy = func(context.Context) error { destroyed.Add(1); a.emit("latch"); return nil }
			a.upgrade = func(context.Context) error { upgraded.Add(1); return cause.New(cause.UpgradeRolledBack, "unhealthy") }
			c := connect(t, a)

			ch, err := c.Challenge(t.Context())
			if err != nil || ch.Policy != "shop" || ch.InstanceID != "i-1" || ch.BootID != testBoot || !ch.Expires.After(time.Now()) {
				t.Fatalf("%+v, %v", ch, err)
			}
			up := answer(t, k, ch, order.Upgrade, []byte("a signed policy"))
			if err := c.Signed(t.Context(), up, nil); cause.Of(err) != cause.UpgradeRolledBack {
				t.Errorf("upgrade: %v", err)
			}
			if string(a.order) != "a signed policy" {
				t.Errorf("the order carried %q", a.order)
			}
			if err := c.Signed(t.Context(), up, nil); cause.Of(err) != cause.OrderReplayed {
				t.Errorf("the same order again: %v", err)
			}
			if err := c.Signed(t.Context(), answer(t, k, ch, order.Destroy, nil), nil); cause.Of(err) != cause.OrderReplayed {
				t.Errorf("another order with the same challenge: %v", err)
			}
			if ch, err = c.Challenge(t.Context()); err != nil {
				t.Fatal(err)
			}
			for name, tc := range map[string]struct {
				change func(*order.Challenge)
				key    *dssetest.Key
				code   cause.Code
			}{
				"a challenge that was never given out": {func(c *order.Challenge) { c.Challenge = strings.Repeat("0", 64) }, k, cause.OrderChallenge},
				"another instance":                     {func(c *order.Challenge) { c.InstanceID = "i-2" }, k, cause.OrderOtherInstance},
				"another boot":                         {func(c *order.Challenge) { c.BootID = "1" + testBoot[1:] }, k, cause.OrderOtherBoot},
				"another policy":                       {func(c *order.Challenge) { c.Policy = "other" }, k, cause.OrderOtherPolicy},
				"a stranger's key":                     {func(*order.Challenge) {}, dssetest.New(t, "ecdsa"), cause.OrderSignature},
			} {
				changed := *ch
				tc.change(&changed)
				if err := c.Signed(t.Context(), answer(t, tc.key, &changed, order.Destroy, nil), nil); cause.Of(err) != tc.code {
					t.Errorf("%s: %v, expected %s", name, err, tc.code)
				}
			}
			// None of these has used the challenge up.
			var events []string
			if err := c.Signed(t.Context(), answer(t, k, ch, order.Destroy, nil), func(e Event) { events = append(events, e.Name) }); err != nil || strings.Join(events, " ") != "latch" {
				t.Errorf("destroy: %v, %v", err, events)
			}
			if destroyed.Load() != 1 || upgraded.Load() != 1 {
				t.Errorf("%d destroys and %d upgrades were carried out, expected one of each", destroyed.Load(), upgraded.Load())
			}
		})
	}
}

// Whoever sends one order many times at once gets it carried out once.
func TestSignedOrderOnceInARace(t *testing.T) {
	a, k := signing(t)
	var done atomic.Int32
	a.destroy = func(context.Context) error { done.Add(1); return nil }
	c := NewClient(serve(t, a))
	ch, err := c.Challenge(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	document := answer(t, k, ch, order.Destroy, nil)
	var ok, replayed atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			switch err := c.Signed(t.Context(), document, nil); cause.Of(err) {
			case "":
				ok.Add(1)
			case cause.OrderReplayed:
				replayed.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if ok.Load() != 1 || replayed.Load() != 15 || done.Load() != 1 {
		t.Errorf("%d accepted, %d replayed, %d carried out", ok.Load(), replayed.Load(), done.Load())
	}
}

// What comes over the serial port without a signature is nobody's order,
// whatever the policy says of uids.
func TestUnsignedOverSerial(t *testing.T) {
	a, _ := signing(t)
	a.rules.Control.OrderUIDs = []uint32{0, 1, 4294967295}
	a.destroy = func(context.Context) error { t.Error("an order got through"); return nil }
	a.upgrade = a.destroy
	c := NewSerialClient(serveSerial(t, a), 0)
	if err := c.Destroy(t.Context(), nil); cause.Of(err) != cause.OrderUnsigned {
		t.Errorf("destroy: %v", err)
	}
	if err := c.Upgrade(t.Context(), []byte("a signed policy is no signed order"), nil); cause.Of(err) != cause.OrderUnsigned {
		t.Errorf("upgrade: %v", err)
	}
	if st, err := c.Status(t.Context()); err != nil || st.State != StateReady {
		t.Errorf("after them: %+v, %v", st, err)
	}
}

// A local caller without rights gains none by a signature, and one with rights
// none by a bad one.
func TestPeerCredentialsBesideSignature(t *testing.T) {
	a, k := signing(t)
	a.destroy = func(context.Context) error { t.Error("an order got through"); return nil }
	s := NewServer(a, discard)
	ch := &order.Challenge{Policy: "shop", InstanceID: "i-1", BootID: testBoot, Challenge: strings.Repeat("0", 64)}
	for name, tc := range map[string]struct {
		caller Caller
		code   string
	}{
		"a user that nobody named":        {Caller{Transport: TransportUnix, UID: 1234}, "not-permitted"},
		"root with an unknown challenge":  {Caller{Transport: TransportUnix}, "order-challenge-unknown"},
		"a transport that nobody listens": {Caller{Transport: "vsock"}, "not-permitted"},
	} {
		r, _ := http.NewRequest(http.MethodPost, "/v1/destroy", bytes.NewReader(answer(t, k, ch, order.Destroy, nil)))
		r.Header.Set("Content-Type", order.PayloadType)
		w := &recorder{header: http.Header{}}
		s.http.Handler.ServeHTTP(w, r.WithContext(context.WithValue(t.Context(), connKey{}, &conn{caller: tc.caller, set: &conns{}})))
		if w.status != http.StatusForbidden || !strings.Contains(w.body.String(), tc.code) {
			t.Errorf("%s: %d %s, expected %s", name, w.status, &w.body, tc.code)
		}
	}
}

type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

func TestChallengeBeforeThePolicy(t *testing.T) {
	if _, err := NewClient(serve(t, newAgent())).Challenge(t.Context()); cause.Of(err) != cause.NotReady {
		t.Error(err)
	}
}

func TestChallenges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := challenges{now: time.Now}
		first, _ := c.issue("host")
		time.Sleep(challengeLife - time.Second)
		second, _ := c.issue("host")
		if err := c.redeem(first); err != nil {
			t.Errorf("in its last second: %v", err)
		}
		if err := c.redeem(first); cause.Of(err) != cause.OrderReplayed {
			t.Errorf("twice: %v", err)
		}
		time.Sleep(challengeLife)
		if err := c.redeem(second); cause.Of(err) != cause.OrderChallenge {
			t.Errorf("after its life: %v", err)
		}

		// A reader who asks without end pushes out only its own.
		mine, _ := c.issue("operator")
		oldest, _ := c.issue("host")
		for range 10 * maxChallenges {
			_, _ = c.issue("host")
		}
		if err := c.redeem(oldest); cause.Of(err) != cause.OrderChallenge {
			t.Errorf("pushed out: %v", err)
		}
		if err := c.redeem(mine); err != nil {
			t.Errorf("another's: %v", err)
		}
		for i := range 10 * maxChallenges {
			v, _ := c.issue(string(rune(i)))
			if i%2 == 0 {
				_ = c.redeem(v)
			}
		}
		if len(c.open) > maxChallenges || len(c.used) > maxUsed {
			t.Errorf("%d open, %d used", len(c.open), len(c.used))
		}
	})
}
