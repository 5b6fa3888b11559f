// Package platform knows which trusted execution environment the guest runs
// in, and makes its evidence.
//
// It promises that a platform is never guessed and never replaced by another:
// what cannot be proven fails. Platform "tpm" is served here; TDX and SEV-SNP
// devices are recognised and refused by name. It judges nothing: see
// policy/appraisal.
package platform

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Attester makes the evidence of one platform.
type Attester interface {
	// TEE is the platform's name in the KBS protocol.
	TEE() string
	// Auth returns what dialect cvm-agent/1 sends with an auth request.
	Auth(ctx context.Context) (*kbs.CVMAgentAuth, error)
	// Activate proves that the AK and the EK of Auth live in one TPM: it
	// returns the secret that the broker encrypted to them.
	Activate(ctx context.Context, c *kbs.CVMAgentChallenge) ([]byte, error)
	// Evidence returns the primary evidence over report_data (SHA-384, 48
	// bytes, shortened or padded as the platform's row in kbs-protocol says).
	Evidence(ctx context.Context, reportData [48]byte) (json.RawMessage, error)
}

// devices of platforms, by their stable kernel names.
var devices = []struct {
	platform policy.Platform
	paths    []string
}{
	{policy.PlatformSNP, []string{"/dev/sev-guest"}},
	{policy.PlatformTDX, []string{"/dev/tdx_guest", "/dev/tdx-guest"}},
}

// Detect returns the one platform that this guest is and that the policy
// allows. Two candidates, or none, are an error.
func Detect(allowed []policy.Platform, tpm *TPM) (Attester, error) {
	return detect(allowed, tpm, func(path string) bool {
		_, err := os.Stat(path)
		return !errors.Is(err, os.ErrNotExist) // unreadable counts as there
	})
}

func detect(allowed []policy.Platform, tpm *TPM, exists func(string) bool) (Attester, error) {
	for _, d := range devices {
		for _, path := range d.paths {
			if !exists(path) {
				continue
			}
			// A vTPM beside a TEE is the host's: it never stands in for the TEE.
			return nil, cause.New(cause.PlatformNotAllowed, "%s shows platform %s, whose evidence this build does not make; a TPM beside it does not stand in", path, d.platform)
		}
	}
	if tpm == nil {
		return nil, cause.New(cause.PlatformNotAllowed, "no SEV-SNP, TDX or TPM device: nothing here can be attested")
	}
	if !slices.Contains(allowed, policy.PlatformTPM) {
		return nil, cause.New(cause.PlatformNotAllowed, "this is platform %s, the policy allows %s", policy.PlatformTPM, fmt.Sprint(allowed))
	}
	return tpm, nil
}
