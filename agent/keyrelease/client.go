// Package keyrelease gets keys from the policy's key broker after remote
// attestation: the guest side of the KBS protocol 0.4.0 and of dialect
// cvm-agent/1, and the unwrapping of ocicrypt layer keys on top of it.
//
// It promises: every session has a new nonce, a new key pair and new evidence;
// only the broker that the policy names is talked to, over TLS that chains to
// the policy's roots; a token counts only when a key that the policy pins
// signed it over this session's key; a refusal is final; and no key appears in
// an error. It decides nothing about what may run.
package keyrelease

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Config is what a client needs to know. Everything that is trusted in it
// comes from the signed policy.
type Config struct {
	Broker   policy.Broker
	Initdata []byte        // exact TOML that the launch is bound to
	EventLog func() []byte // CEL-TLV bytes of the log as it is now
	Attester platform.Attester
	Logger   *slog.Logger     // nil: none
	Now      func() time.Time // nil: time.Now
	// OnWait is told of each wait for a broker that does not answer. May be nil.
	OnWait func(err error, next time.Duration)
	// FirstWait is the first pause between tries; zero: 500 ms.
	FirstWait time.Duration
}

// Client opens sessions with one broker.
type Client struct {
	c         Config
	base      *url.URL
	http      *http.Client
	tokenKeys []crypto.PublicKey
}

// New checks the configuration. It opens no connection.
func New(c Config) (*Client, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.OnWait == nil {
		c.OnWait = func(error, time.Duration) {}
	}
	if c.FirstWait == 0 {
		c.FirstWait = 500 * time.Millisecond
	}
	switch c.Broker.Dialect {
	case "":
		c.Broker.Dialect = kbs.Dialect
	case kbs.Dialect, kbs.DialectKBS:
	default:
		return nil, cause.New(cause.PolicyInvalid, "broker.dialect %q is not known", c.Broker.Dialect)
	}
	base, err := url.Parse(c.Broker.URL)
	if err != nil || base.Scheme != "https" || base.Host == "" || base.User != nil {
		return nil, cause.New(cause.PolicyInvalid, "broker.url %q is not https://host[:port]", c.Broker.URL)
	}
	transport, err := newTransport(c.Broker.TLSRoots)
	if err != nil {
		return nil, err
	}
	cl := &Client{c: c, base: base, http: transport}
	for i, pem := range c.Broker.TokenKeys {
		key, err := dsse.ParsePublicKeyPEM([]byte(pem))
		if err != nil {
			return nil, cause.New(cause.PolicyInvalid, "broker.tokenKeys[%d]: %w", i, err)
		}
		cl.tokenKeys = append(cl.tokenKeys, key)
	}
	if len(cl.tokenKeys) == 0 {
		return nil, cause.New(cause.PolicyInvalid, "broker.tokenKeys is empty: no token could be verified")
	}
	return cl, nil
}

// Attest opens a session: new nonce, new key pair, new evidence over the event
// log as it is now. A broker that does not answer is tried again, with backoff
// and jitter, until ctx ends; a refusal is final. Nothing is measured here, so
// that trying again repeats no event.
func (cl *Client) Attest(ctx context.Context) (*Session, error) {
	return retry(ctx, cl, func() (*Session, error) { return cl.attest(ctx) })
}

