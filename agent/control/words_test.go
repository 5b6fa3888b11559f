package control

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/order"
)

// wordy is an agent whose workload said something before it ended.
type wordy struct{ *agent }

func (w wordy) Status() Status {
	st := w.agent.Status()
	st.Phases = []Phase{{Name: "healthy", Outcome: Failed, Log: "hunter2"}}
	return st
}

func (w wordy) say() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, Event{Seq: uint64(len(w.events) + 1), Phase: Phase{Name: "healthy", Outcome: Failed, Log: "hunter2"}})
	close(w.more)
	w.more = make(chan struct{})
}

// The serial port is the host's: no answer there has a byte of a workload's log,
// while the socket in the guest has it.
func TestWorkloadsWordsStayInTheGuest(t *testing.T) {
	a, key := signing(t)
	w := wordy{a}
	w.say()
	failing := func(context.Context) error { w.say(); return errors.New("no") }
	a.destroy, a.upgrade = failing, failing

	reads := func(c *Client) string {
		t.Helper()
		st, err := c.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		all := []any{st}
		if err := c.Events(t.Context(), false, func(e Event) error { all = append(all, e); return nil }); err != nil {
			t.Fatal(err)
		}
		data, err := json.Marshal(all)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	serial := NewSerialClient(serveSerial(t, w), 0)
	local := NewClient(serve(t, w))
	if got := reads(serial); strings.Contains(got, "hunter2") || !strings.Contains(got, "healthy") {
		t.Errorf("the host reads %s", got)
	}
	if got := reads(local); strings.Count(got, "hunter2") != 2 {
		t.Errorf("the guest's operator reads %s", got)
	}

	ch, err := serial.Challenge(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	if err := serial.Signed(t.Context(), answer(t, key, ch, order.Destroy, nil), func(e Event) {
		seen++
		if e.Log != "" {
			t.Errorf("an order's stream tells the host %q", e.Log)
		}
	}); err == nil || seen == 0 {
		t.Errorf("%v after %d events", err, seen)
	}
}
