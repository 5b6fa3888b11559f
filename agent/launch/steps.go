package launch

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// generation is one policy with everything that is verified, fetched or
// running under it.
type generation struct {
	verified *policy.Verified
	initdata []byte // the document that carries this policy
	broker   Broker // nil when the policy names none
	images   Images
	items    []*item
	staged   bool // its events are policy-staged and image-staged
}

// item is one workload of a generation.
type item struct {
	rule      policy.Workload
	image     Image
	scanner   Scanner // nil when nothing is to be compared
	keys      LayerKeys
	secrets   map[string][]byte // name → value, until they are written
	stored    Stored
	container workload.Container
	id        string // container ID, "" while there is none
}

// Default deadlines of phases.
const (
	localDeadline = time.Minute // what asks nobody outside the guest
	registryTime  = 5 * time.Minute
	brokerTime    = 5 * time.Minute
	fetchTime     = 30 * time.Minute
	sbomTime      = 10 * time.Minute
	startTime     = 2 * time.Minute
)

func (g *generation) policy() *policy.Policy { return g.verified.Policy }

// event is the event of a kind that names the generation's policy.
func (g *generation) event(kind eventlog.Kind, reason string) eventlog.Event {
	e := eventlog.Event{Kind: kind, Policy: g.policy().Name, PolicyDigest: g.verified.Digest, PolicyVersion: g.policy().Version, Reason: reason}
	if kind == eventlog.KindPolicy || kind == eventlog.KindPolicyStaged {
		e.Signers = g.verified.Signers
	}
	return e
}

// open makes the clients that the generation's policy asks for.
func (a *Agent) open(g *generation) (err error) {
	if g.policy().Broker != nil {
		if g.broker, err = a.world.Broker(g.verified, a.initdata, a.platform, a.log); err != nil {
			return err
		}
	}
	if g.images, err = a.world.Images(g.verified, a.waitsForRegistry); err != nil {
		return err
	}
	for _, rule := range g.policy().Workloads {
		g.items = append(g.items, &item{rule: rule})
	}
	return nil
}

// warmUp gives the workloads their SBOM scanners. Those that are fetched side by
// side first are started as well: what they need before they see an image
// passes beside attestation and fetch. They have nothing of the image, and no
// rights.
func (a *Agent) warmUp(ctx context.Context, g *generation) {
	for i, w := range g.items {
		if w.rule.SBOM.Required && w.rule.SBOM.Compare != "none" {
			w.scanner = a.world.Scanner(ctx, i < maxTogether)
		}
	}
}

// waitsForRegistry shows a wait in the phases that ask registries.
func (a *Agent) waitsForRegistry(err error, next time.Duration) {
	a.rec.waiting([]string{"resolve", "signature", "attestation", "fetch"},
		"waiting for registry: "+textOf(err)+", retry in "+next.Round(100*time.Millisecond).String())
}

// attest proves the guest to the broker and learns the version mark, the
// current signers and the time.
func (a *Agent) attest(ctx context.Context, st *step, g *generation) error {
	if g.broker == nil {
		if a.config.requireMark(g.policy()) {
			return cause.New(cause.BrokerMarkMissing, "the measured image requires a broker's version mark and the policy names no broker")
		}
		st.skipped("the policy names no broker")
		return nil
	}
	return a.session(ctx, st, g, func(s Session) error {
		claims := s.Claims()
		if err := a.checkClaims(claims, g); err != nil {
			return err
		}
		a.setClaims(claims)
		st.progress("version mark %d, broker's time %s", claims.VersionMark, claims.IssuedAt.UTC().Format(time.RFC3339))
		return nil
	})
}

func (a *Agent) checkClaims(c Claims, g *generation) error {
	p := g.policy()
	if c.Tombstone {
		return cause.New(cause.Destroyed, "the broker says that this instance is destroyed")
	}
	if !c.HasMark {
		if a.config.requireMark(p) {
			return cause.New(cause.BrokerMarkMissing, "the broker's token carries no version mark for policy %s", p.Name)
		}
		return nil
	}
	if c.PolicyName != p.Name {
		return cause.New(cause.TokenInvalid, "the broker's token is about policy %q, expected %s", c.PolicyName, p.Name)
	}
	if c.VersionMark > p.Version {
		return cause.New(cause.PolicyBelowFloor, "policy %s has version %d, the broker's mark is %d", p.Name, p.Version, c.VersionMark)
	}
	if len(c.Signers) > 0 && !slices.ContainsFunc(g.verified.Signers, func(f string) bool { return slices.Contains(c.Signers, f) }) {
		return cause.New(cause.PolicySignature, "policy %s is signed by none of the current signers that the broker names", p.Name)
	}
	expires, err := time.Parse(time.RFC3339, p.Expires)
	if err != nil {
		return cause.New(cause.PolicyInvalid, "expiry %q is not RFC 3339", p.Expires)
	}
	if c.IssuedAt.After(expires) {
		return cause.New(cause.PolicyExpired, "policy %s expired at %s, the broker's time is %s", p.Name, p.Expires, c.IssuedAt.UTC().Format(time.RFC3339))
	}
	return nil
}

