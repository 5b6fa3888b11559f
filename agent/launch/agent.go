package launch

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Agent is the daemon: it runs the launch once and carries out orders after.
type Agent struct {
	config  Config
	world   World
	logger  *slog.Logger
	version string
	bootID  string
	now     func() time.Time
	rec     *recorder
	manager manager
	gid     int64 // of the operator group, -1 when there is none

	retryFirst   time.Duration // first wait of a retry
	destroyGrace time.Duration
	destroyAgain time.Duration

	// Set once by the launch, before any order is accepted.
	initdata []byte
	platform Platform
	log      Log
	secrets  Secrets

	destroying atomic.Bool // one-way: no key, no start from here on

	podmanMu sync.Mutex
	podmanAt Podman

	mu           sync.Mutex // guards what follows
	state        string
	running      *generation // what runs; replaced by an upgrade
	former       *generation // what a confirmed upgrade replaced, until it is cleared away
	staged       *generation // the last upgrade's, however it went
	shown        *generation // what status shows as the policy
	platformName policy.Platform
	claims       *Claims
	health       map[string]string // workload → why it is unhealthy now
	current      *order
	lastErr      error
	stopRun      context.CancelFunc // ends Run
}

// Options of an Agent.
type Options struct {
	Config  Config
	World   World
	Logger  *slog.Logger
	Version string
	BootID  string           // the kernel's
	Now     func() time.Time // default time.Now
}

// New returns an agent that has done nothing yet.
func New(o Options) *Agent {
	a := &Agent{config: o.Config, world: o.World, logger: o.Logger, version: o.Version, bootID: o.BootID, now: o.Now,
		manager: systemd{}, gid: control.GroupID(o.Config.SocketGroup), retryFirst: 500 * time.Millisecond,
		destroyGrace: destroyGrace, destroyAgain: destroyAgain,
		state: control.StateStarting, health: map[string]string{}}
	if a.now == nil {
		a.now = time.Now
	}
	a.rec = newRecorder(a.now, a.notice)
	return a
}

// Run serves the control socket, launches, and watches the workloads until ctx
// ends. A launch that fails ends it with a *PhaseError and leaves nothing in
// podman's storage. Workloads keep running when ctx ends after ready: the next
// run replaces them.
func (a *Agent) Run(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a.mu.Lock()
	a.stopRun = cancel
	a.mu.Unlock()
	served, serial := make(chan error, 1), make(chan struct{})
	server := control.NewServer(a, a.logger)
	go func() { served <- server.Serve(ctx, l) }()
	go func() {
		defer close(serial)
		if path := a.config.ControlSerial; path != "" {
			server.ServeSerial(ctx, func() (control.Port, error) { return control.OpenPort(path) })
		}
	}()
	go a.watchdog(ctx)
	defer func() {
		cancel()
		if err := <-served; err != nil {
			a.logger.Error("the control socket", "error", err)
		}
		<-serial
		if a.log != nil {
			_ = a.log.Close()
		}
		if a.platform != nil {
			_ = a.platform.Close()
		}
	}()

	err := a.launch(ctx)
	switch {
	case cause.Of(err) == cause.Destroyed:
		a.stayDestroyed(ctx)
	case err != nil:
		a.manager.notify("STATUS=" + err.Error())
		a.dwell(ctx, err)
		return err
	}
	settleMemory()
	a.watch(ctx)
	a.manager.notify("STOPPING=1")
	return nil
}

// stayDestroyed finishes a destroy that was cut short and answers reads.
func (a *Agent) stayDestroyed(ctx context.Context) {
	a.destroying.Store(true)
	err := a.destroy(ctx)
	a.mu.Lock()
	a.state, a.lastErr = control.StateDestroyed, err
	a.notifyState()
	a.mu.Unlock()
	a.manager.notify("READY=1")
	a.endMachine(err)
}

// becomeReady opens the control socket for orders.
func (a *Agent) becomeReady(g *generation) error {
	a.mu.Lock()
	a.running, a.state = g, control.StateReady
	a.mu.Unlock()
	a.manager.notify("READY=1")
	return nil
}

// swap makes g what runs.
func (a *Agent) swap(g *generation) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running != g {
		a.former = a.running
	}
	a.running, a.shown = g, g
	clear(a.health)
}

func (a *Agent) setStaged(g *generation) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.staged = g
}

func (a *Agent) setPolicy(g *generation) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shown = g
}

func (a *Agent) setClaims(c Claims) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.claims = &c
}

