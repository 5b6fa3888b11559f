package launch

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Which order may interrupt which:
//
//	under way          upgrade                     destroy
//	---------          -------                     -------
//	launch             not-ready                   not-ready
//	nothing (ready)    begins                      begins
//	upgrade            busy                        takes over: the upgrade is cancelled first
//	rollback           busy                        takes over
//	destroy            destroyed                   joins: one outcome for both
//	destroyed          destroyed                   done already: ok; what was left over is tried again
//	failed rollback    begins: it may repair       begins
//
// Destroy takes over everything; an upgrade takes over nothing. Orders of one
// kind never run side by side.

// order is one order under way.
type order struct {
	cancel context.CancelCauseFunc
	done   chan struct{} // closed at the end, after err is set
	err    error
}

var errTakenOver = errors.New("destroy took over")

// Upgrade carries out an upgrade order to its outcome.
func (a *Agent) Upgrade(ctx context.Context, body []byte) error {
	ctx, o, err := a.admit(ctx, control.StateUpgrading)
	if err != nil {
		return err
	}
	LimitMemory()
	err = withPhase(a.upgrade(ctx, body))
	a.finish(o, err, nil)
	settleMemory()
	return err
}

// withPhase keeps the phase in the text of an order's outcome, which travels
// with its cause beside it.
func withPhase(err error) error {
	var p *PhaseError
	if !errors.As(err, &p) {
		return err
	}
	return cause.New(cause.Of(err), "%s: %s", p.at(), textOf(p.Err))
}

// Destroy carries out the destroy order to its outcome.
func (a *Agent) Destroy(ctx context.Context) error {
	a.mu.Lock()
	switch a.state {
	case control.StateStarting:
		a.mu.Unlock()
		return cause.New(cause.NotReady, "orders are accepted only once the launch is ready")
	case control.StateDestroying:
		running := a.current
		a.mu.Unlock()
		<-running.done
		return running.err
	}
	running := a.current
	ctx, o := a.beginLocked(ctx, control.StateDestroying)
	a.mu.Unlock()
	// From here on nothing is started and no key is asked for.
	a.destroying.Store(true)
	if running != nil {
		running.cancel(errTakenOver)
		<-running.done
	}
	err := a.destroy(ctx)
	a.finish(o, err, func() { a.state = control.StateDestroyed })
	a.endMachine(err)
	return err
}

// admit begins an order that takes over nothing.
func (a *Agent) admit(ctx context.Context, state string) (context.Context, *order, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch a.state {
	case control.StateStarting:
		return nil, nil, cause.New(cause.NotReady, "orders are accepted only once the launch is ready")
	case control.StateUpgrading:
		return nil, nil, cause.New(cause.Busy, "an upgrade is under way")
	case control.StateDestroying, control.StateDestroyed:
		return nil, nil, cause.New(cause.Destroyed, "this instance is destroyed")
	}
	ctx, o := a.beginLocked(ctx, state)
	return ctx, o, nil
}

func (a *Agent) beginLocked(ctx context.Context, state string) (context.Context, *order) {
	ctx, cancel := context.WithCancelCause(ctx)
	o := &order{cancel: cancel, done: make(chan struct{})}
	a.current, a.state = o, state
	a.notifyState()
	return ctx, o
}

// finish ends the order. settle (may be nil) changes the state under the lock;
// by default an order that destroy did not take over leaves the agent ready.
func (a *Agent) finish(o *order, err error, settle func()) {
	o.cancel(nil)
	a.mu.Lock()
	defer a.mu.Unlock()
	o.err = err
	close(o.done)
	if a.current != o { // destroy took over
		return
	}
	a.current = nil
	switch {
	case settle != nil:
		settle()
	case cause.Of(err) == cause.RollbackFailed:
		a.state = control.StateFailed
	case a.state == control.StateUpgrading:
		a.state = control.StateReady
	}
	a.lastErr = err
	a.notifyState()
}

// latchPath is the durable mark that this instance is destroyed. It is a hint
// on this disk; a restored disk is the broker's tombstone's to catch.
func (a *Agent) latchPath() string { return filepath.Join(a.config.StateDir, "destroyed") }

