package broker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// running is a broker that was made by Init and runs by Run.
type running struct {
	dir, url string
	ca       []byte
	admin    *adminclient.Client
	http     *http.Client
	logs     *lockedBuffer
	stop     func() // graceful, and waits
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start makes a broker directory, changes its configuration, and runs it.
func start(t *testing.T, roots []byte, change func(c *Config)) *running {
	t.Helper()
	dir := t.TempDir()
	rootFile := filepath.Join(t.TempDir(), "ek.pem")
	o := InitOptions{Dir: dir, Hosts: []string{"127.0.0.1", "localhost"}, Listen: "127.0.0.1:0", Now: time.Now()}
	if roots != nil {
		if err := os.WriteFile(rootFile, roots, 0o600); err != nil {
			t.Fatal(err)
		}
		o.EKRoots = []RootConfig{{Name: "demo", Paths: []string{rootFile}}}
	}
	if err := Init(o); err != nil {
		t.Fatal(err)
	}
	return run(t, dir, change)
}

// run runs the broker of a directory.
func run(t *testing.T, dir string, change func(c *Config)) *running {
	t.Helper()
	c, err := LoadConfig(filepath.Join(dir, FileConfig))
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(c)
	}
	ctx, cancel := context.WithCancel(context.Background())
	logs := &lockedBuffer{}
	out, in := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, c, "", slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug})), in)
		in.CloseWithError(io.EOF)
	}()
	var line string
	if _, err := fmt.Fscanf(out, "listening on %s\n", &line); err != nil {
		t.Fatalf("no address: %v, %v", err, <-done)
	}
	r := &running{dir: dir, url: line, logs: logs}
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	t.Cleanup(r.stop)
	if r.ca, err = os.ReadFile(filepath.Join(dir, FileCA)); err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(filepath.Join(dir, FileAdminToken))
	if err != nil {
		t.Fatal(err)
	}
	if r.admin, err = adminclient.New(r.url, r.ca, string(token)); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(r.ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(transport.CloseIdleConnections)
	r.http = &http.Client{Transport: transport, Timeout: 20 * time.Second}
	return r
}

