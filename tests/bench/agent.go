package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// launchWithin bounds one launch: minutes on a busy machine.
const launchWithin = 10 * time.Minute

// published is an image in the registry, in both forms, and the initdata with
// a policy that names the encrypted one.
type published struct {
	name      string
	encrypted string // repository@sha256:…, for our broker's key and for a JWE recipient
	plain     string // the same layer, not encrypted
	initdata  string
	port      uint16 // where the workload listens
}

// publish pushes the image, encrypted by cvmctl and plain by skopeo.
func (b *bench) publish(ctx context.Context, s source) (*published, error) {
	b.say("%s image: publishing (%.0f MB, %.0f MB compressed, %d entries)", s.Name, mb(s.Unpacked), mb(s.Compressed), s.Entries)
	p := &published{name: strings.ToLower(s.Name)}
	var err error
	if p.port, err = rig.FreePort(); err != nil {
		return nil, err
	}
	if b.jwe == "" {
		if b.jwe, _, err = b.stage.NewRecipient("stock"); err != nil {
			return nil, err
		}
	}
	template, err := b.stage.Template(p.name, rig.PolicyWorkload{Name: "bench", Port: p.port, Encryption: "required"})
	if err != nil {
		return nil, err
	}
	// The template's deadlines are for small images on idle machines.
	slow := b.stage.Path("policy", p.name+"-slow.yaml")
	if err := rig.Edit(template, slow, map[string]string{"fetch: 2m, sbom: 2m": "fetch: 5m, sbom: 5m"}); err != nil {
		return nil, err
	}
	policy := b.stage.Path("policy", p.name+".yaml")
	encrypted, err := b.stage.Publish(ctx, rig.PublishOptions{Source: []string{"--image", "oci:" + s.Layout}, To: "bench/" + p.name + ":encrypted",
		Encrypt: true, Workload: "bench", Template: slow, Out: policy,
		Extra: []string{"--recipient", "jwe:" + strings.TrimSuffix(b.jwe, ".pem") + ".pub.pem"}})
	if err != nil {
		return nil, err
	}
	p.encrypted = encrypted.Digest
	p.plain = b.stage.Registry.Reference("bench/"+p.name, ":plain")
	if err := b.stage.Copy(ctx, "oci:"+s.Layout, p.plain); err != nil {
		return nil, err
	}
	signed, err := b.stage.SignPolicy(ctx, policy)
	if err != nil {
		return nil, err
	}
	p.initdata, err = b.stage.Pack(ctx, signed)
	return p, err
}

// timing is one timed run.
type timing struct {
	Seconds float64
	CPU     float64 // seconds, of all processes that took part; steadier than Seconds on a busy machine
}

// launch is one run of the agent, from its execution to READY=1.
type launch struct {
	timing
	Policy float64 // seconds until the policy was accepted
	Added  float64 // seconds that the regeneration of the SBOM adds
	Phases []phase
}

// phase is one of `ctl status`, with its times relative to the execution.
type phase struct {
	Name    string
	Outcome string
	Begins  float64 // seconds
	Takes   float64 // seconds
}

func (p phase) ends() float64 { return p.Begins + p.Takes }

func (l *launch) phase(name string) (phase, error) {
	for _, p := range l.Phases {
		if p.Name == name {
			return p, nil
		}
	}
	return phase{}, fmt.Errorf("ctl status has no phase %s", name)
}

// guest makes a machine that was never booted: empty storage, empty state.
func (b *bench) guest(ctx context.Context) (*rig.Guest, error) {
	b.serial++
	name := "a" + strconv.Itoa(b.serial)
	podman, err := b.stage.StartPodman(ctx, name+"p")
	if err != nil {
		return nil, err
	}
	return b.stage.NewGuest(rig.GuestOptions{Name: name, TPM: b.stage.TPM, Podman: podman, Signers: []string{b.owner}})
}

// agent launches on empty storage, and again with the image in storage, as
// after a restart of the machine: other containers, registers and run directory.
func (b *bench) agent(ctx context.Context, p *published) (first, second *launch, err error) {
	g, err := b.guest(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, b.discard(ctx, g.Podman, g.Dir)) }()
	for _, l := range []**launch{&first, &second} {
		if err := g.Boot(ctx, p.initdata); err != nil {
			return nil, nil, err
		}
		if *l, err = b.launch(ctx, g, nil); err != nil {
			return nil, nil, err
		}
		g.Halt()
		if _, err := g.Podman.Command(ctx, "rm", "--all", "--force", "--time", "0"); err != nil {
			return nil, nil, err
		}
	}
	return first, second, nil
}

