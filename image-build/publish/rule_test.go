package publish

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// refusingBroker answers every rule with err.
type refusingBroker struct {
	*memoryBroker
	err error
}

func (b refusingBroker) PutRule(context.Context, string, adminclient.Rule) error { return b.err }

// The token is an admin's: a file that others can read is refused, as by
// `cvmctl broker`, and its text is in no error.
func TestAnAdminTokenThatOthersCanReadIsRefused(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("an-admins-token-0123456789abcdefghijklmnopqrstuvwxyz"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &run{o: &Options{Encrypt: true, Broker: BrokerOptions{URL: "https://broker.test", CAFile: certificate(t), TokenFile: token}}}
	if _, err := r.preparedBroker(); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(token, 0o640); err != nil {
		t.Fatal(err)
	}
	_, err := r.preparedBroker()
	if cause.Of(err) != cause.Usage || !strings.Contains(err.Error(), "--broker-token-file: ") || !strings.Contains(err.Error(), "only its owner") || strings.Contains(err.Error(), "an-admins-token-0123456789abcdefghijklmnopqrstuvwxyz") {
		t.Errorf("%v", err)
	}
}

// A broker that takes signed documents alone keeps the key, and the publisher
// is told what is left to do; any other refusal fails the run.
func TestRuleOfABrokerThatWantsSignedDocuments(t *testing.T) {
	o := Options{Broker: BrokerOptions{Signers: []string{strings.Repeat("a", 64)}}, launches: &launches{}}
	doc := &policy.Policy{Name: "app", Platforms: []policy.Platform{policy.PlatformTPM}}
	for detail, fails := range map[string]bool{adminclient.RulesAreSigned: false, "policy-invalid: no": true} {
		res := &Result{KeyResource: "kbs:///a/b/c", ManifestDigest: "sha256:" + strings.Repeat("b", 64)}
		refusal := cause.New(cause.NotPermitted, "PUT: %w", kbs.NewError(kbs.VariantPolicyDeny, "%s", detail))
		why, err := (&run{o: &o}).putRule(t.Context(), refusingBroker{newMemoryBroker(), refusal}, doc, res)
		if (err != nil) != fails || res.ReleaseRule || strings.Contains(why, res.KeyResource) == fails {
			t.Errorf("%s: rule reported %t, %q, %v", detail, res.ReleaseRule, why, err)
		}
	}
}

// A TEE's report says who was launched by its measurement alone: without one
// the broker is told nothing, and the key goes to nobody.
func TestRuleForATEENamesItsLaunches(t *testing.T) {
	launch := "launch:\n- {label: one, platform: snp, snp: {measurement: '" + strings.Repeat("a1", 48) + "'}}\n"
	text := launch + "tcb: {snp: {minimum: {Milan: {bootloader: 4, tee: 0, snp: 22, microcode: 213}}}}\n"
	file := filepath.Join(t.TempDir(), "launch.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(t.TempDir(), "old.yaml")
	if err := os.WriteFile(old, []byte(launch), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		platforms []policy.Platform
		file      string
		set       bool
		launches  int
	}{
		"SNP with its launch":                         {[]policy.Platform{policy.PlatformSNP}, file, true, 1},
		"SNP without":                                 {[]policy.Platform{policy.PlatformSNP}, "", false, 0},
		"SNP with, TDX without":                       {[]policy.Platform{policy.PlatformSNP, policy.PlatformTDX}, file, false, 0},
		"a bare TPM, which names no TEE":              {[]policy.Platform{policy.PlatformTPM}, "", true, 0},
		"SNP with its launch, on firmware of any age": {[]policy.Platform{policy.PlatformSNP}, old, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newMemoryBroker()
			o := Options{Broker: BrokerOptions{Signers: []string{strings.Repeat("a", 64)}}}
			var err error
			if o.launches, err = readLaunches(c.file); err != nil {
				t.Fatal(err)
			}
			res := &Result{KeyResource: "kbs:///a/b/c", ManifestDigest: "sha256:" + strings.Repeat("b", 64)}
			why, err := (&run{o: &o}).putRule(t.Context(), b, &policy.Policy{Name: "app", Platforms: c.platforms}, res)
			rule, set := b.rules[res.KeyResource]
			if err != nil || set != c.set || res.ReleaseRule != c.set || len(rule.Launch) != c.launches {
				t.Errorf("%v, rule set %t, reported %t, launches %d: %s", err, set, res.ReleaseRule, len(rule.Launch), why)
			}
		})
	}
	for name, text := range map[string]string{"no launch": "launch: []\n", "a launch of nothing": "launch: [{label: x, platform: snp}]\n", "another document": "a: 1\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readLaunches(file); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}