// call sends a request with an optional cookie and returns status, body and
// the Set-Cookie header.
func (r *running) call(t *testing.T, method, path, cookie, bearer, body string) (int, string, string) {
	t.Helper()
	req, err := http.NewRequest(method, r.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if cookie != "" {
		req.Header.Set("Cookie", cookie)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := r.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), resp.Header.Get("Set-Cookie")
}

// guest plays Trustee's guest client with handwritten JSON.
type guest struct {
	r      *running
	cookie string
	nonce  string
	key    *ecdsa.PrivateKey
	jwk    string
	token  string
}

func (r *running) newGuest(t *testing.T, curve elliptic.Curve, extra string) (*guest, map[string]any) {
	t.Helper()
	g := &guest{r: r}
	status, body, cookie := r.call(t, "POST", "/kbs/v0/auth", "", "", `{"version":"0.4.0","tee":"tpm","extra-params":`+extra+`}`)
	if status != 200 {
		t.Fatalf("auth: %d %s", status, body)
	}
	name, value, _ := strings.Cut(cookie, "=")
	if name != "kbs-session-id" || len(value) != 32 || strings.ContainsAny(cookie, "; ") {
		t.Fatalf("Set-Cookie: %s", cookie)
	}
	g.cookie = cookie
	var challenge map[string]any
	if err := json.Unmarshal([]byte(body), &challenge); err != nil {
		t.Fatal(err)
	}
	g.nonce = challenge["nonce"].(string)
	var err error
	if g.key, err = ecdsa.GenerateKey(curve, rand.Reader); err != nil {
		t.Fatal(err)
	}
	j, err := kbs.NewTEEPubKey(&g.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	g.jwk = fmt.Sprintf(`{"kty":"EC","crv":%q,"alg":"ECDH-ES+A256KW","x":%q,"y":%q}`, j.Crv, j.X, j.Y)
	return g, challenge
}

func (g *guest) reportData(t *testing.T, additional string) [kbs.ReportDataSize]byte {
	t.Helper()
	j, err := kbs.NewTEEPubKey(&g.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	rd, err := kbs.ReportData(additional, g.nonce, j)
	if err != nil {
		t.Fatal(err)
	}
	return rd
}

// attest posts evidence and keeps the token.
func (g *guest) attest(t *testing.T, initdata, primary, additional string) (int, string) {
	t.Helper()
	add, err := json.Marshal(additional)
	if err != nil {
		t.Fatal(err)
	}
	status, body, _ := g.r.call(t, "POST", "/kbs/v0/attest", g.cookie, "", `{"init-data":`+initdata+
		`,"runtime-data":{"nonce":"`+g.nonce+`","tee-pubkey":`+g.jwk+`},"tee-evidence":{"primary_evidence":`+primary+`,"additional_evidence":`+string(add)+`}}`)
	var answer struct{ Token string }
	if status == 200 {
		if err := json.Unmarshal([]byte(body), &answer); err != nil {
			t.Fatal(err)
		}
		g.token = answer.Token
	}
	return status, body
}

// open decrypts a resource after checking the shape of its JWE.
func (g *guest) open(t *testing.T, body string) []byte {
	t.Helper()
	var parts map[string]string
	if err := json.Unmarshal([]byte(body), &parts); err != nil {
		t.Fatalf("not a flattened JWE: %v: %s", err, body)
	}
	if len(parts) != 5 || parts["protected"] == "" || parts["encrypted_key"] == "" || parts["iv"] == "" || parts["ciphertext"] == "" || parts["tag"] == "" {
		t.Fatalf("members of the JWE: %v", parts)
	}
	obj, err := jose.ParseEncryptedJSON(body, []jose.KeyAlgorithm{jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		t.Fatal(err)
	}
	data, err := obj.Decrypt(g.key)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func variant(t *testing.T, status int, body string) string {
	t.Helper()
	return kbs.DecodeError(status, []byte(body)).Variant()
}

func listedAK(p *tpmtest.TPM) func(c *Config) {
	return func(c *Config) { c.TrustedAKs = []string{fingerprint(p.AKSPKI)} }
}

func anyPolicy() release.Rule {
	return release.Rule{APIVersion: release.RuleAPIVersion, Platforms: []string{"tpm"}, AnyPolicy: true}
}

// The whole protocol as Trustee's guest client speaks it, from the wire facts:
// cookie, bearer token, both curves, init-data null, one token per session.
func TestProtocolAsTrusteesGuest(t *testing.T) {
	p := tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.RSA)
	r := start(t, nil, listedAK(p))
	ctx := context.Background()
	secret := []byte("0123456789abcdef0123456789abcdef")
	const uri = "kbs:///default/key/key_id1"
	if err := r.admin.PutResource(ctx, uri, secret); err != nil {
		t.Fatal(err)
	}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P521()} {
		g, challenge := r.newGuest(t, curve, `{"supported-hash-algorithms":["sha256","sha384","sha512"]}`)
		if s, ok := challenge["extra-params"].(string); !ok || s != "" {
			t.Fatalf("extra-params: %v", challenge["extra-params"])
		}
		if status, body, _ := r.call(t, "GET", "/kbs/v0/resource/default/key/key_id1", g.cookie, "", ""); status != 401 || variant(t, status, body) != "TokenNotFound" {
			t.Fatalf("before attestation: %d %s", status, body)
		}
		ev := string(tpmtest.JSON(t, p.Evidence(g.reportData(t, ""), 0, 8, 14)))
		if status, body := g.attest(t, "null", ev, ""); status != 200 {
			t.Fatalf("attest: %d %s", status, body)
		}
		token := g.token
		if status, _ := g.attest(t, "null", `{}`, ""); status != 200 || g.token != token {
			t.Fatalf("posting again: %d, the old token %t", status, g.token == token)
		}
		checkToken(t, r, token)

		// No rule: nobody gets it.
		if err := r.admin.DeleteRule(ctx, uri); err == nil && curve == elliptic.P256() {
			t.Fatal("deleted a rule that is not there")
		}
		status, body, _ := r.call(t, "GET", "/kbs/v0/resource/default/key/key_id1", g.cookie, "", "")
		if status != 401 || variant(t, status, body) != "PolicyDeny" || !strings.Contains(body, "no release rule") {
			t.Fatalf("without a rule: %d %s", status, body)
		}
		if err := r.admin.PutRule(ctx, uri, anyPolicy()); err != nil {
			t.Fatal(err)
		}
		for how, auth := range map[string][2]string{"cookie": {g.cookie, ""}, "bearer": {"", token}} {
			status, body, _ := r.call(t, "GET", "/kbs/v0/resource/default/key/key_id1", auth[0], auth[1], "")
			if status != 200 || !bytes.Equal(g.open(t, body), secret) {
				t.Fatalf("%s: %d %s", how, status, body)
			}
		}
		for path, want := range map[string]string{
			"/kbs/v0/resource/default/key/other": "PolicyDeny",
			"/kbs/v0/resource/default/key":       "InvalidRequestPath",
			"/kbs/v0/resource/default/../key":    "InvalidRequestPath",
			"/kbs/v0/resource/a/%2e/c":           "InvalidRequestPath",
			"/kbs/v0/pkcs11/a/b/c":               "PluginNotFound",
			"/nothing":                           "InvalidRequestPath",
		} {
			status, body, _ := r.call(t, "GET", path, g.cookie, "", "")
			if variant(t, status, body) != want || (status == 404) != (want != "PolicyDeny") {
				t.Errorf("%s: %d %s", path, status, body)
			}
		}
	}
	// A rule without a resource: the protocol's answer for a missing one.
	if err := r.admin.PutRule(ctx, "kbs:///default/key/missing", anyPolicy()); err != nil {
		t.Fatal(err)
	}
	g, _ := r.newGuest(t, elliptic.P256(), `""`)
	ev := string(tpmtest.JSON(t, p.Evidence(g.reportData(t, ""), 0)))
	if status, body := g.attest(t, "null", ev, ""); status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	if status, body, _ := r.call(t, "GET", "/kbs/v0/resource/default/key/missing", g.cookie, "", ""); status != 401 || variant(t, status, body) != "PluginInternalError" {
		t.Errorf("missing resource: %d %s", status, body)
	}
	// A rule that names a policy is no easier for a dialect that has none.
	named := anyPolicy()
	named.AnyPolicy, named.Policy = false, &release.PolicyRule{Names: []string{"shop"}, Signers: []string{strings.Repeat("a", 64)}}
	if err := r.admin.PutRule(ctx, uri, named); err != nil {
		t.Fatal(err)
	}
	if status, body, _ := r.call(t, "GET", "/kbs/v0/resource/default/key/key_id1", g.cookie, "", ""); status != 401 || variant(t, status, body) != "PolicyDeny" || !strings.Contains(body, "event-log") {
		t.Errorf("leaving out: %d %s", status, body)
	}
	r.stop()
	checkAudit(t, r, string(secret), g.token, strings.TrimPrefix(g.cookie, "kbs-session-id="))
}

// checkToken verifies the token by the published key and its layout by
// pointer, as other readers of EAR tokens do.
func checkToken(t *testing.T, r *running, token string) {
	t.Helper()
	pub, err := os.ReadFile(filepath.Join(r.dir, FileTokenPub))
	if err != nil {
		t.Fatal(err)
	}
	key := parsePublic(t, pub)
	jws, err := jose.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := jws.Verify(key)
	if err != nil {
		t.Fatal(err)
	}
	if jws.Signatures[0].Header.JSONWebKey == nil {
		t.Error("no jwk in the header")
	}
	claims, err := kbs.DecodeTokenClaims(payload)
	if err != nil {
		t.Fatal(err)
	}
	if claims.Expires-claims.IssuedAt > 300 || claims.Expires <= claims.IssuedAt || claims.Nonce == "" {
		t.Errorf("times and nonce of the token: %+v", claims)
	}
}

// checkAudit verifies the chain and that none of the secrets is in any log or
// in the storage.
func checkAudit(t *testing.T, r *running, secrets ...string) {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(r.dir, "audit.ndjson"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(bytes.NewReader(log)); err != nil {
		t.Error(err)
	}
	db, err := os.ReadFile(filepath.Join(r.dir, "broker.db"))
	if err != nil {
		t.Fatal(err)
	}
	admin, err := os.ReadFile(filepath.Join(r.dir, FileAdminToken))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range append(secrets, strings.TrimSpace(string(admin))) {
		for where, text := range map[string]string{"audit log": string(log), "log": r.logs.String(), "storage": string(db)} {
			if strings.Contains(text, s) {
				t.Errorf("a secret is in the %s", where)
			}
		}
	}
}

func TestAuthRefusals(t *testing.T) {
	r := start(t, nil, nil)
	for what, c := range map[string]struct{ body, variant, detail string }{
		"another version":     {`{"version":"0.2.0","tee":"tpm","extra-params":""}`, "AttestationError", "KBS Client Protocol Version Mismatch"},
		"a semver range":      {`{"version":"^0.4.0","tee":"tpm","extra-params":""}`, "AttestationError", "KBS Client Protocol Version Mismatch"},
		"an unknown TEE":      {`{"version":"0.4.0","tee":"nothing","extra-params":""}`, "AttestationError", "not accepted"},
		"a TEE for tests":     {`{"version":"0.4.0","tee":"sample","extra-params":""}`, "AttestationError", "not accepted"},
		"not JSON":            {`{`, "SerdeError", ""},
		"a wrong type":        {`{"version":1,"tee":"tpm","extra-params":""}`, "SerdeError", ""},
		"an EK that is none":  {`{"version":"0.4.0","tee":"tpm","extra-params":{"cvm-agent":{"version":"cvm-agent/1","ek_cert":"AAAA","ak_public":"AAAA"}}}`, "AttestationError", "EK certificate"},
		"a body over 64 KiB":  {`{"version":"` + strings.Repeat("0", 70_000) + `"}`, "SerdeError", ""},
		"a dialect of no TPM": {`{"version":"0.4.0","tee":"tpm","extra-params":{"cvm-agent":{"version":"cvm-agent/1"}}}`, "AttestationError", "ek_cert"},
	} {
		status, body, cookie := r.call(t, "POST", "/kbs/v0/auth", "", "", c.body)
		if status != 401 || variant(t, status, body) != c.variant || !strings.Contains(body, c.detail) || cookie != "" {
			t.Errorf("%s: %d %s", what, status, body)
		}
	}
	if status, body, _ := r.call(t, "GET", "/healthz", "", "", ""); status != 200 || body != "ok\n" {
		t.Errorf("healthz: %d %s", status, body)
	}
}

// Lessons 3 and 4: no verifier for evidence that proves nothing can be
// configured, and the route refuses its name.
func TestLesson03_NoSampleVerifier(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sample", "sampledevice", ""} {
		if _, err := New(Options{Store: &Store{}, Audit: &audit.Log{}, TokenKey: key, Logger: slog.Default(), Now: time.Now, MaxSessions: 1, Verifiers: verifiers(name)}); err == nil {
			t.Errorf("a verifier for %q was accepted", name)
		}
	}
}

// A refused attestation ends its session: nonce and activation are good once.
func TestEvidenceIsGoodOnce(t *testing.T) {
	p := tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.ECC)
	r := start(t, nil, listedAK(p))
	g, _ := r.newGuest(t, elliptic.P256(), `""`)
	stale := string(tpmtest.JSON(t, p.Evidence([48]byte{1}, 0)))
	if status, body := g.attest(t, "null", stale, ""); status != 401 || variant(t, status, body) != "AttestationError" || !strings.Contains(body, "report-data") {
		t.Fatalf("stale quote: %d %s", status, body)
	}
	fresh := string(tpmtest.JSON(t, p.Evidence(g.reportData(t, ""), 0)))
	if status, body := g.attest(t, "null", fresh, ""); status != 401 {
		t.Fatalf("second try in a spent session: %d %s", status, body)
	}
	// Evidence of one session is not evidence in another.
	a, _ := r.newGuest(t, elliptic.P256(), `""`)
	b, _ := r.newGuest(t, elliptic.P256(), `""`)
	ev := string(tpmtest.JSON(t, p.Evidence(a.reportData(t, ""), 0)))
	if status, body := b.attest(t, "null", ev, ""); status != 401 {
		t.Fatalf("replayed into another session: %d %s", status, body)
	}
	if status, body := a.attest(t, "null", ev, ""); status != 200 {
		t.Fatalf("the session itself: %d %s", status, body)
	}
}
