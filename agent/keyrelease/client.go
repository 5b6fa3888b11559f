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
	"crypto/sha256"
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

// Client opens sessions with the policy's broker, at whichever of its URLs
// answers. It may be used by several goroutines.
type Client struct {
	c         Config
	route     *route
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
	route, err := newRoute(c.Broker)
	if err != nil {
		return nil, err
	}
	transport, err := newTransport(c.Broker.TLSRoots)
	if err != nil {
		return nil, err
	}
	cl := &Client{c: c, route: route, http: transport}
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

// WithWait is the same client, with another OnWait.
func (cl *Client) WithWait(onWait func(err error, next time.Duration)) *Client {
	other := *cl
	if onWait != nil {
		other.c.OnWait = onWait
	}
	return &other
}

// Attest opens a session: new nonce, new key pair, new evidence over the event
// log as it is now, at the URL that answered last or the next one that does.
// When none answers all are tried again, with backoff and jitter, until ctx
// ends; a refusal is final, wherever it comes from. Nothing is measured here,
// so that trying again repeats no event.
func (cl *Client) Attest(ctx context.Context) (*Session, error) {
	return retry(ctx, cl, func() (*Session, error) {
		return failover(ctx, cl, func(base *url.URL) (*Session, error) { return cl.attest(ctx, base) })
	})
}

func (cl *Client) attest(ctx context.Context, base *url.URL) (*Session, error) {
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
	body, cookie, err := cl.post(ctx, base, kbs.PathAuth, nil, request)
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
	s := &Session{client: cl, base: base, cookie: cookie, key: key}
	if s.public, err = kbs.NewTEEPubKey(&key.PublicKey); err != nil {
		return nil, cause.New(cause.Internal, "describe the session key: %w", err)
	}
	evidence, err := cl.evidence(ctx, challenge, s, ours)
	if err != nil {
		return nil, err
	}
	body, _, err = cl.post(ctx, base, kbs.PathAttest, cookie, evidence)
	if err != nil {
		return nil, refusal(cause.AttestationRefused, err)
	}
	if s.claims, err = cl.verifyToken(body, challenge.Nonce, s.public, ours); err != nil {
		return nil, err
	}
	return s, nil
}

// evidence answers a challenge for the session's key. The log and the quote are
// of one moment, which the session remembers: when an event comes in between,
// both are taken again.
func (cl *Client) evidence(ctx context.Context, c *kbs.Challenge, s *Session, ours bool) (*kbs.AttestRequest, error) {
	var extra kbs.AdditionalCVMAgent
	if ours {
		// A broker that leaves the dialect out is found here where the platform
		// needs a credential, and by its token everywhere.
		var err error
		if extra, err = cl.c.Attester.Additional(ctx, c.Nonce, c.ExtraParams.CVMAgent); err != nil {
			return nil, err
		}
	}
	for range 5 {
		// Under dialect kbs the log can travel in the platform's own alone.
		log := cl.c.EventLog()
		events := log
		if ours {
			extra.EventLog, events = log, nil
		}
		additional, err := extra.Encode()
		if err != nil {
			return nil, cause.New(cause.EvidenceFailed, "encode the additional evidence: %w", err)
		}
		reportData, err := kbs.ReportData(additional, c.Nonce, s.public)
		if err != nil {
			return nil, cause.New(cause.EvidenceFailed, "%w", err)
		}
		primary, err := cl.c.Attester.Evidence(ctx, reportData, events)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(log, cl.c.EventLog()) {
			continue
		}
		s.quoted = sha256.Sum256(log)
		r := &kbs.AttestRequest{
			RuntimeData: kbs.RuntimeData{Nonce: c.Nonce, TEEPubKey: s.public},
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
		cl.c.Logger.Warn("the key broker does not answer", "urls", cl.route.String(), "error", err, "retry_in", next.Round(time.Millisecond))
		cl.c.OnWait(err, next)
		select {
		case <-ctx.Done():
			return v, err
		case <-time.After(next):
		}
	}
}
