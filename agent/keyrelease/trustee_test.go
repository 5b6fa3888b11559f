package keyrelease

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// attester is evidence in memory: the broker of these tests judges none.
type attester struct {
	tee     string // "": tpm
	primary string // "": made up
	data    [48]byte
	quotes  int
	events  []byte // as the last evidence had them
	onQuote func()
}

func (a *attester) TEE() string {
	if a.tee != "" {
		return a.tee
	}
	return "tpm"
}
func (a *attester) Auth(context.Context) (*kbs.CVMAgentAuth, error) {
	if a.tee != "" {
		return &kbs.CVMAgentAuth{Version: "cvm-agent/1"}, nil
	}
	return &kbs.CVMAgentAuth{Version: "cvm-agent/1", EKCert: []byte("ek"), AKPublic: []byte("ak")}, nil
}
func (a *attester) Additional(_ context.Context, _ string, c *kbs.CVMAgentChallenge) (kbs.AdditionalCVMAgent, error) {
	if a.tee != "" {
		return kbs.AdditionalCVMAgent{}, nil
	}
	if c == nil {
		return kbs.AdditionalCVMAgent{}, cause.New(cause.BrokerProtocol, "no credential in the challenge")
	}
	return kbs.AdditionalCVMAgent{Activation: make([]byte, 32)}, nil
}
func (a *attester) Evidence(_ context.Context, rd [48]byte, events []byte) (json.RawMessage, error) {
	a.quotes++
	a.events, a.data = events, rd
	if a.onQuote != nil {
		a.onQuote()
	}
	if a.primary != "" {
		return json.RawMessage(a.primary), nil
	}
	return json.RawMessage(fmt.Sprintf(`{"tpm_quote":{"report_data":"%x"}}`, rd)), nil
}
func (*attester) Register() eventlog.Register                         { return nil }
func (*attester) CheckLaunch(context.Context, *policy.Initdata) error { return nil }

// trustee plays a broker from the wire facts alone: every answer is written by
// hand, from the requests' raw JSON.
type trustee struct {
	t      *testing.T
	server *httptest.Server
	key    *ecdsa.PrivateKey // signs tokens
	id     string            // of its sessions

	mu       sync.Mutex
	requests []string
	cookies  []string // Cookie headers, one for each request
	bodies   []string
	teeKey   json.RawMessage
	nonce    string
	secret   string // the resource

	// Each may be replaced by a test to misbehave.
	down      int // answer 503 so many times
	challenge func(ours bool) string
	claims    func(c map[string]any)
	sign      func(payload []byte) string
	resource  func(w http.ResponseWriter, jwe string)
	version   string // the one that it speaks
	refuse    func(w http.ResponseWriter, path string) bool
}

func newTrustee(t *testing.T) *trustee {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b := &trustee{t: t, key: key, id: sessionID(), version: "0.4.0", secret: "a very secret resource"}
	b.server = httptest.NewTLSServer(http.HandlerFunc(b.serve))
	b.server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	t.Cleanup(b.server.Close)
	return b
}

// sessionID is 32 hex digits, as Trustee's are.
func sessionID() string {
	raw := make([]byte, 16)
	_, _ = rand.Read(raw)
	return hex.EncodeToString(raw)
}

