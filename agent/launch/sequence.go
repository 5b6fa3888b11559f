package launch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// PhaseError says in which phase a sequence failed.
type PhaseError struct {
	Phase    string
	Workload string // "" for phases of the whole guest
	Err      error  // carries the cause
}

func (e *PhaseError) Error() string {
	return fmt.Sprintf("%s: %s: %s", e.at(), cause.Of(e.Err), textOf(e.Err))
}

// at is PHASE or PHASE/WORKLOAD.
func (e *PhaseError) at() string {
	if e.Workload == "" {
		return e.Phase
	}
	return e.Phase + "/" + e.Workload
}

func (e *PhaseError) Unwrap() error { return e.Err }

// textOf is the error's text without its cause code, in one line.
func textOf(err error) string {
	var e *cause.Error
	if errors.As(err, &e) {
		return oneLine(e.Err.Error())
	}
	return oneLine(err.Error())
}

// sequence runs phases one after the other, or side by side where they are
// independent. Its first error stays: phases after it are not begun, so that a
// list of phases reads top to bottom without branches.
type sequence struct {
	a    *Agent
	name string
	ctx  context.Context

	mu  sync.Mutex
	err error
}

func (a *Agent) sequence(ctx context.Context, name string) *sequence {
	return &sequence{a: a, name: name, ctx: ctx}
}

func (s *sequence) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *sequence) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

// run does one phase of the whole guest.
func (s *sequence) run(name string, deadline time.Duration, do func(ctx context.Context, st *step) error) {
	if s.failed() == nil {
		s.fail(s.phase(s.ctx, name, "", deadline, do))
	}
}

// each does one phase for every workload, in the policy's order.
func (s *sequence) each(g *generation, name string, deadline time.Duration, do func(ctx context.Context, st *step, w *item) error) {
	for _, w := range g.items {
		if s.failed() != nil {
			return
		}
		s.fail(s.phase(s.ctx, name, w.rule.Name, deadline, func(ctx context.Context, st *step) error { return do(ctx, st, w) }))
	}
}

// phaseFunc does one phase of one workload within together.
type phaseFunc func(name string, deadline time.Duration, do func(ctx context.Context, st *step) error) error

// together does steps for all workloads side by side; the first failure
// cancels the others.
func (s *sequence) together(g *generation, steps func(w *item, phase phaseFunc) error) {
	if s.failed() != nil {
		return
	}
	group, ctx := errgroup.WithContext(s.ctx)
	group.SetLimit(maxTogether)
	for _, w := range g.items {
		group.Go(func() error {
			return steps(w, func(name string, deadline time.Duration, do func(ctx context.Context, st *step) error) error {
				return s.phase(ctx, name, w.rule.Name, deadline, do)
			})
		})
	}
	if err := group.Wait(); err != nil {
		s.fail(err)
	}
}

// maxTogether bounds the workloads that are verified and fetched side by side:
// it bounds memory, and more would not be faster on the few cores of a guest.
const maxTogether = 4

// phase does one phase with its deadline and records it.
func (s *sequence) phase(ctx context.Context, name, workload string, deadline time.Duration, do func(ctx context.Context, st *step) error) error {
	if err := ctx.Err(); err != nil {
		return &PhaseError{name, workload, cause.New(cause.Cancelled, "not begun: %w", err)}
	}
	limited, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	st := s.a.rec.begin(s.name, name, workload)
	err := do(limited, st)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		// Stopped from outside, whatever it then ran into: what stopped it is
		// the cause, and that is not this phase's.
		err = cause.New(cause.Cancelled, "given up: another phase failed or the agent is stopping")
	case limited.Err() != nil && cause.Of(err) == cause.Internal:
		err = cause.New(cause.DeadlineExceeded, "not done within %s: %w", deadline, err)
	}
	st.end(err)
	if err != nil {
		return &PhaseError{name, workload, err}
	}
	return nil
}

// retry repeats do while its error is that something outside does not answer,
// with backoff and jitter, until ctx ends; each wait is visible in the phase. A
// refusal is never repeated.
func (a *Agent) retry(ctx context.Context, st *step, do func(ctx context.Context) error) error {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = a.retryFirst
	b.MaxInterval = 15 * time.Second
	var down error // why the last try failed
	for {
		err := do(ctx)
		who, outside := unavailable(err)
		if down != nil && ctx.Err() != nil && cutShort(err) {
			// Where in a try the deadline fell is chance: what was waited for
			// all the while is the cause.
			return down
		}
		if !outside || ctx.Err() != nil {
			return err
		}
		down = err
		next := b.NextBackOff()
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < next {
			return err
		}
		st.waiting("waiting for %s: %s, retry in %s", who, textOf(err), next.Round(100*time.Millisecond))
		select {
		case <-ctx.Done():
			return err
		case <-time.After(next):
		}
	}
}

// cutShort says whether err is only that the time was over.
func cutShort(err error) bool {
	code := cause.Of(err)
	return code == cause.DeadlineExceeded || code == cause.Internal && errors.Is(err, context.DeadlineExceeded)
}

func unavailable(err error) (who string, ok bool) {
	switch cause.Of(err) {
	case cause.RegistryUnavailable:
		return "registry", true
	case cause.BrokerUnavailable:
		return "broker", true
	case cause.PodmanUnavailable:
		return "podman", true
	}
	return "", false
}

func oneLine(text string) string {
	out := make([]rune, 0, len(text))
	space := false
	for _, r := range text {
		if r <= ' ' || r == 0x7f {
			space = len(out) > 0
			continue
		}
		if space {
			out = append(out, ' ')
			space = false
		}
		out = append(out, r)
		if len(out) >= maxText {
			return string(out) + "…"
		}
	}
	return string(out)
}

// maxText bounds a failure's text, in runes: hostile peers write parts of it.
const maxText = 600
