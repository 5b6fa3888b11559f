package publish

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func TestPolicyIsJudgedBeforeAnythingIsBuilt(t *testing.T) {
	file := func(t *testing.T, text string) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "template.yaml")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cases := map[string]struct {
		change func(*testing.T, *Options)
		text   string
	}{
		"a template that is not there":  {func(_ *testing.T, o *Options) { o.Policy.Template = "/nonexistent" }, "--policy-template"},
		"a template with unknown field": {func(t *testing.T, o *Options) { o.Policy.Template = file(t, "nonsense: 1\n") }, "nonsense"},
		"a template without the workload": {func(t *testing.T, o *Options) {
			o.Policy.Template = file(t, "workloads: [{name: other, image: x, signatures: {required: []}, sbom: {required: true}, encryption: optional}]\n")
		}, "no workload"},
		"a template that requires encryption": {func(t *testing.T, o *Options) {
			o.Policy.Template = file(t, "workloads: [{name: judged, image: x, signatures: {required: []}, sbom: {required: true}, encryption: required}]\n")
		}, "requires encryption"},
		"a policy name that is no name":   {func(_ *testing.T, o *Options) { o.Policy.Name = "No Name" }, "name"},
		"a platform that is none":         {func(_ *testing.T, o *Options) { o.Policy.Platforms = []string{"sample"} }, "platforms"},
		"a broker without token keys":     {func(_ *testing.T, o *Options) { o.Policy.BrokerURL = "https://b.example" }, "--broker-token-key"},
		"a signing key that is not there": {func(_ *testing.T, o *Options) { o.Policy.SignKey = "/nonexistent" }, "--sign-policy-key"},
	}
	for sentence, c := range cases {
		t.Run(sentence, func(t *testing.T) {
			o := testOptions(t, "judged")
			o.Context = t.TempDir() // no Containerfile: a build would fail otherwise
			o.Policy.Out = filepath.Join(t.TempDir(), "policy.yaml")
			c.change(t, &o)
			_, err := Run(t.Context(), o)
			if cause.Of(err) != cause.Usage || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v, expected %s about %q", err, cause.Usage, c.text)
			}
		})
	}
}

func TestRenderedPolicyIsReadBackTheSame(t *testing.T) {
	p := &policy.Policy{
		APIVersion: policy.APIVersion, Name: "app", Version: 1<<53 - 1, Expires: "2030-01-01T00:00:00Z",
		Platforms: []policy.Platform{policy.PlatformTPM},
		Workloads: []policy.Workload{{
			Name: "app", Image: "r.example/app@sha256:" + strings.Repeat("a", 64), Encryption: "optional",
			Signatures: policy.Signatures{Required: []policy.Signer{{KeyResource: "kbs:///a/b/c", KeyDigest: "sha256:" + strings.Repeat("b", 64)}}},
			Run: policy.Run{
				Command: []string{"yes", "007", "1e3", "- x", "a: b", "#", "", " padded ", "line\nline\n", "\ttab", "true", "<&>"},
				Env:     map[string]string{"A": "no", "B": "0x10", "C": "~", "Y": "x", "1": "one"},
			},
			Limits: policy.ImageLimits{MaxBytes: 1 << 40},
		}},
		Upgrade: policy.Upgrade{Deadlines: policy.Deadlines{Fetch: policy.Duration(90 * time.Second)}},
	}
	text, err := render(p)
	if err != nil {
		t.Fatal(err)
	}
	var again policy.Policy
	if _, err := bounded.DecodeYAML(text, &again, bounded.Limits{}); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if a, b := must(encode(p)), must(encode(&again)); string(a) != string(b) {
		t.Errorf("\n%s\nbecame\n%s", a, b)
	}
}
