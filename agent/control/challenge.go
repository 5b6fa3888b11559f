package control

import (
	"crypto/rand"
	"encoding/hex"
	"slices"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Bounds of the challenges that are waited for. One asker's newest pushes out
// its own oldest, so that a reader who asks without end keeps nobody from
// giving an order.
const (
	challengeLife    = 10 * time.Minute
	maxPerAsker      = 8
	maxChallenges    = 256 // of all askers
	maxUsed          = 256 // remembered to tell a replay from an unknown one
	challengeEntropy = 32  // bytes
)

// challenges are given out and redeemed once each. Their age is measured by the
// monotonic clock, which the host's idea of the time does not move.
type challenges struct {
	now func() time.Time

	mu   sync.Mutex
	open []given // oldest first
	used []string
}

type given struct {
	value, asker string
	at           time.Time
}

func (c *challenges) issue(asker string) (value string, expires time.Time) {
	var b [challengeEntropy]byte
	_, _ = rand.Read(b[:]) // never fails
	value = hex.EncodeToString(b[:])
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire(now)
	mine, oldest := 0, -1
	for i, g := range c.open {
		if g.asker == asker {
			if mine++; oldest < 0 {
				oldest = i
			}
		}
	}
	switch {
	case mine >= maxPerAsker:
		c.open = slices.Delete(c.open, oldest, oldest+1)
	case len(c.open) >= maxChallenges:
		c.open = slices.Delete(c.open, 0, 1)
	}
	c.open = append(c.open, given{value, asker, now})
	return value, now.Add(challengeLife)
}

func (c *challenges) expire(now time.Time) {
	c.open = slices.DeleteFunc(c.open, func(g given) bool { return now.Sub(g.at) >= challengeLife })
}

// redeem uses a challenge up: of any number of orders with it, at most one
// passes.
func (c *challenges) redeem(value string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expire(c.now())
	for i, g := range c.open {
		if g.value == value {
			c.open = slices.Delete(c.open, i, i+1)
			if c.used = append(c.used, value); len(c.used) > maxUsed {
				c.used = slices.Delete(c.used, 0, 1)
			}
			return nil
		}
	}
	if slices.Contains(c.used, value) {
		return cause.New(cause.OrderReplayed, "the order's challenge has been used already")
	}
	return cause.New(cause.OrderChallenge, "the order's challenge is none that this agent gave out in the last %s", challengeLife)
}
