package verifycmd

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// runs runs `verify evidence` with vendors' roots of the test's own.
func (o options) runs(t *testing.T, args ...string) (document, error) {
	t.Helper()
	c := o.command()
	c.SilenceErrors, c.SilenceUsage = true, true
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetArgs(append([]string{"--output", "json"}, args...))
	err := c.Execute()
	var d document
	if out.Len() > 0 {
		if jerr := json.Unmarshal(out.Bytes(), &d); jerr != nil {
			t.Fatal(jerr)
		}
	}
	return d, err
}

func file(t *testing.T, name string, v any) string {
	t.Helper()
	return (&guest{dir: t.TempDir()}).write(t, name, v)
}

// request is a made attest request, with the report data that its runtime-data
// gives.
func request(t *testing.T, additional string) (kbs.AttestRequest, [kbs.ReportDataSize]byte) {
	t.Helper()
	r := kbs.AttestRequest{RuntimeData: kbs.RuntimeData{Nonce: "bm9uY2U="}}
	var err error
	if r.RuntimeData.TEEPubKey, err = kbs.NewTEEPubKey(&tdxtest.NewKey(t).PublicKey); err != nil {
		t.Fatal(err)
	}
	r.TEEEvidence.AdditionalEvidence = additional
	rd, err := kbs.ReportData(additional, r.RuntimeData.Nonce, r.RuntimeData.TEEPubKey)
	if err != nil {
		t.Fatal(err)
	}
	return r, rd
}

