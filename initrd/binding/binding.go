// Package binding ties the initdata to the launch: it holds a TEE's own launch
// field against it, or extends PCR 8 by its digest, once.
//
// It promises that nothing else was measured into our registers before, and
// that what was extended is read back. It looks at no policy.
package binding

import (
	"context"
	"fmt"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// MustBeZero are the registers that nothing may have touched: 8 and 14 are
// ours, 12 and 13 show a changed command line and foreign system extensions.
var MustBeZero = []int{platform.PCRLaunch, 12, 13, platform.PCREvents}

// Launch is what this guest's launch can be bound by: a TEE or a TPM.
type Launch struct {
	tee platform.Attester
	tpm *platform.TPM
}

// Open finds the TEE. Without one it opens the TPM that spec names (see
// platform.OpenTPM): a TPM beside a TEE is the host's and stays untouched.
func Open(ctx context.Context, h platform.Hardware, spec string) (*Launch, error) {
	guest, err := platform.Open(ctx, h, platform.Options{})
	if err != nil {
		return nil, err
	}
	tee, err := guest.TEE()
	if err != nil {
		return nil, err
	}
	if tee != nil {
		return &Launch{tee: tee}, nil
	}
	if spec == "" {
		return nil, cause.New(cause.Usage, "measure takes --tpm SPEC where there is no SEV-SNP or TDX device")
	}
	tpm, err := platform.OpenTPM(spec)
	if err != nil {
		return nil, err
	}
	return &Launch{tpm: tpm}, nil
}

// Close closes the TPM.
func (l *Launch) Close() error {
	if l.tpm == nil {
		return nil
	}
	return l.tpm.Close()
}

// Platform names what binds the launch.
func (l *Launch) Platform() string {
	if l.tee != nil {
		return l.tee.TEE()
	}
	return string(policy.PlatformTPM)
}

// CheckFresh requires that nothing measured into our registers. A TEE has none
// at this stage: its launch field was set before the first instruction.
func (l *Launch) CheckFresh(ctx context.Context) error {
	if l.tee != nil {
		return nil
	}
	values, err := l.tpm.ReadPCRs(ctx, MustBeZero...)
	if err != nil {
		return err
	}
	for _, i := range MustBeZero {
		if !allZero(values[i]) {
			return cause.New(cause.RegisterNotZero, "PCR %d is %x before the measurement, expected zero: something else measured into it, or this boot is measured already", i, values[i])
		}
	}
	return nil
}

// Bind holds the initdata against the TEE's launch field, or extends PCR 8 by
// its digest, and says what it is bound to in one line. CheckFresh comes first.
func (l *Launch) Bind(ctx context.Context, initdata *policy.Initdata) (string, error) {
	if l.tee != nil {
		if err := l.tee.CheckLaunch(ctx, initdata); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s launch is bound to %x", l.tee.TEE(), initdata.Digest()), nil
	}
	if initdata.Algorithm != "sha256" {
		return "", cause.New(cause.InitdataMalformed, "initdata algorithm %q: PCR 8 takes sha256", initdata.Algorithm)
	}
	if err := l.tpm.ExtendPCR(ctx, platform.PCRLaunch, initdata.Digest()); err != nil {
		return "", err
	}
	// Read back: an extend that did not happen must not be found out later.
	values, err := l.tpm.ReadPCRs(ctx, platform.PCRLaunch)
	if err != nil {
		return "", err
	}
	if err := policy.CheckBindingPCR8(initdata, values[platform.PCRLaunch]); err != nil {
		return "", err
	}
	return fmt.Sprintf("PCR 8 %x", values[platform.PCRLaunch]), nil
}

func allZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return len(b) > 0
}
