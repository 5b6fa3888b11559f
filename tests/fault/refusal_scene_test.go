package fault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sync/errgroup"

	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/signkey"
	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// places is how many scripts run at a time.
const places = 3

// scene is what all scripts share: registry, broker, keys and images.
type scene struct {
	rig      *rig.Rig
	stage    *rig.Stage
	stranger *rig.Keys // signs what nobody should accept
	app      *rig.Publication
	vault    *rig.Publication // encrypted
	sbom     string           // of app
	kek      []byte           // wraps the keys of its layers
	signers  map[string]dsse.Signer
	free     chan *place
	scripts  atomic.Int64 // that have begun
}

// place is what one script has for itself.
type place struct {
	tpm    *rig.TPM
	podman *rig.Podman
	front  *front // its registry
	gate   *gate  // before its broker
	image  string // the good image, as the front serves it
}

const dpkgStatus = `Package: base-files
Status: install ok installed
Maintainer: Nobody <nobody@example.org>
Architecture: amd64
Version: 12.4
Description: a package for the scanner to find
`

func newScene(ctx context.Context) (_ *scene, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("run as root: guests mount file systems and run containers")
	}
	r, err := rig.New(rig.Options{})
	if err != nil {
		return nil, err
	}
	s := &scene{rig: r, sbom: r.Path("app.spdx.json"), signers: map[string]dsse.Signer{}, free: make(chan *place, places)}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if s.stage, err = r.NewStage(ctx, nil); err != nil {
		return nil, err
	}
	if s.stranger, err = r.NewKeys(ctx, "stranger"); err != nil {
		return nil, err
	}
	for name, keys := range s.keys() {
		pem, err := os.ReadFile(keys.Private)
		if err != nil {
			return nil, err
		}
		if s.signers[name], err = signkey.Load(pem, []byte(strings.TrimPrefix(keys.Env[0], "COSIGN_PASSWORD="))); err != nil {
			return nil, err
		}
	}
	var all []*place
	var group errgroup.Group
	group.Go(func() error { return s.publish(ctx) })
	group.Go(func() (err error) {
		all, err = s.newPlaces(ctx)
		return err
	})
	if err := group.Wait(); err != nil {
		return nil, err
	}
	for n, p := range all {
		// The same image, signed under the name that this place gives it.
		repository := fmt.Sprintf("%s/place%d/app", p.front.host, n+1)
		p.image = repository + "@" + s.app.ManifestDigest
		if err := errors.Join(r.Copy(ctx, s.app.Digest, repository+":v1"), r.CosignSign(ctx, p.image, s.stage.Signer),
			r.CosignAttest(ctx, p.image, s.sbom, s.stage.Signer)); err != nil {
			return nil, err
		}
		s.free <- p
	}
	return s, nil
}

func (s *scene) keys() map[string]*rig.Keys {
	return map[string]*rig.Keys{"owner": s.stage.Owner, "signer": s.stage.Signer, "stranger": s.stranger}
}

// publish makes the good images: a plain one with a package in it, and an
// encrypted one whose key is released to policies by the owner alone.
func (s *scene) publish(ctx context.Context) error {
	template, err := s.stage.Template("fault", rig.PolicyWorkload{Name: "app", Port: 1}, rig.PolicyWorkload{Name: "vault", Port: 1, Encryption: "required"})
	if err != nil {
		return err
	}
	out := s.rig.Path("policy", "fault.yaml")
	dir, err := s.rig.BuildApp(ctx, rig.App{Name: "app", Version: "v1", Files: map[string]string{"/var/lib/dpkg/status": dpkgStatus}})
	if err != nil {
		return err
	}
	if s.app, err = s.stage.Publish(ctx, rig.PublishOptions{Source: []string{dir}, To: "fault/app:v1", Workload: "app",
		Template: template, Out: out, Extra: []string{"--sbom-out", s.sbom}}); err != nil {
		return err
	}
	if dir, err = s.rig.BuildApp(ctx, rig.App{Name: "vault", Version: "v1"}); err != nil {
		return err
	}
	kek := s.rig.Path("vault.kek")
	if s.vault, err = s.stage.Publish(ctx, rig.PublishOptions{Source: []string{dir}, To: "fault/vault:v1", Workload: "vault",
		Template: out, Out: out, Extra: []string{"--encrypt", "--resource", vaultKey, "--kek-out", kek}}); err != nil {
		return err
	}
	if s.kek, err = os.ReadFile(kek); err != nil {
		return err
	}
	owner, err := s.stage.Owner.Fingerprint()
	if err != nil {
		return err
	}
	rule := s.rig.Path("vault.rule")
	text := fmt.Sprintf("{apiVersion: cvm-agent.release-rule/v1, platforms: [tpm], ekRoots: [%s], policy: {names: [fault], signers: [%s]}}", rig.EKRootName, owner)
	return errors.Join(os.WriteFile(rule, []byte(text), 0o600), s.admin(ctx, "resource", "put", vaultKey, "--file", kek),
		s.admin(ctx, "rule", "set", vaultKey, "--file", rule), s.stage.PutSecret(ctx, "kbs:///fault/secret/token", token, vaultKey))
}

