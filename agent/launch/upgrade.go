package launch

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/google/renameio/v2"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// upgrade replaces the running policy by a newer one of the same name: stage,
// commit, confirm, or roll back to the last good one.
func (a *Agent) upgrade(ctx context.Context, body []byte) error {
	s, next := a.sequence(ctx, "upgrade"), &generation{staged: true}
	a.mu.Lock()
	old := a.running
	a.mu.Unlock()
	if old == nil {
		return cause.New(cause.NotReady, "nothing runs that could be upgraded")
	}
	a.setStaged(next) // for a destroy that takes over

	// Stage: everything is verified and fetched while the old one runs.
	already := false
	s.run("policy", localDeadline, func(ctx context.Context, st *step) (err error) {
		next.verified, next.initdata, err = a.world.Order(body, old.verified, old.initdata, a.now())
		if err != nil {
			return err
		}
		if already = next.verified.Digest == old.verified.Digest; already {
			st.skipped("policy %s version %d is already running", next.policy().Name, next.policy().Version)
			return nil
		}
		if err := checkNewer(old, next); err != nil {
			return err
		}
		st.progress("%s version %d, %s", next.policy().Name, next.policy().Version, next.verified.Digest)
		if err := a.allow(ctx, next); err != nil {
			return err
		}
		if err := a.log.AppendOnce(ctx, next.event(eventlog.KindPolicyStaged, "")); err != nil {
			return err
		}
		return a.open(next)
	})
	if already && s.failed() == nil {
		return nil
	}
	a.warmUp(ctx, next)
	s.run("attest", a.deadlines(next).Broker.Or(brokerTime), func(ctx context.Context, st *step) error { return a.attest(ctx, st, next) })
	s.together(next, func(w *item, phase phaseFunc) error { return a.verify(next, w, phase) })
	s.each(next, "measure", localDeadline, func(ctx context.Context, st *step, w *item) error { return a.measure(ctx, st, next, w) })
	s.together(next, func(w *item, phase phaseFunc) error { return a.fetch(next, w, phase) })
	if err := s.failed(); err != nil {
		a.abandon(ctx, next, old, err)
		return err
	}

	// Commit: from the event on, a restart of the daemon runs the new policy.
	s.run("commit", localDeadline, func(ctx context.Context, _ *step) error {
		if err := renameio.WriteFile(a.committedPath(next.verified.Digest), next.initdata, 0o600); err != nil {
			return cause.New(cause.StorageFailed, "keep the policy's document: %w", err)
		}
		return a.log.AppendOnce(ctx, next.event(eventlog.KindCommitted, ""))
	})
	if err := s.failed(); err != nil {
		a.abandon(ctx, next, old, err)
		return err
	}
	s.each(old, "stop", startTime, func(ctx context.Context, st *step, w *item) error { return a.stop(ctx, st, w) })
	s.each(next, "start", a.deadlines(next).Start.Or(startTime), func(ctx context.Context, st *step, w *item) error { return a.start(ctx, st, next, w) })

	// Confirm, or roll back.
	s.each(next, "healthy", healthTime(next), func(ctx context.Context, st *step, w *item) error { return a.healthy(ctx, st, next, w) })
	if err := s.failed(); err != nil {
		return a.rollback(ctx, old, next, err)
	}
	a.swap(next)
	s.run("clear", undoTime, func(ctx context.Context, st *step) error {
		err := errors.Join(a.dropDocument(old), a.removeContainers(ctx, old), a.removeImages(ctx, old, next))
		if err != nil { // the upgrade is done; say what is left
			a.logger.Warn("something of the former version is left", "error", err)
			st.skipped("something of the former version is left: %s", oneLine(err.Error()))
		}
		old.close()
		return nil
	})
	a.mu.Lock()
	a.former = nil
	a.mu.Unlock()
	return nil
}

// checkNewer is also the policy package's rule; it is cheap, and what it
// guards is worth asking twice.
func checkNewer(old, next *generation) error {
	switch o, n := old.policy(), next.policy(); {
	case n.Name != o.Name:
		return cause.New(cause.PolicyOtherName, "the running policy is %s, the upgrade's is %s", o.Name, n.Name)
	case n.Version <= o.Version:
		return cause.New(cause.PolicyNotNewer, "version %d runs, the upgrade has version %d", o.Version, n.Version)
	}
	return nil
}

