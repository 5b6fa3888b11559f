package policy_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func example(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("examples", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func decoded(t testing.TB, name string) *policy.Policy {
	t.Helper()
	p, err := policy.DecodeYAML(example(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestExamplesAreValidAndSurviveSigningForm(t *testing.T) {
	files, err := filepath.Glob("examples/*.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("%d examples: %v", len(files), err)
	}
	for _, f := range files {
		data := example(t, filepath.Base(f))
		if !bytes.HasPrefix(data, []byte("# yaml-language-server: $schema=policy.schema.json\n")) {
			t.Errorf("%s does not begin with the schema's line", f)
		}
		p, err := policy.DecodeYAML(data)
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		first, err := p.Canonical()
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		again, err := policy.DecodeJSON(first)
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		second, err := again.Canonical()
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("%s: the canonical form is not stable: %v", f, err)
		}
	}
}

// TestFullExampleHasEveryField keeps the example complete: each leaf of the
// schema but a few alternatives is written in it.
func TestFullExampleHasEveryField(t *testing.T) {
	full := string(example(t, "full.yaml"))
	elsewhere := map[string]bool{"accept": true, "keyless": true, "issuer": true, "identity": true, "trustedRoot": true, "exec": true, "tcp": true}
	raw, err := policy.Schema()
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		Properties map[string]json.RawMessage `json:"properties"`
		Defs       map[string]struct {
			Properties map[string]json.RawMessage `json:"properties"`
		} `json:"$defs"`
	}
	if err := json.Unmarshal(raw, &s); err != nil {
		t.Fatal(err)
	}
	check := func(where string, props map[string]json.RawMessage) {
		for name := range props {
			if !elsewhere[name] && !strings.Contains(full, name+":") {
				t.Errorf("examples/full.yaml lacks %s.%s", where, name)
			}
		}
	}
	check("Policy", s.Properties)
	for name, d := range s.Defs {
		check(name, d.Properties)
	}
}

func TestSchemaFileIsUpToDate(t *testing.T) {
	want, err := policy.Schema()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, example(t, "policy.schema.json")) {
		t.Fatal("policy/examples/policy.schema.json is stale: run `cvmctl policy schema > policy/examples/policy.schema.json`")
	}
	for _, part := range []string{`"$schema": "https://json-schema.org/draft/2020-12/schema"`, `"additionalProperties": false`, `"az-snp-vtpm"`, `"description": "host/repository@sha256:…`} {
		if !bytes.Contains(want, []byte(part)) {
			t.Errorf("the schema lacks %s", part)
		}
	}
}

// change replaces one text of the full example, which must be there.
func change(t testing.TB, name, old, with string) []byte {
	t.Helper()
	data := string(example(t, name))
	if !strings.Contains(data, old) {
		t.Fatalf("%s does not contain %q", name, old)
	}
	return []byte(strings.Replace(data, old, with, 1))
}

func TestPolicyRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		old, with string
		code      cause.Code
		want      string
	}{
		"an unknown field":                {"name: payments\n", "name: payments\nnames: x\n", cause.PolicyUnknownField, "names: unknown field"},
		"an unknown field deep inside":    {"user: \"1000:1000\"", "privileged: true", cause.PolicyUnknownField, "workloads[0].run.privileged: unknown field"},
		"another API version":             {"cvm-agent.policy/v1", "cvm-agent.policy/v2", cause.PolicyInvalid, "apiVersion"},
		"a name with capitals":            {"name: payments", "name: Payments", cause.PolicyInvalid, "line 5, column 1: name:"},
		"a name of 64 bytes":              {"name: payments", "name: " + strings.Repeat("a", 64), cause.PolicyInvalid, "name"},
		"version zero":                    {"version: 7", "version: 0", cause.PolicyInvalid, "version"},
		"a negative version":              {"version: 7", "version: -7", cause.PolicyMalformed, "version: -7 does not fit"},
		"a version beyond exact numbers":  {"version: 7", "version: 9007199254740992", cause.PolicyInvalid, "version"},
		"a minimum above the version":     {"minimumVersion: 5", "minimumVersion: 8", cause.PolicyInvalid, "minimumVersion"},
		"an expiry without time zone":     {"2036-01-01T00:00:00Z", "2036-01-01T00:00:00", cause.PolicyInvalid, "expires"},
		"an expiry in another time zone":  {"2036-01-01T00:00:00Z", "2036-01-01T00:00:00+02:00", cause.PolicyInvalid, "expires"},
		"a threshold above the keys":      {"threshold: 2", "threshold: 3", cause.PolicyInvalid, "nextSigners.threshold"},
		"a threshold of zero":             {"threshold: 2", "threshold: 0", cause.PolicyInvalid, "nextSigners.threshold"},
		"the sample platform":             {"platforms: [snp,", "platforms: [sample,", cause.PolicyInvalid, "platforms[0]"},
		"a platform twice":                {"platforms: [snp,", "platforms: [snp, snp,", cause.PolicyInvalid, "duplicate"},
		"a broker by http":                {"https://broker", "http://broker", cause.PolicyInvalid, "broker.url"},
		"a broker with a password":        {"https://broker", "https://u:p@broker", cause.PolicyInvalid, "broker.url"},
		"a further broker by http":        {"https://broker-b", "http://broker-b", cause.PolicyInvalid, "broker.urls[0]"},
		"a further broker with a path":    {"https://broker-b.example.com:8443", "https://broker-b.example.com:8443/x", cause.PolicyInvalid, "broker.urls[0]"},
		"a broker twice":                  {"https://broker-b.", "https://broker.", cause.PolicyInvalid, "broker.urls[0]"},
		"eight further brokers":           {"urls: [", "urls: [" + strings.Repeat(`"https://h", `, 7), cause.PolicyInvalid, "broker.urls: 8 entries"},
		"a VMPL that does not exist":      {"vmpl: 0", "vmpl: 4", cause.PolicyInvalid, "vmpl: 4"},
		"a VMPL below zero":               {"vmpl: 0", "vmpl: -1", cause.PolicyMalformed, "vmpl"},
		"a VMPL without SNP":              {"[snp, tdx, az-snp-vtpm, az-tdx-vtpm, tpm]\nvmpl: 0", "[tdx, tpm]\nvmpl: 1", cause.PolicyInvalid, "vmpl: 1, but platforms has no snp"},
		"a TLS root that is none":         {"-----BEGIN CERTIFICATE-----", "-----BEGIN PUBLIC KEY-----", cause.PolicyInvalid, "broker.tlsRoots[0]"},
		"an unknown dialect":              {"dialect: cvm-agent/1", "dialect: cvm-agent/2", cause.PolicyInvalid, "broker.dialect"},
		"dialect kbs without acceptance":  {"dialect: cvm-agent/1", "dialect: kbs", cause.PolicyInvalid, "no-version-mark"},
		"TLS roots for plain HTTP":        {"plainHTTP: true", "plainHTTP: true\n    tlsRoots: [x]", cause.PolicyInvalid, "registries[1].tlsRoots"},
		"a registry with a path":          {"host: localhost:5000", "host: localhost:5000/x", cause.PolicyInvalid, "registries[1].host"},
		"a tag instead of a digest":       {"@sha256:" + strings.Repeat("c0", 32), ":latest", cause.PolicyImageNotByDigest, "workloads[0].image"},
		"no tag and no digest":            {"@sha256:" + strings.Repeat("c0", 32), "", cause.PolicyImageNotByDigest, "workloads[0].image"},
		"a tag beside the digest":         {"api@sha256:", "api:v1@sha256:", cause.PolicyImageNotByDigest, "leave the tag out"},
		"a short digest":                  {strings.Repeat("c0", 32), "c0", cause.PolicyInvalid, "workloads[0].image"},
		"an image without a host":         {"registry.example.com/payments/api@", "payments/api@", cause.PolicyInvalid, "registry host"},
		"no signer":                       {"required:\n        - key: |", "required: []\n    x:\n        - key: |", cause.PolicyUnknownField, "workloads[0].x"},
		"a key resource without digest":   {"          keyDigest: sha256:" + strings.Repeat("ab", 32) + "\n", "", cause.PolicyInvalid, "keyDigest"},
		"a key resource on a host":        {"kbs:///payments/cosign-pub/release", "kbs://evil/payments/cosign-pub/release", cause.PolicyInvalid, "names a host"},
		"a damaged key":                   {"-----BEGIN PUBLIC KEY-----\n            M", "-----BEGIN PUBLIC KEY-----\n            A", cause.PolicyInvalid, "workloads[0].signatures.required[0].key"},
		"an SBOM rule without an SBOM":    {"sbom:\n      required: true", "sbom:\n      required: false", cause.PolicyInvalid, "workloads[0].sbom.required"},
		"an unknown comparison":           {"compare: strict", "compare: loose", cause.PolicyInvalid, "sbom.compare"},
		"no word on encryption":           {"encryption: required", "encryption: \"\"", cause.PolicyInvalid, "workloads[0].encryption: is missing"},
		"CAP_SYS_ADMIN":                   {"[CAP_NET_BIND_SERVICE]", "[CAP_SYS_ADMIN]", cause.PolicyInvalid, "capabilities[0]"},
		"CAP_SYS_RAWIO":                   {"[CAP_NET_BIND_SERVICE]", "[CAP_SYS_RAWIO]", cause.PolicyInvalid, "capabilities[0]"},
		"CAP_DAC_READ_SEARCH":             {"[CAP_NET_BIND_SERVICE]", "[CAP_CHOWN, CAP_DAC_READ_SEARCH]", cause.PolicyInvalid, "capabilities[1]"},
		"SYS_ADMIN by its short name":     {"[CAP_NET_BIND_SERVICE]", "[SYS_ADMIN]", cause.PolicyInvalid, "capabilities[0]"},
		"ALL capabilities":                {"[CAP_NET_BIND_SERVICE]", "[ALL]", cause.PolicyInvalid, "capabilities[0]"},
		"the host's network":              {"network: bridge", "network: host", cause.PolicyInvalid, "run.network"},
		"a bind mount":                    {"- type: tmpfs\n          target: /tmp", "- type: bind\n          target: /tmp", cause.PolicyInvalid, "mounts[0].type"},
		"a volume that is a host path":    {"name: api-data", "name: /etc", cause.PolicyInvalid, "mounts[1].name"},
		"a mount over the secrets":        {"target: /tmp", "target: /run/secrets", cause.PolicyInvalid, "mounts[0].target"},
		"a mount in the secrets":          {"target: /tmp", "target: /run/secrets/db", cause.PolicyInvalid, "mounts[0].target"},
		"a mount through /var/run":        {"target: /tmp", "target: /var/run/secrets", cause.PolicyInvalid, "mounts[0].target"},
		"a mount over /proc":              {"target: /tmp", "target: /proc", cause.PolicyInvalid, "mounts[0].target"},
		"a mount in /sys":                 {"target: /tmp", "target: /sys/kernel/config", cause.PolicyInvalid, "mounts[0].target"},
		"a mount over /dev":               {"target: /tmp", "target: /dev", cause.PolicyInvalid, "mounts[0].target"},
		"a mount over the root":           {"target: /tmp", "target: /", cause.PolicyInvalid, "mounts[0].target"},
		"a mount with ..":                 {"target: /tmp", "target: /tmp/../proc", cause.PolicyInvalid, "mounts[0].target"},
		"two mounts on one target":        {"target: /tmp", "target: /var/lib/api", cause.PolicyInvalid, "duplicate"},
		"a secret that leaves its folder": {"name: db-password", "name: ../db", cause.PolicyInvalid, "secrets[0].name"},
		"a secret of two segments":        {"kbs:///payments/secret/db-password", "kbs:///payments/secret", cause.PolicyInvalid, "secrets[0].resource"},
		"a secret that all may write":     {"mode: \"0440\"", "mode: \"0666\"", cause.PolicyInvalid, "secrets[0].mode"},
		"an unquoted octal mode":          {"mode: \"0440\"", "mode: 0440", cause.PolicyMalformed, "secrets[0].mode"},
		"two health checks":               {"healthCheck:\n", "healthCheck:\n        exec: [/bin/true]\n", cause.PolicyInvalid, "healthCheck: has 2"},
		"no health check in the rule":     {"http:\n          port: 8080\n          path: /healthz\n", "", cause.PolicyMalformed, "line"},
		"a health check on port 0":        {"port: 8080\n          path", "port: 0\n          path", cause.PolicyInvalid, "healthCheck.http"},
		"a duration of a week":            {"deadline: 90s", "deadline: 168h", cause.PolicyMalformed, "healthCheck.deadline: duration"},
		"a duration without a unit":       {"deadline: 90s", "deadline: 90", cause.PolicyMalformed, "healthCheck.deadline"},
		"a user with a shell character":   {"user: \"1000:1000\"", "user: \"1000;1\"", cause.PolicyInvalid, "run.user"},
		"an environment name with =":      {"LOG_LEVEL: info", "\"LOG=LEVEL\": info", cause.PolicyInvalid, "run.env"},
		"an order that does not exist":    {"orders: [upgrade, destroy]", "orders: [upgrade, logs]", cause.PolicyInvalid, "control.orderKeys[0].orders[1]"},
		"an unknown strategy":             {"strategy: replace", "strategy: blue", cause.PolicyInvalid, "upgrade.strategy"},
		"a log target":                    {"workload: journal", "workload: syslog", cause.PolicyInvalid, "log.workload"},
		"a port out of range":             {"host: 80\n", "host: 65536\n", cause.PolicyMalformed, "ports[0].host: 65536 does not fit"},
		"a port on a host name":           {"hostIP: 0.0.0.0", "hostIP: localhost", cause.PolicyInvalid, "ports[0].hostIP"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := policy.DecodeYAML(change(t, "full.yaml", c.old, c.with))
			if cause.Of(err) != c.code || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, expected cause %s and %q", err, c.code, c.want)
			}
			var f *bounded.FieldError
			if !errors.As(err, &f) || f.Line < 1 || f.Column < 1 {
				t.Fatalf("error %v names no line", err)
			}
		})
	}
}