// launch runs the agent of a booted guest until it tells the service manager
// that it is ready; started (may be nil) hears its process id.
func (b *bench) launch(ctx context.Context, g *rig.Guest, started func(pid int)) (*launch, error) {
	notify := filepath.Join(g.Dir, "notify.sock")
	if err := os.Remove(notify); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer manager.Close()
	syscall.Sync() // what other runs wrote is not this one's to write back
	before := cpuOf(g.Podman.PID())
	began := time.Now()
	g.Agent, err = b.stage.Start(g.Name, []string{"NOTIFY_SOCKET=" + notify}, b.stage.Program("cvm-agent"), "run", "--config", g.Config)
	if err != nil {
		return nil, err
	}
	if started != nil {
		started(g.Agent.PID())
	}
	ready, err := waitReady(ctx, manager, g.Agent)
	if err != nil {
		return nil, err
	}
	l := &launch{timing: timing{Seconds: ready.Sub(began).Seconds(), CPU: cpuOf(g.Agent.PID()) + cpuOf(g.Podman.PID()) - before}}
	return l, l.read(ctx, g, began)
}

// waitReady returns when READY=1 came.
func waitReady(ctx context.Context, manager *net.UnixConn, agent *rig.Process) (time.Time, error) {
	deadline := time.Now().Add(launchWithin)
	message := make([]byte, 64<<10)
	for {
		if err := manager.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			return time.Time{}, err
		}
		n, err := manager.Read(message)
		now := time.Now()
		switch {
		case err == nil && strings.Contains("\n"+string(message[:n]), "\nREADY=1"):
			return now, nil
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			return now, err
		case ctx.Err() != nil:
			return now, ctx.Err()
		case !agent.Running():
			return now, fmt.Errorf("the agent ended: %s", lastLines(agent.Output(), 3))
		case now.After(deadline):
			return now, fmt.Errorf("not ready after %s", launchWithin)
		}
	}
}

// read takes the phases from `ctl status`.
func (l *launch) read(ctx context.Context, g *rig.Guest, began time.Time) error {
	out, err := g.Ctl(ctx, "status", "--output", "json")
	if err != nil {
		return err
	}
	var status struct {
		Phases []struct {
			Name       string    `json:"phase"`
			Outcome    string    `json:"outcome"`
			Start      time.Time `json:"start"`
			DurationMS float64   `json:"durationMs"`
		} `json:"phases"`
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return fmt.Errorf("ctl status: %w", err)
	}
	for _, p := range status.Phases {
		l.Phases = append(l.Phases, phase{Name: p.Name, Outcome: p.Outcome, Begins: p.Start.Sub(began).Seconds(), Takes: p.DurationMS / 1000})
	}
	policy, err := l.phase("policy")
	if err != nil {
		return err
	}
	fetch, err := l.phase("fetch")
	if err != nil {
		return err
	}
	sbom, err := l.phase("sbom")
	if err != nil {
		return err
	}
	l.Policy = policy.ends()
	// From the last byte of the image to the end of the comparison: whatever
	// part of the scan overlaps with the fetch costs nothing.
	l.Added = max(0, sbom.ends()-fetch.ends())
	return nil
}

// discard empties the storage of a run, so that the next one does not share the
// disk with it.
func (b *bench) discard(ctx context.Context, podman *rig.Podman, dirs ...string) error {
	if ctx.Err() != nil {
		return nil // the rig cleans up
	}
	_, err := podman.Command(ctx, "rm", "--all", "--force", "--time", "0")
	podman.Stop()
	// The configuration stays: the rig asks podman about this storage again
	// when it closes.
	for _, dir := range append(dirs, podman.GraphRoot, podman.RunRoot) {
		// conmon's own cleanup may mount the storage again for a moment.
		err = errors.Join(err, rig.Eventually(ctx, 10*time.Second, func() error { return errors.Join(unmountUnder(dir), os.RemoveAll(dir)) }))
	}
	return err
}

func unmountUnder(dir string) error {
	mounts, err := rig.MountsUnder(dir)
	for _, point := range slices.Backward(mounts) {
		if unmountErr := syscall.Unmount(point, syscall.MNT_DETACH); unmountErr != nil && !errors.Is(unmountErr, syscall.EINVAL) {
			err = errors.Join(err, fmt.Errorf("unmounting %s: %w", point, unmountErr))
		}
	}
	return err
}

// cpuOf is the processor time in seconds of a process and of those children
// that it has waited for; zero when it is gone.
func cpuOf(pid int) float64 {
	fields := statOf(pid)
	if len(fields) < 15 {
		return 0
	}
	var ticks float64
	for _, f := range fields[11:15] { // utime stime cutime cstime
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0
		}
		ticks += n
	}
	return ticks / 100 // USER_HZ is 100 on every Linux that Go runs on
}

// statOf splits /proc/PID/stat after the name, which may hold anything: its
// first field is the state.
func statOf(pid int) []string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	text := string(stat)
	return strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
}

func mb(n int64) float64 { return float64(n) / 1e6 }

// lastLines joins the last n non-empty lines.
func lastLines(text string, n int) string {
	var lines []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], " | ")
}