func (s *scene) admin(ctx context.Context, args ...string) error {
	b := s.stage.Broker
	argv := append([]string{s.rig.Program("cvmctl"), "broker"}, args...)
	_, err := s.rig.Run(ctx, nil, append(argv, "--url", b.URL, "--ca", b.CA, "--token-file", b.AdminToken)...)
	return err
}

// token is the secret of a workload.
const token = "32-bytes-that-nobody-else-reads!"

// vaultKey is the resource that opens the encrypted image.
const vaultKey = "kbs:///fault/key/vault"

func (s *scene) newPlaces(ctx context.Context) (all []*place, err error) {
	for n := range places {
		p := &place{tpm: s.stage.TPM, podman: s.stage.Podman}
		if n > 0 {
			if p.tpm, err = s.rig.StartTPM(ctx, ""); err != nil {
				return nil, err
			}
			if p.podman, err = s.rig.StartPodman(ctx, fmt.Sprintf("guest-%d", n+1)); err != nil {
				return nil, err
			}
		}
		if p.front, err = newFront(s.stage.Registry.Host); err != nil {
			return nil, err
		}
		if p.gate, err = newGate(strings.TrimPrefix(s.stage.Broker.URL, "https://")); err != nil {
			return nil, err
		}
		s.rig.OnClose(func() error { return errors.Join(p.front.down(), p.gate.down()) })
		all = append(all, p)
	}
	return all, nil
}

// world is one script's: its place, its guest, its agent.
type world struct {
	*scene
	*place
	guest        *rig.Guest
	port, second uint16 // of the first workload, and of the other one of both.yaml
	dir          string // $WORK
	agent        *run   // of `exits`, running or ended
	events       int64  // size of podman's event log at the script's start
	mounts       []string
	visitors     *atomic.Int64 // of the place where redirects go
	watch        *watch
}

type worldKey struct{}