// abandon gives a staged upgrade up. The old version runs on, untouched.
func (a *Agent) abandon(ctx context.Context, next, old *generation, why error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	if err := errors.Join(a.removeContainers(ctx, next), a.removeImages(ctx, next, old)); err != nil {
		a.logger.Error("something of the abandoned upgrade is left", "error", err)
	}
	next.close()
	if a.destroying.Load() || a.log.State().Staged == nil {
		return
	}
	if err := a.log.AppendOnce(ctx, next.event(eventlog.KindRolledBack, string(cause.Of(why)))); err != nil {
		a.logger.Error("the abandoned upgrade is not in the event log", "error", err)
	}
}

// stop ends a container of the old version but keeps it, so that a rollback
// needs nobody outside.
func (a *Agent) stop(ctx context.Context, st *step, w *item) error {
	return a.retry(ctx, st, func(ctx context.Context) error {
		podman, err := a.podman(ctx, st)
		if err != nil {
			return err
		}
		return podman.Stop(ctx, w.id, stopTime(w.rule.Run))
	})
}

// rollback puts the last good version back after a committed upgrade that did
// not become healthy. why is the upgrade's failure.
func (a *Agent) rollback(ctx context.Context, old, next *generation, why error) error {
	if errors.Is(context.Cause(ctx), errTakenOver) {
		return why // destroy removes everything
	}
	// The order may have been cancelled by the daemon's end; the last good one
	// is worth more time.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTime)
	defer cancel()
	s := a.sequence(ctx, "rollback")

	s.run("clear", undoTime, func(ctx context.Context, _ *step) error { return a.removeContainers(ctx, next) })
	// The register says it before the old version starts, as with every start.
	s.run("measure", localDeadline, func(ctx context.Context, _ *step) error {
		if err := a.mayReturn(old, next); err != nil {
			return err
		}
		return a.log.AppendOnce(ctx, next.event(eventlog.KindRolledBack, string(cause.Of(why))))
	})
	s.each(old, "start", a.deadlines(old).Start.Or(startTime), func(ctx context.Context, st *step, w *item) error { return a.restore(ctx, st, w) })
	s.each(old, "healthy", healthTime(old), func(ctx context.Context, st *step, w *item) error { return a.healthy(ctx, st, old, w) })
	if err := s.failed(); err != nil {
		a.swap(old)
		return cause.New(cause.RollbackFailed, "the upgrade failed (%s) and so did going back (%s)", oneLine(why.Error()), oneLine(err.Error()))
	}
	if err := errors.Join(a.removeImages(ctx, next, old), a.dropDocument(next)); err != nil {
		a.logger.Warn("the failed version's image is left", "error", err)
	}
	next.close()
	return cause.New(cause.UpgradeRolledBack, "version %d runs again: %s", old.policy().Version, oneLine(why.Error()))
}

// mayReturn refuses a version that the committed policy, or the broker since,
// has put below the floor: an attacker who can make an upgrade fail must not
// win the old version by it.
func (a *Agent) mayReturn(old, next *generation) error {
	floor := next.policy().MinimumVersion
	a.mu.Lock()
	if c := a.claims; c != nil && c.HasMark {
		floor = max(floor, c.VersionMark)
	}
	a.mu.Unlock()
	if v := old.policy().Version; v < floor {
		return cause.New(cause.PolicyBelowFloor, "version %d is below %d, the lowest that may run now", v, floor)
	}
	return nil
}

// dropDocument removes the document of a policy that is no longer to be found
// by a restarted daemon.
func (a *Agent) dropDocument(g *generation) error {
	if err := os.Remove(a.committedPath(g.verified.Digest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// rollbackTime bounds a rollback as a whole.
const rollbackTime = 10 * time.Minute

// restore starts the kept container again, or makes it anew from its verified
// image when somebody removed it.
func (a *Agent) restore(ctx context.Context, st *step, w *item) error {
	return a.retry(ctx, st, func(ctx context.Context) error {
		podman, err := a.podman(ctx, st)
		if err != nil {
			return err
		}
		if err := podman.Resume(ctx, w.id, w.container); err == nil || cause.Of(err) == cause.PodmanUnavailable {
			return err
		}
		st.progress("the kept container does not start, making it anew")
		w.id, err = podman.Start(ctx, w.container)
		return err
	})
}
