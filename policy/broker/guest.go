package broker

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// maxAuth bounds the body of POST auth, in bytes: an EK certificate and a
// public area.
const maxAuth = 64 << 10

// auth opens a session.
func (s *Server) auth(w http.ResponseWriter, r *http.Request) error {
	b, err := body(w, r, maxAuth)
	if err != nil {
		return err
	}
	req, err := kbs.DecodeAuthRequest(b)
	if err != nil {
		return kbs.NewError(kbs.VariantSerdeError, "%s", err)
	}
	if req.Version != kbs.Version {
		return kbs.NewError(kbs.VariantAttestationError, "%s: expected %s, found %s", kbs.VersionMismatch, kbs.Version, req.Version)
	}
	v := s.verifiers[req.TEE]
	if v == nil {
		return kbs.NewError(kbs.VariantAttestationError, "evidence of TEE %q is not accepted here", req.TEE)
	}
	dialect := kbs.DialectKBS
	var challenge kbs.Challenge
	var pending *appraisal.Pending
	if a := req.ExtraParams.CVMAgent; a != nil {
		dialect = kbs.Dialect
		challenge.ExtraParams.CVMAgent, pending, err = v.Challenge(a, rand.Reader)
		if err != nil {
			return kbs.NewError(kbs.VariantAttestationError, "%s", err)
		}
	}
	n := newSession(req.TEE, dialect, pending, s.now())
	if err := s.sessions.open(n); err != nil {
		return err
	}
	challenge.Nonce = n.nonce
	// No Path attribute, as Trustee sends it: clients then scope it to /kbs/v0.
	http.SetCookie(w, &http.Cookie{Name: kbs.CookieName, Value: n.id})
	writeJSON(w, http.StatusOK, challenge)
	return nil
}

// cookieSession returns the live session of the request's cookie, or nil.
func (s *Server) cookieSession(r *http.Request) (*session, error) {
	c, err := r.Cookie(kbs.CookieName)
	if err != nil {
		return nil, nil
	}
	return s.sessions.get(c.Value)
}

// attest judges evidence and answers with a token. An attested session gets
// its old token again; a session whose evidence was refused is over, because
// its nonce and activation secret are good once.
func (s *Server) attest(w http.ResponseWriter, r *http.Request) error {
	n, err := s.cookieSession(r)
	if err != nil {
		return err
	}
	if n == nil {
		return kbs.NewError(kbs.VariantAttestationError, "no such session, or it is older than %s", SessionLife)
	}
	// Before the body is read: a session holds one body at a time.
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.token != "" {
		writeJSON(w, http.StatusOK, kbs.AttestResponse{Token: n.token})
		return nil
	}
	if n.spent {
		return errSpent()
	}
	b, done, err := s.evidenceBody(w, r)
	if err != nil {
		return err
	}
	defer done()
	// Of two evidences for one nonce, here or at another broker, one is judged.
	if won, err := s.sessions.claim(n); err != nil {
		return err
	} else if !won {
		return errSpent()
	}
	rec := audit.Record{Op: "attest", Peer: peer(r), Session: n.label, TEE: n.tee, Dialect: n.dialect}
	if err := s.judgeEvidence(n, b, &rec); err != nil {
		n.pending = nil
		if eerr := s.sessions.end(n); eerr != nil { // it is spent all the same
			s.log.Error("a refused session could not be removed", "session", n.label, "error", eerr)
		}
		rec.Outcome, rec.Reason = "refused", printable(err.Error())
		if werr := s.audit.Write(rec); werr != nil {
			return werr
		}
		return err
	}
	rec.Outcome = "ok"
	// On record before it takes effect.
	if err := s.audit.Write(rec); err != nil {
		n.token = ""
		return errors.Join(err, s.sessions.end(n))
	}
	n.pending = nil
	if err := s.sessions.attested(n); err != nil {
		n.token = ""
		return err
	}
	writeJSON(w, http.StatusOK, kbs.AttestResponse{Token: n.token})
	return nil
}

// errSpent answers evidence for a nonce that other evidence was judged for.
func errSpent() error {
	return kbs.NewError(kbs.VariantAttestationError, "this session's nonce is spent: open a new one")
}

