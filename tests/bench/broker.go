package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"
)

// The load. Half of the bar's rate is offered at random times; for the highest
// rate, so many guests keep the broker busy at once.
const (
	offered       = 250 // sessions a second
	busyGuests    = 32
	latencyGuests = 128 // connections ready for arrivals
)

// brokerPlan is how much is measured.
type brokerPlan struct {
	peak     time.Duration // of each closed loop
	latency  time.Duration // of each open loop
	agents   int           // launches of the agent's client
	sessions int           // of the memory's broker
	every    int           // sessions between two looks at its memory
	limit    int           // its bound on sessions; 0: the default, 10000
}

func (o options) brokerPlan() brokerPlan {
	if o.quick {
		// A tenth of the sessions under a tenth of the bound: the same shape.
		return brokerPlan{peak: time.Second, latency: 2 * time.Second, agents: 20, sessions: 10_000, every: 1000, limit: 1000}
	}
	return brokerPlan{peak: 4 * time.Second, latency: 10 * time.Second, agents: 200, sessions: 100_000, every: 10_000}
}

// held is how many sessions the broker of the memory keeps.
func (p brokerPlan) held() int {
	if p.limit == 0 {
		return 10_000
	}
	return p.limit
}

// peak is one closed loop.
type peak struct {
	Rate   float64 // sessions a second
	Server float64 // the broker's CPU, ms a session
	Load   float64 // this program's CPU, ms a session: it shares the processors
}

// brokerRun is what was measured of the broker; the n-th of each list is of the
// n-th round, but for agents and memory.
type brokerRun struct {
	plan           brokerPlan
	quote          []float64   // a made report signed, ms
	verify, crypto []float64   // bare loops, a second, all processors
	kept, fresh    []peak      // with kept connections, with a new one for each session
	latency        [][]float64 // ms, of each session
	agents         []float64   // attest and resource without the quote, ms
	memory         []brokerMemory
	audit          int64 // bytes of the audit log and the storage, for each session of the memory's broker
	stored         int64
}

// broker measures the key broker. dir is for its files.
func (b *bench) broker(ctx context.Context, dir string, plan brokerPlan) (*brokerRun, error) {
	f, err := newFleet(ctx, filepath.Join(dir, "fleet"))
	if err != nil {
		return nil, err
	}
	run := &brokerRun{plan: plan}
	if err := b.brokerSpeed(ctx, dir, f, run); err != nil {
		return nil, err
	}
	return run, b.brokerMemory(ctx, dir, f, run)
}

// profileFlags makes the broker write profiles, when they are asked for.
func (b *bench) profileFlags(name string) []string {
	if b.profile == "" {
		return nil
	}
	return []string{"-cpuprofile", filepath.Join(b.profile, name+".cpu.pprof"), "-heapprofile", filepath.Join(b.profile, name+".heap.pprof")}
}

