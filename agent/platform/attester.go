// Package platform knows which trusted execution environment the guest runs
// in, and makes its evidence.
//
// It promises that a platform is never guessed and never replaced by another:
// devices say what there is, the policy says what is allowed, and what cannot
// be proven fails. No two of extend, quote and read of one platform overlap.
// It asks no service of a vendor, and one of the host only where the agent's
// configuration names it. It judges no evidence: see policy/appraisal.
package platform

import (
	"context"
	"encoding/json"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Attester makes the evidence of one platform. Its methods may be called from
// several goroutines.
type Attester interface {
	// TEE is the platform's name in the KBS protocol.
	TEE() string
	// CheckLaunch compares what this launch is bound to (HOST_DATA, MRCONFIGID
	// or PCR 8, as the hardware tells this guest) with the initdata. Zero is
	// refused.
	CheckLaunch(ctx context.Context, initdata *policy.Initdata) error
	// Register is the event log's register; nil where the platform has none.
	Register() eventlog.Register
	// Auth returns what dialect cvm-agent/1 sends with an auth request.
	Auth(ctx context.Context) (*kbs.CVMAgentAuth, error)
	// Additional returns what the platform adds to additional_evidence under
	// dialect cvm-agent/1 for a session's nonce. The challenge is nil when the
	// broker sent none.
	Additional(ctx context.Context, nonce string, c *kbs.CVMAgentChallenge) (kbs.AdditionalCVMAgent, error)
	// Evidence returns the primary evidence over report_data (SHA-384, 48
	// bytes, shortened or padded as the platform's row in kbs-protocol says).
	// events is the agent's log where it can travel in the platform's own log
	// alone (dialect kbs), nil where it travels beside.
	Evidence(ctx context.Context, reportData [kbs.ReportDataSize]byte, events []byte) (json.RawMessage, error)
}

// padded is report_data in the 64 bytes of SNP and TDX.
func padded(reportData [kbs.ReportDataSize]byte) (out [64]byte) {
	copy(out[:], reportData[:])
	return out
}