func (a *Agent) checkLatch() error {
	_, err := os.Lstat(a.latchPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return cause.New(cause.StorageFailed, "look for the destroy latch: %w", err)
	}
	return cause.New(cause.Destroyed, "this instance was destroyed before")
}

// destroy ends the instance, in an order that a kill at any instruction does
// not undo: the latch first, then the register, then what it stands for.
func (a *Agent) destroy(ctx context.Context) error {
	s := a.sequence(ctx, "destroy")
	a.mu.Lock()
	generations := []*generation{a.running, a.former, a.staged}
	a.mu.Unlock()

	s.run("latch", localDeadline, func(context.Context, *step) error {
		if err := renameio.WriteFile(a.latchPath(), []byte(a.now().UTC().Format("2006-01-02T15:04:05Z")+"\n"), 0o600); err != nil {
			return cause.New(cause.DestroyFailed, "set the latch: %w", err)
		}
		return nil
	})
	s.run("measure", localDeadline, func(ctx context.Context, st *step) error {
		switch {
		case a.log == nil:
			st.skipped("the event log was not opened in this run")
			return nil
		case a.log.State().Destroyed:
			st.skipped("it is in the event log")
			return nil
		}
		return a.log.AppendOnce(ctx, eventlog.Event{Kind: eventlog.KindDestroy, Reason: "ordered"})
	})
	// What cannot be removed does not keep the rest: each part is tried, and
	// what remains is named.
	if s.failed() != nil && cause.Of(s.failed()) == cause.DestroyFailed {
		return s.failed()
	}
	var remains []error
	part := func(name string, do func(ctx context.Context, st *step) error) {
		if err := s.phase(ctx, name, "", undoTime, do); err != nil {
			remains = append(remains, err)
		}
	}
	part("secrets", func(context.Context, *step) (err error) {
		if a.secrets == nil { // a destroy that a kill cut short goes on
			if a.secrets, err = a.world.Secrets(); err != nil {
				return cause.Wrap(cause.DestroyFailed, err)
			}
		}
		return cause.Wrap(cause.DestroyFailed, a.secrets.WipeAll())
	})
	part("stop", func(ctx context.Context, st *step) error {
		podman, err := a.podman(ctx, st)
		if err != nil {
			return err
		}
		owned, err := podman.List(ctx, "")
		for _, c := range owned {
			err = errors.Join(err, podman.Remove(ctx, c.ID))
		}
		st.progress("%d containers removed", len(owned))
		return cause.Wrap(cause.DestroyFailed, err)
	})
	part("images", func(ctx context.Context, st *step) (err error) {
		for _, g := range generations {
			if g != nil {
				err = errors.Join(err, a.removeImages(ctx, g, nil))
			}
		}
		// Those of an earlier run too, of which this one knows nothing.
		all, openErr := a.world.Images(&policy.Verified{Policy: &policy.Policy{}}, func(error, time.Duration) {})
		if openErr != nil {
			return cause.Wrap(cause.DestroyFailed, errors.Join(err, openErr))
		}
		err = errors.Join(err, all.RemoveAll(ctx), all.Close())
		return cause.Wrap(cause.DestroyFailed, err)
	})
	part("volumes", func(ctx context.Context, st *step) error {
		podman, err := a.podman(ctx, st)
		if err != nil {
			return err
		}
		removed, err := podman.RemoveVolumes(ctx, "")
		st.progress("%d volumes removed", len(removed))
		return cause.Wrap(cause.DestroyFailed, err)
	})
	part("documents", func(context.Context, *step) error {
		names, err := filepath.Glob(a.committedPath("*"))
		for _, name := range names {
			err = errors.Join(err, os.Remove(name))
		}
		if err != nil {
			return cause.New(cause.DestroyFailed, "remove the policy's document: %w", err)
		}
		return nil
	})
	a.mu.Lock()
	a.running, a.former, a.staged = nil, nil, nil
	a.mu.Unlock()
	if err := errors.Join(append(remains, s.failed())...); err != nil {
		return cause.New(cause.DestroyFailed, "something remains: %s", oneLine(err.Error()))
	}
	return nil
}