func (b *trustee) serve(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	body, _ := io.ReadAll(r.Body)
	b.requests = append(b.requests, r.Method+" "+r.URL.Path)
	b.cookies = append(b.cookies, strings.Join(r.Header["Cookie"], "|"))
	b.bodies = append(b.bodies, string(body))
	if b.down > 0 {
		b.down--
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	cookie, _ := r.Cookie("kbs-session-id")
	if b.refuse != nil && b.refuse(w, r.URL.Path) {
		return
	}
	if r.URL.Path != "/kbs/v0/auth" && (cookie == nil || cookie.Value != b.id) {
		deny(w, "TokenNotFound", "no session")
		return
	}
	switch r.URL.Path {
	case "/kbs/v0/auth":
		var q struct {
			Version string                     `json:"version"`
			TEE     string                     `json:"tee"`
			Extra   map[string]json.RawMessage `json:"extra-params"`
		}
		if json.Unmarshal(body, &q) != nil || q.Version != b.version {
			deny(w, "AttestationError", "KBS Client Protocol Version Mismatch")
			return
		}
		_, ours := q.Extra["cvm-agent"]
		raw := make([]byte, 32)
		_, _ = rand.Read(raw)
		b.nonce = base64.StdEncoding.EncodeToString(raw)
		w.Header().Set("Set-Cookie", "kbs-session-id="+b.id)
		answer := `{"nonce":"` + b.nonce + `","extra-params":""}`
		if ours && q.TEE == "tpm" {
			answer = `{"nonce":"` + b.nonce + `","extra-params":{"cvm-agent":{"credential_blob":"AAEA","secret":"AAEA"}}}`
		}
		if b.challenge != nil {
			answer = b.challenge(ours)
		}
		_, _ = io.WriteString(w, answer)
	case "/kbs/v0/attest":
		var q struct {
			RuntimeData struct {
				Nonce string          `json:"nonce"`
				Key   json.RawMessage `json:"tee-pubkey"`
			} `json:"runtime-data"`
		}
		if json.Unmarshal(body, &q) != nil || q.RuntimeData.Nonce != b.nonce {
			deny(w, "AttestationError", "nonce")
			return
		}
		b.teeKey = q.RuntimeData.Key
		now := time.Now().Unix()
		claims := map[string]any{
			"iat": now, "exp": now + 300, "eat_nonce": b.nonce,
			"submods": map[string]any{"cpu0": map[string]any{
				"ear.status": "affirming",
				"ear.veraison.annotated-evidence": map[string]any{
					"runtime_data_claims": map[string]any{"nonce": b.nonce, "tee-pubkey": b.teeKey},
				},
				"something-new": 1,
			}},
			"cvm-agent": map[string]any{"policy_name": "demo", "version_mark": 2, "signers": []string{"ab"}, "instance_id": "0011", "tombstone": false},
		}
		if b.claims != nil {
			b.claims(claims)
		}
		payload, _ := json.Marshal(claims)
		token := b.signed(b.key, payload)
		if b.sign != nil {
			token = b.sign(payload)
		}
		_, _ = io.WriteString(w, `{"token":"`+token+`"}`)
	case "/kbs/v0/resource/default/key/1":
		jwe := b.encrypted([]byte(b.secret))
		if b.resource != nil {
			b.resource(w, jwe)
			return
		}
		_, _ = io.WriteString(w, jwe)
	default:
		deny(w, "PolicyDeny", "no rule")
	}
}

func deny(w http.ResponseWriter, variant, detail string) {
	w.WriteHeader(http.StatusUnauthorized)
	_, _ = fmt.Fprintf(w, `{"type":"https://github.com/confidential-containers/kbs/errors/%s","detail":"%s"}`, variant, detail)
}

func (b *trustee) signed(key *ecdsa.PrivateKey, payload []byte) string {
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{EmbedJWK: true}).WithType("JWT"))
	if err != nil {
		b.t.Error(err)
		return ""
	}
	jws, err := s.Sign(payload)
	if err != nil {
		b.t.Error(err)
		return ""
	}
	out, _ := jws.CompactSerialize()
	return out
}

func (b *trustee) encrypted(data []byte) string {
	var k jose.JSONWebKey
	if err := json.Unmarshal(b.teeKey, &k); err != nil {
		b.t.Error(err)
		return ""
	}
	return encryptedTo(b.t, k.Key, data)
}

func encryptedTo(t *testing.T, pub any, data []byte) string {
	b := struct{ t *testing.T }{t}
	e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.ECDH_ES_A256KW, Key: pub}, nil)
	if err != nil {
		b.t.Error(err)
		return ""
	}
	o, err := e.Encrypt(data)
	if err != nil {
		b.t.Error(err)
		return ""
	}
	return o.FullSerialize()
}

func (b *trustee) config() Config {
	spki, err := x509.MarshalPKIXPublicKey(&b.key.PublicKey)
	if err != nil {
		b.t.Fatal(err)
	}
	return Config{
		Broker: policy.Broker{
			URL:       b.server.URL,
			TLSRoots:  []string{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b.server.Certificate().Raw}))},
			TokenKeys: []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))},
		},
		Initdata:  []byte("version = \"0.1.0\"\n"),
		EventLog:  func() []byte { return []byte("log") },
		Attester:  &attester{},
		FirstWait: time.Millisecond,
	}
}

func (b *trustee) client(change func(*Config)) *Client {
	b.t.Helper()
	c := b.config()
	if change != nil {
		change(&c)
	}
	cl, err := New(c)
	if err != nil {
		b.t.Fatal(err)
	}
	return cl
}

func deadline(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
