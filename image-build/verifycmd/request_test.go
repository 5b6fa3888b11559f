package verifycmd

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// pcr14 is the event log's register in the test's TPM.
type pcr14 struct{ tpm *tpmtest.TPM }

func (pcr14) Name() string { return "pcr14" }
func (pcr14) Index() int   { return 14 }

func (p pcr14) Extend(_ context.Context, digests map[crypto.Hash][]byte) error {
	p.tpm.Extend(14, digests[crypto.SHA256])
	return nil
}

func (p pcr14) Read(context.Context) ([]byte, error) { return p.tpm.Read(14), nil }

var image = "sha256:" + strings.Repeat("1", 64)

// guest is a launched guest: a real TPM, a signed policy in PCR 8, a log in PCR 14.
type guest struct {
	tpm      *tpmtest.TPM
	signer   *dssetest.Key
	initdata []byte
	log      []byte
	dir      string
}

func launch(t *testing.T) *guest {
	t.Helper()
	g := &guest{tpm: tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.ECC), signer: dssetest.New(t, "ecdsa"), dir: t.TempDir()}
	p := &policy.Policy{
		APIVersion: policy.APIVersion, Name: "shop", Version: 2, Expires: time.Now().Add(time.Hour).UTC().Format(time.RFC3339),
		Platforms: []policy.Platform{policy.PlatformTPM},
		Workloads: []policy.Workload{{
			Name: "web", Image: "registry.example/shop@" + image, Encryption: "optional",
			Signatures: policy.Signatures{Required: []policy.Signer{{Key: g.signer.PEM}}},
		}},
	}
	envelope, err := policy.Sign(p, g.signer)
	if err != nil {
		t.Fatal(err)
	}
	if g.initdata, err = policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: g.signer.PEM}); err != nil {
		t.Fatal(err)
	}
	payload, err := p.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	in, err := policy.ParseInitdata(g.initdata)
	if err != nil {
		t.Fatal(err)
	}
	g.tpm.Extend(8, in.Digest())
	log, err := eventlog.Open(t.Context(), t.TempDir(), pcr14{g.tpm})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []eventlog.Event{
		{Kind: eventlog.KindPolicy, Policy: "shop", PolicyVersion: 2, PolicyDigest: policy.Digest(payload), Signers: []string{g.signer.Fingerprint}},
		{Kind: eventlog.KindImage, Workload: "web", Image: "registry.example/shop@" + image},
	} {
		if err := log.Append(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	g.log = log.Bytes()
	return g
}

// request is the guest's attest request, and its report data.
func (g *guest) request(t *testing.T) (kbs.AttestRequest, [kbs.ReportDataSize]byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r := kbs.AttestRequest{InitData: &kbs.InitData{Format: "toml", Body: string(g.initdata)}}
	r.RuntimeData.Nonce = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
	if r.RuntimeData.TEEPubKey, err = kbs.NewTEEPubKey(&key.PublicKey); err != nil {
		t.Fatal(err)
	}
	if r.TEEEvidence.AdditionalEvidence, err = (kbs.AdditionalCVMAgent{EventLog: g.log}).Encode(); err != nil {
		t.Fatal(err)
	}
	rd, err := kbs.ReportData(r.TEEEvidence.AdditionalEvidence, r.RuntimeData.Nonce, r.RuntimeData.TEEPubKey)
	if err != nil {
		t.Fatal(err)
	}
	r.TEEEvidence.PrimaryEvidence = tpmtest.JSON(t, g.tpm.Evidence(rd, 0, 4, 8, 9, 11, 12, 13, 14))
	return r, rd
}

func (g *guest) write(t *testing.T, name string, v any) string {
	t.Helper()
	data, ok := v.([]byte)
	if !ok {
		var err error
		if data, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(g.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// evidenceOf runs `verify evidence` and returns its JSON.
func evidenceOf(t *testing.T, args ...string) (document, error) {
	t.Helper()
	c := Command()
	c.SilenceErrors, c.SilenceUsage = true, true
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetArgs(append([]string{"evidence", "--output", "json"}, args...))
	err := c.Execute()
	var d document
	if out.Len() > 0 {
		if jerr := json.Unmarshal(out.Bytes(), &d); jerr != nil {
			t.Fatal(jerr)
		}
	}
	return d, err
}

// A whole attest request: report_data from its runtime-data, launch by its
// init-data, log by its register, and a rule that names policy and image.
func TestAttestRequest(t *testing.T) {
	g := launch(t)
	r, rd := g.request(t)
	ak := sha256.Sum256(g.tpm.AKSPKI)
	rule := g.write(t, "rule.yaml", []byte("apiVersion: cvm-agent.release-rule/v1\nplatforms: [tpm]\npolicy: {names: [shop], signers: ["+g.signer.Fingerprint+
		"], minimumVersion: 2}\nimages: ['"+image+"']\npcrs: {'12': ['"+strings.Repeat("0", 64)+"']}\n"))
	common := []string{"--format", "kbs", "--tee", "tpm", "--trusted-ak", hex.EncodeToString(ak[:]), "--rules", rule}
	run := func(t *testing.T, r kbs.AttestRequest, more ...string) (document, error) {
		return evidenceOf(t, append(append(common, "--in", g.write(t, "request.json", r)), more...)...)
	}

	d, err := run(t, r)
	if err != nil || !d.Accepted || d.Facts == nil || d.Facts.Log.Running.Policy != "shop" {
		t.Fatalf("%v: %+v", err, d)
	}
	for name, want := range map[string]appraisal.Outcome{
		appraisal.CheckReportData: appraisal.Passed, appraisal.CheckLaunch: appraisal.Passed, appraisal.CheckEventLog: appraisal.Passed,
		appraisal.CheckPolicyName: appraisal.Passed, appraisal.CheckImage: appraisal.Passed, checkFreshness: appraisal.NotChecked, checkMark: appraisal.NotChecked,
	} {
		if got := d.Verdict.Outcome(name); got != want {
			t.Errorf("%s: %s, expected %s", name, got, want)
		}
	}
	if d, err = run(t, r, "--report-data", hex.EncodeToString(rd[:])); err != nil || d.Verdict.Outcome(checkFreshness) != appraisal.Passed {
		t.Errorf("with its report data: %v", err)
	}

	for what, c := range map[string]struct {
		row    string
		change func(r *kbs.AttestRequest)
		more   []string
	}{
		"another nonce":     {appraisal.CheckReportData, func(r *kbs.AttestRequest) { r.RuntimeData.Nonce = "x" + r.RuntimeData.Nonce[1:] }, nil},
		"another log":       {appraisal.CheckReportData, func(r *kbs.AttestRequest) { r.TEEEvidence.AdditionalEvidence += " " }, nil},
		"no log":            {appraisal.CheckReportData, func(r *kbs.AttestRequest) { r.TEEEvidence.AdditionalEvidence = "" }, nil},
		"other initdata":    {appraisal.CheckLaunch, func(r *kbs.AttestRequest) { r.InitData.Body += "\n" }, nil},
		"no initdata":       {appraisal.CheckLaunch, func(r *kbs.AttestRequest) { r.InitData = nil }, nil},
		"other report data": {checkFreshness, func(*kbs.AttestRequest) {}, []string{"--report-data", "01"}},
	} {
		t.Run(what, func(t *testing.T) {
			changed := r
			init := *r.InitData
			changed.InitData = &init
			c.change(&changed)
			d, err := run(t, changed, c.more...)
			if cause.Of(err) != cause.EvidenceRefused || d.Accepted || !strings.Contains(d.Cause.Text, c.row+":") {
				t.Fatalf("%v, expected a refusal by %s", err, c.row)
			}
		})
	}
	if _, err := run(t, r, "--initdata", rule); cause.Of(err) != cause.Usage {
		t.Errorf("initdata twice: %v", err)
	}
	if _, err := run(t, r, "--event-log", g.write(t, "log", g.log)); cause.Of(err) != cause.Usage {
		t.Errorf("a log twice: %v", err)
	}

	// The same in parts: evidence, initdata and log in files of their own.
	parts := []string{"--in", g.write(t, "evidence.json", r.TEEEvidence.PrimaryEvidence), "--initdata", g.write(t, "initdata.toml", g.initdata),
		"--event-log", g.write(t, "log", g.log), "--report-data", hex.EncodeToString(rd[:32])}
	if d, err := evidenceOf(t, append(common, parts...)...); err != nil || !d.Accepted {
		t.Errorf("in parts: %v", err)
	}
	// The composite form, whose additional evidence has the log.
	composite := append(common, "--in", g.write(t, "composite.json", r.TEEEvidence), "--initdata", filepath.Join(g.dir, "initdata.toml"))
	if d, err := evidenceOf(t, composite...); err != nil || d.Verdict.Outcome(appraisal.CheckReportData) != appraisal.NotChecked {
		t.Errorf("composite: %v", err)
	}
}

// What is inside --in is bounded and decoded strictly before it is judged.
func TestMalformedRequests(t *testing.T) {
	dir := t.TempDir()
	for what, text := range map[string]string{
		"a request without evidence":       `{"runtime-data":{"nonce":"","tee-pubkey":{}}}`,
		"a request with a key of no curve": `{"init-data":null,"runtime-data":{"nonce":"","tee-pubkey":{"kty":"EC"}},"tee-evidence":{"primary_evidence":{},"additional_evidence":""}}`,
		"additional evidence of no text":   `{"primary_evidence":{},"additional_evidence":{}}`,
		"additional evidence of no JSON":   `{"primary_evidence":{},"additional_evidence":"x"}`,
		"an element too many":              `{"x":[` + strings.Repeat("0,", 1_000_000) + `0]}`,
		"2 MiB and more":                   `{"x":"` + strings.Repeat("0", kbs.MaxBody) + `"}`,
		"nested too deeply":                strings.Repeat(`{"x":`, 40) + "1" + strings.Repeat("}", 40),
		"a number":                         "1",
		"nothing":                          "",
	} {
		path := filepath.Join(dir, "in")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if d, err := evidenceOf(t, "--in", path, "--format", "kbs", "--tee", "tpm"); cause.Exit(err) != cause.ExitMalformed || d.Verdict != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(vector(f, "trustee-tpm-evidence.json"))
	f.Add([]byte(`{"primary_evidence":{},"additional_evidence":"{}"}`))
	f.Add([]byte(`{"runtime-data":{"nonce":"","tee-pubkey":{"kty":"EC"}},"cvm-agent":{"version":"cvm-agent/1"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e := &evidence{}
		if err := e.decode("tpm", b); err == nil && len(e.primary) == 0 {
			t.Fatal("no evidence and no error")
		}
	})
}
