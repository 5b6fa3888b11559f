package kbs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
)

const testKey = `{"kty":"EC","crv":"P-256","alg":"ECDH-ES+A256KW","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}`

// The check value of the protocol page.
func TestJCSSHA384CheckValue(t *testing.T) {
	d, err := jcsSHA384(json.RawMessage(`{"c":{"d":"e"},"b":1,"a":"test"}`))
	if err != nil {
		t.Fatal(err)
	}
	got := hex.EncodeToString(d[:])
	if !strings.HasPrefix(got, "e71ce8e70d81") || !strings.HasSuffix(got, "78870c3") {
		t.Fatalf("SHA-384 over JCS is %s", got)
	}
}

func TestReportDataCoversEveryInput(t *testing.T) {
	var key TEEPubKey
	if err := json.Unmarshal([]byte(testKey), &key); err != nil {
		t.Fatal(err)
	}
	base, err := ReportData("", "bm9uY2U=", key)
	if err != nil {
		t.Fatal(err)
	}
	// The same object written by hand: the member is there although empty.
	byHand, err := jcsSHA384(json.RawMessage(`{"tee-pubkey":` + testKey + `,"nonce":"bm9uY2U=","additional-evidence":""}`))
	if err != nil || byHand != base {
		t.Fatalf("report data differs from the handwritten object (%v)", err)
	}
	other := key
	other.X, other.Y = other.Y, other.X
	for what, f := range map[string]func() ([48]byte, error){
		"additional evidence": func() ([48]byte, error) { return ReportData("{}", "bm9uY2U=", key) },
		"nonce":               func() ([48]byte, error) { return ReportData("", "bm9uY2V=", key) },
		"key":                 func() ([48]byte, error) { return ReportData("", "bm9uY2U=", other) },
	} {
		if d, err := f(); err != nil || d == base {
			t.Errorf("report data does not change with the %s (%v)", what, err)
		}
	}
	if _, err := ReportData("\xff", "n", key); err == nil {
		t.Error("a string that is not UTF-8 was hashed")
	}
	if d, err := ReportData(`<a href="&">`, "n", key); err != nil {
		t.Error(err)
	} else if h, _ := jcsSHA384(json.RawMessage(`{"additional-evidence":"<a href=\"&\">","nonce":"n","tee-pubkey":` + testKey + `}`)); h != d {
		t.Error("HTML characters are escaped before hashing")
	}
}

func TestResourceURI(t *testing.T) {
	good := map[string]string{
		"kbs:///default/key/1":                "kbs:///default/key/1",
		"kbs://broker.example:8080/a/b/c.d-e": "kbs:///a/b/c.d-e",
		"kbs://[::1]:8080/a_/-b/c":            "kbs:///a_/-b/c",
	}
	for in, want := range good {
		u, err := ParseResourceURI(in)
		if err != nil || u.String() != want {
			t.Errorf("%s: %v, %v", in, u, err)
		}
	}
	for what, in := range map[string]string{
		"another scheme":             "https:///a/b/c",
		"two segments":               "kbs:///a/b",
		"four segments":              "kbs:///a/b/c/d",
		"an empty segment":           "kbs:///a//c",
		"a segment of dots":          "kbs:///a/../c",
		"percent-encoding":           "kbs:///a/%2e/c",
		"a query":                    "kbs:///a/b/c?x=1",
		"a fragment":                 "kbs:///a/b/c#x",
		"a newline at the end":       "kbs:///a/b/c\n",
		"user information":           "kbs://u:p@host/a/b/c",
		"a segment that is too long": "kbs:///a/b/" + strings.Repeat("x", 256),
		"a name that is not ASCII":   "kbs:///a/b/ü",
	} {
		if u, err := ParseResourceURI(in); err == nil {
			t.Errorf("%s was accepted as %v", what, u)
		}
	}
}

func TestTEEPubKey(t *testing.T) {
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P521()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		jwk, err := NewTEEPubKey(&k.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		pub, err := jwk.PublicKey()
		if err != nil || !k.PublicKey.Equal(pub) {
			t.Errorf("%s does not come back: %v", c.Params().Name, err)
		}
	}
	if k, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader); k != nil {
		if _, err := NewTEEPubKey(&k.PublicKey); err == nil {
			t.Error("P-384 was accepted")
		}
	}
	var good TEEPubKey
	_ = json.Unmarshal([]byte(testKey), &good)
	for what, change := range map[string]func(*TEEPubKey){
		"a point off the curve":    func(k *TEEPubKey) { k.Y = k.X },
		"a short coordinate":       func(k *TEEPubKey) { k.X = k.X[:42] },
		"a padded coordinate":      func(k *TEEPubKey) { k.X += "=" },
		"another algorithm":        func(k *TEEPubKey) { k.Alg = "ECDH-ES" },
		"no algorithm":             func(k *TEEPubKey) { k.Alg = "" },
		"another curve":            func(k *TEEPubKey) { k.Crv = "P-521" },
		"an unknown key type":      func(k *TEEPubKey) { k.Kty = "oct" },
		"RSA members in an EC key": func(k *TEEPubKey) { k.N = "AQAB" },
		"RSA with PKCS #1 v1.5":    func(k *TEEPubKey) { *k = TEEPubKey{Kty: "RSA", Alg: "RSA1_5", N: "AQAB", E: "AQAB"} },
		"RSA of 24 bits":           func(k *TEEPubKey) { *k = TEEPubKey{Kty: "RSA", Alg: AlgRSA, N: "AQAB", E: "AQAB"} },
	} {
		k := good
		change(&k)
		if _, err := k.PublicKey(); err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
}

