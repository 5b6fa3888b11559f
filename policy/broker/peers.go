package broker

import (
	"container/list"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// maxPeers bounds the table of peers; the one that was quiet for longest goes.
// Who has that many addresses is not held by a limit for each.
const maxPeers = 1 << 16

// peers limits how often one peer asks. A peer is an IPv4 address or an IPv6
// /64, which is what one machine commonly has to itself.
type peers struct {
	every rate.Limit
	burst int
	most  int
	now   func() time.Time

	mu    sync.Mutex
	known map[netip.Prefix]*list.Element
	order *list.List // of *peerState, quiet for longest first
}

type peerState struct {
	prefix  netip.Prefix
	limiter *rate.Limiter
}

func newPeers(perSecond, burst int, now func() time.Time) *peers {
	return &peers{every: rate.Limit(perSecond), burst: burst, most: maxPeers, now: now, known: map[netip.Prefix]*list.Element{}, order: list.New()}
}

// peerPrefix is what counts as one peer; an address that is none is the zero one.
func peerPrefix(remote string) netip.Prefix {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.Prefix{}
	}
	a := ap.Addr().Unmap().WithZone("")
	bits := 64
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits)
	return p
}

// admit takes one request of a peer, or says after how long one would be.
func (p *peers) admit(remote string) (ok bool, wait time.Duration) {
	prefix, now := peerPrefix(remote), p.now()
	p.mu.Lock()
	e := p.known[prefix]
	if e == nil {
		for p.order.Len() >= p.most {
			delete(p.known, p.order.Remove(p.order.Front()).(*peerState).prefix)
		}
		e = p.order.PushBack(&peerState{prefix, rate.NewLimiter(p.every, p.burst)})
		p.known[prefix] = e
	} else {
		p.order.MoveToBack(e)
	}
	l := e.Value.(*peerState).limiter
	p.mu.Unlock()
	r := l.ReserveN(now, 1)
	if wait = r.DelayFrom(now); wait <= 0 {
		return true, 0
	}
	r.CancelAt(now)
	return false, wait
}

// limited answers a peer that asks too often. The status is not the protocol's
// 401, which clients take as final.
func limited(w http.ResponseWriter, wait time.Duration) error {
	w.Header().Set("Retry-After", strconv.Itoa(1+int(wait/time.Second)))
	e := kbs.NewError(kbs.VariantRateLimited, "too many requests from this address")
	e.Status = http.StatusTooManyRequests
	return e
}

// peerListener bounds the connections of one peer: what is over the bound is
// closed at once.
type peerListener struct {
	net.Listener
	most int

	mu   sync.Mutex
	open map[netip.Prefix]int
}

func limitPeers(l net.Listener, most int) net.Listener {
	if most == 0 {
		return l
	}
	return &peerListener{Listener: l, most: most, open: map[netip.Prefix]int{}}
}

func (l *peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		p := peerPrefix(c.RemoteAddr().String())
		if l.add(p, 1) {
			return &peerConn{Conn: c, close: sync.OnceFunc(func() { l.add(p, -1) })}, nil
		}
		_ = c.Close()
	}
}

func (l *peerListener) add(p netip.Prefix, n int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n > 0 && l.open[p] >= l.most {
		return false
	}
	if l.open[p] += n; l.open[p] == 0 {
		delete(l.open, p)
	}
	return true
}

type peerConn struct {
	net.Conn
	close func()
}

func (c *peerConn) Close() error {
	defer c.close()
	return c.Conn.Close()
}
