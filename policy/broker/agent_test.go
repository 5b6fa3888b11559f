package broker

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
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

// launched is a guest that was launched with a signed policy.
type launched struct {
	tpm      *tpmtest.TPM
	ca       *tpmtest.CA
	signer   *dssetest.Key
	initdata []byte
	digest   string
	log      *eventlog.Log
}

var (
	imageOne = "sha256:" + strings.Repeat("1", 64)
	imageTwo = "sha256:" + strings.Repeat("2", 64)
)

func signedInitdata(t *testing.T, signer *dssetest.Key, version uint64, expires time.Time) (initdata []byte, digest string) {
	t.Helper()
	p := &policy.Policy{
		APIVersion: policy.APIVersion, Name: "shop", Version: version,
		Expires:   expires.UTC().Format(time.RFC3339),
		Platforms: []policy.Platform{policy.PlatformTPM},
		Workloads: []policy.Workload{{
			Name: "web", Image: "registry.example/shop@" + imageOne, Encryption: "optional",
			Signatures: policy.Signatures{Required: []policy.Signer{{Key: signer.PEM}}},
			SBOM:       policy.SBOM{Required: false},
		}},
	}
	envelope, err := policy.Sign(p, signer)
	if err != nil {
		t.Fatal(err)
	}
	initdata, err = policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: signer.PEM})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := p.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	return initdata, policy.Digest(payload)
}

func launch(t *testing.T) *launched {
	t.Helper()
	ca := tpmtest.NewCA(t)
	l := &launched{ca: ca, tpm: tpmtest.Start(t, ca, tpmtest.ECC), signer: dssetest.New(t, "ecdsa")}
	l.initdata, l.digest = signedInitdata(t, l.signer, 2, time.Now().Add(time.Hour))
	in, err := policy.ParseInitdata(l.initdata)
	if err != nil {
		t.Fatal(err)
	}
	l.tpm.Extend(8, in.Digest())
	if l.log, err = eventlog.Open(context.Background(), t.TempDir(), pcr14{l.tpm}); err != nil {
		t.Fatal(err)
	}
	l.event(t, eventlog.Event{Kind: eventlog.KindPolicy, Policy: "shop", PolicyVersion: 2, PolicyDigest: l.digest, Signers: []string{l.signer.Fingerprint}})
	l.event(t, eventlog.Event{Kind: eventlog.KindImage, Workload: "web", Image: "registry.example/shop@" + imageOne})
	return l
}

func (l *launched) event(t *testing.T, e eventlog.Event) {
	t.Helper()
	if err := l.log.Append(context.Background(), e); err != nil {
		t.Fatal(err)
	}
}

// begin opens a session in dialect cvm-agent/1 and returns what posts evidence
// for it.
func (l *launched) begin(t *testing.T, r *running) (post func() (int, string), g *guest) {
	t.Helper()
	return l.prepare(t, r, nil)
}

// attest runs dialect cvm-agent/1 with handwritten JSON. change may tamper with
// what is sent after everything was quoted.
func (l *launched) attest(t *testing.T, r *running, change func(initdata *string, additional map[string]string)) (*guest, int, string) {
	t.Helper()
	post, g := l.prepare(t, r, change)
	status, body := post()
	return g, status, body
}

