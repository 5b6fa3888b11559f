package launch

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// Main runs the daemon with the configuration file until ctx ends.
func Main(ctx context.Context, configFile, version string, logger *slog.Logger) error {
	LimitMemory()
	c, err := ReadConfig(configFile)
	if err != nil {
		return &PhaseError{Phase: "config", Err: err}
	}
	if err := prepare(c); err != nil {
		return &PhaseError{Phase: "config", Err: err}
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return &PhaseError{Phase: "config", Err: cause.New(cause.Internal, "the kernel's boot id: %w", err)}
	}
	a := New(Options{Config: c, World: real{c, logger, platform.Linux()}, Logger: logger, Version: version, BootID: strings.TrimSpace(string(boot))})
	l, err := control.Listen(c.ControlSocket, a.gid)
	if err != nil {
		return &PhaseError{Phase: "config", Err: cause.New(cause.Config, "the control socket: %w", err)}
	}
	return a.Run(ctx, l)
}

// real is the World of the product.
type real struct {
	config   Config
	logger   *slog.Logger
	hardware platform.Hardware
}

func (r real) trust() policy.Trust {
	t := r.config.Trust
	return policy.Trust{Fingerprints: t.Signers, Threshold: t.Threshold, VersionFloor: t.VersionFloor}
}

func (r real) Policy(initdata []byte, now time.Time) (*policy.Verified, error) {
	doc, err := policy.ParseInitdata(initdata)
	if err != nil {
		return nil, err
	}
	return policy.OpenInitdata(doc, r.trust(), now)
}

func (r real) Order(order []byte, running *policy.Verified, runningInitdata []byte, now time.Time) (*policy.Verified, []byte, error) {
	envelope, err := policy.CarriedEnvelope(order)
	if err != nil {
		return nil, nil, err
	}
	// What runs already is verified: ordering it again changes nothing.
	if e, err := dsse.Parse(envelope); err == nil && policy.Digest(e.Payload) == running.Digest {
		return running, runningInitdata, nil
	}
	next, err := running.OpenUpgrade(envelope, now)
	if err != nil {
		return nil, nil, err
	}
	initdata, err := successorInitdata(runningInitdata, envelope, running, next)
	return next, initdata, err
}

// successorInitdata is the document from which a restarted daemon reads the
// upgraded policy: the running one's keys and chain, one link longer when the
// signers changed.
func successorInitdata(runningInitdata, envelope []byte, running, next *policy.Verified) ([]byte, error) {
	doc, err := policy.ParseInitdata(runningInitdata)
	if err != nil {
		return nil, err
	}
	data := map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: doc.Data[policy.KeySigners]}
	rotation, err := doc.Rotation()
	if err != nil {
		return nil, err
	}
	rotated, err := changedSigners(running, next)
	if err != nil {
		return nil, err
	}
	if rotated {
		link, err := doc.Envelope()
		if err != nil {
			return nil, err
		}
		rotation = append(rotation, link)
	}
	if len(rotation) > 0 {
		links := make([]json.RawMessage, len(rotation))
		for i := range rotation {
			links[i] = rotation[i]
		}
		text, err := json.Marshal(links)
		if err != nil {
			return nil, cause.New(cause.PolicyRotation, "pack the rotation chain: %w", err)
		}
		data[policy.KeyRotation] = string(text)
	}
	return policy.PackInitdata("sha256", data)
}

func changedSigners(a, b *policy.Verified) (bool, error) {
	fingerprints := func(v *policy.Verified) (out []string, err error) {
		for _, key := range v.Keys {
			f, err := dsse.Fingerprint(key)
			if err != nil {
				return nil, err
			}
			out = append(out, f)
		}
		slices.Sort(out)
		return out, nil
	}
	fa, err := fingerprints(a)
	if err != nil {
		return false, err
	}
	fb, err := fingerprints(b)
	return a.Threshold != b.Threshold || !slices.Equal(fa, fb), err
}

func (r real) Podman(ctx context.Context, onWait func(error, time.Duration)) (Podman, error) {
	p, err := workload.Connect(ctx, r.config.PodmanSocket, onWait)
	if err != nil {
		return nil, err
	}
	return p, nil
}

func (r real) Secrets() (Secrets, error) {
	return workload.OpenSecrets(filepath.Join(r.config.RunDir, "secrets"))
}