// podman returns the connection, made at its first use. st (may be nil) shows
// the waiting.
func (a *Agent) podman(ctx context.Context, st *step) (Podman, error) {
	a.podmanMu.Lock()
	defer a.podmanMu.Unlock()
	if a.podmanAt != nil {
		return a.podmanAt, nil
	}
	p, err := a.world.Podman(ctx, func(err error, next time.Duration) {
		if st != nil {
			st.waiting("waiting for podman: %s, retry in %s", textOf(err), next.Round(100*time.Millisecond))
		}
	})
	if err == nil {
		a.podmanAt = p
	}
	return p, err
}

// connectPodmanEarly lets podman's service start while images are verified.
func (a *Agent) connectPodmanEarly(ctx context.Context) {
	go func() {
		// Short: the phase that needs podman waits for it, visibly.
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		_, _ = a.podman(ctx, nil)
	}()
}

// Rules implements control.Agent.
func (a *Agent) Rules() control.Rules {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := control.Rules{OperatorGID: a.gid}
	if a.shown != nil {
		r.Control = a.shown.policy().Control
	}
	return r
}

// Identity implements control.Agent.
func (a *Agent) Identity() control.Identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	id := control.Identity{BootID: a.bootID}
	if a.shown != nil {
		id.Policy = a.shown.policy().Name
	}
	if a.claims != nil {
		id.InstanceID = a.claims.InstanceID
	}
	return id
}

// Events implements control.Agent.
func (a *Agent) Events(after uint64) ([]control.Event, <-chan struct{}) { return a.rec.since(after) }

// Status implements control.Agent.
func (a *Agent) Status() control.Status {
	phases := a.rec.list()
	a.mu.Lock()
	defer a.mu.Unlock()
	st := control.Status{State: a.state, Agent: a.version, Phases: phases, Workloads: []control.Workload{}}
	if a.lastErr != nil {
		st.Cause, st.Text = string(cause.Of(a.lastErr)), textOf(a.lastErr)
	}
	if g := a.shown; g != nil {
		p := g.policy()
		st.Policy = &control.Policy{Name: p.Name, Version: p.Version, Digest: g.verified.Digest, Expires: p.Expires, Signers: g.verified.Signers}
		st.Platform = string(a.platformName)
		st.EventLog = &control.Log{Register: a.platform.Register(), Events: len(a.log.Events())}
		if p.Broker != nil {
			st.Broker = &control.Broker{URL: p.Broker.URL}
			if c := a.claims; c != nil {
				st.Broker.VersionMark, st.Broker.InstanceID, st.Broker.AttestedAt = c.VersionMark, c.InstanceID, c.IssuedAt
			}
		}
	}
	if g := a.running; g != nil {
		for _, w := range g.items {
			why, sick := a.health[w.rule.Name]
			st.Workloads = append(st.Workloads, control.Workload{Name: w.rule.Name, Image: w.rule.Image,
				ImageID: w.container.ImageID, Container: w.id, Healthy: w.id != "" && !sick, Text: why})
		}
	}
	return st
}

// watch probes the workloads until ctx ends. It only tells: podman's restart
// policy is what brings a container back.
func (a *Agent) watch(ctx context.Context) {
	failures := map[string]int{}
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		a.mu.Lock()
		g, ready := a.running, a.state == control.StateReady
		a.mu.Unlock()
		if g == nil || !ready {
			clear(failures)
			continue
		}
		for _, w := range g.items {
			a.probe(ctx, g, w, failures)
		}
	}
}

// watchInterval is between two probes of all workloads; a check's own interval
// is for the time until its first success.
const watchInterval = 5 * time.Second

func (a *Agent) probe(ctx context.Context, g *generation, w *item, failures map[string]int) {
	podman, err := a.podman(ctx, nil)
	if err == nil {
		err = podman.Probe(ctx, w.id, w.container)
	}
	name, retries := w.rule.Name, workload.DefaultRetries
	if h := w.rule.Run.HealthCheck; h != nil && h.Retries > 0 {
		retries = h.Retries
	}
	if err == nil {
		failures[name] = 0
	} else {
		failures[name]++
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running != g || a.state != control.StateReady { // an order came between
		return
	}
	_, sick := a.health[name]
	switch {
	case err == nil && sick:
		delete(a.health, name)
		a.logger.Info("workload is healthy again", "workload", name)
		a.notifyState()
	case err != nil && failures[name] >= retries && !sick:
		a.health[name] = textOf(err)
		a.logger.Warn("workload is unhealthy", "workload", name, "error", textOf(err))
		a.notifyState()
	}
}

// notifyState tells the service manager; a.mu is held.
func (a *Agent) notifyState() {
	text := a.state
	if len(a.health) > 0 {
		text += fmt.Sprintf(", %d workloads unhealthy", len(a.health))
	}
	a.manager.notify("STATUS=" + text)
}

var _ control.Agent = (*Agent)(nil)
