package broker_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
)

const (
	keyPath = "default/key/key_id1"
	keyText = "0123456789abcdef0123456789abcdef"
	// initdata is a document that a launch can be bound to.
	initdata = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n\n[data]\n\"aa.toml\" = \"[token_configs]\"\n"
)

// platforms are made machines of every kind, and a broker that trusts them.
type platforms struct {
	*world
	snp *snptest.Chain
	tdx *tdxtest.Platform
	tpm *tpmtest.TPM
}

func newPlatforms(t *testing.T) *platforms {
	t.Helper()
	p := &platforms{snp: snptest.New(t, snptest.Config{}), tdx: tdxtest.New(t, tdxtest.Config{}), tpm: tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.RSA)}
	ak := sha256.Sum256(p.tpm.AKSPKI)
	snp := &appraisal.SNP{Roots: p.snp.Roots(), Collateral: p.snp.Collateral(t)}
	tdx := &appraisal.TDX{Roots: p.tdx.Roots(), Collateral: p.tdx.Source(t)}
	p.world = newWorld(t, time.Now, snp, &appraisal.AzureSNP{SNP: snp}, tdx, &appraisal.AzureTDX{TDX: tdx},
		&appraisal.TPM{TrustedAKs: []string{hex.EncodeToString(ak[:])}})
	p.put(t, keyPath, []byte(keyText), "snp", "tdx", "az-snp-vtpm", "az-tdx-vtpm", "tpm")
	return p
}

// evidence is the TEE's evidence over report data, launched with initdata's
// digest where bound.
func (p *platforms) evidence(t *testing.T, tee string, rd [48]byte, bound bool) string {
	t.Helper()
	digest := sha256.Sum256([]byte(initdata))
	var pcr8 [32]byte
	var field [64]byte
	copy(field[:], rd[:])
	snp := snptest.Options{}
	tdx := tdxtest.Report{ReportData: field, MRTD: [48]byte{1}, RTMR: [4][48]byte{{2}, {3}, {4}}}
	if bound {
		snp.HostData = digest[:]
		copy(tdx.MRConfigID[:], digest[:])
		pcr8 = sha256.Sum256(append(make([]byte, 32), digest[:]...))
	}
	switch tee {
	case "snp":
		return snpEvidence(p.snp.Report(t, field, snp), p.snp.Signer.Vcek.Raw)
	case "tdx":
		return `{"cc_eventlog":null,"quote":"` + base64.StdEncoding.EncodeToString(p.tdx.Quote(t, tdx)) + `"}`
	case "az-snp-vtpm":
		return string(p.snp.AzureEvidence(t, rd, snptest.AzureOptions{PCRs: map[int][32]byte{8: pcr8}}))
	case "az-tdx-vtpm":
		return string(p.tdx.AzureEvidence(t, rd, tdx, snptest.AzureOptions{PCRs: map[int][32]byte{8: pcr8}}))
	}
	if bound && bytes.Equal(p.tpm.Read(8), make([]byte, 32)) {
		p.tpm.Extend(8, digest[:])
	}
	e := p.tpm.Evidence(rd, 0, 8)
	pcrs, _ := json.Marshal(e.Quote.PCRs)
	b64 := base64.StdEncoding.EncodeToString
	return `{"tpm_quote":{"signature":"` + b64(e.Quote.Signature) + `","message":"` + b64(e.Quote.Message) + `","pcrs":` + string(pcrs) + `},"ak_public":"` + b64(e.AKPublic) + `"}`
}

// Trustee's guest gets its key on every platform: cookie and bearer token,
// init-data null and present, both curves and RSA, one token for one session.
func TestTrusteeGuestOnEveryPlatform(t *testing.T) {
	p := newPlatforms(t)
	for _, c := range []struct{ tee, key, init string }{
		{"snp", "P-256", ""}, {"snp", "P-521", initdata}, {"snp", "RSA", initdata},
		{"tdx", "P-256", initdata}, {"tdx", "P-521", ""}, {"az-snp-vtpm", "P-256", ""}, {"az-snp-vtpm", "P-521", initdata},
		{"az-tdx-vtpm", "P-256", initdata}, {"tpm", "P-256", ""}, {"tpm", "P-521", initdata},
	} {
		t.Run(fmt.Sprintf("%s %s init-data %t", c.tee, c.key, c.init != ""), func(t *testing.T) {
			g := p.open(t, c.tee, c.key)
			g.get(t, keyPath).refused(t, 401, "TokenNotFound")
			if a := g.attest(t, g.request(c.init, p.evidence(t, c.tee, g.reportData(""), c.init != ""), "")); a.status != 200 {
				t.Fatalf("attest: %d %s", a.status, a.body)
			}
			token := g.token
			if a := g.attest(t, `{"anything":1}`); a.status != 200 || g.token != token {
				t.Errorf("posting again: %d, the old token %t", a.status, g.token == token)
			}
			g.checkToken(t, c.tee, c.init)
			for how, headers := range map[string]map[string]string{
				"cookie":                            {"Cookie": g.cookie},
				"bearer token":                      {"Authorization": "Bearer " + token},
				"token beside a session that ended": {"Authorization": "Bearer " + token, "Cookie": "kbs-session-id=" + strings.Repeat("0", 32)},
			} {
				a := p.do(t, "GET", "/kbs/v0/resource/"+keyPath, headers, "")
				if a.status != 200 || string(g.key.decrypt(t, a.body)) != keyText {
					t.Errorf("%s: %d %s", how, a.status, a.body)
				}
			}
			p.do(t, "GET", "/kbs/v0/resource/"+keyPath, map[string]string{"Authorization": "Bearer " + token + "x"}, "").refused(t, 401, "TokenVerifierError")
		})
	}
}

