package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// Bounds. Under TCG on a busy machine all of it is slow; none is waited for in
// vain, since a machine that goes off ends the waiting.
const (
	bootWithin  = 8 * time.Minute
	askWithin   = 30 * time.Second
	orderWithin = 6 * time.Minute
	offWithin   = 3 * time.Minute
)

// orderType is the media type of a signed order.
const orderType = "application/vnd.cvm-agent.order.v1+json"

// story is the life of one guest.
type story struct {
	*scene
	vm      *rig.Machine
	agent   *serial
	early   string    // the early stage's line on the console
	earlyAt time.Time // when it was seen
	spent   []byte    // the upgrade's order, which was carried out
}

func (s *story) checks() []check {
	return []check{
		{"measured", "the early stage binds the launch to the seed's policy: PCR 8 is the predicted one", s.measured},
		{"attested", "the broker accepts the evidence, by the endorsement key of this run's authority", s.attested},
		{"predicted", "the key is released under PCR 2, 4, 9, 11, 12 and 13 as computed from the image file", s.predicted},
		{"ready", "the agent says so on the virtio-serial port, of the policy that was signed", s.ready},
		{"answers", "the decrypted image runs on podman's bridge and answers the host", s.answers("vault v1")},
		{"secret", "and has the broker's secret as a file", func(ctx context.Context) error {
			return rig.WaitHTTP(ctx, s.vm.Port, "/secrets/token", "32 bytes")
		}},
		{"unsigned-destroy", "a destroy that nobody signed is refused", s.unsignedDestroy},
		{"stranger-destroy", "so is one that a key outside the policy signed", s.strangerDestroy},
		{"other-pcr", "with another PCR 11 in the reference document, an upgrade gets no key", s.otherPCR},
		{"upgrade", "a signed order upgrades to version 2", s.upgrade},
		{"clients", "a hundred clients of the port, one after the other, are each answered", s.clients},
		{"replayed-upgrade", "the same order again is refused", s.replayedUpgrade},
		{"replayed-destroy", "so is a destroy over a challenge that was used", s.replayedDestroy},
		{"rollback", "version 3 never gets healthy: version 2 comes back", s.rollback},
		{"destroy", "a signed order destroys the instance", s.destroy},
		{"power-off", "and the machine is off", s.powerOff},
	}
}

// on says whether the machine is.
func (s *story) on() bool { return s.vm != nil && s.vm.Running() }

func (s *story) measured(ctx context.Context) (err error) {
	if s.vm, err = s.StartMachine(ctx, rig.MachineOptions{Name: "story", Disk: s.disk(), Seeds: []string{s.seed},
		TPM: s.TPM, Forward: guestPort, Accel: s.accel}); err != nil {
		return err
	}
	s.agent = newSerial(s.vm)
	if s.early, err = s.vm.WaitConsole(ctx, bootWithin, regexp.MustCompile(`cvm-early: [^\n]*\n`)); err != nil {
		return err
	}
	s.earlyAt = time.Now()
	if !strings.Contains(s.early, "PCR 8 "+s.pcr8) {
		return fmt.Errorf("the console says %q, expected PCR 8 %s", s.early, s.pcr8)
	}
	return nil
}

// audited waits for a record of the broker. A refusal is final, and so is a
// machine that is off.
func (s *story) audited(ctx context.Context, op, resource string) error {
	var final error
	err := rig.Eventually(ctx, bootWithin, func() error {
		running := s.vm.Running()
		refused, err := s.Broker.Since(0, op, "refused", "")
		if err != nil {
			return err
		}
		ok, err := s.Broker.Since(0, op, "ok", resource)
		switch {
		case err != nil:
		case len(refused) > 0:
			final = fmt.Errorf("the broker refused: %s", refused[0])
		case len(ok) == 0 && !running:
			final = fmt.Errorf("the machine is off: %s", s.lastLines())
		case len(ok) == 0:
			err = fmt.Errorf("the audit log has no %s: %s", op, s.lastLines())
		}
		return err
	})
	return errors.Join(final, err)
}

func (s *story) attested(ctx context.Context) error { return s.audited(ctx, "attest", "") }

func (s *story) predicted(ctx context.Context) error {
	return s.audited(ctx, "release", s.apps[floor].KeyResource)
}