func TestPolicyRefusesWhatNeedsABroker(t *testing.T) {
	for name, edit := range map[string]func(p *policy.Policy){
		"required encryption": func(p *policy.Policy) { p.Workloads[0].Run.Secrets = nil },
		"secrets":             func(p *policy.Policy) { p.Workloads[0].Encryption = "optional" },
	} {
		p := decoded(t, "full.yaml")
		p.Broker = nil
		p.Workloads[0].Signatures.Required = p.Workloads[0].Signatures.Required[:1]
		edit(p)
		if err := p.Validate(); cause.Of(err) != cause.PolicyInvalid || !strings.Contains(err.Error(), "broker") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPolicyRefusesTwoOfAName(t *testing.T) {
	p := decoded(t, "full.yaml")
	p.Workloads = append(p.Workloads, p.Workloads[0])
	if err := p.Validate(); cause.Of(err) != cause.PolicyInvalid || !strings.Contains(err.Error(), "workloads[1].name") {
		t.Errorf("two workloads of one name: %v", err)
	}
	p.Workloads[1].Name = "other"
	if err := p.Validate(); cause.Of(err) != cause.PolicyInvalid || !strings.Contains(err.Error(), "workloads[1].run.ports[0]") {
		t.Errorf("one host port for two workloads: %v", err)
	}
}

// TestLesson34_NoAliasesUnknownOrDuplicateFields: a legacy alias of a field
// bypassed a check on the new name elsewhere.
func TestLesson34_NoAliasesUnknownOrDuplicateFields(t *testing.T) {
	yaml := string(example(t, "minimal.yaml"))
	for name, c := range map[string]struct {
		in   string
		code cause.Code
	}{
		"a name in another case":          {strings.Replace(yaml, "encryption:", "Encryption:", 1), cause.PolicyUnknownField},
		"the Go name of a field":          {strings.Replace(yaml, "workloads:", "Workloads:", 1), cause.PolicyUnknownField},
		"a duplicate field":               {yaml + "name: hello\n", cause.PolicyMalformed},
		"a duplicate in another case":     {yaml + "Name: hello\n", cause.PolicyUnknownField},
		"an anchor and its alias":         {strings.Replace(yaml, "name: hello", "name: &n hello", 1), cause.PolicyMalformed},
		"a merge key":                     {yaml + "<<: {version: 2}\n", cause.PolicyMalformed},
		"a second document":               {yaml + "---\nname: other\n", cause.PolicyMalformed},
		"a boolean of YAML 1.1":           {strings.Replace(yaml, "required: true", "required: yes", 1), cause.PolicyMalformed},
		"an explicit type":                {strings.Replace(yaml, "version: 1", "version: !!int \"1\"", 1), cause.PolicyMalformed},
		"an empty field that says \"no\"": {yaml + "broker:\n", cause.PolicyMalformed},
	} {
		if _, err := policy.DecodeYAML([]byte(c.in)); cause.Of(err) != c.code {
			t.Errorf("YAML with %s: %v, expected %s", name, err, c.code)
		}
	}
	p := decoded(t, "minimal.yaml")
	good, err := p.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		old, with string
		code      cause.Code
	}{
		"a name in another case":      {`"encryption":`, `"Encryption":`, cause.PolicyUnknownField},
		"a duplicate field":           {`"name":"hello"`, `"name":"hello","name":"hello"`, cause.PolicyMalformed},
		"a duplicate by escape":       {`"name":"hello"`, `"name":"hello","\u006eame":"hello"`, cause.PolicyMalformed},
		"an unknown field":            {`"name":"hello"`, `"name":"hello","nome":1`, cause.PolicyUnknownField},
		"a space":                     {`"name":`, `"name": `, cause.PolicyMalformed},
		"fields in another order":     {`{"apiVersion":"cvm-agent.policy/v1",`, `{"version":1,"apiVersion":"cvm-agent.policy/v1",`, cause.PolicyMalformed},
		"an escape that is not short": {`"hello"`, `"\u0068ello"`, cause.PolicyMalformed},
		"a number in another form":    {`"version":1,`, `"version":1.0,`, cause.PolicyMalformed},
		"null":                        {`"name":"hello"`, `"name":null`, cause.PolicyMalformed},
	} {
		in := strings.Replace(string(good), c.old, c.with, 1)
		if in == string(good) {
			t.Fatalf("%s changes nothing", name)
		}
		if _, err := policy.DecodeJSON([]byte(in)); cause.Of(err) != c.code {
			t.Errorf("JSON with %s: %v, expected %s", name, err, c.code)
		}
	}
}

func TestOversizedPolicy(t *testing.T) {
	big := append(example(t, "minimal.yaml"), "# "+strings.Repeat("x", policy.MaxSize)...)
	if _, err := policy.DecodeYAML(big); cause.Of(err) != cause.PolicyTooLarge {
		t.Errorf("YAML: %v", err)
	}
	if _, err := policy.DecodeJSON(bytes.Repeat([]byte(" "), policy.MaxSize+1)); cause.Of(err) != cause.PolicyTooLarge {
		t.Errorf("JSON: %v", err)
	}
}

func FuzzDecodeYAML(f *testing.F) {
	for _, name := range []string{"minimal.yaml", "full.yaml", "trustee.yaml"} {
		f.Add(example(f, name))
	}
	f.Add([]byte("a: &b c"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := policy.DecodeYAML(data)
		if err != nil {
			if cause.Of(err) == cause.Internal {
				t.Fatalf("an error without a cause: %v", err)
			}
			return
		}
		out, err := p.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := policy.DecodeJSON(out); err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
	})
}

func FuzzDecodeJSON(f *testing.F) {
	for _, name := range []string{"minimal.yaml", "full.yaml", "trustee.yaml"} {
		out, err := decoded(f, name).Canonical()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(out)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := policy.DecodeJSON(data)
		if err != nil {
			if cause.Of(err) == cause.Internal {
				t.Fatalf("an error without a cause: %v", err)
			}
			return
		}
		if _, err := p.Canonical(); err != nil {
			t.Fatal(err)
		}
	})
}
