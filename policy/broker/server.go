package broker

import (
	"crypto/ecdsa"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Options is what a Server is made of.
type Options struct {
	Store       *Store
	Audit       *audit.Log
	TokenKey    *ecdsa.PrivateKey // P-256
	Verifiers   []appraisal.Verifier
	AdminHashes [][32]byte // SHA-256 of admin tokens; empty: the admin side is off
	MaxSessions int        // at least 1
	RuleSigners *RuleSigners
	// PeerRate is how many requests a second one peer may make for long, PeerBurst
	// how many at once. A rate of 0 or less is no limit.
	PeerRate, PeerBurst int
	Logger              *slog.Logger
	Now                 func() time.Time
}

// Server answers the KBS protocol and the admin side.
type Server struct {
	store     *Store
	audit     *audit.Log
	issuer    *issuer
	verifiers map[string]appraisal.Verifier
	admin     [][32]byte
	documents *documents // nil: rules are not signed here
	sessions  sessions
	peers     *peers // nil: no limit
	metrics   *metrics
	large     chan struct{} // a place for each large body
	log       *slog.Logger
	now       func() time.Time
}

// New checks the options and makes the server.
func New(o Options) (*Server, error) {
	if o.Store == nil || o.Audit == nil || o.TokenKey == nil || o.Logger == nil || o.Now == nil {
		return nil, cause.New(cause.Internal, "broker: store, audit log, token key, logger and clock are all needed")
	}
	if o.MaxSessions < 1 {
		return nil, cause.New(cause.Config, "limits.sessions is %d, expected at least 1", o.MaxSessions)
	}
	i, err := newIssuer(o.TokenKey)
	if err != nil {
		return nil, err
	}
	s := &Server{
		store: o.Store, audit: o.Audit, issuer: i, admin: o.AdminHashes, log: o.Logger, now: o.Now,
		verifiers: map[string]appraisal.Verifier{},
		large:     make(chan struct{}, largeBodies),
	}
	if o.RuleSigners != nil {
		if s.documents, err = newDocuments(*o.RuleSigners); err != nil {
			return nil, err
		}
	}
	for _, v := range o.Verifiers {
		name := v.TEE()
		// Evidence of these proves nothing: no build accepts a verifier for them.
		if name == "" || strings.HasPrefix(name, "sample") || s.verifiers[name] != nil {
			return nil, cause.New(cause.Config, "verifier %q is not allowed, or there twice", name)
		}
		s.verifiers[name] = v
	}
	if s.sessions, err = o.Store.sessions(o.MaxSessions, o.Now); err != nil {
		return nil, err
	}
	s.metrics = newMetrics(s.sessions.live)
	s.watch()
	if o.PeerRate > 0 {
		s.peers = newPeers(o.PeerRate, max(1, o.PeerBurst), o.Now)
	}
	return s, nil
}

// Close keeps what sessions there are for the next start; nothing is to be
// served any more. The store stays open.
func (s *Server) Close() error { return s.sessions.close() }

// ServeHTTP routes by the exact path: nothing is cleaned, decoded or
// redirected, so that one resource has one path.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	start, endpoint := time.Now(), endpoint(r.URL.Path)
	err := s.admit(w, r)
	if err == nil {
		err = s.route(w, r)
	}
	if err == nil {
		s.metrics.request(endpoint, "ok", start)
		return
	}
	var e *kbs.Error
	if !errors.As(err, &e) {
		s.log.Error("request failed", "method", r.Method, "path", printable(r.URL.Path), "peer", peer(r), "error", err)
		e = kbs.NewError(kbs.VariantPluginInternalError, "internal error")
		if cause.Of(err) == cause.StorageFailed {
			// Not the protocol's 401: another broker, or this one later, can answer.
			e.Status = http.StatusServiceUnavailable
		}
	}
	s.metrics.request(endpoint, e.Variant(), start)
	if e.Status == http.StatusTooManyRequests { // counted; a line for each would be a flood of its own
		writeJSON(w, e.Status, e.Body)
		return
	}
	e.Body.Detail = printable(e.Body.Detail)
	s.log.Info("refused", "method", r.Method, "path", printable(r.URL.Path), "peer", peer(r), "type", e.Variant(), "detail", e.Body.Detail)
	writeJSON(w, e.Status, e.Body)
}

