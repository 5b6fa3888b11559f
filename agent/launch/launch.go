package launch

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// maxInitdata bounds the initdata document, in bytes.
const maxInitdata = policy.MaxInitdata

// launch is the life of the guest from its policy to its running workloads.
func (a *Agent) launch(ctx context.Context) error {
	s, g := a.sequence(ctx, "launch"), &generation{}
	a.connectPodmanEarly(ctx)

	s.run("policy", localDeadline, func(ctx context.Context, st *step) error { return a.openPolicy(ctx, st, g) })
	a.warmUp(ctx, g)
	s.run("attest", a.deadlines(g).Broker.Or(brokerTime), func(ctx context.Context, st *step) error { return a.attest(ctx, st, g) })

	s.together(g, func(w *item, phase phaseFunc) error { return a.verify(g, w, phase) }) // resolve, signature, attestation
	s.each(g, "measure", localDeadline, func(ctx context.Context, st *step, w *item) error { return a.measure(ctx, st, g, w) })
	s.together(g, func(w *item, phase phaseFunc) error { return a.fetch(g, w, phase) }) // key, fetch, sbom

	s.run("clear", a.deadlines(g).Start.Or(startTime), a.clearOld)
	s.each(g, "start", a.deadlines(g).Start.Or(startTime), func(ctx context.Context, st *step, w *item) error { return a.start(ctx, st, g, w) })
	s.each(g, "healthy", a.healthTime(g), func(ctx context.Context, st *step, w *item) error { return a.healthy(ctx, st, g, w) })

	s.run("ready", localDeadline, func(context.Context, *step) error { return a.becomeReady(g) })
	if err := s.failed(); err != nil {
		a.undo(ctx, g, err)
		return err
	}
	return nil
}

// openPolicy reads the initdata, checks that the launch is bound to it,
// verifies its policy and puts it into the event log.
func (a *Agent) openPolicy(ctx context.Context, st *step, g *generation) error {
	if err := a.checkLatch(); err != nil {
		return err
	}
	initdata, err := bounded.ReadFile(a.config.Initdata, maxInitdata)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return cause.New(cause.PolicyMissing, "no initdata: %w", err)
	case errors.Is(err, bounded.ErrTooLarge):
		return cause.New(cause.PolicyTooLarge, "%w", err)
	case err != nil:
		return cause.New(cause.InitdataMalformed, "%w", err)
	}
	a.initdata = initdata
	if a.platform, err = a.world.Platform(ctx, initdata); err != nil {
		return err
	}
	if g.verified, err = a.world.Policy(initdata, a.now()); err != nil {
		return err
	}
	g.initdata = initdata
	if err := a.allow(ctx, g); err != nil { // which register it is
		return err
	}
	if a.log, err = a.platform.Log(ctx); err != nil {
		return err
	}
	first, err := a.resume(g)
	if err != nil {
		return err
	}
	if err := a.allow(ctx, g); err != nil { // an upgrade's policy may have come in its place
		return err
	}
	if first != nil {
		if err := a.log.AppendOnce(ctx, *first); err != nil {
			return err
		}
	}
	if a.secrets, err = a.world.Secrets(); err != nil {
		return err
	}
	if err := a.secrets.WipeAll(); err != nil {
		return cause.New(cause.StorageFailed, "wipe the secrets of an earlier run: %w", err)
	}
	a.setPolicy(g)
	st.progress("%s version %d, %s", g.policy().Name, g.policy().Version, g.verified.Digest)
	if err := a.open(g); err != nil {
		return err
	}
	return cause.Wrap(cause.StorageFailed, g.images.PruneUncommitted(ctx))
}

// allow holds what there is against what the policy asks for: the ways in, and
// the platform.
func (a *Agent) allow(ctx context.Context, g *generation) error {
	if err := servable(g.policy()); err != nil {
		return err
	}
	name, err := a.platform.Allow(ctx, g.policy())
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.platformName = name
	return nil
}

// resume settles what the log says of an earlier run of the daemon in this
// boot, and returns the event that comes next, if any. The last committed
// policy is what runs: after an upgrade that is not the initdata's, and its
// document is taken from the run directory only when its digest is the
// committed one.
func (a *Agent) resume(g *generation) (*eventlog.Event, error) {
	state := a.log.State()
	switch {
	case state.Destroyed:
		return nil, cause.New(cause.Destroyed, "the event log says that this instance is destroyed")
	case state.Digest == "":
		e := g.event(eventlog.KindPolicy, "")
		return &e, nil
	}
	if state.Digest != g.verified.Digest {
		committed, err := bounded.ReadFile(a.committedPath(state.Digest), maxInitdata)
		if err != nil {
			return nil, cause.New(cause.EventLogDiverged, "the event log commits policy %s, whose document cannot be read: %w", state.Digest, err)
		}
		verified, err := a.world.Policy(committed, a.now())
		if err != nil {
			return nil, err
		}
		if verified.Digest != state.Digest {
			return nil, cause.New(cause.EventLogDiverged, "the event log commits policy %s, the run directory has %s", state.Digest, verified.Digest)
		}
		g.verified, g.initdata = verified, committed
	}
	if staged := state.Staged; staged != nil { // an upgrade was cut short before its commit
		return &eventlog.Event{Kind: eventlog.KindRolledBack, Policy: staged.Policy, PolicyDigest: staged.Digest,
			PolicyVersion: staged.Version, Reason: "restart"}, nil
	}
	return nil, nil
}

