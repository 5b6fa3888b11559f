package keyrelease

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// compact is JSON without the spaces that mean nothing.
func compact(t *testing.T, data []byte) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, data); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// What the client sends, member by member, against kbs-protocol.md: the test
// reads and computes by hand and uses no type of ours.
func TestWireOfAuthAndAttest(t *testing.T) {
	snp, err := os.ReadFile("testdata/trustee-snp-evidence.json")
	if err != nil {
		t.Fatal(err)
	}
	initdata := "version = \"0.1.0\"\n# <&> \"é\"\n"
	for name, c := range map[string]struct {
		tee, primary, dialect string
		initdata              []byte
	}{
		"snp under kbs":               {"snp", string(snp), "kbs", []byte(initdata)},
		"snp under cvm-agent/1":       {"snp", string(snp), "cvm-agent/1", []byte(initdata)},
		"snp without initdata":        {"snp", string(snp), "kbs", nil},
		"tdx under kbs":               {"tdx", `{"cc_eventlog":null,"quote":"BAACAA=="}`, "kbs", []byte(initdata)},
		"tdx with a log":              {"tdx", `{"cc_eventlog":"AQAAAA==","quote":"BAACAA=="}`, "cvm-agent/1", nil},
		"az-snp-vtpm under kbs":       {"az-snp-vtpm", `{"version":2}`, "kbs", []byte(initdata)},
		"az-tdx-vtpm without anybody": {"az-tdx-vtpm", `{"version":2}`, "cvm-agent/1", nil},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTrustee(t)
			a := &attester{tee: c.tee, primary: c.primary}
			cl := b.client(func(f *Config) { f.Attester, f.Initdata, f.Broker.Dialect = a, c.initdata, c.dialect })
			if _, err := cl.Attest(deadline(t, time.Minute)); err != nil {
				t.Fatal(err)
			}
			wantAuth := `{"version":"0.4.0","tee":"` + c.tee + `","extra-params":{"supported-hash-algorithms":["sha384"]}}`
			if c.dialect == "cvm-agent/1" {
				wantAuth = strings.TrimSuffix(wantAuth, "}}") + `,"cvm-agent":{"version":"cvm-agent/1"}}}`
			}
			if b.bodies[0] != wantAuth {
				t.Errorf("auth %s, expected %s", b.bodies[0], wantAuth)
			}
			var q map[string]json.RawMessage
			if err := json.Unmarshal([]byte(b.bodies[1]), &q); err != nil || len(q) != 3 {
				t.Fatalf("attest has %d members, %v", len(q), err)
			}
			switch {
			case c.initdata == nil && string(q["init-data"]) != "null":
				t.Errorf("init-data %s, expected null", q["init-data"])
			case c.initdata != nil:
				var i map[string]string
				if err := json.Unmarshal(q["init-data"], &i); err != nil || len(i) != 2 || i["format"] != "toml" || i["body"] != initdata {
					t.Errorf("init-data %v, %v", i, err)
				}
			}
			var runtime struct {
				Nonce string            `json:"nonce"`
				Key   map[string]string `json:"tee-pubkey"`
			}
			if err := json.Unmarshal(q["runtime-data"], &runtime); err != nil || runtime.Nonce != b.nonce {
				t.Fatalf("runtime-data %s, %v", q["runtime-data"], err)
			}
			k := runtime.Key
			x, errX := base64.RawURLEncoding.DecodeString(k["x"])
			y, errY := base64.RawURLEncoding.DecodeString(k["y"])
			if len(k) != 5 || k["kty"] != "EC" || k["crv"] != "P-256" || k["alg"] != "ECDH-ES+A256KW" || len(x) != 32 || len(y) != 32 || errX != nil || errY != nil {
				t.Errorf("tee-pubkey %v", k)
			}
			var evidence map[string]json.RawMessage
			if err := json.Unmarshal(q["tee-evidence"], &evidence); err != nil || len(evidence) != 2 {
				t.Fatalf("tee-evidence has %d members, %v", len(evidence), err)
			}
			if got, want := compact(t, evidence["primary_evidence"]), compact(t, []byte(c.primary)); got != want {
				t.Errorf("primary_evidence %.100s, expected %.100s", got, want)
			}
			var additional string
			if err := json.Unmarshal(evidence["additional_evidence"], &additional); err != nil {
				t.Fatalf("additional_evidence %s is no string", evidence["additional_evidence"])
			}
			if want := map[string]string{"kbs": "", "cvm-agent/1": `{"cvm-agent-eventlog":"bG9n"}`}[c.dialect]; additional != want {
				t.Errorf("additional_evidence %q, expected %q", additional, want)
			}
			// RFC 8785: members in order, no spaces.
			canonical := fmt.Sprintf(`{"additional-evidence":"%s","nonce":"%s","tee-pubkey":{"alg":"ECDH-ES+A256KW","crv":"P-256","kty":"EC","x":"%s","y":"%s"}}`,
				strings.ReplaceAll(additional, `"`, `\"`), b.nonce, k["x"], k["y"])
			if want := sha512.Sum384([]byte(canonical)); want != a.data {
				t.Errorf("report_data %x, expected %x", a.data, want)
			}
			if (a.events != nil) != (c.dialect == "kbs") {
				t.Errorf("events for the platform's own log: %q", a.events)
			}
		})
	}
}

