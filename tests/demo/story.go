package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// story is the demo's state: what was started and what was published.
type story struct {
	show      *display
	rig       *rig.Rig
	stage     *rig.Stage
	following sync.WaitGroup // followers of agents' events

	webPort, vaultPort uint16
	web1, web2, vault  *rig.Publication
	policy1, policy2   string // policy documents, YAML
	signed1, signed2   string // the same in DSSE envelopes
	initdata           string // what the first boot is bound to
}

// secretURI is a secret of the encrypted workload: 32 bytes.
const secretURI = "kbs:///demo/secret/token"

// launchWithin bounds a launch: it is seconds, but the machine may be busy.
const launchWithin = 2 * time.Minute

// tell goes through the steps in order. On an error it returns the step too.
func (s *story) tell(ctx context.Context) (step string, err error) {
	steps := []struct {
		id, text string
		do       func(context.Context) error
	}{
		{"parts", "a registry, a software TPM, a key broker, podman twice, signing keys", s.parts},
		{"publish", "build, describe, sign and push two images, one of them encrypted", s.publish},
		{"check", "stock tools look at what was published", s.check},
		{"policy", "sign the launch policy and pack it into initdata", s.sign},
		{"refuse-policy", "a changed policy must not start anything", s.refusePolicy},
		{"refuse-key", "nor may a host that also replaces the trusted signer get a key", s.refuseKey},
		{"measure", "the early stage measures the initdata into PCR 8", s.measure},
		{"launch", "the agent verifies, attests, decrypts, compares and runs", s.launch},
		{"running", "both workloads run, from verified images", s.running},
		{"upgrade", "version 2 takes over", s.upgrade},
		{"rollback", "version 3 never gets healthy: version 2 comes back", s.rollback},
		{"refuse-image", "an image re-signed by another key is refused, version 2 stays", s.refuseImage},
		{"destroy", "containers, images, volumes and keys go", s.destroy},
	}
	for _, st := range steps {
		s.show.step(st.id, st.text)
		if err := st.do(ctx); err != nil {
			return st.id, err
		}
		if ctx.Err() != nil {
			return st.id, ctx.Err()
		}
	}
	return "", nil
}

func (s *story) parts(ctx context.Context) (err error) {
	s.stage, err = s.rig.NewStage(ctx, nil)
	if err != nil {
		return err
	}
	if s.webPort, err = rig.FreePort(); err != nil {
		return err
	}
	s.vaultPort, err = rig.FreePort()
	return err
}

func (s *story) publish(ctx context.Context) error {
	template, err := s.stage.Template("demo",
		rig.PolicyWorkload{Name: "web", Port: s.webPort},
		rig.PolicyWorkload{Name: "vault", Port: s.vaultPort, Encryption: "required",
			Extra: "secrets: [{name: token, resource: \"" + secretURI + "\", mode: \"0444\"}]"})
	if err != nil {
		return err
	}
	s.policy1 = s.rig.Path("policy", "demo-1.yaml")
	if s.web1, err = s.build(ctx, rig.App{Name: "web", Version: "v1"}, template, s.policy1, 1); err != nil {
		return err
	}
	dir, err := s.rig.BuildApp(ctx, rig.App{Name: "vault", Version: "v1", Files: map[string]string{"/srv/recipe": "what nobody else may read\n"}})
	if err != nil {
		return err
	}
	s.vault, err = s.stage.Publish(ctx, rig.PublishOptions{
		Source: []string{dir}, To: "demo/vault:v1", Encrypt: true, Workload: "vault", Template: s.policy1, Out: s.policy1})
	if err != nil {
		return err
	}
	s.show.saw("cvmctl published %s and, encrypted, %s", s.web1.Digest, s.vault.Digest)
	return s.stage.PutSecret(ctx, secretURI, strings.Repeat("s", 32), s.vault.KeyResource)
}

// build publishes one version of the plain image and completes a policy.
func (s *story) build(ctx context.Context, app rig.App, template, out string, version uint64) (*rig.Publication, error) {
	dir, err := s.rig.BuildApp(ctx, app)
	if err != nil {
		return nil, err
	}
	return s.stage.Publish(ctx, rig.PublishOptions{
		Source: []string{dir}, To: "demo/" + app.Name + ":" + app.Version, Workload: app.Name, Template: template, Out: out, Version: version})
}