func (s *story) ready(ctx context.Context) error {
	if err := s.waitState(ctx, "ready"); err != nil {
		return err
	}
	if err := s.running(ctx, floor); err != nil {
		return err
	}
	out, err := s.Run(ctx, nil, s.Program("cvmctl"), "control", "--serial", s.vm.Control, "status", "--output", "json")
	if err == nil && !strings.Contains(out, s.apps[floor].ManifestDigest) {
		err = fmt.Errorf("cvmctl control status does not name the image: %s", out)
	}
	return errors.Join(err, s.reportBoot(ctx))
}

func (s *story) waitState(ctx context.Context, want string) error {
	var off error
	err := rig.Eventually(ctx, bootWithin, func() error {
		if !s.vm.Running() {
			off = fmt.Errorf("the machine is off: %s", s.lastLines())
			return nil
		}
		var status rig.Status
		err := s.agent.get(ctx, askWithin, "/v1/status", &status)
		if err == nil && status.State != want {
			time.Sleep(500 * time.Millisecond)
			err = fmt.Errorf("the agent is %s, expected %s: %s %s", status.State, want, status.Cause, status.Text)
		}
		return err
	})
	return errors.Join(off, err)
}

// clients come and go while the guest, which has just upgraded, is busy, and
// still hears of the one before. None may wait for longer than a slow machine needs.
func (s *story) clients(ctx context.Context) error {
	start := time.Now()
	for n := range 100 {
		time.Sleep(time.Duration(n) * 100 * time.Microsecond)
		if err := s.agent.get(ctx, askWithin, "/v1/status", nil); err != nil {
			return fmt.Errorf("client %d, after %v: %w", n+1, time.Since(start).Round(time.Millisecond), err)
		}
	}
	s.report.say("     a client each %v", (time.Since(start) / 100).Round(time.Millisecond))
	return nil
}

// running checks that exactly one version's image runs, and is healthy.
func (s *story) running(ctx context.Context, version uint64) error {
	var status rig.Status
	if err := s.agent.get(ctx, askWithin, "/v1/status", &status); err != nil {
		return err
	}
	if status.Policy == nil || status.Policy.Version != version {
		return fmt.Errorf("the policy in force is %+v, expected version %d", status.Policy, version)
	}
	if len(status.Workloads) != 1 || !status.Workloads[0].Healthy || !strings.HasSuffix(status.Workloads[0].Image, s.apps[version].ManifestDigest) {
		return fmt.Errorf("running is %+v, expected %s, healthy", status.Workloads, s.apps[version].Digest)
	}
	return nil
}

func (s *story) answers(want string) func(context.Context) error {
	return func(ctx context.Context) error { return rig.WaitHTTP(ctx, s.vm.Port, "/", want) }
}

func (s *story) unsignedDestroy(ctx context.Context) error {
	if err := refusedWith(s.agent.order(ctx, "destroy", "", nil), "order-unsigned"); err != nil {
		return err
	}
	return s.running(ctx, floor)
}

func (s *story) strangerDestroy(ctx context.Context) error {
	stranger, err := s.NewKeys(ctx, "stranger")
	if err != nil {
		return err
	}
	order, err := s.sign(ctx, stranger, "destroy", 0)
	if err != nil {
		return err
	}
	if err := refusedWith(s.agent.order(ctx, "destroy", orderType, order), "order-signature-invalid"); err != nil {
		return err
	}
	return s.running(ctx, floor)
}

// otherPCR is the counter-check of predicted: the same evidence, with one PCR
// of the document changed, gets nothing.
func (s *story) otherPCR(ctx context.Context) error {
	if err := s.setReference(ctx, "11", strings.Repeat("ab", 32)); err != nil {
		return err
	}
	order, err := s.sign(ctx, s.operator, "upgrade", floor+1)
	if err != nil {
		return err
	}
	refused := refusedWith(s.agent.order(ctx, "upgrade", orderType, order), "key-refused")
	return errors.Join(refused, s.setReference(ctx, "", ""), s.running(ctx, floor))
}

func (s *story) upgrade(ctx context.Context) (err error) {
	if s.spent, err = s.sign(ctx, s.operator, "upgrade", floor+1); err != nil {
		return err
	}
	if err := s.agent.order(ctx, "upgrade", orderType, s.spent); err != nil {
		return err
	}
	return s.second(ctx)
}

// second checks that version 2 answers and nothing else runs.
func (s *story) second(ctx context.Context) error {
	if err := s.answers("vault v2")(ctx); err != nil {
		return err
	}
	return s.running(ctx, floor+1)
}