// setup gives the script a place and writes agent.yaml, policy.yaml (the good
// image), vault.yaml (the encrypted one) and both.yaml.
func (s *scene) setup(env *testscript.Env) (err error) {
	w := &world{scene: s, place: <-s.free, dir: env.WorkDir}
	env.Values[worldKey{}] = w
	env.Defer(func() {
		if err := w.leave(); err != nil {
			env.T().Fatal("leaving the place: ", err)
		}
		s.free <- w.place
	})
	// A number too, since go test -count runs a script again.
	name := fmt.Sprintf("%s-%d", strings.TrimPrefix(filepath.Base(env.WorkDir), "script-"), s.scripts.Add(1))
	owner, err := s.stage.Owner.Fingerprint()
	if err != nil {
		return err
	}
	if w.guest, err = s.rig.NewGuest(rig.GuestOptions{Name: name, TPM: w.tpm, Podman: w.podman, Signers: []string{owner}}); err != nil {
		return err
	}
	if w.port, err = rig.FreePort(); err != nil {
		return err
	}
	if w.second, err = rig.FreePort(); err != nil {
		return err
	}
	if w.events, err = size(w.eventFile()); err != nil {
		return err
	}
	if err := w.writePolicies(name); err != nil {
		return err
	}
	config, err := os.ReadFile(w.guest.Config)
	if err != nil {
		return err
	}
	fingerprint, err := s.stranger.Fingerprint()
	if err != nil {
		return err
	}
	for key, value := range map[string]string{
		"SYFT_CHECK_FOR_APP_UPDATE": "false", "SYFT_REGISTRY_INSECURE_USE_HTTP": "true", "SYFT_FILE_METADATA_SELECTION": "all", "SYFT_FILE_METADATA_DIGESTS": "sha256",
		"PATH": s.rig.Bin + ":" + s.rig.Tools + ":" + os.Getenv("PATH"),
		"SEED": w.guest.Initdata, "PORT2": fmt.Sprint(w.second),
		"APP_ID": strings.TrimPrefix(s.app.ConfigDigest, "sha256:"), "VAULT_ID": strings.TrimPrefix(s.vault.ConfigDigest, "sha256:"),
		// What the agent calls the image in storage.
		"APP_NAME": strings.Split(s.app.Digest, "@")[0] + ":cvm-" + strings.TrimPrefix(s.app.ConfigDigest, "sha256:")[:12],
		"BROKER":   s.stage.Broker.URL, "BROKER_CA": s.stage.Broker.CA, "BROKER_TOKEN": s.stage.Broker.AdminToken,
		"APP": w.image, "VAULT": s.vault.Digest, "REGISTRY": w.front.host, "DIRECT": s.stage.Registry.Host, "PORT": fmt.Sprint(w.port), "SOCKET": w.guest.Socket,
		"OWNER": owner, "STRANGER": fingerprint, "GRAPHROOT": w.podman.GraphRoot, "SBOM": s.sbom,
		"KEYS": s.rig.Path("keys"), "COSIGN_PASSWORD": strings.TrimPrefix(s.stage.Owner.Env[0], "COSIGN_PASSWORD=")} {
		env.Setenv(key, value)
	}
	return os.WriteFile(filepath.Join(w.dir, "agent.yaml"), config, 0o600)
}

func (w *world) writePolicies(name string) error {
	app := rig.PolicyWorkload{Name: "app", Image: w.image, Port: w.port}
	vault := rig.PolicyWorkload{Name: "vault", Image: w.vault.Digest, Port: w.port, Encryption: "required"}
	direct, second := app, vault
	direct.Image, second.Port = w.app.Digest, w.second
	for file, workloads := range map[string][]rig.PolicyWorkload{"policy.yaml": {app}, "vault.yaml": {vault}, "both.yaml": {direct, second}} {
		draft := name + "-" + strings.TrimSuffix(file, ".yaml")
		template, err := w.stage.Template(draft, workloads...)
		if err != nil {
			return err
		}
		// The release rule of the vault's key names the policy "fault".
		replace := map[string]string{"name: " + draft: "name: fault", w.stage.Broker.URL: "https://" + w.gate.host}
		if file == "policy.yaml" {
			replace["host: "+w.stage.Registry.Host] = "host: " + w.front.host
		}
		if err := rig.Edit(template, filepath.Join(w.dir, file), replace); err != nil {
			return err
		}
	}
	return nil
}

// leave makes the place as it was.
func (w *world) leave() error {
	ctx := context.Background()
	if w.agent != nil {
		w.agent.stop()
	}
	w.front.honest()
	errs := []error{w.front.up(), w.gate.up()}
	if len(w.mounts) > 0 {
		errs = append(errs, w.unmount(ctx))
	}
	if !w.podman.Running() {
		errs = append(errs, w.podman.Restart(ctx))
	}
	left, err := w.podman.Leftovers(ctx)
	errs = append(errs, err)
	if len(left) > 0 {
		for _, args := range [][]string{{"rm", "--all", "--force", "--time", "0"}, {"rmi", "--all", "--force"}, {"volume", "prune", "--force"}} {
			_, err := w.podman.Command(ctx, args...)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (w *world) eventFile() string { return filepath.Join(w.podman.Dir, "tmp", "events", "events.log") }

func size(file string) (int64, error) {
	info, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
