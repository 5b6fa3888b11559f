package publish

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
)

// A TEE's report says who was launched by its measurement alone: without one
// the broker is told nothing, and the key goes to nobody.
func TestRuleForATEENamesItsLaunches(t *testing.T) {
	text := "launch:\n- {label: one, platform: snp, snp: {measurement: '" + strings.Repeat("a1", 48) + "'}}\n"
	file := filepath.Join(t.TempDir(), "launch.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		platforms []policy.Platform
		files     []string
		set       bool
		launches  int
	}{
		"SNP with its launch":            {[]policy.Platform{policy.PlatformSNP}, []string{file}, true, 1},
		"SNP without":                    {[]policy.Platform{policy.PlatformSNP}, nil, false, 0},
		"SNP with, TDX without":          {[]policy.Platform{policy.PlatformSNP, policy.PlatformTDX}, []string{file}, false, 0},
		"a bare TPM, which names no TEE": {[]policy.Platform{policy.PlatformTPM}, nil, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newMemoryBroker()
			o := Options{Broker: BrokerOptions{Signers: []string{strings.Repeat("a", 64)}}}
			var err error
			if o.launches, err = readLaunches(c.files); err != nil {
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
		if _, err := readLaunches([]string{file}); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}