func (s *story) replayedUpgrade(ctx context.Context) error {
	return errors.Join(refusedWith(s.agent.order(ctx, "upgrade", orderType, s.spent), "order-replayed"), s.second(ctx))
}

func (s *story) replayedDestroy(ctx context.Context) error {
	order, err := s.signOver(ctx, s.operator, "destroy", 0, s.Path("orders", "challenge.json"))
	if err != nil {
		return err
	}
	return errors.Join(refusedWith(s.agent.order(ctx, "destroy", orderType, order), "order-replayed"), s.second(ctx))
}

func (s *story) rollback(ctx context.Context) error {
	order, err := s.sign(ctx, s.operator, "upgrade", floor+2)
	if err != nil {
		return err
	}
	return errors.Join(refusedWith(s.agent.order(ctx, "upgrade", orderType, order), "upgrade-rolled-back"), s.second(ctx))
}

func (s *story) destroy(ctx context.Context) error {
	order, err := s.sign(ctx, s.operator, "destroy", 0)
	if err != nil {
		return err
	}
	return s.agent.order(ctx, "destroy", orderType, order)
}

func (s *story) powerOff(ctx context.Context) error { return s.vm.WaitOff(ctx, offWithin) }

// sign asks the agent for a challenge and makes an order over it; the challenge
// stays in orders/challenge.json.
func (s *story) sign(ctx context.Context, keys *rig.Keys, operation string, version uint64) ([]byte, error) {
	file := s.Path("orders", "challenge.json")
	var challenge json.RawMessage
	if err := s.agent.get(ctx, askWithin, "/v1/challenge", &challenge); err != nil {
		return nil, err
	}
	if err := s.write(file, string(challenge)); err != nil {
		return nil, err
	}
	return s.signOver(ctx, keys, operation, version, file)
}

func (s *story) signOver(ctx context.Context, keys *rig.Keys, operation string, version uint64, challenge string) ([]byte, error) {
	out := s.Path("orders", operation+".json")
	// The instance is the broker's to name: the challenge came by way of the host.
	released, err := s.Broker.Since(0, "release", "ok", s.apps[floor].KeyResource)
	if err != nil {
		return nil, err
	}
	if len(released) == 0 || released[0].Instance == "" {
		return nil, errors.New("the audit log names no instance that got the key")
	}
	argv := []string{s.Program("cvmctl"), "order", operation, "--challenge", challenge, "--key", keys.Private, "--out", out,
		"--policy-name", "e2e", "--instance", released[0].Instance}
	if operation == "upgrade" {
		argv = append(argv, "--policy", s.policies[version])
	}
	if _, err := s.Run(ctx, keys.Env, argv...); err != nil {
		return nil, err
	}
	return os.ReadFile(out)
}

func (s *story) lastLines() string {
	lines := strings.Split(strings.TrimSpace(s.vm.Console()), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], " | ")
}

// earlyTook is in the early stage's line.
var earlyTook = regexp.MustCompile(`early stage (\d+) ms`)

// reportBoot says how long the boot took, by phase. The guest's clock is the
// host's, as the machine's RTC gives it: to a second.
func (s *story) reportBoot(ctx context.Context) error {
	events, err := s.agent.events(ctx)
	if err != nil {
		return err
	}
	first := slices.IndexFunc(events, func(e event) bool { return e.Sequence == "launch" })
	last := slices.IndexFunc(events, func(e event) bool { return e.Sequence == "launch" && e.Phase == "ready" && e.Outcome == "ok" })
	if last < 0 { // the sequence's own end
		last = len(events) - 1
	}
	took := earlyTook.FindStringSubmatch(s.early)
	if first < 0 || took == nil {
		return fmt.Errorf("no launch in %d events, or no duration in %q", len(events), s.early)
	}
	since := func(t time.Time) float64 { return t.Sub(s.vm.Started).Seconds() }
	s.report.say("   boot (%s): early stage done %.1fs, of which it took %s ms; agent's first event %.1fs; ready %.1fs", s.accel,
		since(s.earlyAt), took[1], since(events[first].Time), since(events[last].Time))
	for _, e := range events {
		if e.Sequence == "launch" && e.Phase != "" && e.Outcome == "ok" {
			s.report.say("     %6.1fs  %s took %.1fs", since(e.Time), e.Phase, e.Time.Sub(e.Start).Seconds())
		}
	}
	return nil
}