// On plain SNP only report_data covers the log. In a whole attest request it
// is recomputed from the log; without runtime-data the log proves nothing, even
// beside report data that a caller knows.
func TestSNPLogCountsOnlyUnderItsReportData(t *testing.T) {
	chain := snptest.New(t, snptest.Config{})
	o := options{amd: chain.Roots()}
	g := launch(t) // for a log that replays
	additional, err := (kbs.AdditionalCVMAgent{EventLog: g.log}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	r, rd := request(t, additional)
	r.TEEEvidence.PrimaryEvidence = chain.Evidence(t, rd, snptest.Options{})
	lists := chain.Collateral(t).Dir
	args := []string{"--format", "kbs", "--tee", "snp", "--collateral", lists}

	d, err := o.runs(t, append(args, "--in", file(t, "request.json", r))...)
	if err != nil || d.Facts.Log == nil || d.Facts.Log.Running.Policy != "shop" || d.Verdict.Outcome(appraisal.CheckSNPRevocation) != appraisal.Passed {
		t.Fatalf("a whole request: %v, %+v", err, d.Facts)
	}
	changed := r
	changed.TEEEvidence.AdditionalEvidence = strings.Replace(additional, "{", "{ ", 1)
	if _, err := o.runs(t, append(args, "--in", file(t, "request.json", changed))...); cause.Of(err) != cause.EvidenceRefused || !strings.Contains(err.Error(), "report-data:") {
		t.Errorf("another additional evidence: %v", err)
	}
	d, err = o.runs(t, append(args, "--in", file(t, "composite.json", r.TEEEvidence), "--report-data", hex.EncodeToString(rd[:]))...)
	if err != nil || d.Facts.Log != nil || d.Verdict.Outcome(appraisal.CheckEventLog) != appraisal.NotChecked {
		t.Errorf("without runtime-data: %v, the log is a fact: %t", err, d.Facts != nil && d.Facts.Log != nil)
	}
	// Nor does a rule that names a policy take it.
	rule := file(t, "rule.yaml", []byte("apiVersion: cvm-agent.release-rule/v1\nplatforms: [snp]\nanyLaunch: true\npolicy: {names: [shop], signers: ["+strings.Repeat("a", 64)+"]}\n"))
	if _, err = o.runs(t, append(args, "--in", file(t, "composite.json", r.TEEEvidence), "--report-data", hex.EncodeToString(rd[:]), "--rules", rule)...); cause.Of(err) != cause.EvidenceRefused {
		t.Errorf("a rule took a log that nothing covers: %v", err)
	}
}

// The certificates of --certs stand in for those that the evidence lacks, in
// every form that they come in.
func TestSNPCertificatesFromFiles(t *testing.T) {
	chain := snptest.New(t, snptest.Config{})
	o := options{amd: chain.Roots()}
	crl := chain.CRL(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	dir := t.TempDir()
	for name, data := range map[string][]byte{"vcek.der": chain.Signer.Vcek.Raw, "ask.cer": chain.Signer.Ask.Raw, "list.crl": crl} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var rd [64]byte
	raw := file(t, "report.bin", chain.Report(t, rd, snptest.Options{}))
	if d, err := o.runs(t, "--format", "snp", "--in", raw, "--certs", dir); err != nil || !d.Facts.SNP.NotRevoked {
		t.Errorf("raw: %v", err)
	}
	wire := file(t, "evidence.json", chain.Evidence(t, [48]byte{}, snptest.Options{NoCerts: true}))
	if d, err := o.runs(t, "--format", "kbs", "--tee", "snp", "--in", wire, "--certs", dir); err != nil || !d.Facts.SNP.NotRevoked {
		t.Errorf("wire: %v", err)
	}
	if _, err := o.runs(t, "--format", "kbs", "--tee", "snp", "--in", wire); cause.Of(err) != cause.EvidenceRefused || !strings.Contains(err.Error(), "--certs") {
		t.Errorf("without certificates: %v", err)
	}
	revoked := chain.CRL(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), chain.Signer.Ask.SerialNumber)
	if err := os.WriteFile(filepath.Join(dir, "list.crl"), revoked, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := o.runs(t, "--format", "snp", "--in", raw, "--certs", dir, "--allow-missing", "revocation"); cause.Of(err) != cause.EvidenceRefused || !strings.Contains(err.Error(), "revocation:") {
		t.Errorf("a revoked chain: %v", err)
	}
}

// TDX with Intel's collateral in a directory: accepted, and refused the day
// after the collateral's last.
func TestTDXWithCollateral(t *testing.T) {
	p := tdxtest.New(t, tdxtest.Config{})
	o := options{intelRoots: p.Roots()}
	report := tdxtest.Report{MRTD: [48]byte{1}, RTMR: [4][48]byte{{2}, {3}, {4}}}
	quote := file(t, "quote.bin", p.Quote(t, report))
	d, err := o.runs(t, "--format", "tdx", "--in", quote, "--certs", p.Source(t).Dir)
	if err != nil || d.Facts.TDX.TCBStatus != "UpToDate" || !d.Facts.TDX.NotRevoked {
		t.Fatalf("%v: %+v", err, d)
	}
	later := time.Now().AddDate(1, 0, 0).Format(time.RFC3339)
	if _, err := o.runs(t, "--format", "tdx", "--in", quote, "--collateral", p.Source(t).Dir, "--time", later); cause.Of(err) != cause.EvidenceRefused {
		t.Errorf("a year later: %v", err)
	}
	wire := file(t, "evidence.json", kbs.TDXEvidence{Quote: p.Quote(t, report)})
	if _, err := o.runs(t, "--format", "kbs", "--tee", "tdx", "--in", wire, "--collateral", p.Source(t).Dir); err != nil {
		t.Errorf("the wire's form: %v", err)
	}
	if _, err := o.runs(t, "--format", "tdx", "--in", quote, "--collateral", p.Source(t).Dir, "--initdata", file(t, "initdata.toml", launch(t).initdata)); cause.Of(err) != cause.EvidenceRefused || !strings.Contains(err.Error(), "launch-binding:") {
		t.Errorf("initdata that a zero MRCONFIGID does not hold: %v", err)
	}
}

// A whole request of a TD under dialect cvm-agent/1: the log replays to RTMR3,
// the initdata is in MRCONFIGID, the instance is named by its own key.
func TestTDXRequest(t *testing.T) {
	p := tdxtest.New(t, tdxtest.Config{})
	o := options{intelRoots: p.Roots()}
	g := launch(t)
	replayed, err := eventlog.Replay(g.log)
	if err != nil {
		t.Fatal(err)
	}
	r := kbs.AttestRequest{InitData: &kbs.InitData{Format: "toml", Body: string(g.initdata)}}
	additional := kbs.AdditionalCVMAgent{EventLog: g.log, Instance: tdxtest.InstanceJWS(t, tdxtest.NewKey(t), "bm9uY2U=")}
	text, err := additional.Encode()
	if err != nil {
		t.Fatal(err)
	}
	made, rd := request(t, text)
	r.RuntimeData, r.TEEEvidence = made.RuntimeData, made.TEEEvidence
	report := tdxtest.Report{MRTD: [48]byte{1}, RTMR: [4][48]byte{{2}, {3}, {4}, replayed.SHA384}}
	copy(report.ReportData[:], rd[:])
	in, err := policy.ParseInitdata(g.initdata)
	if err != nil {
		t.Fatal(err)
	}
	copy(report.MRConfigID[:], in.Digest())
	evidence := func(report tdxtest.Report) string {
		primary, err := json.Marshal(kbs.TDXEvidence{Quote: p.Quote(t, report)})
		if err != nil {
			t.Fatal(err)
		}
		r.TEEEvidence.PrimaryEvidence = primary
		return file(t, "request.json", r)
	}
	args := []string{"--format", "kbs", "--tee", "tdx", "--collateral", p.Source(t).Dir, "--in"}
	d, err := o.runs(t, append(args, evidence(report))...)
	if err != nil || !strings.HasPrefix(d.Facts.Identity, "key:") || d.Facts.Log.Register != "RTMR3" || d.Verdict.Outcome(appraisal.CheckLaunch) != appraisal.Passed {
		t.Fatalf("%v: %+v", err, d.Facts)
	}
	for what, c := range map[string]struct {
		change func(*tdxtest.Report)
		row    string
	}{
		"another RTMR3":     {func(r *tdxtest.Report) { r.RTMR[3][0] ^= 1 }, appraisal.CheckEventLog},
		"another initdata":  {func(r *tdxtest.Report) { r.MRConfigID[0] ^= 1 }, appraisal.CheckLaunch},
		"a zero MRCONFIGID": {func(r *tdxtest.Report) { r.MRConfigID = [48]byte{} }, appraisal.CheckLaunch},
		"other report data": {func(r *tdxtest.Report) { r.ReportData[0] ^= 1 }, appraisal.CheckReportData},
		"a debuggable TD":   {func(r *tdxtest.Report) { r.Attributes = 1<<28 | 1 }, appraisal.CheckTDXDebug},
	} {
		changed := report
		c.change(&changed)
		if _, err := o.runs(t, append(args, evidence(changed))...); cause.Of(err) != cause.EvidenceRefused || !strings.Contains(err.Error(), c.row+":") {
			t.Errorf("%s: %v, expected a refusal by %s", what, err, c.row)
		}
	}
}

// Azure's two forms in whole attest requests.
func TestAzureRequests(t *testing.T) {
	chain, platform := snptest.New(t, snptest.Config{}), tdxtest.New(t, tdxtest.Config{})
	o := options{amd: chain.Roots(), intelRoots: platform.Roots()}
	for tee, c := range map[string]struct {
		primary func(rd [kbs.ReportDataSize]byte) json.RawMessage
		dir     string
	}{
		"az-snp-vtpm": {func(rd [kbs.ReportDataSize]byte) json.RawMessage {
			return chain.AzureEvidence(t, rd, snptest.AzureOptions{})
		}, chain.Collateral(t).Dir},
		"az-tdx-vtpm": {func(rd [kbs.ReportDataSize]byte) json.RawMessage {
			return platform.AzureEvidence(t, rd, tdxtest.Report{MRTD: [48]byte{1}, RTMR: [4][48]byte{{2}, {3}, {4}}}, snptest.AzureOptions{})
		}, platform.Source(t).Dir},
	} {
		r, rd := request(t, "")
		r.TEEEvidence.PrimaryEvidence = c.primary(rd)
		args := []string{"--format", "kbs", "--tee", tee, "--collateral", c.dir}
		d, err := o.runs(t, append(args, "--in", file(t, "request.json", r))...)
		if err != nil || d.Verdict.Outcome(appraisal.CheckReportData) != appraisal.Passed || !strings.HasPrefix(d.Facts.Identity, "az-ak:") {
			t.Errorf("%s: %v", tee, err)
		}
		r.RuntimeData.Nonce = "b3RoZXI="
		if _, err = o.runs(t, append(args, "--in", file(t, "request.json", r))...); cause.Of(err) != cause.EvidenceRefused || !strings.Contains(err.Error(), "report-data:") {
			t.Errorf("%s, another nonce: %v", tee, err)
		}
	}
}

// A vTPM's AK that no list names counts by its certificate, which the auth
// request had: the bundle carries it beside the attest request's members.
func TestAKCertificate(t *testing.T) {
	g := launch(t)
	key, err := x509.ParsePKIXPublicKey(g.tpm.AKSPKI)
	if err != nil {
		t.Fatal(err)
	}
	issuer := tdxtest.NewKey(t)
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "AK root"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: root.NotAfter, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 3}}}
	ca, err := x509.CreateCertificate(rand.Reader, root, root, issuer.Public(), issuer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.CreateCertificate(rand.Reader, leaf, root, key, issuer)
	if err != nil {
		t.Fatal(err)
	}
	r, _ := g.request(t)
	bundle := func(auth any) string {
		return file(t, "bundle.json", map[string]any{"init-data": r.InitData, "runtime-data": r.RuntimeData, "tee-evidence": r.TEEEvidence, "cvm-agent": auth})
	}
	good := bundle(kbs.CVMAgentAuth{Version: kbs.Dialect, AKPublic: g.tpm.AKPublic, AKCert: cert})
	roots := "mine=" + file(t, "ak.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca}))
	d, err := evidenceOf(t, "--format", "tpm", "--in", good, "--ak-roots", roots)
	if err != nil || d.Verdict.Outcome(appraisal.CheckAKCert) != appraisal.Passed || d.Facts.Dialect != kbs.Dialect || !slices.Equal(d.Facts.EKRoots, []string{"mine"}) {
		t.Fatalf("%v: %+v", err, d.Facts)
	}
	for what, c := range map[string]struct {
		in   string
		args []string
		row  string
	}{
		"no roots":           {good, nil, appraisal.CheckAKCert},
		"after its last day": {good, []string{"--ak-roots", roots, "--time", time.Now().AddDate(1, 0, 0).Format(time.RFC3339)}, appraisal.CheckAKCert},
		"no certificate":     {bundle(kbs.CVMAgentAuth{Version: kbs.Dialect, AKPublic: g.tpm.AKPublic, EKCert: g.tpm.EKCert}), []string{"--ak-roots", roots}, appraisal.CheckAKBound},
		"another AK's":       {bundle(kbs.CVMAgentAuth{Version: kbs.Dialect, AKPublic: launch(t).tpm.AKPublic, AKCert: cert}), []string{"--ak-roots", roots}, appraisal.CheckAKSame},
	} {
		if _, err := evidenceOf(t, append([]string{"--format", "tpm", "--in", c.in}, c.args...)...); cause.Of(err) != cause.EvidenceRefused || !strings.Contains(err.Error(), c.row+":") {
			t.Errorf("%s: %v, expected a refusal by %s", what, err, c.row)
		}
	}
	if _, err := evidenceOf(t, "--format", "tpm", "--in", bundle(map[string]any{"version": "2"})); cause.Of(err) != cause.EvidenceMalformed {
		t.Errorf("another dialect: %v", err)
	}
}

// One flipped bit anywhere in what AMD's key signed, or in its signature, is a
// refusal, and every truncation is malformed.
func TestSNPVectorEveryByte(t *testing.T) {
	raw := vector(t, "snp-report-v2.bin")
	dir := t.TempDir()
	path := filepath.Join(dir, "report")
	verify := func(b []byte) error {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := evidenceOf(t, "--format", "snp", "--in", path, "--certs", "testdata/vectors/snp-report-v2-vcek.der", "--time", "2026-06-01T00:00:00Z", "--allow-missing", "revocation")
		return err
	}
	if err := verify(raw); err != nil {
		t.Fatal(err)
	}
	signature := []int{kbs.SNPSignedSize, kbs.SNPSignedSize + 47, kbs.SNPSignedSize + 72, kbs.SNPSignedSize + 72 + 47, kbs.SNPSignedSize + 48, kbs.SNPReportSize - 1}
	for at := range kbs.SNPReportSize {
		if at >= kbs.SNPSignedSize && !slices.Contains(signature, at) {
			continue
		}
		b := bytes.Clone(raw)
		b[at] ^= 1
		if err := verify(b); cause.Exit(err) != cause.ExitRefused {
			t.Errorf("byte %#x: %v", at, err)
		}
	}
	for n := 0; n < len(raw); n += 37 {
		if err := verify(raw[:n]); cause.Exit(err) != cause.ExitMalformed {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// --rules takes reference values as they are written and as they are signed.
func TestReferenceValues(t *testing.T) {
	chain := snptest.New(t, snptest.Config{})
	o := options{amd: chain.Roots()}
	measurement := strings.Repeat("4d", 48)
	text := "apiVersion: " + release.ReferenceAPIVersion + "\nname: shop\nversion: 3\nexpires: '" + time.Now().Add(time.Hour).UTC().Format(time.RFC3339) + `'
launch: [{label: one, platform: snp, snp: {measurement: '` + measurement + `'}}]
tcb: {snp: {minimum: {Milan: {bootloader: 4, tee: 0, snp: 24, microcode: 219}}}}
resources:
- {resource: ['kbs:///shop/key/web'], platforms: [snp], anyPolicy: true}
`
	raw := file(t, "report.bin", chain.Report(t, [64]byte{}, snptest.Options{}))
	certs := file(t, "vcek.der", chain.Signer.Vcek.Raw)
	run := func(t *testing.T, more ...string) (document, error) {
		return o.runs(t, append([]string{"--format", "snp", "--in", raw, "--certs", certs, "--collateral", chain.Collateral(t).Dir}, more...)...)
	}
	if d, err := run(t, "--rules", file(t, "rules.yaml", []byte(text))); err != nil {
		t.Fatalf("%v: %+v", err, d.Verdict)
	}
	ref, err := release.DecodeReferenceYAML([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	signer, other := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519")
	envelope, err := release.SignReference(ref, []dsse.Signer{signer}...)
	if err != nil {
		t.Fatal(err)
	}
	signed := file(t, "rules.dsse.json", envelope)
	key, otherKey := file(t, "key.pub", []byte(signer.PEM)), file(t, "other.pub", []byte(other.PEM))
	two := strings.Replace(text, "['kbs:///shop/key/web']", "['kbs:///shop/key/web', 'kbs:///shop/key/db']", 1)
	for what, c := range map[string]struct {
		args []string
		want cause.Code // "": accepted
		text string
	}{
		"signed":                    {[]string{"--rules", signed, "--rules-key", key}, "", ""},
		"signed, by its resource":   {[]string{"--rules", signed, "--rules-key", key, "--resource", "kbs:///shop/key/web"}, "", ""},
		"signed by somebody else":   {[]string{"--rules", signed, "--rules-key", otherKey}, cause.PolicySignature, ""},
		"signed, by too few":        {[]string{"--rules", signed, "--rules-key", key, "--rules-key", otherKey, "--rules-threshold", "2"}, cause.PolicySignature, ""},
		"signed, without a key":     {[]string{"--rules", signed}, cause.Usage, "--rules-key"},
		"a threshold of too many":   {[]string{"--rules", signed, "--rules-key", key, "--rules-threshold", "2"}, cause.Usage, "--rules-threshold"},
		"a key and no signature":    {[]string{"--rules", file(t, "r.yaml", []byte(text)), "--rules-key", key}, cause.Usage, "is not signed"},
		"a key and no rules":        {[]string{"--rules-key", key}, cause.Usage, "need --rules"},
		"another resource":          {[]string{"--rules", signed, "--rules-key", key, "--resource", "kbs:///shop/key/db"}, cause.Usage, "does not name"},
		"two, and neither is meant": {[]string{"--rules", file(t, "r.yaml", []byte(two))}, cause.Usage, "kbs:///shop/key/db, kbs:///shop/key/web"},
		"two, and one is meant":     {[]string{"--rules", file(t, "r.yaml", []byte(two)), "--resource", "kbs:///shop/key/db"}, "", ""},
		"another measurement":       {[]string{"--rules", file(t, "r.yaml", []byte(strings.Replace(text, "4d", "4e", 1)))}, cause.EvidenceRefused, ""},
		"a higher TCB":              {[]string{"--rules", file(t, "r.yaml", []byte(strings.Replace(text, "219", "220", 1)))}, cause.EvidenceRefused, ""},
		"expired":                   {[]string{"--rules", signed, "--rules-key", key, "--time", time.Now().Add(2 * time.Hour).Format(time.RFC3339)}, cause.PolicyExpired, ""},
		"an unknown field":          {[]string{"--rules", file(t, "r.yaml", []byte(text+"more: 1\n"))}, cause.Config, "more"},
	} {
		t.Run(what, func(t *testing.T) {
			d, err := run(t, c.args...)
			if cause.Of(err) != c.want || (err != nil && !strings.Contains(err.Error(), c.text)) || d.Accepted != (c.want == "") {
				t.Fatalf("%v, expected %q %s", err, c.want, c.text)
			}
		})
	}
}