func (l *launched) prepare(t *testing.T, r *running, change func(initdata *string, additional map[string]string)) (func() (int, string), *guest) {
	t.Helper()
	b64 := base64.StdEncoding.EncodeToString
	g, challenge := r.newGuest(t, elliptic.P256(), fmt.Sprintf(`{"supported-hash-algorithms":["sha384"],"cvm-agent":{"version":"cvm-agent/1","ek_cert":%q,"ak_public":%q}}`,
		b64(l.tpm.EKCert), b64(l.tpm.AKPublic)))
	c := challenge["extra-params"].(map[string]any)["cvm-agent"].(map[string]any)
	blob, err1 := base64.StdEncoding.DecodeString(c["credential_blob"].(string))
	enc, err2 := base64.StdEncoding.DecodeString(c["secret"].(string))
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	secret, err := l.tpm.Activate(&kbs.CVMAgentChallenge{CredentialBlob: blob, Secret: enc})
	if err != nil {
		t.Fatal(err)
	}
	initdata := string(l.initdata)
	members := map[string]string{"cvm-agent-eventlog": b64(l.log.Bytes()), "cvm-agent-activation": b64(secret)}
	if change != nil {
		change(&initdata, members)
	}
	additional, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	ev := string(tpmtest.JSON(t, l.tpm.Evidence(g.reportData(t, string(additional)), 0, 2, 4, 7, 8, 9, 11, 12, 13, 14)))
	init := "null"
	if initdata != "" {
		b, err := json.Marshal(initdata)
		if err != nil {
			t.Fatal(err)
		}
		init = `{"format":"toml","body":` + string(b) + `}`
	}
	return func() (int, string) { return g.attest(t, init, ev, string(additional)) }, g
}

func (l *launched) rule() release.Rule {
	return release.Rule{
		APIVersion: release.RuleAPIVersion, Platforms: []string{"tpm"}, EKRoots: []string{"demo"},
		Policy: &release.PolicyRule{Names: []string{"shop"}, Signers: []string{l.signer.Fingerprint}, MinimumVersion: 2},
		Images: []string{imageOne},
		PCRs:   map[string][]string{"12": {strings.Repeat("0", 64)}},
	}
}

// get asks for the resource of the tests.
func (g *guest) get(t *testing.T) (int, string) {
	t.Helper()
	status, body, _ := g.r.call(t, "GET", "/kbs/v0/resource/shop/key/web", g.cookie, "", "")
	return status, body
}

const webKey = "kbs:///shop/key/web"

