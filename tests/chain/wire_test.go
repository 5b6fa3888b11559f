package chain

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// wire is a TLS server between the guest and the broker whose certificate the
// guest's policy trusts, as if an attacker had got such a one. request and
// answer (may be nil) change bodies by the endpoint's last element.
type wire struct {
	server          *httptest.Server
	request, answer func(endpoint string, body []byte) []byte
	sent            map[string][]byte // the last body that the guest sent to an endpoint
}

func newWire(t *testing.T, s *shelf) *wire {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.read(t, broker.FileCA)))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(transport.CloseIdleConnections)
	w := &wire{sent: map[string][]byte{}}
	w.server = httptest.NewUnstartedServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		endpoint := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		w.sent[endpoint] = body
		if w.request != nil {
			body = w.request(endpoint, body)
		}
		q, err := http.NewRequestWithContext(r.Context(), r.Method, "https://"+s.address+r.URL.Path, bytes.NewReader(body))
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		q.Header = r.Header.Clone()
		a, err := transport.RoundTrip(q)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		defer a.Body.Close()
		if body, err = io.ReadAll(a.Body); err != nil {
			panic(http.ErrAbortHandler)
		}
		if w.answer != nil && a.StatusCode == http.StatusOK {
			body = w.answer(endpoint, body)
		}
		for _, c := range a.Header.Values("Set-Cookie") {
			out.Header().Add("Set-Cookie", c)
		}
		out.WriteHeader(a.StatusCode)
		_, _ = out.Write(body)
	}))
	w.server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	w.server.StartTLS()
	t.Cleanup(w.server.Close)
	return w
}

// policyBroker is what a policy says of the broker behind the wire.
func (w *wire) policyBroker(t *testing.T, s *shelf) policy.Broker {
	t.Helper()
	b := s.policyBroker(t)
	b.URL = w.server.URL
	b.TLSRoots = []string{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.server.Certificate().Raw}))}
	return b
}

// edit decodes a message, has it changed, and encodes it again.
func edit[T any](t *testing.T, body []byte, change func(*T)) []byte {
	t.Helper()
	var m T
	if err := json.Unmarshal(body, &m); err != nil {
		t.Error(err)
		return body
	}
	change(&m)
	changed, err := json.Marshal(m)
	if err != nil {
		t.Error(err)
	}
	return changed
}

// strangerKey is a session key of somebody else's.
func strangerKey(t *testing.T) kbs.TEEPubKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := kbs.NewTEEPubKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return public
}

// The quote covers the session's key, its nonce and the log: each swapped on
// the way is refused, and so is evidence that was good a session ago.
func TestLesson11_KeyNonceAndLogAreTied(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	w := newWire(t, s)
	client := v.client(t, w.policyBroker(t, s), nil)
	released(t, client) // the wire alone changes nothing
	good, stranger := w.sent["attest"], strangerKey(t)

	attest := func(change func(*kbs.AttestRequest)) func(string, []byte) []byte {
		return func(endpoint string, body []byte) []byte {
			if endpoint != "attest" {
				return body
			}
			return edit(t, body, change)
		}
	}
	additional := func(change func(*kbs.AdditionalCVMAgent)) func(string, []byte) []byte {
		return attest(func(m *kbs.AttestRequest) {
			m.TEEEvidence.AdditionalEvidence = string(edit(t, []byte(m.TEEEvidence.AdditionalEvidence), change))
		})
	}
	answer := func(endpoint string, change func([]byte) []byte) func(string, []byte) []byte {
		return func(at string, body []byte) []byte {
			if at != endpoint {
				return body
			}
			return change(body)
		}
	}
	var old kbs.AttestRequest
	if err := json.Unmarshal(good, &old); err != nil {
		t.Fatal(err)
	}
	var oldExtra kbs.AdditionalCVMAgent
	if err := json.Unmarshal([]byte(old.TEEEvidence.AdditionalEvidence), &oldExtra); err != nil || len(oldExtra.Activation) == 0 {
		t.Fatalf("additional evidence %+v, %v", oldExtra, err)
	}
	for _, c := range []struct {
		what            string
		request, answer func(string, []byte) []byte
		code            cause.Code
		says            string
	}{
		{"another session key", attest(func(m *kbs.AttestRequest) { m.RuntimeData.TEEPubKey = stranger }), nil,
			cause.AttestationRefused, appraisal.CheckReportData + ":"},
		{"another nonce in the evidence", attest(func(m *kbs.AttestRequest) { m.RuntimeData.Nonce = old.RuntimeData.Nonce }), nil,
			cause.AttestationRefused, "nonce"},
		{"an old nonce in the challenge", nil, answer("auth", func(body []byte) []byte {
			return edit(t, body, func(m *kbs.Challenge) { m.Nonce = old.RuntimeData.Nonce })
		}), cause.AttestationRefused, "nonce"},
		{"the log of before the last event", additional(func(m *kbs.AdditionalCVMAgent) { m.EventLog = v.earlier }), nil,
			cause.AttestationRefused, appraisal.CheckReportData + ":"},
		{"no log", additional(func(m *kbs.AdditionalCVMAgent) { m.EventLog = nil }), nil,
			cause.AttestationRefused, appraisal.CheckReportData + ":"},
		{"the activation secret of a session ago", additional(func(m *kbs.AdditionalCVMAgent) { m.Activation = oldExtra.Activation }), nil,
			cause.AttestationRefused, appraisal.CheckReportData + ":"},
		{"the whole evidence of a session ago", func(endpoint string, body []byte) []byte {
			if endpoint == "attest" {
				return good
			}
			return body
		}, nil, cause.AttestationRefused, "nonce"},
		{"the quote of a session ago", attest(func(m *kbs.AttestRequest) { m.TEEEvidence = old.TEEEvidence }), nil,
			cause.AttestationRefused, appraisal.CheckReportData + ":"},
	} {
		w.request, w.answer = c.request, c.answer
		t.Run(c.what, func(t *testing.T) { refused(t, client, c.code, c.says) })
	}
	w.request, w.answer = nil, nil
	released(t, client)
}

// What comes back is tied as well: a token of another session, a resource of
// another session, and anything that is not a JWE to this session's key.
func TestAnswersOfAnotherSessionAreRefused(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	w := newWire(t, s)
	client := v.client(t, w.policyBroker(t, s), nil)
	old := map[string][]byte{}
	w.answer = func(endpoint string, body []byte) []byte {
		old[endpoint] = body
		return body
	}
	released(t, client)
	at := func(endpoint string, instead []byte) func(string, []byte) []byte {
		return func(e string, body []byte) []byte {
			if e == endpoint {
				return instead
			}
			return body
		}
	}
	for what, c := range map[string]struct {
		answer func(string, []byte) []byte
		code   cause.Code
		says   string
	}{
		"the token of a session ago":    {at("attest", old["attest"]), cause.TokenInvalid, "another session"},
		"the resource of a session ago": {at("web", old["web"]), cause.KeyMalformed, "does not decrypt"},
		"the resource as it is":         {at("web", kek), cause.KeyMalformed, "JWE"},
		"an empty resource":             {at("web", nil), cause.KeyMalformed, "JWE"},
	} {
		w.answer = c.answer
		t.Run(what, func(t *testing.T) { refused(t, client, c.code, c.says) })
	}
	w.answer = nil

	session, err := client.Attest(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	session.Close()
	if _, err := session.Resource(context.Background(), webKey); err == nil {
		t.Error("a closed session still opens resources")
	}
}
