package publish

import (
	"bytes"
	"context"
	"slices"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// keyBroker is what publishing needs of a broker's admin side.
type keyBroker interface {
	Resources(ctx context.Context) ([]string, error)
	PutResource(ctx context.Context, uri string, data []byte) error
	DeleteResource(ctx context.Context, uri string) error
	PutRule(ctx context.Context, uri string, rule adminclient.Rule) error
}

// preparedBroker opens the admin client, or returns nil when no key goes to a
// broker.
func (r *run) preparedBroker() (keyBroker, error) {
	b := r.o.Broker
	if !r.o.Encrypt || !b.used() {
		return nil, nil
	}
	if r.o.openBroker != nil {
		return r.o.openBroker()
	}
	ca, err := bounded.ReadNamed(b.CAFile, 1<<20)
	if err != nil {
		return nil, cause.New(cause.Usage, "--broker-ca: %w", err)
	}
	token, err := bounded.ReadNamedSecret(b.TokenFile, 64<<10)
	if err != nil {
		return nil, cause.New(cause.Usage, "--broker-token-file: %w", err)
	}
	defer clear(token)
	return adminclient.New(b.URL, ca, string(token))
}

// storeKey hands the KEK over before anything is encrypted with it, to the
// broker or to --kek-out. It never replaces a key: that would make another
// image unreadable.
func (r *run) storeKey(ctx context.Context, keys keyBroker, enc *encryption) (string, error) {
	if keys == nil {
		return r.o.KEKOut, writeSecret(r.o.KEKOut, enc.kek)
	}
	have, err := keys.Resources(ctx)
	if err != nil {
		return "", failed(cause.BrokerUnavailable, "list resources", err)
	}
	if slices.Contains(have, enc.resource) {
		return "", cause.New(cause.Usage, "--resource %s is already there: each image has a key of its own, choose another name", enc.resource)
	}
	if err := keys.PutResource(ctx, enc.resource, enc.kek); err != nil {
		return "", failed(cause.BrokerUnavailable, "store key", err)
	}
	r.did("key " + enc.resource)
	return enc.resource, nil
}

// putRule lets the broker release the key to guests that run the written
// policy, signed by its signers, with this very image.
func (r *run) putRule(ctx context.Context, keys keyBroker, doc *policy.Policy, res *Result) (string, error) {
	signers := r.o.Broker.Signers
	if len(signers) == 0 && r.policySigner != nil {
		fp, err := dsse.Fingerprint(r.policySigner.PublicKey())
		if err != nil {
			return "", err
		}
		signers = []string{fp}
	}
	if len(signers) == 0 {
		return "none set, the policy's signers are unknown: the key is released to nobody until a rule is set", nil
	}
	rule := adminclient.Rule{
		APIVersion: "cvm-agent.release-rule/v1",
		EKRoots:    r.o.Broker.EKRoots,
		Policy:     &adminclient.PolicyRule{Names: []string{doc.Name}, Signers: signers, MinimumVersion: doc.MinimumVersion},
		Images:     []string{res.ManifestDigest},
		TCB:        r.o.launches.TCB,
	}
	for _, p := range doc.Platforms {
		rule.Platforms = append(rule.Platforms, string(p))
		for _, l := range r.o.launches.Launch {
			if l.Platform == string(p) {
				rule.Launch = append(rule.Launch, l)
			}
		}
	}
	if err := rule.Validate(); err != nil {
		return "none set (" + err.Error() + "; --rule-launch gives both): the key is released to nobody until a rule is set", nil
	}
	switch err := keys.PutRule(ctx, res.KeyResource, rule); {
	case adminclient.IsRulesAreSigned(err):
		return "none set, the broker takes signed reference documents alone: the key is released to nobody until one names " + res.KeyResource, nil
	case err != nil:
		return "", failed(cause.BrokerUnavailable, "set release rule", err)
	}
	res.ReleaseRule = true
	r.did("release rule of " + res.KeyResource)
	return "policy " + doc.Name + " with this image", nil
}

// maxLaunches bounds a file of launches, in bytes.
const maxLaunches = release.MaxReferenceSize

// launches is what of a reference document a rule needs.
type launches struct {
	Launch []release.Launch `json:"launch"`
	TCB    *release.TCB     `json:"tcb,omitempty"`
}

// readLaunches reads a file of `cvmctl measure`, where tcb may be added, or a
// whole reference document.
func readLaunches(path string) (*launches, error) {
	if path == "" {
		return &launches{}, nil
	}
	data, err := bounded.ReadNamed(path, maxLaunches)
	if err != nil {
		return nil, cause.New(cause.Usage, "--rule-launch: %w", err)
	}
	if bytes.Contains(data, []byte(release.ReferenceAPIVersion)) {
		d, err := release.DecodeReferenceYAML(data)
		if err != nil {
			return nil, err
		}
		return &launches{d.Launch, &d.TCB}, nil
	}
	var d launches
	if _, err := bounded.DecodeYAML(data, &d, bounded.Limits{Bytes: maxLaunches, Depth: 8}); err != nil {
		return nil, cause.New(cause.Usage, "--rule-launch: %s: %w", path, err)
	}
	if len(d.Launch) == 0 {
		return nil, cause.New(cause.Usage, "--rule-launch: %s has no launch", path)
	}
	for _, l := range d.Launch {
		if err := l.Validate(); err != nil {
			return nil, cause.New(cause.Usage, "--rule-launch: %s: %w", path, err)
		}
	}
	return &d, nil
}
