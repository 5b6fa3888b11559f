package release

import (
	"strings"
	"testing"
)

const goodRule = `apiVersion: cvm-agent.release-rule/v1
platforms: [tpm]
ekRoots: [demo]
policy:
  names: [shop]
  signers: [aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]
  minimumVersion: 2
images:
  - sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb
pcrs:
  "9": ["cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"]
  "12": ["0000000000000000000000000000000000000000000000000000000000000000"]
`

func TestDecodeRule(t *testing.T) {
	r, err := DecodeRule([]byte(goodRule))
	if err != nil {
		t.Fatal(err)
	}
	if r.Policy.MinimumVersion != 2 || len(r.PCRs) != 2 || r.PCRs["12"][0] != strings.Repeat("0", 64) {
		t.Fatalf("%+v", r)
	}
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeRuleJSON(b); err != nil {
		t.Fatal(err)
	}
	replace := func(old, new string) string {
		if !strings.Contains(goodRule, old) {
			t.Fatalf("no %q in the rule", old)
		}
		return strings.Replace(goodRule, old, new, 1)
	}
	ones, zeros := `"`+strings.Repeat("1", 64)+`"`, `"`+ZeroPCR+`"`
	for _, platforms := range []string{"[snp]", "[tdx, az-snp-vtpm, az-tdx-vtpm]"} {
		if _, err := DecodeRule([]byte(replace("[tpm]", platforms) + "anyLaunch: true\n")); err != nil {
			t.Errorf("any launch of %s, in so many words: %v", platforms, err)
		}
	}
	whole := replace("[tpm]", "[snp]") + "launch: [{label: a, platform: snp, snp: {measurement: \"" + strings.Repeat("1", 96) + "\"}}]\n" +
		"tcb: {snp: {minimum: {Milan: {bootloader: 4, tee: 0, snp: 22, microcode: 213}}}}\n"
	if _, err := DecodeRule([]byte(whole)); err != nil {
		t.Error(err)
	}
	for what, in := range map[string]string{
		"an unknown field":             goodRule + "anything: 1\n",
		"a duplicate key":              goodRule + "platforms: [snp]\n",
		"an alias":                     replace("[tpm]", "&a [tpm]") + "ekroots: *a\n",
		"a tag":                        replace("[tpm]", "!!set [tpm]"),
		"two documents":                goodRule + "---\n" + goodRule,
		"the sample platform":          replace("[tpm]", "[sample]"),
		"no platform":                  replace("[tpm]", "[]"),
		"another API version":          replace("rule/v1", "rule/v2"),
		"no signers":                   replace("signers: [aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]", "signers: []"),
		"a signer in capitals":         replace("[aaaa", "[AAAA"),
		"a threshold over the signers": replace("  minimumVersion", "  threshold: 2\n  minimumVersion"),
		"an image by tag":              replace("sha256:bbbb", "repo:latest"),
		"policy and anyPolicy":         goodRule + "anyPolicy: true\n",
		"PCR 24":                       replace(`"9"`, `"24"`),
		"PCR 09":                       replace(`"9"`, `"09"`),
		"a PCR without values":         replace(`["cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"]`, "[]"),
		"a key that is a number":       replace(`"12"`, "12"),
		"a negative version":           replace("minimumVersion: 2", "minimumVersion: -1"),
		"neither policy nor anyPolicy": "apiVersion: cvm-agent.release-rule/v1\nplatforms: [tpm]\n",
		"a TEE without a launch":       replace("[tpm]", "[snp]"),
		"one TEE of two platforms":     replace("[tpm]", "[tpm, az-tdx-vtpm]"),
		"launch and anyLaunch":         goodRule + "anyLaunch: true\nlaunch: [{label: a, platform: tpm, pcrs: {\"4\": " + ones + ", \"9\": " + ones + ", \"11\": " + ones + ", \"12\": " + zeros + ", \"13\": " + zeros + "}}]\n",
		"SNP firmware of any age":      replace("[tpm]", "[snp]") + "launch: [{label: a, platform: snp, snp: {measurement: \"" + strings.Repeat("1", 96) + "\"}}]\n",
		"nothing":                      "",
	} {
		if _, err := DecodeRule([]byte(in)); err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
}

func FuzzRule(f *testing.F) {
	f.Add([]byte(goodRule))
	f.Add([]byte(`{"apiVersion":"cvm-agent.release-rule/v1","platforms":["snp"],"anyPolicy":true,"anyLaunch":true}`))
	f.Add([]byte(`{"apiVersion":"cvm-agent.release-rule/v1","platforms":["tpm"],"anyPolicy":true}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeRule(b)
		if err != nil {
			return
		}
		out, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeRuleJSON(out); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	})
}
