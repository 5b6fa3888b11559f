package appraisal

import (
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// A log with the digest of the signed version 2 that calls it version 9 would
// pass every mark: name and version are held to the document.
func TestTheLogNamesTheSignedDocument(t *testing.T) {
	key := dssetest.New(t, "ed25519")
	p := &policy.Policy{
		APIVersion: policy.APIVersion, Name: "shop", Version: 2, Expires: "2099-01-01T00:00:00Z", Platforms: []policy.Platform{policy.PlatformTPM},
		Workloads: []policy.Workload{{Name: "web", Image: "registry.example/shop@" + image, Encryption: "optional", Signatures: policy.Signatures{Required: []policy.Signer{{Key: key.PEM}}}}},
	}
	envelope, err := policy.Sign(p, key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: key.PEM})
	if err != nil {
		t.Fatal(err)
	}
	in, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := p.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	rule := release.Rule{Platforms: []string{"tpm"}, Policy: &release.PolicyRule{Names: []string{"shop", "shop2"}, Signers: []string{key.Fingerprint}}}
	mark := func(string) uint64 { return 2 }
	judge := func(change func(l *LogFacts)) *Verdict {
		set := Set{Policy: "shop", Version: 2, Digest: policy.Digest(payload), Signers: []string{key.Fingerprint}}
		l := &LogFacts{First: set, Running: set}
		change(l)
		return Judge(Facts{TEE: "tpm", Dialect: kbs.Dialect, Launch: &LaunchFacts{Initdata: in}, Log: l}, rule, mark, time.Now())
	}
	if err := judge(func(*LogFacts) {}).Refusal(); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(l *LogFacts){
		"another version":                   func(l *LogFacts) { l.First.Version, l.Running.Version = 9, 9 },
		"another name":                      func(l *LogFacts) { l.First.Policy, l.Running.Policy = "shop2", "shop2" },
		"another digest":                    func(l *LogFacts) { l.First.Digest, l.Running.Digest = "sha256:0", "sha256:0" },
		"another version of what runs":      func(l *LogFacts) { l.Running.Version = 9 },
		"another version before an upgrade": func(l *LogFacts) { l.First.Version, l.Running.Version, l.Running.Digest = 1, 3, "sha256:0" },
	} {
		if v := judge(change); v.Outcome(CheckFirstEvent) != Failed || v.Refusal() == nil {
			t.Errorf("%s: %+v", what, v.Checks)
		}
	}
}
