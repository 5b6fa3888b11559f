package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// Launches of a second guest, with its own TPM and storage, that must fail.

// refusePolicy boots a guest whose policy was changed after it was signed.
func (s *story) refusePolicy(ctx context.Context) error {
	owner, err := s.stage.Owner.Fingerprint()
	if err != nil {
		return err
	}
	changed := s.rig.Path("policy", "changed.toml")
	if err := rig.ChangePayload(s.initdata, changed, `"compare":"strict"`, `"compare":"normal"`); err != nil {
		return err
	}
	return s.refuseLaunch(ctx, "changed", changed, owner, "policy", "policy-signature-invalid")
}

// refuseKey boots a guest whose host signed the policy itself and made the
// guest trust that key. Nothing on the host's side can tell; the broker can.
func (s *story) refuseKey(ctx context.Context) error {
	host, err := s.rig.NewKeys(ctx, "host")
	if err != nil {
		return err
	}
	trusted, err := host.Fingerprint()
	if err != nil {
		return err
	}
	policy := s.rig.Path("policy", "hosts.yaml")
	if err := rig.Edit(s.policy1, policy, nil); err != nil {
		return err
	}
	signed, err := s.stage.SignPolicy(ctx, policy, host)
	if err != nil {
		return err
	}
	initdata, err := s.stage.Pack(ctx, signed, host)
	if err != nil {
		return err
	}
	mark, err := s.audited()
	if err != nil {
		return err
	}
	if err := s.refuseLaunch(ctx, "host", initdata, trusted, "key/vault", "key-refused"); err != nil {
		return err
	}
	refusals, err := s.stage.Broker.Since(mark, "release", "refused", s.vault.KeyResource)
	if err != nil {
		return err
	}
	if len(refusals) == 0 {
		return errors.New("the broker's audit log records no refusal")
	}
	s.show.saw("the broker's audit log records: %s", refusals[0])
	return nil
}

// refuseLaunch boots a guest of that name and expects its agent to end with
// the phase and cause, leaving nothing.
func (s *story) refuseLaunch(ctx context.Context, name, initdata, trusted, phase, code string) error {
	tpm, err := s.rig.StartTPM(ctx, "")
	if err != nil {
		return err
	}
	podman, err := s.rig.StartPodman(ctx, name+"-podman")
	if err != nil {
		return err
	}
	guest, err := s.rig.NewGuest(rig.GuestOptions{Name: name, TPM: tpm, Podman: podman, Signers: []string{trusted}})
	if err != nil {
		return err
	}
	if err := guest.Boot(ctx, initdata); err != nil {
		return err
	}
	if err := guest.Launch(); err != nil {
		return err
	}
	s.follow(ctx, guest)
	limited, cancel := context.WithTimeout(ctx, launchWithin)
	defer cancel()
	status, err := guest.Agent.Wait(limited)
	if err != nil {
		return err
	}
	gotPhase, gotCode, text := guest.Failure()
	if status != exitRefused || gotPhase != phase || gotCode != code {
		return fmt.Errorf("expected exit status %d and %s in phase %s, got %d and %s in phase %q: %s",
			exitRefused, code, phase, status, gotCode, gotPhase, strings.TrimSpace(text))
	}
	s.show.saw("refused with exit status %d in phase %s: %s: %s", status, gotPhase, gotCode, text)
	if err := s.nothingLeft(ctx, podman); err != nil {
		return err
	}
	podman.Stop()
	tpm.Stop()
	return nil
}