// The cookie of a session goes with its own requests, and with nothing else.
func TestCookieScope(t *testing.T) {
	b := newTrustee(t)
	cl := b.client(nil)
	s, err := cl.Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	first := b.id
	b.id = sessionID()
	other, err := cl.Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Resource(deadline(t, time.Minute), "kbs:///default/key/1"); err != nil {
		t.Fatal(err)
	}
	// The first session's cookie is still its own: this broker no longer knows it.
	if _, err := s.Resource(deadline(t, time.Minute), "kbs:///default/key/1"); Variant(err) != "TokenNotFound" {
		t.Errorf("got %v", err)
	}
	n := "kbs-session-id="
	want := []string{"", n + first, "", n + b.id, n + b.id, n + first}
	if got := b.cookies; strings.Join(got, ",") != strings.Join(want, ",") {
		t.Errorf("cookies %q, expected %q", got, want)
	}
	for _, bad := range []string{"kbs-session-id=", "kbs-session-id=xyz", "kbs-session-id=" + strings.Repeat("ab", 100), "session=" + b.id, "kbs-session-id=abcd"} {
		b.refuse = func(w http.ResponseWriter, path string) bool {
			w.Header().Set("Set-Cookie", bad)
			_, _ = io.WriteString(w, `{"nonce":"`+base64.StdEncoding.EncodeToString(make([]byte, 32))+`","extra-params":""}`)
			return true
		}
		if _, err := cl.Attest(deadline(t, time.Minute)); cause.Of(err) != cause.BrokerProtocol {
			t.Errorf("cookie %q gave %v", bad, err)
		}
	}
}

