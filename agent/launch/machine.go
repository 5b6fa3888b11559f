package launch

import (
	"context"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Times between a destroy and the machine's end, where the image wants one.
const (
	destroyGrace = 3 * time.Second  // for the outcome to reach who ordered it
	destroyAgain = 30 * time.Second // for who ordered it to try again, when something remains
)

// endMachine powers the machine off after a destroy, if the measured
// configuration says so. The daemon ends too, in success: in the image that is
// the same order to systemd a second time (units/cvm-agent.service.d).
func (a *Agent) endMachine(err error) {
	if !a.config.PowerOffOnDestroy {
		return
	}
	wait := a.destroyGrace
	if err != nil {
		wait = a.destroyAgain
	}
	time.AfterFunc(wait, func() {
		ctx, cancel := context.WithTimeout(context.Background(), localDeadline)
		defer cancel()
		if err := a.manager.powerOff(ctx); err != nil {
			a.logger.Error("the machine cannot be powered off", "error", err)
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.stopRun != nil {
			a.stopRun()
		}
	})
}

// dwell keeps answering reads for a bounded time after a launch that repetition
// does not help, so that an operator can see why before the machine ends.
func (a *Agent) dwell(ctx context.Context, why error) {
	a.mu.Lock()
	a.lastErr = why
	a.mu.Unlock()
	switch cause.Exit(why) {
	case cause.ExitInternal, cause.ExitUnavailable, cause.ExitStorage: // systemd starts it again
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(a.config.FailureWait):
	}
}

// servable refuses a policy that asks for a way in that this agent does not
// have: who relies on it must not find out after the launch.
func servable(p *policy.Policy) error {
	if p.Control.VSOCK {
		return cause.New(cause.PolicyInvalid, "control.vsock: this agent serves the control API on its socket and on virtio-serial, not on vsock")
	}
	return nil
}