// checkToken reads the EAR token by pointers, as relying parties do.
func (g *guest) checkToken(t *testing.T, tee, init string) {
	t.Helper()
	jws, err := jose.ParseSigned(g.token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := jws.Verify(g.w.key.Public())
	if err != nil || jws.Signatures[0].Header.JSONWebKey == nil {
		t.Fatalf("token: %v, jwk in its header %t", err, jws.Signatures[0].Header.JSONWebKey != nil)
	}
	var claims struct {
		Iat, Exp int64
		Submods  map[string]map[string]any
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		t.Fatal(err)
	}
	cpu := claims.Submods["cpu0"]
	annotated, _ := cpu["ear.veraison.annotated-evidence"].(map[string]any)
	runtime, _ := annotated["runtime_data_claims"].(map[string]any)
	key, _ := json.Marshal(runtime["tee-pubkey"])
	if claims.Exp <= claims.Iat || claims.Exp-claims.Iat > 300 || cpu["ear.status"] == nil || cpu["ear.trustworthiness-vector"] == nil || annotated[tee] == nil {
		t.Errorf("claims: %s", payload)
	}
	if string(key) != canonical(t, g.key.jwk()) || runtime["nonce"] != g.nonce {
		t.Errorf("runtime_data_claims: %v", runtime)
	}
	rd := g.reportData("")
	if annotated["report_data"] != hex.EncodeToString(rd[:]) {
		t.Errorf("report_data: %v", annotated["report_data"])
	}
	digest := sha256.Sum256([]byte(initdata))
	if got := annotated["init_data"]; (init == "") != (got == nil) || (init != "" && got != hex.EncodeToString(digest[:])) {
		t.Errorf("init_data: %v", got)
	}
}

func canonical(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	b, _ := json.Marshal(v)
	return string(b)
}

// What a guest may get wrong at auth, and the exact answers.
func TestTrusteeGuestAuthErrors(t *testing.T) {
	p := newPlatforms(t)
	for what, c := range map[string]struct{ body, variant, detail string }{
		"version 0.1.1":     {`{"version":"0.1.1","tee":"snp","extra-params":""}`, "AttestationError", "KBS Client Protocol Version Mismatch"},
		"version 0.4.1":     {`{"version":"0.4.1","tee":"snp","extra-params":{}}`, "AttestationError", "KBS Client Protocol Version Mismatch"},
		"version 0.4":       {`{"version":"0.4","tee":"snp","extra-params":""}`, "AttestationError", "KBS Client Protocol Version Mismatch"},
		"TEE sample":        {`{"version":"0.4.0","tee":"sample","extra-params":""}`, "AttestationError", `"sample" is not accepted`},
		"TEE sampledevice":  {`{"version":"0.4.0","tee":"sampledevice","extra-params":""}`, "AttestationError", "not accepted"},
		"TEE sgx":           {`{"version":"0.4.0","tee":"sgx","extra-params":""}`, "AttestationError", "not accepted"},
		"another case":      {`{"version":"0.4.0","tee":"SNP","extra-params":""}`, "AttestationError", "not accepted"},
		"no TEE":            {`{"version":"0.4.0","extra-params":""}`, "SerdeError", ""},
		"the version twice": {`{"version":"0.4.0","version":"0.4.0","tee":"snp","extra-params":""}`, "SerdeError", "duplicate"},
		"a list":            {`[]`, "SerdeError", ""},
		"nothing":           {``, "SerdeError", ""},
		"a deep one":        {`{"version":"0.4.0","tee":"snp","extra-params":{"x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}}`, "SerdeError", ""},
		"a long one":        {`{"version":"0.4.0","tee":"snp","extra-params":"","x":"` + strings.Repeat("y", 3<<20) + `"}`, "SerdeError", ""},
	} {
		a := p.do(t, "POST", "/kbs/v0/auth", nil, c.body)
		if detail := a.refused(t, 401, c.variant); !strings.Contains(detail, c.detail) {
			t.Errorf("%s: %s", what, detail)
		}
		if a.header.Get("Set-Cookie") != "" {
			t.Errorf("%s: a refusal sets a cookie", what)
		}
	}
	// A newer client says more: unknown members change nothing.
	a := p.do(t, "POST", "/kbs/v0/auth", nil, `{"version":"0.4.0","tee":"snp","extra-params":{"selected":1,"future":{"a":[1,2]}},"more":null}`)
	if a.status != 200 {
		t.Errorf("unknown members: %d %s", a.status, a.body)
	}
	for path, variant := range map[string]string{"/kbs/v0/resource/a/b": "InvalidRequestPath", "/kbs/v0/nothing/a/b/c": "PluginNotFound", "/kbs/v1/auth": "InvalidRequestPath"} {
		p.do(t, "GET", path, nil, "").refused(t, 404, variant)
	}
}

// What a guest may get wrong at attest. Each is a session of its own; the one
// beside them is not disturbed.
func TestTrusteeGuestAttestErrors(t *testing.T) {
	p := newPlatforms(t)
	beside := p.open(t, "snp", "P-256")
	other := p.open(t, "snp", "P-256")
	million := strings.Repeat("0,", 1_000_000) + "0"
	for what, c := range map[string]struct {
		variant, detail string
		body            func(g *guest) string
	}{
		"a report over another nonce": {"AttestationError", "report-data", func(g *guest) string { return g.request("", p.evidence(t, "snp", other.reportData(""), false), "") }},
		"another session's request":   {"AttestationError", "nonce", func(*guest) string { return other.request("", p.evidence(t, "snp", other.reportData(""), false), "") }},
		"a report over another key": {"AttestationError", "report-data", func(g *guest) string {
			rd := g.reportData("")
			g.key = newKey(t, "P-256")
			return g.request("", p.evidence(t, "snp", rd, false), "")
		}},
		"additional evidence not in it": {"AttestationError", "report-data", func(g *guest) string {
			return g.request("", p.evidence(t, "snp", g.reportData(""), false), `{"nvidia":{}}`)
		}},
		"init-data that is not bound": {"AttestationError", "launch-binding", func(g *guest) string { return g.request(initdata, p.evidence(t, "snp", g.reportData(""), false), "") }},
		"init-data with a space more": {"AttestationError", "launch-binding", func(g *guest) string {
			return g.request(initdata+" ", p.evidence(t, "snp", g.reportData(""), true), "")
		}},
		"init-data of another format": {"SerdeError", "toml", func(g *guest) string {
			return strings.Replace(g.request(initdata, p.evidence(t, "snp", g.reportData(""), true), ""), `"toml"`, `"json"`, 1)
		}},
		"evidence of another TEE": {"AttestationError", "", func(g *guest) string { return g.request("", p.evidence(t, "tdx", g.reportData(""), false), "") }},
		"sample evidence":         {"AttestationError", "", func(g *guest) string { return g.request("", `{"svn":"1","report_data":"AAAA"}`, "") }},
		"a nonce twice": {"SerdeError", "duplicate", func(g *guest) string {
			return strings.Replace(g.request("", "{}", ""), `{"nonce":`, `{"nonce":"","nonce":`, 1)
		}},
		"a member twice in evidence": {"SerdeError", "duplicate", func(g *guest) string { return g.request("", `{"cert_chain":null,"cert_chain":null}`, "") }},
		"a million integers": {"SerdeError", "", func(g *guest) string {
			return g.request("", `{"attestation_report":{"report_data":[`+million+`]}}`, "")
		}},
		"more than 2 MB":            {"SerdeError", "", func(g *guest) string { return g.request("", `{"x":"`+strings.Repeat("0", 2<<20)+`"}`, "") }},
		"evidence that is a string": {"SerdeError", "primary_evidence", func(g *guest) string { return g.request("", `"{}"`, "") }},
		"a key on P-384": {"SerdeError", "tee-pubkey", func(g *guest) string {
			return strings.Replace(g.request("", "{}", ""), `"P-256"`, `"P-384"`, 1)
		}},
		"a key of short coordinates": {"SerdeError", "tee-pubkey", func(g *guest) string {
			return regexp.MustCompile(`"x":"[^"]+"`).ReplaceAllString(g.request("", "{}", ""), `"x":"AAAA"`)
		}},
		"half of it": {"SerdeError", "", func(g *guest) string { r := g.request("", "{}", ""); return r[:len(r)/2] }},
	} {
		t.Run(what, func(t *testing.T) {
			g := p.open(t, "snp", "P-256")
			a := g.attest(t, c.body(g))
			if detail := a.refused(t, 401, c.variant); !strings.Contains(detail, c.detail) {
				t.Errorf("%s, expected %s", detail, c.detail)
			}
			g.get(t, keyPath).refused(t, 401, "TokenNotFound")
		})
	}
	p.do(t, "POST", "/kbs/v0/attest", nil, beside.request("", "{}", "")).refused(t, 401, "AttestationError")
	p.do(t, "POST", "/kbs/v0/attest", map[string]string{"Cookie": "kbs-session-id=" + strings.Repeat("f", 32)}, "{}").refused(t, 401, "AttestationError")
	if a := beside.attest(t, beside.request("", p.evidence(t, "snp", beside.reportData(""), false), "")); a.status != 200 {
		t.Errorf("the session beside: %d %s", a.status, a.body)
	}
}

// A newer guest sends members that are not known here, in every object, and
// the additional evidence of a device.
func TestTrusteeGuestOfTheFuture(t *testing.T) {
	p := newPlatforms(t)
	const gpu = `{"nvidia":{"evidence":"AAAA"}}`
	g := p.open(t, "snp", "P-256")
	body := g.request("", p.evidence(t, "snp", g.reportData(gpu), false), gpu)
	for _, object := range []string{`{"init-data":`, `{"nonce":`, `{"primary_evidence":`, `"attestation_report":{`, `{"cert_type":`} {
		member := strings.TrimPrefix(object, "{")
		if name, ok := strings.CutSuffix(object, "{"); ok {
			body = strings.Replace(body, object, name+`{"future":[1,{"a":null}],`, 1)
			continue
		}
		body = strings.Replace(body, object, `{"future":[1,{"a":null}],`+member, 1)
	}
	if strings.Count(body, `"future"`) != 5 {
		t.Fatalf("the test put its members in %d places", strings.Count(body, `"future"`))
	}
	if a := g.attest(t, body); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if a := g.get(t, keyPath); a.status != 200 || string(g.key.decrypt(t, a.body)) != keyText {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// Many sessions of one guest at once do not disturb each other, and of two
// requests for one session one is judged.
func TestTrusteeGuestsAtOnce(t *testing.T) {
	p := newPlatforms(t)
	var wg sync.WaitGroup
	for range 8 {
		g := p.open(t, "snp", "P-256")
		good := g.request("", p.evidence(t, "snp", g.reportData(""), false), "")
		var mu sync.Mutex
		var tokens []string
		for range 3 {
			wg.Go(func() {
				a := p.do(t, "POST", "/kbs/v0/attest", map[string]string{"Cookie": g.cookie}, good)
				mu.Lock()
				defer mu.Unlock()
				if a.status != 200 {
					t.Errorf("%d %s", a.status, a.body)
				}
				if tokens = append(tokens, a.body); slices.ContainsFunc(tokens, func(s string) bool { return s != a.body }) {
					t.Error("one session, two tokens")
				}
			})
		}
	}
	wg.Wait()
}

// Evidence that Trustee's guests once made, in sessions that it was not made
// for: everything passes at a time when its certificates were valid, but what
// ties it to the session, and that alone is named.
func TestTrusteesRecordedEvidence(t *testing.T) {
	at := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	lists := &collateral.Source{Policy: collateral.Policy{Revocation: collateral.IfPresent}}
	snp := &appraisal.SNP{Collateral: lists}
	const ak = "a517f03ffdaee469aef1a19569547e330726335d0461c3ef6383409c6295679e"
	w := newWorld(t, func() time.Time { return at }, snp, &appraisal.AzureSNP{SNP: snp}, &appraisal.TPM{TrustedAKs: []string{ak}})
	row := regexp.MustCompile(`([a-z-]+): (?:expected|not checked)`)
	for tee, c := range map[string]struct {
		file string
		rows []string
	}{
		"az-snp-vtpm": {"trustee-az-snp-vtpm-evidence-v2.json", []string{"report-data", "hcl-user-data"}},
		"snp":         {"trustee-snp-evidence.json", []string{"report-data"}},
		"tpm":         {"trustee-tpm-evidence.json", []string{"report-data"}},
	} {
		t.Run(tee, func(t *testing.T) {
			recorded, err := os.ReadFile("../appraisal/testdata/" + c.file)
			if err != nil {
				t.Fatal(err)
			}
			g := w.open(t, tee, "P-256")
			detail := g.attest(t, g.request("", string(recorded), "")).refused(t, 401, "AttestationError")
			var failed []string
			for _, m := range row.FindAllStringSubmatch(detail, -1) {
				failed = append(failed, m[1])
			}
			if !slices.Equal(failed, c.rows) {
				t.Errorf("refused by %v, expected by %v alone: %s", failed, c.rows, detail)
			}
		})
	}
}