// Evidence of a usual launch is small. More than smallEvidence bytes are read
// by at most largeBodies requests at once, so that the memory of hostile
// bodies is bounded by the connections times the small size.
const (
	usualEvidence = 32 << 10
	smallEvidence = 128 << 10
	largeBodies   = 64
	largeWait     = 10 * time.Second
)

// evidenceBody reads the body of POST attest. done gives back what it took.
func (s *Server) evidenceBody(w http.ResponseWriter, r *http.Request) (b []byte, done func(), err error) {
	done = func() {}
	in := http.MaxBytesReader(w, r.Body, kbs.MaxBody+1)
	var first bytes.Buffer
	// What a peer announces is believed up to what evidence usually has: growing
	// to it step by step would be a sixth of all that a session allocates.
	first.Grow(int(min(max(r.ContentLength, 0), usualEvidence)) + bytes.MinRead)
	if _, err := first.ReadFrom(io.LimitReader(in, smallEvidence)); err != nil {
		return nil, done, kbs.NewError(kbs.VariantSerdeError, "request body: %s", err)
	}
	head := first.Bytes()
	if len(head) < smallEvidence {
		return head, done, nil
	}
	wait := time.NewTimer(largeWait)
	defer wait.Stop()
	select {
	case s.large <- struct{}{}:
	case <-wait.C:
		// Not the protocol's 401: this is to be tried again.
		e := kbs.NewError(kbs.VariantAttestationError, "busy with other evidence of more than %d bytes", smallEvidence)
		e.Status = http.StatusServiceUnavailable
		return nil, done, e
	case <-r.Context().Done():
		return nil, done, r.Context().Err()
	}
	done = sync.OnceFunc(func() { <-s.large })
	rest, err := bounded.ReadAll(in, kbs.MaxBody-int64(len(head)))
	if err != nil {
		done()
		return nil, func() {}, kbs.NewError(kbs.VariantSerdeError, "request body: %s", err)
	}
	return append(head, rest...), done, nil
}

// factsSize is about what a session keeps beside the text of its init-data and
// additional evidence. The primary evidence, which is larger, is not kept.
const factsSize = 4 << 10

// judgeEvidence appraises one attestation request and, when it is accepted,
// leaves facts, key and token in the session. The caller holds n.mu.
func (s *Server) judgeEvidence(n *session, b []byte, rec *audit.Record) error {
	req, err := kbs.DecodeAttestRequest(b)
	if err != nil {
		return kbs.NewError(kbs.VariantSerdeError, "%s", err)
	}
	if req.RuntimeData.Nonce != n.nonce {
		return kbs.NewError(kbs.VariantAttestationError, "runtime-data.nonce is not this session's")
	}
	reportData, err := kbs.ReportData(req.TEEEvidence.AdditionalEvidence, n.nonce, req.RuntimeData.TEEPubKey)
	if err != nil {
		return kbs.NewError(kbs.VariantSerdeError, "%s", err)
	}
	in := appraisal.Input{
		Dialect:    n.dialect,
		Primary:    req.TEEEvidence.PrimaryEvidence,
		Additional: req.TEEEvidence.AdditionalEvidence,
		ReportData: reportData,
		Nonce:      n.nonce,
		Pending:    n.pending,
		Time:       s.now(),
	}
	if req.InitData != nil {
		in.InitData = []byte(req.InitData.Body)
	}
	a, err := s.verifiers[n.tee].Appraise(in)
	if err != nil {
		s.metrics.attestation(n.tee, nil)
		return kbs.NewError(kbs.VariantAttestationError, "evidence: %s", err)
	}
	s.metrics.attestation(n.tee, a.Verdict)
	rec.Verdict, rec.Identity = a.Verdict.Summary(), a.Facts.Identity
	if err := a.Verdict.Refusal(); err != nil {
		return kbs.NewError(kbs.VariantAttestationError, "%s", err)
	}
	if a.Facts.Identity == "" {
		return fmt.Errorf("evidence of TEE %s was accepted without an identity", n.tee)
	}
	inst, err := s.store.Instance(a.Facts.Identity, s.now())
	if err != nil {
		return fmt.Errorf("instance: %w", err)
	}
	rec.Instance = inst.ID
	if l := a.Facts.Log; l != nil {
		rec.Policy = fmt.Sprintf("%s version %d", l.Running.Policy, l.Running.Version)
	}
	claims, err := s.claims(a.Facts, inst)
	if err != nil {
		return err
	}
	if l := a.Facts.Launch; l != nil {
		l.Initdata.Raw = nil // its digest is known; the entries are what rules look at
	}
	n.facts, n.key, n.instance, n.size = a.Facts, req.RuntimeData.TEEPubKey, inst, factsSize+len(in.InitData)+len(in.Additional)
	token, err := s.issuer.issue(n, reportData, claims, s.now())
	if err != nil {
		return fmt.Errorf("token: %w", err)
	}
	n.token = token
	return nil
}

