package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// Orders to the running agent, and what follows from them.

// Exit statuses of the programs, as documented in policy/cause.
const (
	exitRefused  = 10
	exitWorkload = 22
)

func (s *story) upgrade(ctx context.Context) (err error) {
	s.policy2 = s.rig.Path("policy", "demo-2.yaml")
	if s.web2, err = s.build(ctx, rig.App{Name: "web", Version: "v2"}, s.policy1, s.policy2, 2); err != nil {
		return err
	}
	if s.signed2, err = s.stage.SignPolicy(ctx, s.policy2); err != nil {
		return err
	}
	if _, err := s.stage.Guest.Ctl(ctx, "upgrade", s.signed2); err != nil {
		return err
	}
	return s.secondVersion(ctx)
}

// secondVersion checks that version 2 answers, and nothing else runs.
func (s *story) secondVersion(ctx context.Context) error {
	if err := rig.WaitHTTP(ctx, s.webPort, "/", "web v2"); err != nil {
		return err
	}
	s.show.saw("http://%s/ answers %q", rig.ListenOn(s.webPort), "web v2")
	if err := rig.WaitHTTP(ctx, s.vaultPort, "/", "vault v1"); err != nil {
		return err
	}
	return s.containersRun(ctx, s.web2, s.vault)
}

func (s *story) rollback(ctx context.Context) error {
	policy3 := s.rig.Path("policy", "demo-3.yaml")
	web3, err := s.build(ctx, rig.App{Name: "web", Version: "v3", Sick: true}, s.policy2, policy3, 3)
	if err != nil {
		return err
	}
	signed, err := s.stage.SignPolicy(ctx, policy3)
	if err != nil {
		return err
	}
	_, err = s.stage.Guest.Ctl(ctx, "upgrade", signed)
	if err := s.refused(err, exitWorkload, "upgrade-rolled-back"); err != nil {
		return fmt.Errorf("upgrade to %s: %w", web3.Reference, err)
	}
	return s.secondVersion(ctx)
}

// refuseImage has a hostile registry replace the signature of version 1 by one
// that stock cosign makes with a key that the policy does not name. Everything
// else about the image is as it was, and version 4 of the policy, rightly
// signed, names it.
func (s *story) refuseImage(ctx context.Context) error {
	stranger, err := s.rig.NewKeys(ctx, "stranger")
	if err != nil {
		return err
	}
	if err := s.stage.Unsign(ctx, s.web1.Digest); err != nil {
		return err
	}
	if err := s.stage.CosignSign(ctx, s.web1.Digest, stranger); err != nil {
		return err
	}
	if err := s.stage.CosignVerify(ctx, s.web1.Digest, stranger); err != nil {
		return err
	}
	policy4 := s.rig.Path("policy", "demo-4.yaml")
	if err := rig.Edit(s.policy2, policy4, map[string]string{"version: 2\n": "version: 4\n", s.web2.Digest: s.web1.Digest}); err != nil {
		return err
	}
	signed, err := s.stage.SignPolicy(ctx, policy4)
	if err != nil {
		return err
	}
	mark, err := s.audited()
	if err != nil {
		return err
	}
	_, err = s.stage.Guest.Ctl(ctx, "upgrade", signed)
	if err := s.refused(err, exitRefused, "image-signature-invalid"); err != nil {
		return err
	}
	released, err := s.stage.Broker.Since(mark, "release", "ok", "")
	if err != nil {
		return err
	}
	if len(released) > 0 {
		return fmt.Errorf("the broker released a key for a refused upgrade: %s", released[0])
	}
	return s.secondVersion(ctx)
}

func (s *story) destroy(ctx context.Context) error {
	if _, err := s.stage.Guest.Ctl(ctx, "destroy", "--yes"); err != nil {
		return err
	}
	if err := s.nothingLeft(ctx, s.stage.Podman); err != nil {
		return err
	}
	for _, port := range []uint16{s.webPort, s.vaultPort} {
		if rig.Answers(ctx, port) {
			return fmt.Errorf("port %d still answers after destroy", port)
		}
	}
	s.show.saw("nothing answers, and podman has no container, image or volume left")
	return nil
}

// nothingLeft asks podman for what must be gone.
func (s *story) nothingLeft(ctx context.Context, podman *rig.Podman) error {
	left, err := podman.Leftovers(ctx)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("left in podman's storage: %s", strings.Join(left, ", "))
	}
	return err
}

// refused checks that a command was refused with this exit status and cause.
func (s *story) refused(err error, status int, code string) error {
	var c *rig.CommandError
	switch {
	case err == nil:
		return fmt.Errorf("was accepted, expected a refusal with %s", code)
	case !errors.As(err, &c):
		return err
	case c.Status != status || !strings.Contains(c.Stderr, code+": "):
		return fmt.Errorf("expected exit status %d and %s: %w", status, code, err)
	}
	s.show.saw("refused with exit status %d: %s", c.Status, strings.TrimSpace(c.Stderr))
	return nil
}
