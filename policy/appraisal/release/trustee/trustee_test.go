package trustee

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/types"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

var now = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

// exampleDoc is the example document, with a signer that the test holds.
func exampleDoc(t *testing.T, signer string) *release.Reference {
	t.Helper()
	b, err := os.ReadFile("../../../examples/reference/reference.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d, err := release.DecodeReferenceYAML(b)
	if err != nil {
		t.Fatal(err)
	}
	if signer != "" {
		d.Resources[0].Policy.Signers[0] = signer
	}
	return d
}

// everything that the example has to give up when its initdata is pinned.
var everything = []string{NoTombstone, NoSigningKey, NoProduct, NoFMC, NoLaunchTCB, NoRevocation, NoIDBlock, NoVersionMark, NoEventLog, NoEKBinding}

func initdata(t *testing.T, k *dssetest.Key, name string, version uint64, image string) []byte {
	t.Helper()
	p := &policy.Policy{
		APIVersion: policy.APIVersion, Name: name, Version: version, Expires: "2036-01-01T00:00:00Z",
		Platforms: []policy.Platform{policy.PlatformSNP},
		Workloads: []policy.Workload{{Name: "api", Image: "registry.example/api@sha256:" + strings.Repeat(image, 32), Encryption: "optional",
			Signatures: policy.Signatures{Required: []policy.Signer{{Key: k.PEM}}}}},
	}
	envelope, err := policy.Sign(p, k)
	if err != nil {
		t.Fatal(err)
	}
	b, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: k.PEM})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// trustee plays the parts of Trustee that evaluate the exported files.
type trustee struct {
	t      *testing.T
	now    time.Time
	values map[string]any
	as     rego.PreparedEvalQuery
	kbs    map[string]rego.PreparedEvalQuery // by resource path
}

func play(t *testing.T, e *Export) *trustee {
	t.Helper()
	p := &trustee{t: t, now: now, values: map[string]any{}, kbs: map[string]rego.PreparedEvalQuery{}}
	// The values as the provider's sample extractor reads them out of the message.
	var m struct{ Version, Type, Payload string }
	if err := json.Unmarshal(e.Message, &m); err != nil || m.Version != "0.1.0" || m.Type != "sample" {
		t.Fatalf("%+v, %v", m, err)
	}
	payload, err := base64.StdEncoding.DecodeString(m.Payload)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(payload, &p.values); err != nil {
		t.Fatal(err)
	}
	p.as, err = rego.New(rego.Query("data.policy.trust_claims"), rego.Module("default_cpu.rego", string(e.AttestationPolicy)),
		rego.Function1(&rego.Function{Name: "query_reference_value", Decl: types.NewFunction(types.Args(types.S), types.A)},
			func(_ rego.BuiltinContext, name *ast.Term) (*ast.Term, error) {
				v, err := ast.InterfaceToValue(p.values[string(name.Value.(ast.String))])
				return ast.NewTerm(v), err
			})).PrepareForEval(context.Background())
	if err != nil {
		t.Fatalf("attestation policy: %v\n%s", err, e.AttestationPolicy)
	}
	for _, path := range []string{"payments/layer-key/api", "payments/secret/db-password", "staging/layer-key/api", "payments/layer-key/other"} {
		for form, data := range map[string]map[string]any{
			path:             {"plugin": "resource", "resource-path": toAny(strings.Split(path, "/")), "query": map[string]any{}},
			"old " + path:    {"resource-path": path},
			"plugin " + path: {"plugin": "pkcs11", "resource-path": toAny(strings.Split(path, "/"))},
		} {
			p.kbs[form], err = rego.New(rego.Query("data.policy.allow"), rego.Module("resource-policy.rego", string(e.ResourcePolicy)),
				rego.Store(inmem.NewFromObject(data))).PrepareForEval(context.Background())
			if err != nil {
				t.Fatalf("resource policy: %v\n%s", err, e.ResourcePolicy)
			}
		}
	}
	return p
}

func toAny(list []string) (out []any) {
	for _, s := range list {
		out = append(out, s)
	}
	return out
}

// token appraises claims as the attestation service does.
func (p *trustee) token(claims map[string]any) map[string]any {
	p.t.Helper()
	rs, err := p.as.Eval(context.Background(), rego.EvalInput(claims), rego.EvalTime(p.now))
	if err != nil || len(rs) != 1 {
		p.t.Fatalf("%v, %v", rs, err)
	}
	vector := rs[0].Expressions[0].Value.(map[string]any)
	status := "affirming"
	for _, v := range vector { // AR4SI: 2 to 31 affirms, 0 says nothing
		if n, _ := v.(json.Number).Int64(); n > 31 {
			status = "contraindicated"
		}
	}
	return map[string]any{"submods": map[string]any{"cpu0": map[string]any{
		"ear.status": status, "ear.trustworthiness-vector": vector, "ear.veraison.annotated-evidence": claims,
	}}}
}