// session opens a new session for use, and closes it after. Nothing is
// extended between its quote and its end: extends happen in the phases policy
// and measure alone, and none of those overlaps a phase that opens a session.
func (a *Agent) session(ctx context.Context, st *step, g *generation, use func(Session) error) error {
	return a.retry(ctx, st, func(ctx context.Context) error {
		if a.destroying.Load() {
			return cause.New(cause.Destroyed, "no key is asked for after destroy")
		}
		s, err := g.broker.Attest(ctx, func(err error, next time.Duration) {
			st.waiting("waiting for broker: %s, retry in %s", textOf(err), next.Round(100*time.Millisecond))
		})
		if err != nil {
			return err
		}
		defer s.Close()
		return use(s)
	})
}

// publicKeys gets the verification keys that the policy keeps at the broker,
// each in a session of its own.
func (a *Agent) publicKeys(st *step, g *generation) KeyFunc {
	return func(ctx context.Context, uri string) (value []byte, err error) {
		if g.broker == nil {
			return nil, cause.New(cause.PolicyInvalid, "the policy names the resource %s but no broker", uri)
		}
		err = a.session(ctx, st, g, func(s Session) error {
			value, err = s.Resource(ctx, uri)
			return err
		})
		return value, err
	}
}

// verify settles who signed the image and its SBOM, before the first layer
// byte is asked for.
func (a *Agent) verify(g *generation, w *item, phase phaseFunc) error {
	d := g.policy().Upgrade.Deadlines.Registry.Or(registryTime)
	if err := phase("resolve", d, func(ctx context.Context, st *step) error {
		return a.retry(ctx, st, func(ctx context.Context) (err error) {
			if w.image, err = g.images.Resolve(ctx, w.rule); err == nil {
				err = w.image.CheckEncryption()
			}
			return err
		})
	}); err != nil {
		return err
	}
	var signature, attestation error
	var both sync.WaitGroup
	both.Go(func() {
		signature = phase("signature", d, func(ctx context.Context, st *step) error {
			return a.retry(ctx, st, func(ctx context.Context) error { return w.image.VerifySignatures(ctx, a.publicKeys(st, g)) })
		})
	})
	both.Go(func() {
		attestation = phase("attestation", d, func(ctx context.Context, st *step) error {
			if !w.rule.SBOM.Required {
				st.skipped("the policy asks for no SBOM")
				return nil
			}
			return a.retry(ctx, st, func(ctx context.Context) error {
				signed, err := w.image.SBOM(ctx, a.publicKeys(st, g))
				if err == nil && w.scanner != nil {
					w.scanner.Expect(signed) // a large document: it is read now, and not kept
				}
				return err
			})
		})
	})
	both.Wait()
	// Of two failures the image's own signature is the one to name, however
	// the two ran.
	return cmp.Or(signature, attestation)
}

// measure puts the image into the event log, once.
func (a *Agent) measure(ctx context.Context, st *step, g *generation, w *item) error {
	e := eventlog.Event{Kind: eventlog.KindImage, Workload: w.rule.Name, Image: w.rule.Image}
	if g.staged {
		e.Kind = eventlog.KindImageStaged
	} else if running := a.log.State(); slices.Contains(running.Images, eventlog.Image{Workload: e.Workload, Image: e.Image}) {
		st.progress("measured before the daemon's restart")
		return nil
	}
	return a.log.AppendOnce(ctx, e)
}

// fetch gets the keys, the layers and the tree, and compares.
func (a *Agent) fetch(g *generation, w *item, phase phaseFunc) error {
	d := g.policy().Upgrade.Deadlines
	if err := phase("key", d.Broker.Or(brokerTime), func(ctx context.Context, st *step) error { return a.key(ctx, st, g, w) }); err != nil {
		return err
	}
	if err := phase("fetch", d.Fetch.Or(fetchTime), func(ctx context.Context, st *step) error {
		return a.retry(ctx, st, func(ctx context.Context) (err error) {
			if w.stored, err = w.image.Fetch(ctx, w.keys, func(text string) { st.progress("%s", text) }); err == nil {
				st.progress("%s", w.stored.Detail())
			}
			return err
		})
	}); err != nil {
		return err
	}
	wipeAll(w.keys)
	w.keys = nil
	return phase("sbom", d.SBOM.Or(sbomTime), func(ctx context.Context, st *step) error { return a.compare(ctx, st, w) })
}

