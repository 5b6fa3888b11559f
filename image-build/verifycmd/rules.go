package verifycmd

import (
	"bytes"
	"crypto"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// maxKeyFile bounds a public key file, in bytes.
const maxKeyFile = 64 << 10

// rule reads --rules; nil when there are none.
func (o *options) rule(now time.Time) (*release.Rule, error) {
	if o.rules == "" {
		if o.resource != "" || len(o.rulesKeys) > 0 {
			return nil, cause.New(cause.Usage, "--resource and --rules-key need --rules")
		}
		return nil, nil
	}
	data, err := bounded.ReadNamed(o.rules, dsse.MaxSize)
	if err != nil {
		return nil, cause.New(cause.Usage, "--rules: %w", err)
	}
	if _, err := dsse.Parse(data); err == nil {
		return o.signed(data, now)
	}
	if len(o.rulesKeys) > 0 {
		return nil, cause.New(cause.Usage, "--rules-key: %s is not signed", o.rules)
	}
	// Neither document can hold the other's version for another reason.
	if bytes.Contains(data, []byte(release.ReferenceAPIVersion)) {
		d, err := release.DecodeReferenceYAML(data)
		if err != nil {
			return nil, cause.New(cause.Config, "%s: %s", o.rules, reason(err))
		}
		return o.pick(d, now)
	}
	if o.resource != "" {
		return nil, cause.New(cause.Usage, "--resource: %s is one release rule", o.rules)
	}
	return release.DecodeRule(data)
}

// signed opens reference values in an envelope.
func (o *options) signed(envelope []byte, now time.Time) (*release.Rule, error) {
	if len(o.rulesKeys) == 0 {
		return nil, cause.New(cause.Usage, "%s is signed: --rules-key says by whom it must be", o.rules)
	}
	var keys []crypto.PublicKey
	for _, path := range o.rulesKeys {
		data, err := bounded.ReadNamed(path, maxKeyFile)
		if err != nil {
			return nil, cause.New(cause.Usage, "--rules-key: %w", err)
		}
		some, err := dsse.ParsePublicKeysPEM(data)
		if err != nil {
			return nil, cause.New(cause.Usage, "--rules-key: %s: %w", path, err)
		}
		keys = append(keys, some...)
	}
	if o.rulesThreshold < 1 || o.rulesThreshold > len(keys) {
		return nil, cause.New(cause.Usage, "--rules-threshold is %d, expected 1 to %d, the number of keys", o.rulesThreshold, len(keys))
	}
	opened, err := release.OpenReference(envelope, keys, o.rulesThreshold)
	if err != nil {
		return nil, err
	}
	return o.pick(opened.Reference, now)
}

// pick is the rule of --resource, or of the only resource.
func (o *options) pick(d *release.Reference, now time.Time) (*release.Rule, error) {
	if err := (&release.Opened{Reference: d}).CheckExpiry(now); err != nil {
		return nil, err
	}
	rules := d.Rules()
	uri := o.resource
	if uri == "" {
		if len(rules) > 1 {
			return nil, cause.New(cause.Usage, "%s has several resources: --resource is one of %s", o.rules, strings.Join(slices.Sorted(maps.Keys(rules)), ", "))
		}
		for only := range rules {
			uri = only
		}
	}
	r, ok := rules[uri]
	if !ok {
		return nil, cause.New(cause.Usage, "--resource: %s does not name %q", o.rules, uri)
	}
	return &r, nil
}