func TestAuthRequest(t *testing.T) {
	// As Trustee's guest sends it.
	r, err := DecodeAuthRequest([]byte(`{"version":"0.4.0","tee":"snp","extra-params":{"supported-hash-algorithms":["sha256","sha384","sha512"]},"later":{"x":1}}`))
	if err != nil || r.TEE != "snp" || r.ExtraParams.CVMAgent != nil || len(r.ExtraParams.SupportedHashAlgorithms) != 3 {
		t.Fatalf("%+v, %v", r, err)
	}
	if r, err = DecodeAuthRequest([]byte(`{"version":"0.1.1","tee":"tpm","extra-params":""}`)); err != nil || r.Version != "0.1.1" {
		t.Fatalf("empty extra-params: %v", err)
	}
	r, err = DecodeAuthRequest([]byte(`{"version":"0.4.0","tee":"tpm","extra-params":{"cvm-agent":{"version":"cvm-agent/1","ek_cert":"AAE=","ak_public":"AgM="}}}`))
	if err != nil || string(r.ExtraParams.CVMAgent.EKCert) != "\x00\x01" {
		t.Fatalf("%+v, %v", r, err)
	}
	for what, in := range map[string]string{
		"a number as the version":       `{"version":4,"tee":"snp","extra-params":""}`,
		"no TEE":                        `{"version":"0.4.0","extra-params":""}`,
		"a duplicate member":            `{"version":"0.4.0","tee":"snp","tee":"tpm","extra-params":""}`,
		"an unknown dialect":            `{"version":"0.4.0","tee":"tpm","extra-params":{"cvm-agent":{"version":"cvm-agent/2"}}}`,
		"base64url":                     `{"version":"0.4.0","tee":"tpm","extra-params":{"cvm-agent":{"version":"cvm-agent/1","ek_cert":"_-8="}}}`,
		"extra-params as a string":      `{"version":"0.4.0","tee":"tpm","extra-params":"x"}`,
		"extra-params as an array":      `{"version":"0.4.0","tee":"tpm","extra-params":[]}`,
		"trailing data":                 `{"version":"0.4.0","tee":"tpm","extra-params":""} {}`,
		"an array instead of an object": `[]`,
		"nothing":                       ``,
	} {
		if _, err := DecodeAuthRequest([]byte(in)); err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
	// A member in another case is another member, so it cannot override.
	if r, err := DecodeAuthRequest([]byte(`{"version":"0.4.0","tee":"snp","TEE":"tpm","extra-params":""}`)); err != nil || r.TEE != "snp" {
		t.Errorf("a member in capitals was taken: %+v, %v", r, err)
	}
	if _, err := DecodeAuthRequest(make([]byte, MaxBody+1)); err == nil {
		t.Error("a body over the limit was read")
	}
}

func TestChallenge(t *testing.T) {
	nonce := base64.StdEncoding.EncodeToString(make([]byte, 32))
	b, err := json.Marshal(Challenge{Nonce: nonce})
	if err != nil || string(b) != fmt.Sprintf(`{"nonce":%q,"extra-params":""}`, nonce) {
		t.Fatalf("%s, %v", b, err)
	}
	if _, err := DecodeChallenge(b); err != nil {
		t.Fatal(err)
	}
	full := Challenge{Nonce: nonce, ExtraParams: ChallengeExtra{CVMAgent: &CVMAgentChallenge{CredentialBlob: []byte{0, 1, 2}, Secret: []byte{0, 1, 3}}}}
	if b, err = json.Marshal(full); err != nil {
		t.Fatal(err)
	}
	c, err := DecodeChallenge(b)
	if err != nil || string(c.ExtraParams.CVMAgent.Secret) != "\x00\x01\x03" {
		t.Fatalf("%+v, %v", c, err)
	}
	for what, in := range map[string]string{
		"a short nonce":       `{"nonce":"AAAA","extra-params":""}`,
		"another hash":        `{"nonce":"` + nonce + `","extra-params":{"selected-hash-algorithm":"sha256"}}`,
		"an empty activation": `{"nonce":"` + nonce + `","extra-params":{"cvm-agent":{"credential_blob":"","secret":""}}}`,
	} {
		if _, err := DecodeChallenge([]byte(in)); err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
}

func TestAttestRequest(t *testing.T) {
	mk := func(init, key, primary, additional string) []byte {
		return []byte(`{"init-data":` + init + `,"runtime-data":{"nonce":"bg==","tee-pubkey":` + key + `},"tee-evidence":{"primary_evidence":` + primary + `,"additional_evidence":` + additional + `}}`)
	}
	r, err := DecodeAttestRequest(mk("null", testKey, `{"a":1}`, `""`))
	if err != nil || r.InitData != nil || string(r.TEEEvidence.PrimaryEvidence) != `{"a":1}` {
		t.Fatalf("%+v, %v", r, err)
	}
	if r, err = DecodeAttestRequest(mk(`{"format":"toml","body":"version = \"0.1.0\"\n"}`, testKey, `{}`, `"{\"nvidia\":{}}"`)); err != nil || r.InitData.Body != "version = \"0.1.0\"\n" {
		t.Fatalf("%+v, %v", r, err)
	}
	_, others, err := DecodeAdditional(r.TEEEvidence.AdditionalEvidence)
	if err != nil || len(others) != 1 || others[0] != "nvidia" {
		t.Fatalf("%v, %v", others, err)
	}
	for what, in := range map[string][]byte{
		"init-data of another format":      mk(`{"format":"json","body":""}`, testKey, `{}`, `""`),
		"additional evidence as an object": mk("null", testKey, `{}`, `{}`),
		"primary evidence as a string":     mk("null", testKey, `"x"`, `""`),
		"no key":                           mk("null", `{}`, `{}`, `""`),
		"a million numbers":                mk("null", testKey, `{"r":[`+strings.Repeat("1,", 900_000)+`1]}`, `""`),
		"depth of a thousand":              mk("null", testKey, `{"r":`+strings.Repeat("[", 1000)+strings.Repeat("]", 1000)+`}`, `""`),
	} {
		if _, err := DecodeAttestRequest(in); err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
	for what, s := range map[string]string{"an array": `[]`, "null": `null`, "a number as the log": `{"cvm-agent-eventlog":1}`, "two logs": `{"cvm-agent-eventlog":"","cvm-agent-eventlog":""}`} {
		if _, _, err := DecodeAdditional(s); err == nil {
			t.Errorf("additional evidence: %s was accepted", what)
		}
	}
	a := AdditionalCVMAgent{EventLog: []byte{1}, Activation: []byte{2}}
	text, err := a.Encode()
	if err != nil || text != `{"cvm-agent-eventlog":"AQ==","cvm-agent-activation":"Ag=="}` {
		t.Errorf("%s, %v", text, err)
	}
}

// testdata/trustee-tpm-evidence.json is evidence from the repository
// confidential-containers/trustee (Apache-2.0).
func TestTPMEvidenceOfTrustee(t *testing.T) {
	b, err := os.ReadFile("testdata/trustee-tpm-evidence.json")
	if err != nil {
		t.Fatal(err)
	}
	e, err := DecodeTPMEvidence(b)
	if err != nil {
		t.Fatal(err)
	}
	v, err := e.Quote.Values()
	if err != nil || v[17][0] != 0xff || v[0] != ([32]byte{}) {
		t.Fatalf("%x, %v", v, err)
	}
	e.Quote.PCRs = e.Quote.PCRs[:23]
	if _, err := e.Quote.Values(); err == nil {
		t.Error("23 PCRs were accepted")
	}
}

func TestErrors(t *testing.T) {
	e := NewError(VariantPolicyDeny, "no rule for %s", "kbs:///a/b/c")
	b, _ := json.Marshal(e.Body)
	if string(b) != `{"type":"https://github.com/confidential-containers/kbs/errors/PolicyDeny","detail":"no rule for kbs:///a/b/c"}` || e.Status != 401 {
		t.Fatalf("%d %s", e.Status, b)
	}
	if NewError(VariantPluginNotFound, "").Status != 404 || NewError(VariantInvalidRequestPath, "").Status != 404 {
		t.Error("a missing path is not 404")
	}
	got := DecodeError(403, b)
	if got.Variant() != VariantPolicyDeny || got.Status != 403 {
		t.Errorf("%+v", got)
	}
	if v := DecodeError(502, []byte("<html>")).Variant(); v != "" {
		t.Errorf("variant %q out of HTML", v)
	}
	if d := DecodeError(401, []byte(`{"type":"x","detail":"a\u001b[31m\nb`+strings.Repeat("c", 5000)+`"}`)).Body.Detail; strings.ContainsAny(d, "\x1b\n") || len(d) > 300 {
		t.Errorf("detail %q is not fit to be shown", d)
	}
}

func TestTokenClaims(t *testing.T) {
	mk := func(status string) []byte {
		return []byte(`{"iss":"x","iat":1,"exp":301,"later":[1],"submods":{"cpu0":{"ear.status":"` + status + `","ear.veraison.annotated-evidence":{"runtime_data_claims":{"nonce":"n","tee-pubkey":` + testKey + `}}}},"cvm-agent":{"policy_name":"p","version_mark":3,"signers":[],"instance_id":"i","tombstone":false}}`)
	}
	c, err := DecodeTokenClaims(mk("affirming"))
	if err != nil || c.CVMAgent.VersionMark != 3 {
		t.Fatalf("%+v, %v", c, err)
	}
	for _, s := range []string{"", "none", "warning", "contraindicated", "Affirming"} {
		if _, err := DecodeTokenClaims(mk(s)); err == nil {
			t.Errorf("ear.status %q was accepted", s)
		}
	}
}

// Verdicts, tokens and audit records name the members of others.
func TestAdditionalMembersAreBounded(t *testing.T) {
	text := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `,"m%d":{}`, i)
		}
		return "{" + strings.TrimPrefix(b.String(), ",") + "}"
	}
	if _, others, err := DecodeAdditional(text(maxOthers)); err != nil || len(others) != maxOthers {
		t.Errorf("%d, %v", len(others), err)
	}
	if _, _, err := DecodeAdditional(text(maxOthers + 1)); err == nil {
		t.Error("one more was accepted")
	}
}