// check has stock cosign and skopeo judge what cvmctl pushed.
func (s *story) check(ctx context.Context) error {
	for _, p := range []*rig.Publication{s.web1, s.vault} {
		if err := s.stage.CosignVerify(ctx, p.Digest, s.stage.Signer); err != nil {
			return err
		}
		if err := s.stage.CosignVerifySBOM(ctx, p.Digest, s.stage.Signer); err != nil {
			return err
		}
	}
	s.show.saw("cosign verify and cosign verify-attestation --type spdxjson accept both")
	types, err := s.stage.LayerTypes(ctx, s.vault.Digest)
	if err != nil {
		return err
	}
	for _, t := range types {
		if !strings.HasSuffix(t, "+encrypted") {
			return fmt.Errorf("a layer of the encrypted image is in the registry as %s", t)
		}
	}
	s.show.saw("the registry holds the encrypted image's layers as %s", strings.Join(types, ", "))
	return nil
}

func (s *story) sign(ctx context.Context) (err error) {
	if s.signed1, err = s.stage.SignPolicy(ctx, s.policy1); err != nil {
		return err
	}
	s.initdata, err = s.stage.Pack(ctx, s.signed1)
	return err
}

func (s *story) measure(ctx context.Context) error {
	return s.stage.Guest.Boot(ctx, s.initdata)
}

func (s *story) launch(ctx context.Context) error {
	mark, err := s.audited()
	if err != nil {
		return err
	}
	if err := s.stage.Guest.Launch(); err != nil {
		return err
	}
	s.follow(ctx, s.stage.Guest)
	if err := s.stage.Guest.WaitReady(ctx, launchWithin); err != nil {
		return err
	}
	released, err := s.stage.Broker.Since(mark, "release", "ok", s.vault.KeyResource)
	if err != nil {
		return err
	}
	if len(released) == 0 {
		return errors.New("the agent is ready, but the broker's audit log shows no release of the encrypted image's key")
	}
	s.show.saw("the broker's audit log records the release of %s", s.vault.KeyResource)
	return nil
}

// running looks at the workloads from outside.
func (s *story) running(ctx context.Context) error {
	for _, w := range []struct {
		port       uint16
		path, want string
	}{{s.webPort, "/", "web v1"}, {s.vaultPort, "/", "vault v1"}, {s.vaultPort, "/secrets/token", "32 bytes"}} {
		if err := rig.WaitHTTP(ctx, w.port, w.path, w.want); err != nil {
			return err
		}
		s.show.saw("http://%s%s answers %q", rig.ListenOn(w.port), w.path, w.want)
	}
	return s.containersRun(ctx, s.web1, s.vault)
}

// containersRun checks with podman that exactly these images run.
func (s *story) containersRun(ctx context.Context, want ...*rig.Publication) error {
	out, err := s.stage.Podman.Command(ctx, "ps", "--no-trunc", "--format", "{{.ImageID}}")
	if err != nil {
		return err
	}
	ids := strings.Fields(out)
	for _, p := range want {
		id := strings.TrimPrefix(p.ConfigDigest, "sha256:")
		if !strings.Contains(out, id) {
			return fmt.Errorf("podman runs %v, not %s of %s", ids, id, p.Reference)
		}
	}
	if len(ids) != len(want) {
		return fmt.Errorf("podman runs %d containers, expected %d", len(ids), len(want))
	}
	s.show.saw("podman runs exactly the published image IDs, %d containers", len(ids))
	return nil
}

func (s *story) audited() (int, error) {
	records, err := s.stage.Broker.Records()
	return len(records), err
}

// follow shows an agent's phases as they happen.
func (s *story) follow(ctx context.Context, g *rig.Guest) {
	agent := g.Agent
	s.following.Go(func() {
		// The socket appears a moment after the start.
		for agent.Running() && ctx.Err() == nil {
			if g.Follow(ctx, s.show.phase) == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
}
