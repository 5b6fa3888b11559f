package keyrelease

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func TestAttestAndRelease(t *testing.T) {
	for _, dialect := range []string{"cvm-agent/1", "kbs"} {
		t.Run(dialect, func(t *testing.T) {
			b := newTrustee(t)
			s, err := b.client(func(c *Config) { c.Broker.Dialect = dialect }).Attest(deadline(t, time.Minute))
			if err != nil {
				t.Fatal(err)
			}
			if got := s.Token(); got.HasMark != (dialect != "kbs") || (got.HasMark && (got.VersionMark != 2 || got.PolicyName != "demo" || got.InstanceID != "0011")) {
				t.Errorf("claims %+v", got)
			}
			data, err := s.Resource(deadline(t, time.Minute), "kbs:///default/key/1")
			if err != nil || string(data) != b.secret {
				t.Errorf("resource %q, %v", data, err)
			}
			s.Close()
			if _, err := s.Resource(deadline(t, time.Minute), "kbs:///default/key/1"); err == nil {
				t.Error("a closed session released a key")
			}
		})
	}
}

func TestLesson11_TokensOfOtherKeysNoncesAndSessionsAreRefused(t *testing.T) {
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := kbs.NewTEEPubKey(&other.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	cpu := func(c map[string]any) map[string]any {
		return c["submods"].(map[string]any)["cpu0"].(map[string]any)
	}
	for name, spoil := range map[string]func(b *trustee){
		"signed by a key that only its own header names": func(b *trustee) {
			b.sign = func(p []byte) string { return b.signed(other, p) }
		},
		"not signed": func(b *trustee) {
			b.sign = func(p []byte) string {
				e := base64.RawURLEncoding.EncodeToString
				return e([]byte(`{"alg":"none"}`)) + "." + e(p) + "."
			}
		},
		"over another session's key": func(b *trustee) {
			b.claims = func(c map[string]any) {
				cpu(c)["ear.veraison.annotated-evidence"] = map[string]any{"runtime_data_claims": map[string]any{"tee-pubkey": foreign}}
			}
		},
		"over another nonce": func(b *trustee) { b.claims = func(c map[string]any) { c["eat_nonce"] = "x" } },
		"contraindicated":    func(b *trustee) { b.claims = func(c map[string]any) { cpu(c)["ear.status"] = "contraindicated" } },
		"without a status":   func(b *trustee) { b.claims = func(c map[string]any) { delete(cpu(c), "ear.status") } },
		"without the key": func(b *trustee) {
			b.claims = func(c map[string]any) { delete(cpu(c), "ear.veraison.annotated-evidence") }
		},
		"valid for a year":         func(b *trustee) { b.claims = func(c map[string]any) { c["exp"] = time.Now().Unix() + 365*24*3600 } },
		"expired before its issue": func(b *trustee) { b.claims = func(c map[string]any) { c["exp"] = time.Now().Unix() - 10 } },
		"silent about the policy":  func(b *trustee) { b.claims = func(c map[string]any) { delete(c, "cvm-agent") } },
	} {
		t.Run(name, func(t *testing.T) {
			b := newTrustee(t)
			spoil(b)
			if _, err := b.client(nil).Attest(deadline(t, time.Minute)); cause.Of(err) != cause.TokenInvalid {
				t.Errorf("a token %s gave %v, expected %s", name, err, cause.TokenInvalid)
			}
		})
	}
}

func TestLesson12_NoConnectionToAHostThatAnAnnotationNames(t *testing.T) {
	b := newTrustee(t)
	touched := make(chan string, 1)
	evil := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { touched <- r.URL.Path }))
	defer evil.Close()
	s, err := b.client(nil).Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	data, err := s.Resource(deadline(t, time.Minute), "kbs://"+strings.TrimPrefix(evil.URL, "http://")+"/default/key/1")
	if err != nil || string(data) != b.secret {
		t.Errorf("the policy's broker was not asked: %q, %v", data, err)
	}
	select {
	case p := <-touched:
		t.Errorf("the annotation's host was asked for %s", p)
	default:
	}
}

func TestLesson13_AnswersThatAreNoJWEAreRefused(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter, jwe string){
		"the raw resource": func(w http.ResponseWriter, _ string) { _, _ = io.WriteString(w, "a very secret resource") },
		"32 raw bytes":     func(w http.ResponseWriter, _ string) { _, _ = w.Write(make([]byte, 32)) },
		"nothing":          func(http.ResponseWriter, string) {},
		"half of it":       func(w http.ResponseWriter, jwe string) { _, _ = io.WriteString(w, jwe[:len(jwe)/2]) },
		"a wrong tag": func(w http.ResponseWriter, jwe string) {
			var m map[string]string
			_ = json.Unmarshal([]byte(jwe), &m)
			m["tag"] = base64.RawURLEncoding.EncodeToString(make([]byte, 16))
			_ = json.NewEncoder(w).Encode(m)
		},
		"another protected header": func(w http.ResponseWriter, jwe string) {
			var m map[string]string
			_ = json.Unmarshal([]byte(jwe), &m)
			m["protected"] = base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"dir","enc":"A256GCM"}`))
			_ = json.NewEncoder(w).Encode(m)
		},
		"an unknown member": func(w http.ResponseWriter, jwe string) {
			_, _ = io.WriteString(w, strings.TrimSuffix(strings.TrimSpace(jwe), "}")+`,"aad":"eA"}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTrustee(t)
			b.resource = answer
			s, err := b.client(nil).Attest(deadline(t, time.Minute))
			if err != nil {
				t.Fatal(err)
			}
			data, err := s.Resource(deadline(t, time.Minute), "kbs:///default/key/1")
			if cause.Of(err) != cause.KeyMalformed || data != nil {
				t.Errorf("%s gave %d bytes and %v, expected %s", name, len(data), err, cause.KeyMalformed)
			}
		})
	}
}