// A guest that was launched with the rule's policy gets the key of its image,
// with a token that names the policy; each condition changed alone refuses.
func TestAgentDialectEndToEnd(t *testing.T) {
	l := launch(t)
	r := start(t, l.ca.RootsPEM(t), nil)
	ctx := context.Background()
	key := []byte("the key of the web image, 32 b..")
	if err := r.admin.PutResource(ctx, webKey, key); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.PutRule(ctx, webKey, l.rule()); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.SetMark(ctx, "shop", adminclient.Mark{Version: 2, Signers: []string{l.signer.Fingerprint}}); err != nil {
		t.Fatal(err)
	}
	g, status, body := l.attest(t, r, nil)
	if status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	claims := agentClaims(t, r, g.token)
	if claims.PolicyName != "shop" || claims.VersionMark != 2 || len(claims.Signers) != 1 || len(claims.InstanceID) != 32 || claims.Tombstone {
		t.Errorf("claims: %+v", claims)
	}
	if status, body = g.get(t); status != 200 || !bytes.Equal(g.open(t, body), key) {
		t.Fatalf("release: %d %s", status, body)
	}
	again, status, body := l.attest(t, r, nil)
	if status != 200 {
		t.Fatalf("attest again: %d %s", status, body)
	}
	if agentClaims(t, r, again.token).InstanceID != claims.InstanceID {
		t.Error("the same AK got another instance id")
	}

	for what, c := range map[string]struct {
		check  string
		change func(r *release.Rule)
	}{
		"another platform":  {appraisal.CheckPlatform, func(r *release.Rule) { r.Platforms, r.AnyLaunch = []string{"snp"}, true }},
		"another root set":  {appraisal.CheckEKRoots, func(r *release.Rule) { r.EKRoots = []string{"other"} }},
		"another policy":    {appraisal.CheckLaunchPolicy, func(r *release.Rule) { r.Policy.Names = []string{"bank"} }},
		"another signer":    {appraisal.CheckLaunchPolicy, func(r *release.Rule) { r.Policy.Signers = []string{strings.Repeat("a", 64)} }},
		"a higher version":  {appraisal.CheckPolicyVersion, func(r *release.Rule) { r.Policy.MinimumVersion = 3 }},
		"another image":     {appraisal.CheckImage, func(r *release.Rule) { r.Images = []string{imageTwo} }},
		"another PCR value": {"pcr-12", func(r *release.Rule) { r.PCRs["12"] = []string{strings.Repeat("1", 64)} }},
		"a PCR not quoted":  {"pcr-5", func(r *release.Rule) { r.PCRs["5"] = []string{strings.Repeat("0", 64)} }},
	} {
		rule := l.rule()
		c.change(&rule)
		if err := r.admin.PutRule(ctx, webKey, rule); err != nil {
			t.Fatal(err)
		}
		if status, body := g.get(t); status != 401 || variant(t, status, body) != "PolicyDeny" || !strings.Contains(body, c.check+":") {
			t.Errorf("%s: %d %s", what, status, body)
		}
	}
	if err := r.admin.PutRule(ctx, webKey, l.rule()); err != nil {
		t.Fatal(err)
	}

	// An upgrade: the staged set gets its keys while the old one runs.
	two := l.rule()
	two.Images, two.Policy.MinimumVersion = []string{imageTwo}, 3
	l.event(t, eventlog.Event{Kind: eventlog.KindPolicyStaged, Policy: "shop", PolicyVersion: 3, PolicyDigest: "sha256:" + strings.Repeat("3", 64), Signers: []string{l.signer.Fingerprint}})
	l.event(t, eventlog.Event{Kind: eventlog.KindImageStaged, Workload: "web", Image: "registry.example/shop@" + imageTwo})
	if err := r.admin.PutRule(ctx, webKey, two); err != nil {
		t.Fatal(err)
	}
	if status, body := g.get(t); status != 401 || variant(t, status, body) != "PolicyDeny" {
		t.Errorf("a session older than the staging got the staged key: %d %s", status, body)
	}
	staged, status, body := l.attest(t, r, nil)
	if status != 200 {
		t.Fatalf("attest staged: %d %s", status, body)
	}
	if status, body = staged.get(t); status != 200 {
		t.Errorf("staged: %d %s", status, body)
	}
	if got := agentClaims(t, r, staged.token).PolicyName; got != "shop" {
		t.Errorf("policy name %q", got)
	}

	// The broker's mark is a floor for what runs, even where the rule has none.
	if err := r.admin.PutRule(ctx, webKey, l.rule()); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.SetMark(ctx, "shop", adminclient.Mark{Version: 3}); err != nil {
		t.Fatal(err)
	}
	if status, body := g.get(t); status != 401 || !strings.Contains(body, "at least 3") {
		t.Errorf("below the mark: %d %s", status, body)
	}
	r.stop()
	checkAudit(t, r, string(key))
}

