package broker

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"net/http"
	"regexp"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// policyName is a DNS label, as in the launch policy.
var policyName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// authorise checks the admin token: its SHA-256 against every configured hash,
// each in constant time. Without a configured hash nobody is an admin.
func (s *Server) authorise(r *http.Request) error {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	sum := sha256.Sum256([]byte(token))
	match := 0
	for _, h := range s.admin {
		match |= subtle.ConstantTimeCompare(sum[:], h[:])
	}
	if !ok || match != 1 {
		return kbs.NewError(kbs.VariantAdminAuthAccess, "admin access denied for endpoint %s", r.URL.Path)
	}
	return nil
}

// adminDo authorises, runs one admin operation and puts it on record. f calls
// done, at most once, when the operation is certain to succeed and before it
// takes effect: what cannot be recorded does not happen.
func (s *Server) adminDo(r *http.Request, op, resource string, f func(done func() error) error) error {
	rec := audit.Record{Op: "admin." + op, Peer: peer(r), Resource: resource, Outcome: "ok"}
	recorded := false
	err := s.authorise(r)
	if err == nil {
		err = f(func() error {
			recorded = true
			return s.audit.Write(rec)
		})
	}
	if err == nil && recorded {
		return nil
	}
	if err != nil {
		err = adminError(err)
		rec.Outcome, rec.Reason = "refused", printable(err.Error())
	}
	if werr := s.audit.Write(rec); werr != nil {
		return werr
	}
	return err
}

// answer writes v once it is on record that it was asked for.
func answer(w http.ResponseWriter, v any, done func() error) error {
	if err := done(); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, v)
	return nil
}

// adminError gives errors of an admin's own making their protocol variant.
func adminError(err error) error {
	var e *kbs.Error
	switch {
	case errors.As(err, &e):
		return err
	case errors.Is(err, errNotFound):
		return kbs.NewError(kbs.VariantPluginInternalError, "not found")
	}
	switch cause.Of(err) {
	case cause.Config, cause.PolicyMalformed, cause.PolicyUnknownField, cause.PolicyTooLarge:
		return kbs.NewError(kbs.VariantSerdeError, "%s", err)
	case cause.PolicyBelowFloor, cause.PolicyInvalid, cause.PolicyUnsigned, cause.PolicySignature, cause.PolicyExpired, cause.PolicyOtherName:
		return kbs.NewError(kbs.VariantPolicyDeny, "%s", err)
	}
	return err
}

// adminResource is POST and DELETE of a resource.
func (s *Server) adminResource(w http.ResponseWriter, r *http.Request, u kbs.ResourceURI) error {
	switch r.Method {
	case http.MethodPost:
		return s.adminDo(r, "resource.put", u.String(), func(done func() error) error {
			b, err := body(w, r, MaxResource)
			if err != nil {
				return err
			}
			defer clear(b)
			if len(b) == 0 {
				return kbs.NewError(kbs.VariantSerdeError, "the resource is empty")
			}
			return s.store.PutResource(u, b, done)
		})
	case http.MethodDelete:
		return s.adminDo(r, "resource.delete", u.String(), func(done func() error) error { return s.store.DeleteResource(u, done) })
	}
	return kbs.NewError(kbs.VariantInvalidRequestPath, "method %s is not known for %s", r.Method, r.URL.Path)
}

// adminRoute is everything under /admin/v0/.
func (s *Server) adminRoute(w http.ResponseWriter, r *http.Request) error {
	path := r.URL.Path
	if p, ok := strings.CutPrefix(path, adminclient.PathRule); ok {
		u, err := kbs.ParseResourcePath(p)
		if err != nil {
			return kbs.NewError(kbs.VariantInvalidRequestPath, "%s", err)
		}
		return s.adminRule(w, r, u)
	}
	if name, ok := strings.CutPrefix(path, adminclient.PathMark); ok {
		if !policyName.MatchString(name) {
			return kbs.NewError(kbs.VariantInvalidRequestPath, "policy name %q is not a DNS label", name)
		}
		return s.adminMark(w, r, name)
	}
	if path == adminclient.PathMarks && r.Method == http.MethodGet {
		return s.adminNames(w, r, "mark.list", s.store.Marks)
	}
	if path == adminclient.PathReferences || strings.HasPrefix(path, adminclient.PathReference) {
		return s.adminReferences(w, r, strings.TrimPrefix(strings.TrimPrefix(path, adminclient.PathReferences), "/"))
	}
	if path == adminclient.PathInstances || strings.HasPrefix(path, adminclient.PathInstance) {
		return s.adminInstances(w, r, strings.TrimPrefix(path, adminclient.PathInstance))
	}
	bucket := map[string][]byte{adminclient.PathResources: bucketResources, adminclient.PathRules: bucketRules}[path]
	if bucket == nil || r.Method != http.MethodGet {
		return kbs.NewError(kbs.VariantInvalidRequestPath, "Request path %s is invalid", path)
	}
	return s.adminDo(r, "list", "", func(done func() error) error {
		names, err := s.store.list(bucket)
		if err == nil {
			err = answer(w, names, done)
		}
		return err
	})
}

func (s *Server) adminRule(w http.ResponseWriter, r *http.Request, u kbs.ResourceURI) error {
	switch r.Method {
	case http.MethodGet:
		return s.adminDo(r, "rule.show", u.String(), func(done func() error) error {
			rule, err := s.store.Rule(u)
			if err == nil {
				err = answer(w, rule, done)
			}
			return err
		})
	case http.MethodPut:
		return s.adminDo(r, "rule.set", u.String(), func(done func() error) error {
			b, err := body(w, r, release.MaxRuleSize)
			if err != nil {
				return err
			}
			if s.documents != nil {
				return kbs.NewError(kbs.VariantPolicyDeny, adminclient.RulesAreSigned)
			}
			rule, err := release.DecodeRuleJSON(b)
			if err != nil {
				return err
			}
			return s.store.PutRule(u, *rule, done)
		})
	case http.MethodDelete:
		return s.adminDo(r, "rule.delete", u.String(), func(done func() error) error { return s.store.DeleteRule(u, done) })
	}
	return kbs.NewError(kbs.VariantInvalidRequestPath, "method %s is not known for %s", r.Method, r.URL.Path)
}

func (s *Server) adminMark(w http.ResponseWriter, r *http.Request, name string) error {
	switch r.Method {
	case http.MethodGet:
		return s.adminDo(r, "mark.show", name, func(done func() error) error {
			m, err := s.store.Mark(name)
			if err == nil {
				err = answer(w, m, done)
			}
			return err
		})
	case http.MethodPut:
		return s.adminDo(r, "mark.set", name, func(done func() error) error {
			b, err := body(w, r, 64<<10)
			if err != nil {
				return err
			}
			var m adminclient.Mark
			if err := bounded.DecodeJSON(b, &m, bounded.Limits{Depth: 4}); err != nil {
				return cause.New(cause.Config, "mark: %w", err)
			}
			if m.Version == 0 {
				return cause.New(cause.Config, "mark: version is 0, expected at least 1")
			}
			for _, fp := range m.Signers {
				if d, err := hex.DecodeString(fp); err != nil || len(d) != 32 || strings.ToLower(fp) != fp {
					return cause.New(cause.Config, "mark: signer %q is not 64 lowercase hex digits", fp)
				}
			}
			return s.store.RaiseMark(name, m, done)
		})
	}
	return kbs.NewError(kbs.VariantInvalidRequestPath, "method %s is not known for %s", r.Method, r.URL.Path)
}