// admit holds a peer to its rate. Whoever watches over the broker is not held.
func (s *Server) admit(w http.ResponseWriter, r *http.Request) error {
	if s.peers == nil || r.URL.Path == pathHealth {
		return nil
	}
	ok, wait := s.peers.admit(r.RemoteAddr)
	if ok {
		return nil
	}
	s.metrics.limited.Inc()
	return limited(w, wait)
}

const pathHealth = "/healthz"

// endpoint is a request's path as a metric's label.
func endpoint(path string) string {
	switch {
	case path == pathHealth:
		return "healthz"
	case path == kbs.PathAuth:
		return "auth"
	case path == kbs.PathAttest:
		return "attest"
	case strings.HasPrefix(path, kbs.PathResource):
		return "resource"
	case strings.HasPrefix(path, "/admin/v0/"):
		return "admin"
	}
	return "other"
}

func (s *Server) route(w http.ResponseWriter, r *http.Request) error {
	path := r.URL.Path
	if r.URL.RawPath != "" || strings.Contains(path, "%") {
		return kbs.NewError(kbs.VariantInvalidRequestPath, "percent-encoding in the path")
	}
	switch {
	case path == pathHealth && r.Method == http.MethodGet:
		return s.health(w)
	case path == kbs.PathAuth && r.Method == http.MethodPost:
		return s.auth(w, r)
	case path == kbs.PathAttest && r.Method == http.MethodPost:
		return s.attest(w, r)
	case strings.HasPrefix(path, kbs.PathResource):
		u, err := kbs.ParseResourcePath(strings.TrimPrefix(path, kbs.PathResource))
		if err != nil {
			return kbs.NewError(kbs.VariantInvalidRequestPath, "%s", err)
		}
		if r.Method == http.MethodGet {
			return s.resource(w, r, u)
		}
		return s.adminResource(w, r, u)
	case strings.HasPrefix(path, "/admin/v0/"):
		return s.adminRoute(w, r)
	case strings.HasPrefix(path, kbs.PathPrefix) && strings.Count(path, "/") > 3:
		plugin, _, _ := strings.Cut(strings.TrimPrefix(path, kbs.PathPrefix), "/")
		return kbs.NewError(kbs.VariantPluginNotFound, "Plugin %s not found", plugin)
	}
	return kbs.NewError(kbs.VariantInvalidRequestPath, "Request path %s is invalid", path)
}

func (s *Server) health(w http.ResponseWriter) error {
	if err := s.store.Check(); err != nil {
		return err
	}
	_, err := w.Write([]byte("ok\n"))
	return err
}

// body reads a request body of at most max bytes.
func body(w http.ResponseWriter, r *http.Request, max int64) ([]byte, error) {
	b, err := bounded.ReadAll(http.MaxBytesReader(w, r.Body, max+1), max)
	if err != nil {
		return nil, kbs.NewError(kbs.VariantSerdeError, "request body: %s", err)
	}
	return b, nil
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil { // the types written here always encode
		status, b = http.StatusInternalServerError, []byte(`{}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b)
}

func peer(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// printable makes text that may hold a peer's bytes one short, plain line.
func printable(s string) string {
	const most = 4 << 10
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || (r >= 0x7f && r < 0xa0) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// marks looks up version marks for a judgement; a failure to read one is kept
// and must be looked at before the verdict is used.
type marks struct {
	mark func(policy string) (adminclient.Mark, error)
	err  error
}

func (m *marks) version(policy string) uint64 {
	mark, err := m.mark(policy)
	if err != nil {
		m.err = errors.Join(m.err, err)
	}
	return mark.Version
}

// claims is the signed statement about the running policy.
func (s *Server) claims(f appraisal.Facts, inst Instance) (*kbs.CVMAgentClaims, error) {
	if f.Dialect != kbs.Dialect || f.Log == nil {
		return nil, nil
	}
	var mark adminclient.Mark
	mark, err := s.store.Mark(f.Log.Running.Policy)
	if err != nil {
		return nil, fmt.Errorf("version mark: %w", err)
	}
	if mark.Signers == nil {
		mark.Signers = []string{}
	}
	return &kbs.CVMAgentClaims{
		PolicyName:  f.Log.Running.Policy,
		VersionMark: mark.Version,
		Signers:     mark.Signers,
		InstanceID:  inst.ID,
		Tombstone:   inst.Tombstone,
	}, nil
}