// key asks for the layer keys and the secrets in one new session, whose quote
// is newer than every extend.
func (a *Agent) key(ctx context.Context, st *step, g *generation, w *item) error {
	secrets := w.rule.Run.Secrets
	if !w.image.Encrypted() && len(secrets) == 0 {
		st.skipped("the image is plain and no secrets are asked for")
		return nil
	}
	if g.broker == nil {
		return cause.New(cause.KeyRefused, "the image of %s or its secrets need a key and the policy names no broker", w.rule.Name)
	}
	return a.session(ctx, st, g, func(s Session) (err error) {
		if w.image.Encrypted() {
			if w.keys, err = w.image.Unwrap(ctx, s.Resource); err != nil {
				return err
			}
		}
		w.secrets = make(map[string][]byte, len(secrets))
		for _, secret := range secrets {
			if w.secrets[secret.Name], err = s.Resource(ctx, secret.Resource); err != nil {
				return fmt.Errorf("secret %s: %w", secret.Name, err)
			}
		}
		st.progress("%d layer keys, %d secrets", len(w.keys), len(secrets))
		return nil
	})
}

func (a *Agent) compare(ctx context.Context, st *step, w *item) error {
	switch {
	case !w.rule.SBOM.Required:
		st.skipped("the policy asks for no SBOM")
		return nil
	case w.rule.SBOM.Compare == "none":
		st.skipped("the policy asks for no comparison")
		return nil
	}
	root, unmount, err := w.stored.Mount(ctx)
	if err != nil {
		return cause.Wrap(cause.StorageFailed, err)
	}
	detail, err := w.scanner.Compare(ctx, w.stored, root, w.rule.SBOM)
	if unmountErr := unmount(); err == nil && unmountErr != nil {
		return cause.New(cause.StorageFailed, "unmount the image: %w", unmountErr)
	}
	w.scanner.Close()
	w.scanner = nil
	st.progress("%s", detail)
	return err
}

// start runs the container of the verified image.
func (a *Agent) start(ctx context.Context, st *step, g *generation, w *item) error {
	return a.retry(ctx, st, func(ctx context.Context) error {
		if a.destroying.Load() {
			return cause.New(cause.Destroyed, "nothing is started after destroy")
		}
		podman, err := a.podman(ctx, st)
		if err != nil {
			return err
		}
		w.container = workload.Container{Policy: g.policy().Name, Version: g.policy().Version, Workload: w.rule.Name,
			ImageID: w.stored.ImageID(), ImageRef: w.rule.Image, Run: w.rule.Run, LogRule: g.policy().Log.Workload}
		if len(w.rule.Run.Secrets) > 0 {
			user := w.rule.Run.User
			if user == "" {
				if user, err = podman.User(ctx, w.container.ImageID); err != nil {
					return err
				}
			}
			if w.container.SecretDir, err = a.secrets.Write(w.container.Name(), user, w.rule.Run.Secrets, w.secrets); err != nil {
				return err
			}
		}
		if w.id, err = podman.Start(ctx, w.container); err != nil {
			return err
		}
		wipeAll(w.secrets)
		w.secrets = nil
		return nil
	})
}

// healthy waits for the workload's own word.
func (a *Agent) healthy(ctx context.Context, st *step, g *generation, w *item) error {
	podman, err := a.podman(ctx, st)
	if err != nil {
		return err
	}
	if err := podman.WaitHealthy(ctx, w.id, w.container, func(err error) { st.progress("%s", textOf(err)) }); err != nil {
		return err
	}
	st.progress("") // the last failed probe is history
	return nil
}

// healthTime is longer than the check's own deadline, which words the failure.
func healthTime(g *generation) time.Duration {
	longest := time.Duration(0)
	for _, w := range g.policy().Workloads {
		if h := w.Run.HealthCheck; h != nil {
			longest = max(longest, h.Deadline.Or(workload.DefaultDeadline))
		}
	}
	return longest + 30*time.Second
}

func wipeAll[K comparable](values map[K][]byte) {
	for _, v := range values {
		clear(v)
	}
}