// attestedSession finds the session by cookie, then by bearer token.
func (s *Server) attestedSession(r *http.Request) (*session, error) {
	n, err := s.cookieSession(r)
	if err != nil {
		return nil, err
	}
	if n != nil && n.attested() {
		return n, nil
	}
	h := r.Header.Get("Authorization")
	if h == "" {
		return nil, kbs.NewError(kbs.VariantTokenNotFound, "Attestation Token not found")
	}
	token, ok := strings.CutPrefix(h, "Bearer ")
	if !ok {
		return nil, kbs.NewError(kbs.VariantTokenNotFound, "Attestation Token not found: the authorization is not a bearer token")
	}
	// The exact token is one that was issued, or it is none.
	if n, err = s.sessions.getByToken(token); err != nil {
		return nil, err
	}
	if n != nil && n.attested() {
		return n, nil
	}
	return nil, kbs.NewError(kbs.VariantTokenVerifierError, "the token is not one of a living session of this broker")
}

func (n *session) attested() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.token != ""
}

// resource releases one resource to an attested session whose facts satisfy
// the resource's rule.
func (s *Server) resource(w http.ResponseWriter, r *http.Request, u kbs.ResourceURI) error {
	n, err := s.attestedSession(r)
	if err != nil {
		return err
	}
	rec := audit.Record{
		Op: "release", Peer: peer(r), Session: n.label, TEE: n.tee, Dialect: n.dialect,
		Identity: n.facts.Identity, Instance: n.instance.ID, Resource: u.String(),
	}
	jwe, err := s.release(n, u, &rec)
	if err != nil {
		s.metrics.releases.WithLabelValues("refused").Inc()
		rec.Outcome, rec.Reason = "refused", printable(err.Error())
		if werr := s.audit.Write(rec); werr != nil {
			return werr
		}
		return err
	}
	rec.Outcome = "ok"
	s.metrics.releases.WithLabelValues("ok").Inc()
	// On record before it leaves.
	if err := s.audit.Write(rec); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, err = w.Write([]byte(jwe))
	if err != nil {
		s.log.Info("the guest went away before its resource", "resource", u.String(), "session", n.label)
	}
	return nil
}

func (s *Server) release(n *session, u kbs.ResourceURI, rec *audit.Record) (string, error) {
	data, err := s.store.Release(n.facts.Identity, u, func(g Grounds) error {
		if g.Instance.Tombstone {
			return kbs.NewError(kbs.VariantPolicyDeny, "instance %s is destroyed", g.Instance.ID)
		}
		rule, document, err := s.rule(g, u)
		rec.Rules = document
		if err != nil {
			return err
		}
		m := &marks{mark: g.Mark}
		v := appraisal.Judge(n.facts, *rule, m.version, s.now())
		rec.Verdict = v.Summary()
		if m.err != nil {
			return fmt.Errorf("version mark: %w", m.err)
		}
		if l := n.facts.Log; l != nil {
			rec.Policy = fmt.Sprintf("%s version %d", l.Running.Policy, l.Running.Version)
		}
		if err := v.Refusal(); err != nil {
			return kbs.NewError(kbs.VariantPolicyDeny, "%s: %s", u, err)
		}
		return nil
	})
	if errors.Is(err, errNotFound) {
		return "", kbs.NewError(kbs.VariantPluginInternalError, "resource %s not found", u)
	}
	if err != nil {
		return "", err
	}
	defer clear(data)
	jwe, err := encrypt(n.key, data)
	if err != nil {
		return "", kbs.NewError(kbs.VariantJWEError, "%s", err)
	}
	return jwe, nil
}
