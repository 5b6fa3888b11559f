package broker

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func TestPeerPrefix(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.7:1234":           "192.0.2.7/32",
		"[2001:db8:1:2:3::4]:1":    "2001:db8:1:2::/64",
		"[2001:db8:1:2:ffff::9]:2": "2001:db8:1:2::/64",
		"[::ffff:192.0.2.7]:1":     "192.0.2.7/32", // one peer by either spelling
		"[fe80::1%eth0]:1":         "fe80::/64",
		"not an address":           "invalid Prefix",
	} {
		if got := peerPrefix(remote).String(); got != want {
			t.Errorf("%s: %s, expected %s", remote, got, want)
		}
	}
}

func TestPeersAreLimitedEachAlone(t *testing.T) {
	now := time.Unix(1000, 0)
	p := newPeers(10, 3, func() time.Time { return now })
	for i := range 3 {
		if ok, _ := p.admit("192.0.2.1:1"); !ok {
			t.Fatalf("request %d of a burst of 3", i+1)
		}
	}
	ok, wait := p.admit("192.0.2.1:2") // another port is the same peer
	if ok || wait <= 0 || wait > 100*time.Millisecond {
		t.Errorf("over the burst: %v, %s", ok, wait)
	}
	if ok, _ := p.admit("192.0.2.2:1"); !ok {
		t.Error("another peer has to wait")
	}
	now = now.Add(wait)
	if ok, _ := p.admit("192.0.2.1:3"); !ok {
		t.Error("after the wait that was asked for")
	}
	if ok, _ := p.admit("192.0.2.1:3"); ok {
		t.Error("a refused request gave its place back twice")
	}
	p.most = 100
	for i := range 10000 {
		p.admit(fmt.Sprintf("[2001:db8:%x::1]:1", i))
	}
	if len(p.known) != 100 || p.order.Len() != 100 {
		t.Errorf("%d peers are remembered, at most 100", len(p.known))
	}
}

// A peer over its rate gets 429 in the protocol's form; /healthz answers.
func TestARateOverTheLimit(t *testing.T) {
	r := start(t, nil, func(c *Config) { c.Limits.PeerRate, c.Limits.PeerBurst = 1, 5 })
	limited := 0
	began := time.Now()
	for range 40 {
		resp, err := r.http.Get(r.url + kbs.PathResource + "a/b/c")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusTooManyRequests {
			continue
		}
		limited++
		if after := resp.Header.Get("Retry-After"); variant(t, resp.StatusCode, string(body)) != kbs.VariantRateLimited || after == "" || after == "0" {
			t.Errorf("%s, Retry-After %q", body, after)
		}
	}
	// One more for each second that went by.
	if least := 40 - 5 - 1 - int(time.Since(began)/time.Second); limited < least || limited > 35 {
		t.Errorf("%d of 40 requests were limited with a burst of 5, expected %d to 35", limited, least)
	}
	if status, body, _ := r.call(t, "GET", "/healthz", "", "", ""); status != 200 || body != "ok\n" {
		t.Errorf("healthz: %d %s", status, body)
	}
	if strings.Contains(r.logs.String(), kbs.VariantRateLimited) {
		t.Error("each limited request is a line of log")
	}
}

func TestConnectionsOfOnePeer(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := limitPeers(inner, 2)
	defer l.Close()
	accepted := make(chan net.Conn, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	dial()
	dial()
	first := <-accepted
	second := <-accepted
	over := dial()
	if err := over.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := over.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("a third connection was left open: %v", err)
	}
	_ = first.Close()
	_ = first.Close() // counted once
	dial()
	third := <-accepted
	over = dial()
	if err := over.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := over.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("two closes of one connection made two places: %v", err)
	}
	_, _ = second.Close(), third.Close()
}

// The table of peers is used by every request at once.
func TestPeersConcurrently(t *testing.T) {
	p := newPeers(1000, 1000, time.Now)
	p.most = 16
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				p.admit(fmt.Sprintf("192.0.2.%d:1", (w*i)%64))
			}
		})
	}
	wg.Wait()
	if p.order.Len() != 16 || len(p.known) != 16 {
		t.Errorf("%d and %d peers", p.order.Len(), len(p.known))
	}
}
