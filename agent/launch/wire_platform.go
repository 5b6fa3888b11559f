package launch

import (
	"context"
	"os"
	"path/filepath"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Platform looks for the TEE or TPM and holds the launch against the initdata,
// before anything in the initdata counts.
func (r real) Platform(ctx context.Context, initdata []byte) (Platform, error) {
	doc, err := policy.ParseInitdata(initdata)
	if err != nil {
		return nil, err
	}
	guest, err := platform.Open(ctx, r.hardware, platform.Options{
		TPM: r.config.TPM, RunDir: r.config.RunDir, AK: platform.AKOptions(r.config.AttestationKey), Azure: platform.AzureOptions(r.config.Azure)})
	if err != nil {
		return nil, cause.Wrap(cause.TPMUnavailable, err)
	}
	p := &guestPlatform{guest: guest, doc: doc, dir: filepath.Join(r.config.RunDir, "eventlog")}
	if p.bound, err = guest.CheckLaunch(ctx, doc); err != nil {
		_ = guest.Close()
		return nil, cause.Wrap(cause.TPMUnavailable, err)
	}
	return p, nil
}

// guestPlatform is the platform of this guest. Its methods are called one after
// the other.
type guestPlatform struct {
	guest    *platform.Guest
	doc      *policy.Initdata
	dir      string            // of the event log
	bound    bool              // the launch was held against doc
	name     policy.Platform   // set by Allow
	register eventlog.Register // set by Allow
}

// attester is the one that a policy asks for on this guest.
func (p *guestPlatform) attester(of *policy.Policy) (platform.Attester, error) {
	return p.guest.Choose(of.Platforms, uint(of.VMPL))
}

func (p *guestPlatform) Allow(ctx context.Context, of *policy.Policy) (policy.Platform, error) {
	a, err := p.attester(of)
	if err != nil {
		return "", err
	}
	name := policy.Platform(a.TEE())
	if p.name != "" && p.name != name {
		return "", cause.New(cause.PlatformNotAllowed, "this guest was launched as platform %s, the policy makes it %s", p.name, name)
	}
	if !p.bound {
		if err := a.CheckLaunch(ctx, p.doc); err != nil {
			return "", cause.Wrap(cause.TPMUnavailable, err)
		}
		p.bound = true
	}
	if p.name == "" {
		p.name = name
		// Where the platform has no register the log is compared with its head.
		if p.register = a.Register(); p.register == nil {
			p.register = eventlog.NewHead(p.dir)
		}
	}
	return name, nil
}

func (p *guestPlatform) Log(ctx context.Context) (Log, error) {
	if p.register == nil {
		return nil, cause.New(cause.Internal, "the platform was not chosen before its event log")
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return nil, cause.New(cause.EventLogWrite, "%w", err)
	}
	l, err := eventlog.Open(ctx, p.dir, p.register)
	if err != nil {
		return nil, err
	}
	return l, nil
}

func (p *guestPlatform) Register() string { return p.register.Name() }
func (p *guestPlatform) Close() error     { return p.guest.Close() }