func TestRefusalByARuleIsFinal(t *testing.T) {
	b := newTrustee(t)
	s, err := b.client(nil).Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	before := len(b.requests)
	_, err = s.Resource(deadline(t, time.Minute), "kbs:///default/key/other")
	if cause.Of(err) != cause.KeyRefused || !strings.Contains(err.Error(), "no rule") {
		t.Errorf("got %v, expected %s with the broker's reason", err, cause.KeyRefused)
	}
	if n := len(b.requests) - before; n != 1 {
		t.Errorf("asked %d times after a refusal", n)
	}
}

func TestLesson20_ABlipOfTheBrokerIsWaitedFor(t *testing.T) {
	b := newTrustee(t)
	b.down = 3
	var waits []error
	a := &attester{}
	cl := b.client(func(c *Config) {
		c.OnWait = func(err error, _ time.Duration) { waits = append(waits, err) }
		c.Attester = a
	})
	if _, err := cl.Attest(deadline(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if len(waits) != 3 {
		t.Errorf("%d waits shown, expected 3", len(waits))
	}
	// Lesson 8: what is repeated is the asking, never a measurement.
	if a.quotes != 1 {
		t.Errorf("%d quotes for one session", a.quotes)
	}
	b.server.Close()
	if _, err := cl.Attest(deadline(t, time.Second)); cause.Of(err) != cause.BrokerUnavailable {
		t.Errorf("a broker that stays away gave %v, expected %s", err, cause.BrokerUnavailable)
	}
}

func TestBrokersThatAreNotThePolicysAreRefused(t *testing.T) {
	b := newTrustee(t)
	stranger := newTrustee(t)
	cl := b.client(func(c *Config) { c.Broker.TLSRoots = stranger.config().Broker.TLSRoots })
	// httptest shares one certificate; a pool of another root is made here.
	cl.http.Transport.(*http.Transport).TLSClientConfig.RootCAs = x509.NewCertPool()
	if _, err := cl.Attest(deadline(t, time.Minute)); cause.Of(err) != cause.BrokerTLS {
		t.Errorf("a broker of other roots gave %v, expected %s", err, cause.BrokerTLS)
	}
	b.challenge = func(bool) string { return `{"nonce":"` + b.nonce + `","extra-params":""}` }
	if _, err := b.client(nil).Attest(deadline(t, time.Minute)); cause.Of(err) != cause.BrokerProtocol {
		t.Errorf("a broker that leaves the dialect out gave %v, expected %s: leaving out is no downgrade", err, cause.BrokerProtocol)
	}
	for name, change := range map[string]func(*Config){
		"no TLS roots":    func(c *Config) { c.Broker.TLSRoots = nil },
		"no token keys":   func(c *Config) { c.Broker.TokenKeys = nil },
		"plain HTTP":      func(c *Config) { c.Broker.URL = "http://127.0.0.1:1" },
		"another dialect": func(c *Config) { c.Broker.Dialect = "x" },
	} {
		c := b.config()
		change(&c)
		if _, err := New(c); cause.Of(err) != cause.PolicyInvalid {
			t.Errorf("%s gave %v", name, err)
		}
	}
}

func TestAnEventBetweenLogAndQuoteTakesBothAgain(t *testing.T) {
	b := newTrustee(t)
	log := []byte("one")
	a := &attester{}
	a.onQuote = func() {
		if a.quotes == 1 {
			log = []byte("one two")
		}
	}
	cl := b.client(func(c *Config) { c.EventLog = func() []byte { return log }; c.Attester = a })
	if _, err := cl.Attest(deadline(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if a.quotes != 2 {
		t.Errorf("%d quotes, expected 2", a.quotes)
	}
}

func TestLesson29_NoKeyInErrorsOrLogs(t *testing.T) {
	b := newTrustee(t)
	b.secret = "kek-kek-kek-kek-kek-kek-kek-kek!"
	var log strings.Builder
	cl := b.client(func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	s, err := cl.Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	_, err = UnwrapLayerKey(deadline(t, time.Minute), s, wrap(t, []byte(b.secret), `{"symkey":"c2hvcnQtc2VjcmV0"}`, "kbs:///default/key/1"))
	if err == nil {
		t.Fatal("a short key was accepted")
	}
	for _, secret := range []string{b.secret, "short-secret", "c2hvcnQtc2VjcmV0"} {
		if strings.Contains(err.Error()+log.String(), secret) {
			t.Errorf("%q is in the error or the log", secret)
		}
	}
}

func FuzzTokenClaims(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	pub, err := kbs.NewTEEPubKey(&key.PublicKey)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"iat":1,"exp":2,"submods":{"cpu0":{"ear.status":"affirming"}}}`))
	f.Fuzz(func(_ *testing.T, payload []byte) {
		_, _ = checkClaims(payload, "n", pub, true)
	})
}
