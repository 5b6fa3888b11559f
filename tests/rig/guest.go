package rig

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Guest is one agent's world: its configuration and directories, its TPM and
// its podman. It stands for a machine, as far as one process can.
type Guest struct {
	Name     string
	Dir      string
	Config   string // agent.yaml
	Initdata string // what Seed copies to
	Socket   string // control socket
	RunDir   string
	StateDir string
	TPM      *TPM
	Podman   *Podman
	Agent    *Process // of the last Launch

	rig *Rig
}

// GuestOptions is what the measured image of a real guest would hold.
type GuestOptions struct {
	Name         string // "" is guest
	TPM          *TPM
	Podman       *Podman
	Signers      []string // fingerprints of trusted policy signers
	Threshold    int      // zero is 1
	VersionFloor uint64   // zero is 1
	Extra        string   // further lines of agent.yaml
}

// NewGuest writes the agent's configuration. Nothing is started.
func (r *Rig) NewGuest(o GuestOptions) (*Guest, error) {
	if o.Name == "" {
		o.Name = "agent"
	}
	dir := r.Path(o.Name)
	g := &Guest{
		rig: r, Name: o.Name, Dir: dir, TPM: o.TPM, Podman: o.Podman,
		Config:   filepath.Join(dir, "agent.yaml"),
		Initdata: filepath.Join(dir, "initdata.toml"),
		Socket:   filepath.Join(dir, "control.sock"),
		RunDir:   filepath.Join(dir, "run"),
		StateDir: filepath.Join(dir, "state"),
	}
	for _, d := range []string{g.RunDir, g.StateDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	config := fmt.Sprintf(`initdata: %s
trust:
  signers: [%s]
  threshold: %d
  versionFloor: %d
tpm: %s
stateDir: %s
runDir: %s
storage:
  graphRoot: %s
  runRoot: %s
podmanSocket: %s
controlSocket: %s
socketGroup: root
sbomProgram: %s
%s`, g.Initdata, strings.Join(o.Signers, ", "), max(o.Threshold, 1), max(o.VersionFloor, 1), o.TPM.Spec, g.StateDir, g.RunDir,
		o.Podman.GraphRoot, o.Podman.RunRoot, o.Podman.Socket, g.Socket, r.Program("cvm-sbom"), o.Extra)
	return g, os.WriteFile(g.Config, []byte(config), 0o600)
}

// Seed puts an initdata document where the agent looks for it, as the initrd
// does with the one of the machine's seed.
func (g *Guest) Seed(initdata string) error {
	data, err := os.ReadFile(initdata)
	if err != nil {
		return err
	}
	return os.WriteFile(g.Initdata, data, 0o600)
}

// Measure extends the initdata's digest into PCR 8, once per power-on.
func (g *Guest) Measure(ctx context.Context) error {
	_, err := g.rig.Run(ctx, nil, g.rig.Program("cvm-early"), "measure", "--initdata", g.Initdata, "--tpm", g.TPM.Spec)
	return err
}

// Boot does what a reboot with this seed does, up to the agent's start: the
// TPM's registers are reset, the run directory is emptied, the seed measured.
func (g *Guest) Boot(ctx context.Context, initdata string) error {
	g.Halt()
	if err := g.TPM.PowerOn(ctx); err != nil {
		return err
	}
	if err := errors.Join(unmountUnder(g.RunDir), os.RemoveAll(g.RunDir), os.MkdirAll(g.RunDir, 0o700), g.Seed(initdata)); err != nil {
		return err
	}
	return g.Measure(ctx)
}

// Launch starts `cvm-agent run`. It returns at once; WaitReady waits.
func (g *Guest) Launch() error {
	g.Halt()
	p, err := g.rig.Start(g.Name, []string{"GOMEMLIMIT=64MiB"}, g.rig.Program("cvm-agent"), "run", "--config", g.Config)
	g.Agent = p
	return err
}

// Halt stops the agent, if it runs. Containers and registers stay.
func (g *Guest) Halt() {
	if g.Agent != nil {
		g.Agent.Stop()
	}
}

// WaitReady waits until the status says ready. When the agent ends before, the
// error is its *CommandError, with its last lines.
func (g *Guest) WaitReady(ctx context.Context, within time.Duration) error {
	var ended error
	err := Eventually(ctx, within, func() error {
		if !g.Agent.Running() {
			status, err := g.Agent.Wait(ctx)
			if err == nil {
				err = &CommandError{Argv: []string{"cvm-agent", "run"}, Status: status, Stderr: g.Agent.Output()}
			}
			ended = err
			return nil
		}
		status, err := g.Status(ctx)
		if err == nil && status.State != "ready" {
			err = fmt.Errorf("state %s: %s %s", status.State, status.Cause, status.Text)
		}
		return err
	})
	return errors.Join(ended, err)
}

// Phase, Event and Status are the control socket's JSON, as far as tests look
// at it.
type Phase struct {
	Sequence   string  `json:"sequence"`
	Name       string  `json:"phase"`
	Workload   string  `json:"workload"`
	Outcome    string  `json:"outcome"`
	Cause      string  `json:"cause"`
	Text       string  `json:"text"`
	DurationMS float64 `json:"durationMs"`
}

// Event is a change of a phase.
type Event struct {
	Seq uint64 `json:"seq"`
	Phase
}

// Status is the answer to `ctl status`.
type Status struct {
	State  string `json:"state"`
	Policy *struct {
		Name    string `json:"name"`
		Version uint64 `json:"version"`
	} `json:"policy"`
	Workloads []struct {
		Name    string `json:"name"`
		Image   string `json:"image"`
		ImageID string `json:"imageId"`
		Healthy bool   `json:"healthy"`
	} `json:"workloads"`
	Phases []Phase `json:"phases"`
	Cause  string  `json:"cause"`
	Text   string  `json:"text"`
}

// Ctl runs `cvm-agent ctl` against this guest.
func (g *Guest) Ctl(ctx context.Context, args ...string) (string, error) {
	argv := append([]string{g.rig.Program("cvm-agent"), "ctl"}, args...)
	return g.rig.Run(ctx, nil, append(argv, "--socket", g.Socket)...)
}

// Status asks `ctl status`.
func (g *Guest) Status(ctx context.Context) (*Status, error) {
	out, err := g.Ctl(ctx, "status", "--output", "json")
	if err != nil {
		return nil, err
	}
	var s Status
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return nil, fmt.Errorf("ctl status: %w", err)
	}
	return &s, nil
}

// Follow calls each for every event of the agent, past and to come, until ctx
// is done or the agent ends.
func (g *Guest) Follow(ctx context.Context, each func(Event)) error {
	cmd := exec.CommandContext(ctx, g.rig.Program("cvm-agent"), "ctl", "events", "--follow", "--output", "json", "--socket", g.Socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	decodeErr := events(out, each)
	err = cmd.Wait()
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		err = fmt.Errorf("ctl events: %w: %s", err, tail(stderr.String(), 2))
	}
	return errors.Join(decodeErr, err)
}

func events(r io.Reader, each func(Event)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("ctl events: %w", err)
		}
		each(e)
	}
	return nil // the pipe breaks when the follower is stopped
}

// Failure splits the one line that `cvm-agent run` ends with,
// "cvm-agent: <phase>: <code>: <text>".
func (g *Guest) Failure() (phase, code, text string) {
	for line := range strings.Lines(g.Agent.Output()) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "cvm-agent: ")
		if parts := strings.SplitN(rest, ": ", 3); ok && len(parts) == 3 {
			phase, code, text = parts[0], parts[1], parts[2]
		}
	}
	return phase, code, text
}