// clearOld removes the containers of an earlier run. Keeping them would be
// faster, but what they did to themselves meanwhile is not known: the simple
// way is to start again from the images that were just verified.
func (a *Agent) clearOld(ctx context.Context, st *step) error {
	return a.retry(ctx, st, func(ctx context.Context) error {
		podman, err := a.podman(ctx, st)
		if err != nil {
			return err
		}
		old, err := podman.List(ctx, "")
		if err != nil {
			return err
		}
		for _, c := range old {
			if err := podman.Remove(ctx, c.ID); err != nil {
				return err
			}
		}
		if len(old) == 0 {
			st.skipped("nothing was left over")
		} else {
			st.progress("%d containers of an earlier run removed", len(old))
		}
		return nil
	})
}

// undoTime bounds the clearing up after a failure.
const undoTime = 30 * time.Second

// undo removes all that a failed launch began: containers, secrets and images,
// so that nothing is left in podman's storage. When something was refused, what
// an earlier run of the daemon started goes too: it would run on, watched by
// nobody, under a policy or from an image that is not accepted any more. That
// somebody outside does not answer is no reason to stop it.
func (a *Agent) undo(ctx context.Context, g *generation, why error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	err := errors.Join(a.removeContainers(ctx, g), a.removeImages(ctx, g, nil))
	if refused(why) {
		err = errors.Join(err, a.removeEarlier(ctx, g))
	}
	if err != nil {
		a.logger.Error("something of the failed launch is left", "error", err)
	}
	g.close()
}

// refused tells a verdict from an outage. A destroyed instance is no refusal:
// its containers are the destroy's to end.
func refused(why error) bool {
	exit := cause.Exit(why)
	return (exit == cause.ExitRefused || exit == cause.ExitMalformed) && cause.Of(why) != cause.Destroyed
}

// removeEarlier removes the containers of an earlier run, with their images.
func (a *Agent) removeEarlier(ctx context.Context, g *generation) error {
	// Podman has been asked for since the launch began: no long wait.
	connect, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	podman, err := a.podman(connect, nil)
	if err != nil {
		return err
	}
	old, err := podman.List(ctx, "")
	for _, c := range old {
		err = errors.Join(err, podman.Remove(ctx, c.ID))
		if g.images != nil {
			err = errors.Join(err, g.images.Remove(ctx, c.ImageID))
		}
	}
	return err
}

func (a *Agent) removeContainers(ctx context.Context, g *generation) (err error) {
	for _, w := range slices.Backward(g.items) {
		wipeAll(w.keys)
		wipeAll(w.secrets)
		if w.id != "" {
			podman, connectErr := a.podman(ctx, nil)
			if connectErr != nil {
				return errors.Join(err, connectErr)
			}
			err = errors.Join(err, podman.Stop(ctx, w.id, stopTime(w.rule.Run)), podman.Remove(ctx, w.id))
			w.id = ""
		} else if w.container.Workload != "" { // created perhaps, by a podman that went away
			err = errors.Join(err, a.removeByName(ctx, w.container.Policy, w.container.Name()))
		}
		if w.container.SecretDir != "" {
			err = errors.Join(err, a.secrets.Wipe(w.container.Name()))
		}
	}
	return err
}

func (a *Agent) removeByName(ctx context.Context, policy, name string) error {
	podman, err := a.podman(ctx, nil)
	if err != nil {
		return err
	}
	owned, err := podman.List(ctx, policy)
	for _, c := range owned {
		if c.Name == name {
			err = errors.Join(err, podman.Remove(ctx, c.ID))
		}
	}
	return err
}

// removeImages removes the generation's images but those that keep uses too.
func (a *Agent) removeImages(ctx context.Context, g, keep *generation) (err error) {
	for _, w := range g.items {
		if w.stored == nil || keep.uses(w.stored.ImageID()) {
			continue
		}
		err = errors.Join(err, g.images.Remove(ctx, w.stored.ImageID()))
	}
	return err
}

func (g *generation) uses(imageID string) bool {
	return g != nil && slices.ContainsFunc(g.items, func(w *item) bool { return w.stored != nil && w.stored.ImageID() == imageID })
}

// close ends the generation's clients, and scanners that have not come to work.
func (g *generation) close() {
	for _, w := range g.items {
		if w.scanner != nil {
			w.scanner.Close()
			w.scanner = nil
		}
	}
	if g.images != nil {
		_ = g.images.Close()
	}
}

func stopTime(run policy.Run) time.Duration { return run.StopTimeout.Or(10 * time.Second) }

// committedPath is where the document of an upgrade's policy is kept. Each has
// a name of its own: whichever digest the log says after a kill, it is there.
func (a *Agent) committedPath(digest string) string {
	return filepath.Join(a.config.RunDir, "committed-"+strings.TrimPrefix(digest, "sha256:")+".toml")
}

// deadlines are the policy's, or the defaults before it is known.
func (a *Agent) deadlines(g *generation) policy.Deadlines {
	if g.verified == nil {
		return policy.Deadlines{}
	}
	return g.policy().Upgrade.Deadlines
}

func (a *Agent) healthTime(g *generation) time.Duration {
	if g.verified == nil {
		return startTime
	}
	return healthTime(g)
}