func FuzzAttestRequest(f *testing.F) {
	f.Add([]byte(`{"version":"0.4.0","tee":"tpm","extra-params":{"cvm-agent":{"version":"cvm-agent/1","ek_cert":"AAE=","ak_public":"AgM="}}}`))
	f.Add([]byte(`{"init-data":null,"runtime-data":{"nonce":"bg==","tee-pubkey":` + testKey + `},"tee-evidence":{"primary_evidence":{"tpm_quote":{}},"additional_evidence":"{\"cvm-agent-eventlog\":\"AQ==\"}"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = DecodeAuthRequest(b)
		_, _ = DecodeTPMEvidence(b)
		r, err := DecodeAttestRequest(b)
		if err != nil {
			return
		}
		// The evidence that was set aside is what decoding all at once finds.
		var whole AttestRequest
		if err := decode(b, &whole, "attest request"); err != nil || !reflect.DeepEqual(&whole, r) {
			t.Fatalf("at once: %+v, %v, in parts: %+v", whole, err, r)
		}
		_, _, _ = DecodeAdditional(r.TEEEvidence.AdditionalEvidence)
		_, _ = DecodeTPMEvidence(r.TEEEvidence.PrimaryEvidence)
		out, err := json.Marshal(r)
		if err != nil {
			t.Fatalf("does not encode: %v", err)
		}
		again, err := DecodeAttestRequest(out)
		if err != nil {
			t.Fatalf("does not decode again: %v", err)
		}
		d1, err1 := ReportData(r.TEEEvidence.AdditionalEvidence, r.RuntimeData.Nonce, r.RuntimeData.TEEPubKey)
		d2, err2 := ReportData(again.TEEEvidence.AdditionalEvidence, again.RuntimeData.Nonce, again.RuntimeData.TEEPubKey)
		if err1 != nil || err2 != nil || d1 != d2 {
			t.Fatalf("report data differs after a round trip (%v, %v)", err1, err2)
		}
	})
}

func FuzzChallenge(f *testing.F) {
	f.Add([]byte(`{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","extra-params":{"cvm-agent":{"credential_blob":"AAE=","secret":"AAE="}}}`))
	f.Add([]byte(`{"type":"https://github.com/confidential-containers/kbs/errors/PolicyDeny","detail":"no"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = DecodeChallenge(b)
		_, _ = DecodeAttestResponse(b)
		_, _ = DecodeTokenClaims(b)
		if e := DecodeError(401, b); strings.ContainsAny(e.Error(), "\n\x1b") {
			t.Fatalf("%q is not one line", e.Error())
		}
	})
}

func FuzzResourceURI(f *testing.F) {
	f.Add("kbs:///default/key/1")
	f.Add("kbs://[::1]:80/a/b/c")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseResourceURI(s)
		if err != nil {
			return
		}
		v, err := ParseResourceURI(u.String())
		if err != nil || v.Path() != u.Path() {
			t.Fatalf("%q: %v, %v", s, v, err)
		}
	})
}