func (cl *Client) attest(ctx context.Context) (*Session, error) {
	request := kbs.AuthRequest{Version: kbs.Version, TEE: cl.c.Attester.TEE()}
	request.ExtraParams.SupportedHashAlgorithms = []string{"sha384"}
	ours := cl.c.Broker.Dialect == kbs.Dialect
	if ours {
		auth, err := cl.c.Attester.Auth(ctx)
		if err != nil {
			return nil, err
		}
		request.ExtraParams.CVMAgent = auth
	}
	body, cookie, err := cl.post(ctx, kbs.PathAuth, nil, request)
	if err != nil {
		return nil, refusal(cause.AttestationRefused, err)
	}
	if cookie == nil {
		return nil, cause.New(cause.BrokerProtocol, "the broker set no %s cookie", kbs.CookieName)
	}
	challenge, err := kbs.DecodeChallenge(body)
	if err != nil {
		return nil, cause.New(cause.BrokerProtocol, "%w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, cause.New(cause.Internal, "make the session key: %w", err)
	}
	s := &Session{client: cl, cookie: cookie, key: key}
	if s.public, err = kbs.NewTEEPubKey(&key.PublicKey); err != nil {
		return nil, cause.New(cause.Internal, "describe the session key: %w", err)
	}
	evidence, err := cl.evidence(ctx, challenge, s.public, ours)
	if err != nil {
		return nil, err
	}
	body, _, err = cl.post(ctx, kbs.PathAttest, cookie, evidence)
	if err != nil {
		return nil, refusal(cause.AttestationRefused, err)
	}
	if s.claims, err = cl.verifyToken(body, challenge.Nonce, s.public, ours); err != nil {
		return nil, err
	}
	return s, nil
}

// evidence answers a challenge. The log and the quote are of one moment: when
// an event comes in between, both are taken again.
func (cl *Client) evidence(ctx context.Context, c *kbs.Challenge, key kbs.TEEPubKey, ours bool) (*kbs.AttestRequest, error) {
	var extra kbs.AdditionalCVMAgent
	if ours {
		if c.ExtraParams.CVMAgent == nil {
			return nil, cause.New(cause.BrokerProtocol, "the broker does not speak dialect %s: no credential in its challenge", kbs.Dialect)
		}
		secret, err := cl.c.Attester.Activate(ctx, c.ExtraParams.CVMAgent)
		if err != nil {
			return nil, err
		}
		extra.Activation = secret
	}
	for range 5 {
		var log []byte
		if ours {
			log = cl.c.EventLog()
			extra.EventLog = log
		}
		additional, err := extra.Encode()
		if err != nil {
			return nil, cause.New(cause.EvidenceFailed, "encode the additional evidence: %w", err)
		}
		reportData, err := kbs.ReportData(additional, c.Nonce, key)
		if err != nil {
			return nil, cause.New(cause.EvidenceFailed, "%w", err)
		}
		primary, err := cl.c.Attester.Evidence(ctx, reportData)
		if err != nil {
			return nil, err
		}
		if ours && !bytes.Equal(log, cl.c.EventLog()) {
			continue
		}
		r := &kbs.AttestRequest{
			RuntimeData: kbs.RuntimeData{Nonce: c.Nonce, TEEPubKey: key},
			TEEEvidence: kbs.CompositeEvidence{PrimaryEvidence: primary, AdditionalEvidence: additional},
		}
		if cl.c.Initdata != nil {
			r.InitData = &kbs.InitData{Format: "toml", Body: string(cl.c.Initdata)}
		}
		return r, nil
	}
	return nil, cause.New(cause.EvidenceFailed, "the event log kept changing during the quote")
}

// retry repeats do while the broker does not answer, until ctx ends.
func retry[T any](ctx context.Context, cl *Client, do func() (T, error)) (T, error) {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = cl.c.FirstWait
	b.MaxInterval = 15 * time.Second
	for {
		v, err := do()
		if err == nil || cause.Of(err) != cause.BrokerUnavailable || errors.Is(err, errSessionGone) {
			return v, err
		}
		next := b.NextBackOff()
		if deadline, ok := ctx.Deadline(); ctx.Err() != nil || (ok && time.Until(deadline) < next) {
			return v, err
		}
		cl.c.Logger.Warn("the key broker does not answer", "url", cl.base.Redacted(), "error", err, "retry_in", next.Round(time.Millisecond))
		cl.c.OnWait(err, next)
		select {
		case <-ctx.Done():
			return v, err
		case <-time.After(next):
		}
	}
}

// refusal gives an error answer of the broker the cause code that fits.
func refusal(code cause.Code, err error) error {
	var (
		coded  *cause.Error
		answer *kbs.Error
	)
	if errors.As(err, &coded) || !errors.As(err, &answer) {
		return err
	}
	switch answer.Variant() {
	case "", kbs.VariantInvalidRequestPath, kbs.VariantPluginNotFound, kbs.VariantSerdeError:
		return cause.New(cause.BrokerProtocol, "%w", answer)
	}
	return cause.New(code, "%w", answer)
}
