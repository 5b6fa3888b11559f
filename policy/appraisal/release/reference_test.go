package release

import (
	"bytes"
	"crypto"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

func example(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("../../examples/reference/reference.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The example holds, compiles to one rule for each resource, and its signed
// form says the same.
func TestReferenceExample(t *testing.T) {
	d, err := DecodeReferenceYAML([]byte(example(t)))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := d.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	again, err := DecodeReferenceJSON(payload)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := again.Canonical(); err != nil || !bytes.Equal(p, payload) {
		t.Fatalf("not stable: %v", err)
	}
	rules := d.Rules()
	if len(rules) != 3 {
		t.Fatalf("%d rules", len(rules))
	}
	for uri, r := range rules {
		b, err := r.Encode()
		if err != nil {
			t.Fatalf("%s: %v", uri, err)
		}
		if _, err := DecodeRuleJSON(b); err != nil {
			t.Errorf("%s is no rule document: %v", uri, err)
		}
	}
	api, staging := rules["kbs:///payments/layer-key/api"], rules["kbs:///staging/layer-key/api"]
	if len(api.Launch) != 5 || api.TCB.SNP.Minimum["Turin"].FMC == nil || api.Policy.MinimumVersion != 5 || len(api.Images) != 1 {
		t.Errorf("%+v", api)
	}
	if len(staging.Launch) != 1 || staging.Launch[0].Platform != "tpm" || !staging.AnyPolicy || staging.EKRoots[0] != "lab" {
		t.Errorf("%+v", staging)
	}
}

// The schema for editors is what the types say, and the example names it.
func TestReferenceSchema(t *testing.T) {
	want, err := ReferenceSchema()
	if err != nil {
		t.Fatal(err)
	}
	have, err := os.ReadFile("../../examples/reference/reference.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, want) {
		t.Fatal("policy/examples/reference/reference.schema.json is stale: run `cvmctl policy schema --kind reference > policy/examples/reference/reference.schema.json`")
	}
	if !strings.HasPrefix(example(t), "# yaml-language-server: $schema=reference.schema.json\n") {
		t.Error("the example does not name its schema")
	}
}

// Each broken rule is found when the document is signed, and named by its path.
func TestReferenceRefusals(t *testing.T) {
	text := example(t)
	zero := strings.Repeat("0", 64)
	line := func(s string) string { // the whole line that has s
		_, rest, ok := strings.Cut(text, s)
		if !ok {
			t.Fatalf("no %q in the example", s)
		}
		before := text[:len(text)-len(rest)-len(s)]
		start := strings.LastIndex(before, "\n") + 1
		end, _, _ := strings.Cut(rest, "\n")
		return before[start:] + s + end + "\n"
	}
	for what, c := range map[string]struct{ old, new, path string }{
		"an unknown field":                {"version: 3", "version: 3\nversions: 4", "versions: unknown field"},
		"a duplicate key":                 {"version: 3", "version: 3\nversion: 4", "\"version\" already defined"},
		"another API version":             {"reference-values/v1", "reference-values/v2", "apiVersion"},
		"no name":                         {"name: payments-rules", `name: ""`, "name"},
		"version zero":                    {"version: 3", "version: 0", "version"},
		"a negative version":              {"version: 3", "version: -3", "version"},
		"an expiry in local time":         {`"2036-01-01T00:00:00Z"`, `"2036-01-01T00:00:00+01:00"`, "expires"},
		"a label twice":                   {"label: guest-1.3", "label: guest-1.4", "launch[1].label"},
		"a label with a space":            {"label: guest-1.3", "label: guest 1.3", "launch[1].label"},
		"an unknown platform":             {"    platform: tdx", "    platform: sample", "launch[2].platform"},
		"a measurement cut short":         {strings.Repeat("b1", 48), strings.Repeat("b1", 47), "launch[1].snp.measurement"},
		"a measurement in capitals":       {strings.Repeat("b1", 48), strings.Repeat("B1", 48), "launch[1].snp.measurement"},
		"a zero measurement":              {strings.Repeat("b1", 48), strings.Repeat("00", 48), "launch[1].snp.measurement"},
		"no measurement":                  {strings.Repeat("b1", 48), "", "launch[1].snp.measurement"},
		"a zero MRTD":                     {strings.Repeat("c1", 48), strings.Repeat("00", 48), "launch[2].tdx.mrtd"},
		"no RTMR 2":                       {strings.Repeat("c4", 48), "", "launch[2].tdx.rtmr2"},
		"a family ID of 15 bytes":         {strings.Repeat("a4", 16), strings.Repeat("a4", 15), "launch[0].snp.familyID"},
		"SNP parts on TDX":                {"    platform: tdx", "    platform: tdx\n    snp: {measurement: " + strings.Repeat("a", 96) + "}", "launch[2].snp"},
		"an Azure launch without PCR 2":   {line("3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969"), "", "launch[3].pcrs: PCR 2"},
		"PCR 2 as zero":                   {"3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969", zero, "launch[3].pcrs.2"},
		"a tpm launch without PCR 4":      {line(strings.Repeat("f4", 32)), "", "launch[5].pcrs: PCR 4"},
		"a tpm launch without PCR 9":      {line(strings.Repeat("f9", 32)), "", "launch[5].pcrs: PCR 9"},
		"an Azure launch without PCR 11":  {line(strings.Repeat("db", 32)), "", "launch[3].pcrs: PCR 11"},
		"PCR 11 as zero":                  {strings.Repeat("db", 32), zero, "launch[3].pcrs.11"},
		"an Azure launch without 12":      {`      "12": "` + zero + "\"\n", "", "launch[3].pcrs: PCR 12"},
		"an Azure launch without 13":      {`      "13": "` + zero + "\"\n", "", "launch[3].pcrs: PCR 13"},
		"PCR 12 not zero":                 {`"12": "` + zero, `"12": "1` + zero[1:], "launch[3].pcrs.12"},
		"PCR 13 not zero":                 {`"13": "` + zero, `"13": "1` + zero[1:], "launch[3].pcrs.13"},
		"PCR 24":                          {`      "7":`, `      "24":`, "launch[5].pcrs.24"},
		"PCR 07":                          {`      "7":`, `      "07":`, "launch[5].pcrs.07"},
		"a product in small letters":      {"Milan:", "milan:", "tcb.snp.minimum.milan"},
		"a part of the TCB left out":      {"bootloader: 4, tee: 0,", "bootloader: 4,", "tcb.snp.minimum.Milan.tee"},
		"a part over 255":                 {"microcode: 213", "microcode: 256", "tcb.snp.minimum.Milan.microcode"},
		"FMC before Turin":                {"{bootloader: 4,", "{fmc: 1, bootloader: 4,", "tcb.snp.minimum.Milan.fmc"},
		"Turin without FMC":               {"{fmc: 1, ", "{", "tcb.snp.minimum.Turin.fmc"},
		"a signing key that is none":      {"[vcek]", "[vcek, ark]", "tcb.snp.signingKeys[1]"},
		"VMPL 4":                          {"{exact: 0}", "{exact: 4}", "tcb.snp.vmpl"},
		"VMPL exact and max":              {"{exact: 0}", "{exact: 0, max: 1}", "tcb.snp.vmpl"},
		"VMPL neither":                    {"vmpl: {exact: 0}", "vmpl: {}", "tcb.snp.vmpl"},
		"debug allowed":                   {"    signingKeys:", "    allowDebug: true\n    signingKeys:", "tcb.snp.allowDebug: unknown field"},
		"a revoked TCB":                   {"[UpToDate, SW", "[Revoked, SW", "tcb.tdx.tcbStatus[0]"},
		"a TCB date that is none":         {`"2024-11-13T00:00:00Z"`, `"2024-11-13"`, "tcb.tdx.minimumTCBDate"},
		"an advisory that is none":        {"INTEL-SA-00837", "everything", "tcb.tdx.advisories[0]"},
		"a resource by wildcard":          {"kbs:///payments/layer-key/api\n", "kbs:///payments/layer-key/*\n", "resources[0].resource[0]"},
		"a resource at a host":            {"kbs:///payments/layer-key/api\n", "kbs://host/payments/layer-key/api\n", "resources[0].resource[0]"},
		"a resource twice":                {"[kbs:///staging/layer-key/api]", "[kbs:///payments/layer-key/api]", "resources[1].resource[0]"},
		"a platform without a launch":     {"platforms: [tpm]", "platforms: [tpm, tpm]", "resources[1].platforms[1]"},
		"a platform whose label is out":   {"    launch: [guest-1.4, guest-1.3]", "    launch: [guest-1.3]", "resources[0].platforms[1]"},
		"a label that is no launch":       {"[guest-1.4, guest-1.3]", "[guest-1.4, guest-1.2]", "resources[0].launch[1]"},
		"EK roots without tpm":            {"    anyPolicy: true", "    anyPolicy: true\n  - resource: [kbs:///a/b/c]\n    platforms: [tdx]\n    ekRoots: [lab]\n    anyPolicy: true", "resources[2].ekRoots"},
		"policy and anyPolicy":            {"    images:", "    anyPolicy: true\n    images:", "resources[0]"},
		"neither":                         {"    anyPolicy: true", "    anyPolicy: false", "resources[1]"},
		"images without a policy":         {"    anyPolicy: true", "    anyPolicy: true\n    images: [\"sha256:" + strings.Repeat("c", 64) + "\"]", "resources[1]"},
		"a threshold above the signers":   {"threshold: 1", "threshold: 3", "resources[0]"},
		"a version that JSON rounds":      {"minimumVersion: 5", "minimumVersion: 9007199254740993", "resources[0]"},
		"no minimum TCB for SNP":          {text[strings.Index(text, "    minimum:"):strings.Index(text, "    signingKeys:")], "", "tcb.snp.minimum"},
		"an alias":                        {"[vcek]", "&a [vcek]", "anchor"},
		"a resource of nobody's platform": {"    platforms: [tpm]", "    platforms: []", "resources[1].platforms"},
	} {
		if !strings.Contains(text, c.old) {
			t.Errorf("%s: the example has no %q", what, c.old)
			continue
		}
		_, err := DecodeReferenceYAML([]byte(strings.Replace(text, c.old, c.new, 1)))
		if err == nil {
			t.Errorf("%s was accepted", what)
		} else if !strings.Contains(err.Error(), c.path) || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%s: %v, expected the path %s and a line", what, err, c.path)
		}
	}
}

// Lesson 34: what is signed has one reading. Unknown, duplicate and differently
// written keys, and JSON that is not canonical, are refused under a good signature.
func TestLesson34_SignedReferenceHasOneReading(t *testing.T) {
	k := dssetest.New(t, "ecdsa")
	keys := []crypto.PublicKey{k.PublicKey()}
	d, err := DecodeReferenceYAML([]byte(example(t)))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := d.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	for what, p := range map[string]string{
		"an unknown key":        `{"Version":9,` + string(payload[1:]),
		"a duplicate key":       strings.Replace(string(payload), `"version":3`, `"version":3,"version":4`, 1),
		"a space":               strings.Replace(string(payload), `"version":3`, `"version": 3`, 1),
		"keys in another order": `{"version":3,` + strings.Replace(string(payload[1:]), `,"version":3`, "", 1),
		"null":                  "null", "nothing": "", "YAML": example(t),
	} {
		e, err := dsse.Sign(ReferencePayloadType, []byte(p), k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenReference(e, keys, 1); err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
	// A launch policy's envelope is no reference document.
	e, err := dsse.Sign("application/vnd.cvm-agent.launch-policy.v1+json", payload, k)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenReference(e, keys, 1); cause.Of(err) != cause.PolicyMalformed {
		t.Errorf("another payload type: %v", err)
	}
}

func TestReferenceSignatures(t *testing.T) {
	d, err := DecodeReferenceYAML([]byte(example(t)))
	if err != nil {
		t.Fatal(err)
	}
	a, b, c := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519"), dssetest.New(t, "rsa")
	keys := []crypto.PublicKey{a.PublicKey(), b.PublicKey(), c.PublicKey()}
	signed, err := SignReference(d, a, c)
	if err != nil {
		t.Fatal(err)
	}
	o, err := OpenReference(signed, keys, 2)
	if err != nil || len(o.Signers) != 2 || o.Digest != Digest(o.Payload) || o.Rule("kbs:///payments/layer-key/api") == nil || o.Rule("kbs:///payments/layer-key/other") != nil {
		t.Fatalf("%+v, %v", o, err)
	}
	if _, err := OpenReference(signed, keys, 3); cause.Of(err) != cause.PolicySignature {
		t.Errorf("two of three: %v", err)
	}
	if _, err := OpenReference(signed, keys[:1], 2); cause.Of(err) != cause.PolicySignature {
		t.Errorf("one trusted of two: %v", err)
	}
	e, err := dsse.Parse(signed)
	if err != nil {
		t.Fatal(err)
	}
	for i := range e.Payload {
		e.Payload[i] ^= 1
		flipped, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := OpenReference(flipped, keys[:1], 1); cause.Of(err) != cause.PolicySignature {
			t.Fatalf("byte %d flipped: %v", i, err)
		}
		e.Payload[i] ^= 1
	}
	e.Signatures = nil
	bare, err := e.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenReference(bare, keys, 1); cause.Of(err) != cause.PolicyUnsigned {
		t.Errorf("unsigned: %v", err)
	}
	expires := time.Date(2036, 1, 1, 0, 0, 0, 0, time.UTC)
	if err := o.CheckExpiry(expires.Add(-time.Second)); err != nil {
		t.Error(err)
	}
	if err := o.CheckExpiry(expires); cause.Of(err) != cause.PolicyExpired {
		t.Errorf("at its expiry: %v", err)
	}
}

func FuzzReference(f *testing.F) {
	f.Add([]byte(example(f)))
	f.Add([]byte(`{"apiVersion":"cvm-agent.reference-values/v1","name":"a","version":1,"launch":[],"resources":[]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := DecodeReferenceYAML(b)
		if err != nil {
			return
		}
		payload, err := d.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeReferenceJSON(payload); err != nil {
			t.Fatalf("%s: %v", payload, err)
		}
		for uri, r := range d.Rules() {
			if err := r.Validate(); err != nil {
				t.Fatalf("%s: %v", uri, err)
			}
			if len(r.Launch) == 0 {
				t.Fatalf("%s allows any launch", uri)
			}
		}
	})
}

// What a broker saves by keeping what an envelope's exact bytes opened to.
func BenchmarkOpenReference(b *testing.B) {
	d, err := DecodeReferenceYAML([]byte(example(b)))
	if err != nil {
		b.Fatal(err)
	}
	k := dssetest.New(b, "ecdsa")
	signed, err := SignReference(d, k)
	if err != nil {
		b.Fatal(err)
	}
	keys := []crypto.PublicKey{k.PublicKey()}
	for b.Loop() {
		if _, err := OpenReference(signed, keys, 1); err != nil {
			b.Fatal(err)
		}
	}
}