func (p *trustee) allows(path string, input any) bool {
	p.t.Helper()
	q, ok := p.kbs[path]
	if !ok {
		p.t.Fatalf("no %s", path)
	}
	rs, err := q.Eval(context.Background(), rego.EvalInput(input), rego.EvalTime(p.now))
	if err != nil || len(rs) != 1 {
		p.t.Fatalf("%v, %v", rs, err)
	}
	return rs[0].Expressions[0].Value.(bool)
}

func (p *trustee) releases(path string, claims map[string]any) bool {
	return p.allows(path, p.token(claims))
}

// set changes one claim by its path; a nil value deletes it.
func set(claims map[string]any, value any, path ...string) {
	for _, k := range path[:len(path)-1] {
		claims = claims[k].(map[string]any)
	}
	if last := path[len(path)-1]; value == nil {
		delete(claims, last)
	} else {
		claims[last] = value
	}
}

func hexes(digits string, bytes int) string { return strings.Repeat(digits, bytes) }

// snpClaims are those of parsed_claims.md for the example's launch guest-1.3.
func snpClaims(measurement string) map[string]any {
	return map[string]any{
		"measurement": measurement, "policy_debug_allowed": false, "policy_migrate_ma": false,
		"reported_tcb_bootloader": 9, "reported_tcb_tee": 1, "reported_tcb_snp": 22, "reported_tcb_microcode": 213,
	}
}

func tdxClaims(digit string) map[string]any {
	h := func(n string) string { return hexes(digit+n, 48) }
	return map[string]any{
		"quote": map[string]any{
			"header": map[string]any{"tee_type": "81000000", "vendor_id": "939a7233f79c4ca9940a0db3957f0607"},
			"body": map[string]any{"mr_td": h("1"), "rtmr_0": h("2"), "rtmr_1": h("3"), "rtmr_2": h("4"), "mr_owner": hexes("00", 48),
				"mr_owner_config": hexes("00", 48), "mr_seam": h("5"), "td_attributes": "0000001000000000"},
		},
		"td_attributes": map[string]any{"debug": false}, "tcb_status": "UpToDate", "tcb_date": "2025-01-01T00:00:00Z",
		"collateral_expiration_status": "0", "advisory_ids": []any{"INTEL-SA-00837"},
	}
}

func pcrClaims(digit string) map[string]any {
	h := func(n string) string { return hexes(digit+n, 32) }
	return map[string]any{"pcr02": "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969", "pcr04": h("4"), "pcr07": h("7"), "pcr09": h("9"), "pcr11": h("b"), "pcr12": release.ZeroPCR, "pcr13": release.ZeroPCR}
}

func goodClaims(platform string) map[string]any {
	var c map[string]any
	switch platform {
	case "snp":
		c = snpClaims(hexes("b1", 48))
	case "tdx":
		c = tdxClaims("c")
	case "az-snp-vtpm":
		c = snpClaims(hexes("d1", 48))
		c["tpm"] = pcrClaims("d")
	case "az-tdx-vtpm":
		c = tdxClaims("e")
		c["tpm"] = pcrClaims("e")
	case "tpm":
		c = pcrClaims("f")
	}
	return map[string]any{platform: c}
}