func (b *bench) brokerSpeed(ctx context.Context, dir string, f *fleet, run *brokerRun) (err error) {
	// Collecting garbage is the load generator's own affair: seldom, beside a
	// broker that is measured.
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	b.say("broker: starting")
	p, err := startBroker(ctx, filepath.Join(dir, "speed"), f, b.profileFlags("broker-speed")...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	limits, err := newBare()
	if err != nil {
		return err
	}
	connections, hangUp, err := p.connections(ctx, latencyGuests)
	if err != nil {
		return err
	}
	defer hangUp()
	session := func(_ context.Context, worker int) error { return f.session(connections[worker]) }
	reconnect := func(ctx context.Context, _ int) error {
		c, err := connect(ctx, p.address, p.tls)
		if err != nil {
			return err
		}
		defer c.close()
		return f.session(c)
	}
	// Warm up. A connection without a first request is one that the broker closes.
	for i := range connections {
		if err := session(ctx, i); err != nil {
			return err
		}
	}
	if b.profile != "" {
		stop, err := profile(filepath.Join(b.profile, "load.cpu.pprof"))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	for n := range b.runs {
		for _, bare := range []struct {
			to *[]float64
			do func() error
		}{{&run.verify, limits.verify}, {&run.crypto, limits.session}} {
			rate, err := perSecond(ctx, bare.do)
			if err != nil {
				return err
			}
			*bare.to = append(*bare.to, rate)
		}
		quote, err := timeQuotes(ctx, f)
		if err != nil {
			return err
		}
		kept, err := measurePeak(ctx, p, run.plan.peak, session)
		if err != nil {
			return err
		}
		fresh, err := measurePeak(ctx, p, run.plan.peak, reconnect)
		if err != nil {
			return err
		}
		took, err := openLoop(ctx, arrivals(offered, run.plan.latency, uint64(n)), latencyGuests, session)
		if err != nil {
			return err
		}
		latency := each(took, milliseconds)
		run.quote, run.kept, run.fresh, run.latency = append(run.quote, quote), append(run.kept, kept), append(run.fresh, fresh), append(run.latency, latency)
		b.say("broker, round %d of %d: %.0f sessions/s, %.2f ms of the broker's CPU each, %.2f of this program's; at %d/s half within %.1f ms, 99 %% within %.1f ms",
			n+1, b.runs, kept.Rate, kept.Server, kept.Load, offered, percentile(latency, 50), percentile(latency, 99))
	}
	if run.agents, err = f.agents(ctx, p, run.plan.agents); err != nil {
		return fmt.Errorf("the agent's client: %w", err)
	}
	b.say("broker, %d launches of the agent's client: attest and key in %.1f ms without the quote, 99 %% within %.1f", run.plan.agents, percentile(run.agents, 50), percentile(run.agents, 99))
	return nil
}

// measurePeak keeps the broker as busy as it can be.
func measurePeak(ctx context.Context, p *brokerProcess, during time.Duration, do func(context.Context, int) error) (peak, error) {
	server, load := cpuOf(p.pid()), ownCPU()
	n, took, err := closedLoop(ctx, busyGuests, 0, during, do)
	if err == nil && n == 0 {
		err = fmt.Errorf("no session was done in %s", took)
	}
	if err != nil {
		return peak{}, err
	}
	ms := 1000 / float64(n)
	return peak{Rate: float64(n) / took.Seconds(), Server: (cpuOf(p.pid()) - server) * ms, Load: (ownCPU() - load) * ms}, nil
}

// timeQuotes is what one made quote takes of a processor, in ms.
func timeQuotes(ctx context.Context, f *fleet) (float64, error) {
	before := ownCPU()
	n, _, err := closedLoop(ctx, 1, 200, 0, func(context.Context, int) error {
		_, err := f.quote([48]byte{}, [32]byte{})
		return err
	})
	if err != nil {
		return 0, err
	}
	return (ownCPU() - before) * 1000 / float64(n), nil
}

// brokerMemory runs the sessions of a day on a broker of its own and looks at
// its memory.
func (b *bench) brokerMemory(ctx context.Context, dir string, f *fleet, run *brokerRun) (err error) {
	flags := b.profileFlags("broker-memory")
	if run.plan.limit > 0 {
		flags = append(flags, "-sessions", fmt.Sprint(run.plan.limit))
	}
	p, err := startBroker(ctx, filepath.Join(dir, "memory"), f, flags...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	connections, hangUp, err := p.connections(ctx, busyGuests)
	if err != nil {
		return err
	}
	defer hangUp()
	for done := 0; done < run.plan.sessions; done += run.plan.every {
		if _, _, err := closedLoop(ctx, busyGuests, run.plan.every, 0, func(_ context.Context, worker int) error { return f.session(connections[worker]) }); err != nil {
			return err
		}
		m, err := p.memory()
		if err != nil {
			return err
		}
		run.memory = append(run.memory, m)
		b.say("broker, after %d sessions: PSS %.0f MiB, of which %.0f are its mapped storage", done+run.plan.every, m.PSS, m.Storage)
	}
	for name, to := range map[string]*int64{"audit.ndjson": &run.audit, "broker.db": &run.stored} {
		file, err := os.Stat(filepath.Join(p.dir, name))
		if err != nil {
			return err
		}
		*to = file.Size() / int64(run.plan.sessions)
	}
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// ownCPU is this process's processor time in seconds.
func ownCPU() float64 {
	var use syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &use); err != nil {
		return 0
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano()).Seconds()
}