func tokenClaims(t *testing.T, r *running, token string) *kbs.TokenClaims {
	t.Helper()
	pub, err := os.ReadFile(filepath.Join(r.dir, FileTokenPub))
	if err != nil {
		t.Fatal(err)
	}
	jws, err := jose.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := jws.Verify(parsePublic(t, pub))
	if err != nil {
		t.Fatal(err)
	}
	c, err := kbs.DecodeTokenClaims(payload)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func agentClaims(t *testing.T, r *running, token string) *kbs.CVMAgentClaims {
	t.Helper()
	c := tokenClaims(t, r, token)
	if c.CVMAgent == nil {
		t.Fatal("no cvm-agent claim")
	}
	return c.CVMAgent
}

// What the agent quotes over is fresh and its own, but says something else
// than the registers: refused, by the check that is about it.
func TestAgentEvidenceRefused(t *testing.T) {
	l := launch(t)
	r := start(t, l.ca.RootsPEM(t), nil)
	other, _ := signedInitdata(t, l.signer, 3, time.Now().Add(time.Hour))
	b64 := base64.StdEncoding
	for what, c := range map[string]struct {
		check  string
		change func(initdata *string, m map[string]string)
	}{
		"no log":          {appraisal.CheckEventLog, func(_ *string, m map[string]string) { delete(m, "cvm-agent-eventlog") }},
		"an empty log":    {appraisal.CheckEventLog, func(_ *string, m map[string]string) { m["cvm-agent-eventlog"] = "" }},
		"a log cut short": {appraisal.CheckEventLog, func(_ *string, m map[string]string) { m["cvm-agent-eventlog"] = cut(t, m["cvm-agent-eventlog"]) }},
		"a changed event": {appraisal.CheckEventLog, func(_ *string, m map[string]string) {
			m["cvm-agent-eventlog"] = b64.EncodeToString(bytes.Replace(l.log.Bytes(), []byte("shop"), []byte("shoq"), 1))
		}},
		"no activation":       {appraisal.CheckActivation, func(_ *string, m map[string]string) { delete(m, "cvm-agent-activation") }},
		"a guessed secret":    {appraisal.CheckActivation, func(_ *string, m map[string]string) { m["cvm-agent-activation"] = b64.EncodeToString(make([]byte, 32)) }},
		"other initdata":      {appraisal.CheckLaunch, func(i *string, _ map[string]string) { *i = string(other) }},
		"initdata with space": {appraisal.CheckLaunch, func(i *string, _ map[string]string) { *i += "\n" }},
	} {
		_, status, body := l.attest(t, r, c.change)
		if status != 401 || variant(t, status, body) != "AttestationError" || !strings.Contains(body, c.check+":") {
			t.Errorf("%s: %d %s", what, status, body)
		}
	}
	// A register that somebody else extended: the log no longer replays.
	l.tpm.Extend(14, make([]byte, 32))
	if _, status, body := l.attest(t, r, nil); status != 401 || !strings.Contains(body, appraisal.CheckEventLog+":") {
		t.Errorf("a foreign extend: %d %s", status, body)
	}
	// An EK by an issuer that is not configured.
	stranger := start(t, tpmtestRoots(t), nil)
	if _, status, body := l.attest(t, stranger, nil); status != 401 || !strings.Contains(body, appraisal.CheckEKChain+":") {
		t.Errorf("another issuer: %d %s", status, body)
	}
}

// Lesson 25: an old configuration that was once allowed stays refused after the
// mark was raised and the broker restarted; initdata left out is no way round.
func TestLesson25_OldVersionAfterRestart(t *testing.T) {
	l := launch(t)
	r := start(t, l.ca.RootsPEM(t), nil)
	ctx := context.Background()
	rule := l.rule()
	rule.Policy.MinimumVersion = 0
	for _, err := range []error{
		r.admin.PutResource(ctx, webKey, []byte("k")),
		r.admin.PutRule(ctx, webKey, rule),
		r.admin.SetMark(ctx, "shop", adminclient.Mark{Version: 3}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r.stop()
	r = run(t, r.dir, nil)
	g, status, body := l.attest(t, r, nil)
	if status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	if status, body = g.get(t); status != 401 || !strings.Contains(body, appraisal.CheckPolicyVersion+":") {
		t.Errorf("an old version: %d %s", status, body)
	}
	g, status, body = l.attest(t, r, func(i *string, _ map[string]string) { *i = "" })
	if status != 200 {
		t.Fatalf("attest without initdata: %d %s", status, body)
	}
	if status, body = g.get(t); status != 401 || !strings.Contains(body, appraisal.CheckLaunch+":") {
		t.Errorf("initdata left out: %d %s", status, body)
	}
}

func cut(t *testing.T, text string) string {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(b[:len(b)-1])
}

// tpmtestRoots are the roots of a CA that issued nothing to the test's TPM.
func tpmtestRoots(t *testing.T) []byte {
	t.Helper()
	ca := tpmtest.NewCA(t)
	tpmtest.Start(t, ca, tpmtest.ECC)
	return ca.RootsPEM(t)
}
