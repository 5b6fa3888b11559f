package platform

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Options is what the agent's configuration says about the platform.
type Options struct {
	TPM    string // device:PATH or unix:PATH; "" where none is to be looked for
	RunDir string // on a tmpfs: TDX's instance key
	AK     AKOptions
	Azure  AzureOptions
}

// Guest is what this guest's devices show. A platform is a candidate because
// its device is there, never because another is missing.
type Guest struct {
	found  []candidate
	tpm    *TPM  // nil when there is none
	tpmErr error // why it cannot be opened
}

// candidate is a platform with the device that shows it.
type candidate struct {
	platform policy.Platform
	device   string
	open     func(vmpl uint) Attester // attesters of one device share its lock
}

// Open looks for devices. That there are none, or too many, is for Choose to
// say.
func Open(ctx context.Context, h Hardware, o Options) (*Guest, error) {
	g := &Guest{}
	provider, err := h.provider()
	if err != nil {
		return nil, err
	}
	for _, c := range []struct {
		platform policy.Platform
		provider string
		devices  []string
		open     func(device string, tsm bool) func(vmpl uint) Attester
	}{
		{policy.PlatformSNP, providerSEV, sevDevices, func(device string, tsm bool) func(uint) Attester {
			d := &snpDevice{h: h, device: device, tsm: tsm}
			return func(vmpl uint) Attester { return &SNP{d, vmpl} }
		}},
		{policy.PlatformTDX, providerTDX, tdxDevices, func(device string, tsm bool) func(uint) Attester {
			t := &TDX{h: h, device: device, tsm: tsm, dir: o.RunDir}
			return func(uint) Attester { return t }
		}},
	} {
		device := h.first(c.devices)
		shown, tsm := device, provider == c.provider
		if shown == "" && tsm {
			shown = "configfs-tsm provider " + provider
		}
		if shown != "" {
			g.found = append(g.found, candidate{c.platform, shown, c.open(device, tsm)})
		}
	}
	if provider != "" && provider != providerSEV && provider != providerTDX {
		return nil, cause.New(cause.PlatformNotAllowed, "configfs-tsm shows provider %q, whose evidence this build does not make", provider)
	}
	if o.TPM != "" {
		if err := g.openTPM(ctx, o); err != nil {
			return nil, errors.Join(err, g.Close())
		}
	}
	return g, nil
}

// openTPM adds the platform that the TPM is of.
func (g *Guest) openTPM(ctx context.Context, o Options) error {
	tpm, err := OpenTPM(o.TPM)
	if err != nil {
		g.tpmErr = err
		return nil
	}
	tpm.options = o.AK
	g.tpm = tpm
	c := candidate{policy.PlatformTPM, o.TPM, func(uint) Attester { return tpm }}
	azure, err := openAzure(ctx, tpm, o.Azure)
	if err != nil {
		return err
	}
	if azure != nil {
		c = candidate{policy.Platform(azure.TEE()), fmt.Sprintf("%s (NV %#x)", o.TPM, uint32(nvHCLReport)), func(uint) Attester { return azure }}
	}
	g.found = append(g.found, c)
	return nil
}

// TEE returns the one TEE whose own launch field binds the launch: SNP or TDX.
// It is nil without one; two are an error.
func (g *Guest) TEE() (Attester, error) {
	var tee []candidate
	for _, c := range g.found {
		if c.platform == policy.PlatformSNP || c.platform == policy.PlatformTDX {
			tee = append(tee, c)
		}
	}
	switch len(tee) {
	case 0:
		return nil, nil
	case 1:
		return tee[0].open(0), nil
	}
	return nil, cause.New(cause.PlatformNotAllowed, "%s: which of them this guest is cannot be told", list(tee))
}

// CheckLaunch holds the initdata against the launch of the one platform that
// this guest can be, whatever the policy allows: a TEE is never passed over for
// a TPM beside it. Where two could be meant the check is left to the caller,
// after Choose: checked is false.
func (g *Guest) CheckLaunch(ctx context.Context, in *policy.Initdata) (checked bool, err error) {
	meant := slices.Clone(g.found)
	if len(meant) > 1 {
		meant = slices.DeleteFunc(meant, func(c candidate) bool { return c.platform == policy.PlatformTPM })
	}
	switch len(meant) {
	case 0:
		return false, g.nothing()
	case 1:
		return true, meant[0].open(0).CheckLaunch(ctx, in)
	}
	return false, nil
}

// Choose returns the attester of the one platform that this guest shows and the
// policy allows. Two, or none, are an error, and so is a TPM alone where a TEE
// shows itself: a vTPM beside a TEE is the host's and never stands in for it.
func (g *Guest) Choose(allowed []policy.Platform, vmpl uint) (Attester, error) {
	if len(g.found) == 0 {
		return nil, g.nothing()
	}
	var fits []candidate
	var tee *candidate
	for i, c := range g.found {
		if slices.Contains(allowed, c.platform) {
			fits = append(fits, c)
		}
		if c.platform != policy.PlatformTPM && tee == nil {
			tee = &g.found[i]
		}
	}
	switch {
	case len(fits) == 0:
		return nil, cause.New(cause.PlatformNotAllowed, "this is platform %s, the policy allows %s", list(g.found), fmt.Sprint(allowed))
	case len(fits) > 1:
		return nil, cause.New(cause.PlatformNotAllowed, "this can be platform %s, and the policy allows each: name one of them alone", list(fits))
	case fits[0].platform == policy.PlatformTPM && tee != nil:
		return nil, cause.New(cause.PlatformNotAllowed, "%s shows platform %s and the policy allows %s alone: a vTPM beside a TEE is the host's and does not stand in", tee.device, tee.platform, policy.PlatformTPM)
	}
	return fits[0].open(vmpl), nil
}

// nothing says why there is no candidate at all.
func (g *Guest) nothing() error {
	if g.tpmErr != nil {
		return cause.New(cause.Of(g.tpmErr), "no SEV-SNP or TDX device and no TPM: %w", errors.Unwrap(g.tpmErr))
	}
	return cause.New(cause.PlatformNotAllowed, "no SEV-SNP, TDX or TPM device: nothing here can be attested")
}

// Close closes the TPM, the one device that stays open.
func (g *Guest) Close() error {
	if g.tpm == nil {
		return nil
	}
	return g.tpm.Close()
}

func list(found []candidate) string {
	names := make([]string, len(found))
	for i, c := range found {
		names[i] = fmt.Sprintf("%s (%s)", c.platform, c.device)
	}
	return strings.Join(names, " and ")
}
