package keyrelease

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// Lesson 31: the private half of the TEE key stays in the session. It is in
// nothing that is sent, in nothing that the client hands out, prints or logs,
// and gone once the session is closed.
func TestLesson31_TheTEEKeyStaysInTheSession(t *testing.T) {
	b := newTrustee(t)
	var mu sync.Mutex
	var sent bytes.Buffer
	inner := b.server.Config.Handler
	b.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		fmt.Fprintln(&sent, r.Method, r.URL, r.Header, string(body))
		mu.Unlock()
		r.Body = io.NopCloser(bytes.NewReader(body))
		inner.ServeHTTP(w, r)
	})
	var logs bytes.Buffer
	s, err := b.client(func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(&logs, &slog.HandlerOptions{Level: slog.LevelDebug - 4}))
	}).Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resource(deadline(t, time.Minute), "kbs:///default/key/1"); err != nil {
		t.Fatal(err)
	}
	_, refused := s.Resource(deadline(t, time.Minute), "kbs:///default/key/2")
	private, err := s.key.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	d := private.Bytes()
	claims, err := json.Marshal(s.Token())
	if err != nil {
		t.Fatal(err)
	}
	public, err := json.Marshal(s.public)
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	for where, text := range map[string]string{
		"the requests": sent.String(), "the claims": string(claims),
		"the claims as text": fmt.Sprintf("%+v %#v", s.Token(), s.Token()), "the public key": string(public), "the log": logs.String(),
		"a refusal": fmt.Sprint(refused), "the broker's copy": string(b.teeKey),
	} {
		for form, key := range map[string]string{
			"raw": string(d), "hex": hex.EncodeToString(d), "decimal": new(big.Int).SetBytes(d).String(),
			"base64": strings.TrimRight(base64.StdEncoding.EncodeToString(d), "="), "base64url": base64.RawURLEncoding.EncodeToString(d),
		} {
			if strings.Contains(text, key) {
				t.Errorf("the private key is in %s, in %s", where, form)
			}
		}
	}
	var jwk map[string]any
	if err := json.Unmarshal(b.teeKey, &jwk); err != nil || jwk["x"] == nil || jwk["d"] != nil {
		t.Errorf("the key that was sent: %s", b.teeKey)
	}
	s.Close()
	if s.key != nil {
		t.Error("a closed session still has its key")
	}
}
