package launch

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Bounds of the history: what a long-lived agent keeps in memory.
const (
	maxPhases = 256
	maxEvents = 2048
)

// recorder keeps what happened, for status, events, STATUS= and the journal.
type recorder struct {
	mu     sync.Mutex
	now    func() time.Time
	notice func(control.Event) // hears of each event, in order; must not block long
	phases []*step
	events []control.Event
	seq    uint64
	more   chan struct{} // closed and replaced on each event
}

func newRecorder(now func() time.Time, notice func(control.Event)) *recorder {
	return &recorder{now: now, notice: notice, more: make(chan struct{})}
}

// step is one phase under way.
type step struct {
	r     *recorder
	phase control.Phase // guarded by r.mu
	ended bool
	skip  string
}

func (r *recorder) begin(sequence, name, of string) *step {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &step{r: r, phase: control.Phase{Sequence: sequence, Name: name, Workload: of, Outcome: control.Running, Start: r.now()}}
	r.phases = append(r.phases, s)
	if len(r.phases) > maxPhases {
		r.phases = r.phases[len(r.phases)-maxPhases:]
	}
	r.emit(s.phase)
	return s
}

// waiting says what the phase waits for; an equal text is not repeated.
func (s *step) waiting(format string, args ...any) {
	s.set(control.Waiting, fmt.Sprintf(format, args...))
}

// progress says how far the phase is, without an event of its own.
func (s *step) progress(format string, args ...any) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	if !s.ended {
		s.phase.Outcome, s.phase.Text = control.Running, fmt.Sprintf(format, args...)
	}
}

// skipped makes the phase end as skipped, unless it fails.
func (s *step) skipped(format string, args ...any) { s.skip = fmt.Sprintf(format, args...) }

func (s *step) set(outcome, text string) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	if s.ended || (s.phase.Outcome == outcome && s.phase.Text == text) {
		return
	}
	s.phase.Outcome, s.phase.Text = outcome, text
	s.r.emit(s.phase)
}

// waiting shows a wait in every phase under way that has one of the names.
func (r *recorder) waiting(names []string, text string) {
	r.mu.Lock()
	steps := slices.Clone(r.phases)
	r.mu.Unlock()
	for _, s := range steps {
		if slices.Contains(names, s.phase.Name) { // the name never changes
			s.set(control.Waiting, text)
		}
	}
}

func (s *step) end(err error) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	s.phase.DurationMS = milliseconds(s.r.now().Sub(s.phase.Start))
	switch {
	case err != nil:
		s.phase.Outcome, s.phase.Cause, s.phase.Text = control.Failed, string(cause.Of(err)), textOf(err)
		s.phase.Log = workload.LogOf(err)
	case s.skip != "":
		s.phase.Outcome, s.phase.Text = control.Skipped, s.skip
	case s.phase.Outcome == control.Waiting:
		s.phase.Outcome, s.phase.Text = control.OK, ""
	default: // the last progress stays as detail
		s.phase.Outcome = control.OK
	}
	s.r.emit(s.phase)
}

// emit appends an event; r.mu is held.
func (r *recorder) emit(p control.Phase) {
	r.seq++
	now := r.now()
	if p.Outcome == control.Running || p.Outcome == control.Waiting {
		p.DurationMS = milliseconds(now.Sub(p.Start))
	}
	e := control.Event{Seq: r.seq, Phase: p, Time: now}
	if len(r.events) >= maxEvents {
		r.events = append(r.events[:0:0], r.events[maxEvents/4:]...)
	}
	r.events = append(r.events, e)
	close(r.more)
	r.more = make(chan struct{})
	if r.notice != nil {
		r.notice(e)
	}
}

// since returns the kept events with Seq > after and a channel that is closed
// when there are newer ones.
func (r *recorder) since(after uint64) ([]control.Event, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := len(r.events)
	for i > 0 && r.events[i-1].Seq > after {
		i--
	}
	return append([]control.Event(nil), r.events[i:]...), r.more
}

// list returns the kept phases, oldest first.
func (r *recorder) list() []control.Phase {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]control.Phase, 0, len(r.phases))
	for _, s := range r.phases {
		p := s.phase
		if !s.ended {
			p.DurationMS = milliseconds(r.now().Sub(p.Start))
		}
		out = append(out, p)
	}
	return out
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