// Error bodies are told apart by the suffix of their type, whatever the status.
func TestErrorBodies(t *testing.T) {
	const prefix = "https://github.com/confidential-containers/kbs/errors/"
	for name, c := range map[string]struct {
		status          int
		body            string
		attest, release cause.Code
		variant         string
		shown           string
	}{
		"PolicyDeny":             {401, `{"type":"` + prefix + `PolicyDeny","detail":"debug is on"}`, cause.AttestationRefused, cause.KeyRefused, "PolicyDeny", "debug is on"},
		"PolicyDeny with 403":    {403, `{"type":"` + prefix + `PolicyDeny","detail":"debug is on"}`, cause.AttestationRefused, cause.KeyRefused, "PolicyDeny", "debug is on"},
		"a missing resource":     {401, `{"type":"` + prefix + `PluginInternalError","detail":"no such file"}`, cause.AttestationRefused, cause.KeyRefused, "PluginInternalError", "no such file"},
		"AttestationError":       {401, `{"type":"` + prefix + `AttestationError","detail":"KBS Client Protocol Version Mismatch"}`, cause.AttestationRefused, cause.KeyRefused, "AttestationError", "Version Mismatch"},
		"a variant of tomorrow":  {401, `{"type":"` + prefix + `SomethingNew","detail":"x y"}`, cause.AttestationRefused, cause.KeyRefused, "SomethingNew", "x y"},
		"InvalidRequestPath":     {404, `{"type":"` + prefix + `InvalidRequestPath","detail":"p"}`, cause.BrokerProtocol, cause.BrokerProtocol, "InvalidRequestPath", "p"},
		"PluginNotFound":         {404, `{"type":"` + prefix + `PluginNotFound","detail":"p"}`, cause.BrokerProtocol, cause.BrokerProtocol, "PluginNotFound", "p"},
		"a type of others":       {401, `{"type":"https://evil.example/PolicyDeny","detail":"x"}`, cause.BrokerProtocol, cause.BrokerProtocol, "", "401"},
		"no JSON":                {401, `denied`, cause.BrokerProtocol, cause.BrokerProtocol, "", "401"},
		"nothing":                {401, ``, cause.BrokerProtocol, cause.BrokerProtocol, "", "401"},
		"duplicate members":      {401, `{"type":"` + prefix + `PolicyDeny","type":"x","detail":"y"}`, cause.BrokerProtocol, cause.BrokerProtocol, "", "401"},
		"a detail of many lines": {401, `{"type":"` + prefix + `PolicyDeny","detail":"a\nb"}`, cause.AttestationRefused, cause.KeyRefused, "PolicyDeny", "a b"},
		"a redirect":             {302, ``, cause.BrokerProtocol, cause.BrokerProtocol, "", "redirect"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTrustee(t)
			s, err := b.client(nil).Attest(deadline(t, time.Minute))
			if err != nil {
				t.Fatal(err)
			}
			asked := 0
			b.refuse = func(w http.ResponseWriter, _ string) bool {
				asked++
				w.Header().Set("Location", "https://evil.example/")
				w.WriteHeader(c.status)
				_, _ = io.WriteString(w, c.body)
				return true
			}
			_, attest := b.client(nil).Attest(deadline(t, time.Minute))
			_, release := s.Resource(deadline(t, time.Minute), "kbs:///default/key/1")
			for what, got := range map[string]struct {
				err  error
				code cause.Code
			}{"attest": {attest, c.attest}, "release": {release, c.release}} {
				if cause.Of(got.err) != got.code || Variant(got.err) != c.variant || !strings.Contains(got.err.Error(), c.shown) || strings.Contains(got.err.Error(), "\n") {
					t.Errorf("%s: %v, variant %q; expected %s, %q with %q", what, got.err, Variant(got.err), got.code, c.variant, c.shown)
				}
				var r *Refusal
				if c.status != 302 && (!errors.As(got.err, &r) || r.Status != c.status) {
					t.Errorf("%s: no *Refusal with status %d in %v", what, c.status, got.err)
				}
			}
			if asked != 2 {
				t.Errorf("asked %d times: a refusal is final", asked)
			}
		})
	}
}

func TestVersionMismatchIsShown(t *testing.T) {
	b := newTrustee(t)
	b.version = "0.2.0"
	_, err := b.client(nil).Attest(deadline(t, time.Minute))
	if cause.Of(err) != cause.AttestationRefused || Variant(err) != kbs.VariantAttestationError || !strings.Contains(err.Error(), "KBS Client Protocol Version Mismatch") {
		t.Errorf("got %v", err)
	}
	if len(b.requests) != 1 {
		t.Errorf("asked %d times", len(b.requests))
	}
}

// The one key that opens an answer is this session's P-256 key. An answer to
// another key, or another curve's, opens nothing.
func TestJWEByCurve(t *testing.T) {
	for name, curve := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		b := newTrustee(t)
		b.resource = func(w http.ResponseWriter, _ string) {
			_, _ = io.WriteString(w, encryptedTo(t, &key.PublicKey, []byte("x")))
		}
		s, err := b.client(nil).Attest(deadline(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		if data, err := s.Resource(deadline(t, time.Minute), "kbs:///default/key/1"); cause.Of(err) != cause.KeyMalformed || data != nil {
			t.Errorf("to a foreign %s key: %d bytes, %v", name, len(data), err)
		}
		// What the protocol's other curve would be opened with.
		if curve != elliptic.P384() {
			data, err := decrypt([]byte(encryptedTo(t, &key.PublicKey, []byte("resource"))), key)
			if err != nil || string(data) != "resource" {
				t.Errorf("%s: %q, %v", name, data, err)
			}
		}
	}
}