// What the exported files release, and that each condition changed alone
// denies, judged by the real Rego engine.
func TestExportEvaluates(t *testing.T) {
	k := dssetest.New(t, "ecdsa")
	d := exampleDoc(t, k.Fingerprint)
	pinned := initdata(t, k, "payments", 5, "c0")
	in, err := policy.ParseInitdata(pinned)
	if err != nil {
		t.Fatal(err)
	}
	e, err := New(d, Options{Digest: "sha256:00", Accept: everything, Initdata: [][]byte{pinned}, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	p := play(t, e)
	good := func(platform string) map[string]any {
		c := goodClaims(platform)
		value, err := claim(in, platform)
		if err != nil {
			t.Fatal(err)
		}
		c["init_data"] = value
		return c
	}
	path := func(platform string) string {
		if platform == "tpm" {
			return "staging/layer-key/api"
		}
		return "payments/layer-key/api"
	}
	for _, platform := range release.Platforms {
		token := p.token(good(platform))
		for _, form := range []string{"", "old "} {
			if !p.allows(form+path(platform), token) {
				t.Errorf("%s%s is denied: %v", form, platform, token)
			}
		}
		for _, other := range []string{"payments/layer-key/other", "plugin " + path(platform)} {
			if p.allows(other, token) {
				t.Errorf("%s: %s is released", platform, other)
			}
		}
	}
	if p.releases("staging/layer-key/api", good("snp")) || p.releases("payments/layer-key/api", good("tpm")) {
		t.Error("a platform got another platform's resource")
	}
	nested := good("snp") // as later releases show a report
	nested["snp"] = map[string]any{"evidence": map[string]any{
		"measurement": hexes("b1", 48), "policy": map[string]any{"debug_allowed": false, "migrate_ma_allowed": false},
		"reported_tcb": map[string]any{"fmc": nil, "bootloader": 9, "tee": 1, "snp": 22, "microcode": 213},
	}}
	if !p.releases(path("snp"), nested) {
		t.Error("a report beneath evidence is denied")
	}

	type change struct {
		platform string
		value    any
		path     []string
	}
	at := func(platform string, value any, path ...string) change {
		return change{platform, value, append([]string{platform}, path...)}
	}
	cases := map[string]change{
		"another measurement":          at("snp", hexes("b0", 48), "measurement"),
		"no measurement":               at("snp", nil, "measurement"),
		"a measurement of null":        at("snp", false, "measurement"),
		"the paravisor as a guest":     at("snp", hexes("d1", 48), "measurement"),
		"debug allowed":                at("snp", true, "policy_debug_allowed"),
		"debug not known":              at("snp", nil, "policy_debug_allowed"),
		"migration allowed":            at("snp", true, "policy_migrate_ma"),
		"a lower bootloader":           at("snp", 8, "reported_tcb_bootloader"),
		"a lower TEE":                  at("snp", 0, "reported_tcb_tee"),
		"a lower SNP":                  at("snp", 21, "reported_tcb_snp"),
		"a lower microcode":            at("snp", 212, "reported_tcb_microcode"),
		"a TCB that is a string":       at("snp", "255", "reported_tcb_microcode"),
		"no microcode":                 at("snp", nil, "reported_tcb_microcode"),
		"other init-data":              {"snp", hexes("00", 32), []string{"init_data"}},
		"no init-data":                 {"snp", nil, []string{"init_data"}},
		"two platforms in one token":   {"snp", tdxClaims("c"), []string{"tdx"}},
		"another paravisor":            at("az-snp-vtpm", hexes("a1", 48), "measurement"),
		"another MRTD":                 at("tdx", hexes("c0", 48), "quote", "body", "mr_td"),
		"another RTMR 0":               at("tdx", hexes("c0", 48), "quote", "body", "rtmr_0"),
		"another RTMR 1":               at("tdx", hexes("c0", 48), "quote", "body", "rtmr_1"),
		"another RTMR 2":               at("tdx", nil, "quote", "body", "rtmr_2"),
		"an owner":                     at("tdx", hexes("c0", 48), "quote", "body", "mr_owner"),
		"an owner's configuration":     at("tdx", hexes("c0", 48), "quote", "body", "mr_owner_config"),
		"another SEAM module":          at("tdx", hexes("c0", 48), "quote", "body", "mr_seam"),
		"a debug TD":                   at("tdx", true, "td_attributes", "debug"),
		"a debug TD by its attributes": at("tdx", "0100001000000000", "quote", "body", "td_attributes"),
		"a TD that migrates":           at("tdx", "0000002000000000", "quote", "body", "td_attributes"),
		"attributes cut short":         at("tdx", "00000010", "quote", "body", "td_attributes"),
		"another vendor":               at("tdx", "00", "quote", "header", "vendor_id"),
		"an SGX quote":                 at("tdx", "00000000", "quote", "header", "tee_type"),
		"an old platform":              at("tdx", "OutOfDate", "tcb_status"),
		"expired collateral":           at("tdx", "1", "collateral_expiration_status"),
		"an open advisory":             at("tdx", []any{"INTEL-SA-01192"}, "advisory_ids"),
		"no advisories known":          at("tdx", nil, "advisory_ids"),
		"an old TCB date":              at("tdx", "2024-11-12T23:59:59Z", "tcb_date"),
		"no TCB date":                  at("tdx", nil, "tcb_date"),
	}
	for _, platform := range []string{"az-snp-vtpm", "az-tdx-vtpm", "tpm"} {
		for _, pcr := range []string{"pcr02", "pcr04", "pcr09", "pcr11", "pcr12", "pcr13"} {
			where := []string{platform, "tpm", pcr}
			if platform == "tpm" {
				where = []string{platform, pcr}
			}
			cases[platform+" with another "+pcr] = change{platform, hexes("77", 32), where}
			cases[platform+" without "+pcr] = change{platform, nil, where}
		}
	}
	for what, c := range cases {
		claims := good(c.platform)
		set(claims, c.value, c.path...)
		if p.releases(path(c.platform), claims) {
			t.Errorf("%s: released", what)
		}
	}

	// A token that this attestation policy did not make, or not affirming alone.
	for what, change := range map[string]func(token map[string]any){
		"not affirming":          func(m map[string]any) { set(m, "warning", "submods", "cpu0", "ear.status") },
		"no status":              func(m map[string]any) { set(m, nil, "submods", "cpu0", "ear.status") },
		"another vector":         func(m map[string]any) { set(m, 4, "submods", "cpu0", "ear.trustworthiness-vector", "executables") },
		"no configuration":       func(m map[string]any) { set(m, nil, "submods", "cpu0", "ear.trustworthiness-vector", "configuration") },
		"a GPU that is not":      func(m map[string]any) { set(m, map[string]any{"ear.status": "none"}, "submods", "gpu0") },
		"no CPU":                 func(m map[string]any) { set(m, nil, "submods", "cpu0") },
		"evidence of no content": func(m map[string]any) { set(m, nil, "submods", "cpu0", "ear.veraison.annotated-evidence") },
	} {
		token := p.token(good("snp"))
		change(token)
		if p.allows(path("snp"), token) {
			t.Errorf("%s: released", what)
		}
	}
	wrap := func(result bool) any {
		return map[string]any{"trust_context": map[string]any{"attestation_summary": map[string]any{"verification_result": result, "claims": p.token(good("snp"))}}}
	}
	if !p.allows(path("snp"), wrap(true)) || p.allows(path("snp"), wrap(false)) {
		t.Error("a wrapped token is not judged by its result")
	}

	// Reference values that are gone affirm nothing; neither does an expired document.
	for name, v := range p.values {
		delete(p.values, name)
		if p.releases(path("snp"), good("snp")) && p.releases(path("tdx"), good("tdx")) {
			t.Errorf("released without %s", name)
		}
		p.values[name] = v
	}
	p.now = time.Date(2036, 1, 1, 0, 0, 0, 0, time.UTC)
	if p.releases(path("snp"), good("snp")) {
		t.Error("released after the expiry")
	}
}

// What Trustee cannot express is refused unless it is accepted by name, and
// nothing is accepted that is not to be given up.
func TestWhatTrusteeCannotExpress(t *testing.T) {
	k := dssetest.New(t, "ecdsa")
	d := exampleDoc(t, k.Fingerprint)
	fits := initdata(t, k, "payments", 5, "c0")
	export := func(d *release.Reference, accept []string, in ...[]byte) (*Export, error) {
		return New(d, Options{Accept: accept, Initdata: in, Now: now})
	}
	for _, name := range everything {
		less := slices.DeleteFunc(slices.Clone(everything), func(n string) bool { return n == name })
		if _, err := export(d, less, fits); cause.Of(err) != cause.PolicyInvalid || !strings.Contains(err.Error(), name) {
			t.Errorf("without accepting %s: %v", name, err)
		}
	}
	if _, err := export(d, everything); err == nil || !strings.Contains(err.Error(), NoPolicy) {
		t.Errorf("a policy and no initdata: %v", err)
	}
	all := append(slices.Clone(everything), NoPolicy)
	e, err := export(d, all)
	if err != nil || bytes.Contains(e.ResourcePolicy, []byte(`"init_data":`)) || !bytes.Contains(e.ResourcePolicy, []byte("# Given up: no-policy")) || len(e.GivenUp) != len(all) {
		t.Errorf("everything accepted: %+v, %v", e, err)
	}
	for what, c := range map[string]struct {
		accept []string
		in     []byte
	}{
		"no-policy that is not needed": {all, fits},
		"an unknown name":              {append(slices.Clone(everything), "no-quote"), fits},
		"a name twice":                 {append(slices.Clone(everything), NoTombstone), fits},
		"another policy's initdata":    {everything, initdata(t, k, "other", 5, "c0")},
		"a lower version":              {everything, initdata(t, k, "payments", 4, "c0")},
		"another image":                {everything, initdata(t, k, "payments", 5, "c1")},
		"another signer":               {everything, initdata(t, dssetest.New(t, "ecdsa"), "payments", 5, "c0")},
		"no initdata at all":           {everything, []byte("x")},
	} {
		if _, err := export(d, c.accept, c.in); err == nil {
			t.Errorf("%s: exported", what)
		}
	}
	// Nothing to give up but the tombstone, where nothing else is demanded.
	plain := exampleDoc(t, "")
	plain.Resources = []release.Resource{{Resource: []string{"kbs:///a/b/c"}, Platforms: []string{"tdx"}, AnyPolicy: true}}
	if e, err := export(plain, []string{NoTombstone}); err != nil || len(e.GivenUp) != 1 || len(e.Stricter) != 0 {
		t.Errorf("%+v, %v", e, err)
	}
	one := uint32(1)
	vmpl := exampleDoc(t, k.Fingerprint)
	vmpl.TCB.SNP.VMPL = &release.VMPL{Exact: &one}
	if _, err := export(vmpl, everything, fits); err == nil || !strings.Contains(err.Error(), "vmpl") {
		t.Errorf("VMPL 1: %v", err)
	}
}
