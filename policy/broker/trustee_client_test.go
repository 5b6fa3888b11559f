package broker_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	josecipher "github.com/go-jose/go-jose/v4/cipher"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
)

// This file plays Trustee's guest client from the wire facts of the KBS
// protocol 0.4.0 alone: text and maps, none of our message types. What it and
// the broker agree on, Trustee's own guests and the broker agree on.

// kekOf is a key-encryption key of a test.
type kekOf []byte

func (k kekOf) DataKey([]byte) (key, keep []byte, err error) { return bytes.Clone(k), nil, nil }

// world is a broker with the given verifiers behind TLS, and its admin.
type world struct {
	url   string
	http  *http.Client
	admin *adminclient.Client
	key   *ecdsa.PrivateKey // signs tokens
}

func newWorld(t *testing.T, now func() time.Time, verifiers ...appraisal.Verifier) *world {
	t.Helper()
	return newWorldOf(t, now, nil, verifiers...)
}

// newWorldOf is newWorld whose rules are signed, unless signers is nil.
func newWorldOf(t *testing.T, now func() time.Time, signers *broker.RuleSigners, verifiers ...appraisal.Verifier) *world {
	t.Helper()
	dir := t.TempDir()
	store, err := broker.OpenStore(filepath.Join(dir, "broker.db"), kekOf(make([]byte, 32)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	log, err := audit.Open(filepath.Join(dir, "audit.ndjson"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	w := &world{}
	if w.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	admin := strings.Repeat("a", 43)
	server, err := broker.New(broker.Options{
		Store: store, Audit: log, TokenKey: w.key, Verifiers: verifiers, AdminHashes: [][32]byte{sha256.Sum256([]byte(admin))},
		MaxSessions: 1000, Logger: slog.New(slog.DiscardHandler), Now: now, RuleSigners: signers,
	})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewTLSServer(server)
	t.Cleanup(s.Close)
	w.url, w.http = s.URL, s.Client()
	w.http.Timeout = 30 * time.Second
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if w.admin, err = adminclient.New(s.URL, ca, admin); err != nil {
		t.Fatal(err)
	}
	return w
}

// put stores a resource that every accepted guest of the platforms may have.
func (w *world) put(t *testing.T, path string, data []byte, platforms ...string) {
	t.Helper()
	if err := w.admin.PutResource(t.Context(), "kbs:///"+path, data); err != nil {
		t.Fatal(err)
	}
	rule := release.Rule{APIVersion: release.RuleAPIVersion, Platforms: platforms, AnyPolicy: true, AnyLaunch: true}
	if err := w.admin.PutRule(t.Context(), "kbs:///"+path, rule); err != nil {
		t.Fatal(err)
	}
}

// answer is what came back.
type answer struct {
	status int
	header http.Header
	body   string
}

func (w *world) do(t *testing.T, method, path string, headers map[string]string, body string) answer {
	t.Helper()
	req, err := http.NewRequest(method, w.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range headers {
		req.Header.Set(k, v)
	}
	resp, err := w.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(b)}
}

// refused checks that an answer is an error body of exactly two members, with
// the variant as its type's suffix, and returns the detail.
func (a answer) refused(t *testing.T, status int, variant string) string {
	t.Helper()
	var members map[string]string
	if err := json.Unmarshal([]byte(a.body), &members); err != nil || len(members) != 2 {
		t.Errorf("not an error body: %d %s", a.status, a.body)
		return ""
	}
	if want := "https://github.com/confidential-containers/kbs/errors/" + variant; a.status != status || members["type"] != want {
		t.Errorf("%d %s, expected %d %s", a.status, a.body, status, want)
	}
	if members["detail"] == "" {
		t.Error("an error without a detail")
	}
	return members["detail"]
}

// guestKey is the ephemeral key of a session, on either curve or RSA.
type guestKey struct {
	ec  *ecdsa.PrivateKey
	rsa *rsa.PrivateKey
}

func newKey(t *testing.T, kind string) guestKey {
	t.Helper()
	var k guestKey
	var err error
	switch kind {
	case "P-256":
		k.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "P-521":
		k.ec, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	default:
		k.rsa, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func b64url(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// jwk is the key with its members in the order of RFC 8785, so that the same
// text is sent and hashed.
func (k guestKey) jwk() string {
	if k.rsa != nil {
		return fmt.Sprintf(`{"alg":"RSA-OAEP-256","e":%q,"kty":"RSA","n":%q}`, b64url(big.NewInt(int64(k.rsa.E)).Bytes()), b64url(k.rsa.N.Bytes()))
	}
	point, err := k.ec.PublicKey.Bytes() // 04 ‖ x ‖ y
	if err != nil {
		panic(err)
	}
	x, y := point[1:len(point)/2+1], point[len(point)/2+1:]
	return fmt.Sprintf(`{"alg":"ECDH-ES+A256KW","crv":%q,"kty":"EC","x":%q,"y":%q}`, k.ec.Params().Name, b64url(x), b64url(y))
}

// guest is one session of Trustee's guest client.
type guest struct {
	w      *world
	cookie string
	nonce  string
	key    guestKey
	token  string
}

var sessionCookie = regexp.MustCompile(`^kbs-session-id=[0-9a-f]{32}$`)

// open is POST auth.
func (w *world) open(t *testing.T, tee, key string) *guest {
	t.Helper()
	a := w.do(t, "POST", "/kbs/v0/auth", map[string]string{"Content-Type": "application/json"},
		`{"version":"0.4.0","tee":"`+tee+`","extra-params":{"supported-hash-algorithms":["sha256","sha384","sha512"]}}`)
	if a.status != 200 {
		t.Fatalf("auth: %d %s", a.status, a.body)
	}
	if c := a.header.Values("Set-Cookie"); len(c) != 1 || !sessionCookie.MatchString(c[0]) {
		t.Fatalf("Set-Cookie %q, expected the cookie with 32 hex digits and no attribute", c)
	}
	var challenge map[string]any
	if err := json.Unmarshal([]byte(a.body), &challenge); err != nil || len(challenge) != 2 || challenge["extra-params"] != "" {
		t.Fatalf("challenge: %s", a.body)
	}
	nonce, _ := challenge["nonce"].(string)
	if raw, err := base64.StdEncoding.DecodeString(nonce); err != nil || len(raw) != 32 {
		t.Fatalf("nonce: %q", nonce)
	}
	return &guest{w: w, cookie: a.header.Get("Set-Cookie"), nonce: nonce, key: newKey(t, key)}
}

// reportData is SHA-384 over the RFC 8785 form, written out by hand.
func (g *guest) reportData(additional string) [48]byte {
	quoted := `"` + strings.ReplaceAll(strings.ReplaceAll(additional, `\`, `\\`), `"`, `\"`) + `"`
	return sha512.Sum384([]byte(`{"additional-evidence":` + quoted + `,"nonce":"` + g.nonce + `","tee-pubkey":` + g.key.jwk() + `}`))
}

// request is the body of POST attest. initdata is "" for null.
func (g *guest) request(initdata, primary, additional string) string {
	init := "null"
	if initdata != "" {
		text, _ := json.Marshal(initdata)
		init = `{"format":"toml","body":` + string(text) + `}`
	}
	add, _ := json.Marshal(additional)
	return `{"init-data":` + init + `,"runtime-data":{"nonce":"` + g.nonce + `","tee-pubkey":` + g.key.jwk() +
		`},"tee-evidence":{"primary_evidence":` + primary + `,"additional_evidence":` + string(add) + `}}`
}

// attest is POST attest; it keeps the token.
func (g *guest) attest(t *testing.T, body string) answer {
	t.Helper()
	a := g.w.do(t, "POST", "/kbs/v0/attest", map[string]string{"Content-Type": "application/json", "Cookie": g.cookie}, body)
	if a.status == 200 {
		var members map[string]string
		if err := json.Unmarshal([]byte(a.body), &members); err != nil || len(members) != 1 || members["token"] == "" {
			t.Fatalf("attest: %s", a.body)
		}
		g.token = members["token"]
	}
	return a
}

// get is GET resource with the session's cookie.
func (g *guest) get(t *testing.T, path string) answer {
	t.Helper()
	return g.w.do(t, "GET", "/kbs/v0/resource/"+path, map[string]string{"Cookie": g.cookie}, "")
}

// decrypt opens a flattened JWE by its parts: key agreement, key unwrapping
// and AES-GCM, with the protected header as it was received for AAD.
func (k guestKey) decrypt(t *testing.T, body string) []byte {
	t.Helper()
	var jwe map[string]string
	if err := json.Unmarshal([]byte(body), &jwe); err != nil || len(jwe) != 5 {
		t.Fatalf("not a flattened JWE of five members: %s", body)
	}
	part := func(name string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(jwe[name])
		if err != nil || len(b) == 0 {
			t.Fatalf("JWE member %s: %q", name, jwe[name])
		}
		return b
	}
	var header map[string]any
	if err := json.Unmarshal(part("protected"), &header); err != nil || header["enc"] != "A256GCM" {
		t.Fatalf("protected header: %s", part("protected"))
	}
	block, err := aes.NewCipher(k.contentKey(t, header, part("encrypted_key")))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	data, err := gcm.Open(nil, part("iv"), append(part("ciphertext"), part("tag")...), []byte(jwe["protected"]))
	if err != nil {
		t.Fatalf("the AAD is not the protected header as received: %v", err)
	}
	return data
}

// contentKey unwraps the key by the header's algorithm (RFC 7518, 4.3 and 4.6).
func (k guestKey) contentKey(t *testing.T, header map[string]any, wrapped []byte) []byte {
	t.Helper()
	if k.rsa != nil {
		if header["alg"] != "RSA-OAEP-256" {
			t.Fatalf("alg %v", header["alg"])
		}
		key, err := rsa.DecryptOAEP(sha256.New(), nil, k.rsa, wrapped, nil)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	epk, ok := header["epk"].(map[string]any)
	if !ok || len(epk) != 4 || epk["kty"] != "EC" || epk["crv"] != k.ec.Params().Name || header["alg"] != "ECDH-ES+A256KW" || header["apu"] != nil || header["apv"] != nil {
		t.Fatalf("header: %v", header)
	}
	point := []byte{4} // uncompressed
	for _, name := range []string{"x", "y"} {
		text, _ := epk[name].(string)
		b, err := base64.RawURLEncoding.DecodeString(text)
		if err != nil || len(b) != (k.ec.Params().BitSize+7)/8 {
			t.Fatalf("epk.%s has %d bytes, expected the curve's width", name, len(b))
		}
		point = append(point, b...)
	}
	peer, err := ecdsa.ParseUncompressedPublicKey(k.ec.Curve, point)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(josecipher.DeriveECDHES("ECDH-ES+A256KW", nil, nil, k.ec, peer, 32))
	if err != nil {
		t.Fatal(err)
	}
	key, err := josecipher.KeyUnwrap(block, wrapped)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// snpEvidence takes a raw report (SEV-SNP ABI 1.58, table 23) apart into the
// JSON that Trustee's guest sends, with the certificates' DER beside it.
func snpEvidence(raw []byte, vcek []byte) string {
	le := binary.LittleEndian
	ints := func(b []byte) []int {
		out := make([]int, len(b))
		for i, c := range b {
			out[i] = int(c)
		}
		return out
	}
	tcb := func(at int) map[string]any {
		return map[string]any{"fmc": nil, "bootloader": raw[at], "tee": raw[at+1], "snp": raw[at+6], "microcode": raw[at+7]}
	}
	firmware := func(at int) map[string]any {
		return map[string]any{"build": raw[at], "minor": raw[at+1], "major": raw[at+2]}
	}
	chain := any(nil)
	if vcek != nil {
		chain = []any{map[string]any{"cert_type": "VCEK", "data": ints(vcek)}}
	}
	b, _ := json.Marshal(map[string]any{"cert_chain": chain, "attestation_report": map[string]any{
		"version": le.Uint32(raw), "guest_svn": le.Uint32(raw[4:]), "policy": le.Uint64(raw[8:]), "family_id": ints(raw[0x10:0x20]),
		"image_id": ints(raw[0x20:0x30]), "vmpl": le.Uint32(raw[0x30:]), "sig_algo": le.Uint32(raw[0x34:]), "current_tcb": tcb(0x38),
		"plat_info": le.Uint64(raw[0x40:]), "key_info": le.Uint32(raw[0x48:]), "report_data": ints(raw[0x50:0x90]), "measurement": ints(raw[0x90:0xc0]),
		"host_data": ints(raw[0xc0:0xe0]), "id_key_digest": ints(raw[0xe0:0x110]), "author_key_digest": ints(raw[0x110:0x140]),
		"report_id": ints(raw[0x140:0x160]), "report_id_ma": ints(raw[0x160:0x180]), "reported_tcb": tcb(0x180),
		"cpuid_fam_id": raw[0x188], "cpuid_mod_id": raw[0x189], "cpuid_step": raw[0x18a], "chip_id": ints(raw[0x1a0:0x1e0]),
		"committed_tcb": tcb(0x1e0), "current": firmware(0x1e8), "committed": firmware(0x1ec), "launch_tcb": tcb(0x1f0),
		"signature": map[string]any{"r": ints(raw[0x2a0:0x2e8]), "s": ints(raw[0x2e8:0x330])},
	}})
	return string(b)
}
