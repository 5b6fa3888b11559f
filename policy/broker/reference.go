package broker

import (
	"crypto"
	"crypto/sha256"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// RuleSigners are who may sign reference documents: Threshold distinct keys of
// Keys. A broker that has them takes no other rules.
type RuleSigners struct {
	Keys      []crypto.PublicKey
	Threshold int
}

// instanceID is the form of the broker's random value.
var instanceID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// maxOpened bounds the documents that are kept decoded.
const maxOpened = 64

// documents verifies reference documents each time that they are read. What
// one envelope's exact bytes opened to is kept: the same bytes, the same keys,
// the same answer.
type documents struct {
	signers RuleSigners
	mu      sync.Mutex
	opened  map[[32]byte]*release.Opened // by SHA-256 of the envelope
}

func newDocuments(s RuleSigners) (*documents, error) {
	ids := map[string]bool{}
	for _, k := range s.Keys {
		id, err := dsse.Fingerprint(k)
		if err != nil {
			return nil, cause.New(cause.Config, "ruleSigners: %w", err)
		}
		ids[id] = true
	}
	if s.Threshold < 1 || s.Threshold > len(ids) {
		return nil, cause.New(cause.Config, "ruleSigners: threshold %d, expected 1 to %d, the number of distinct keys", s.Threshold, len(ids))
	}
	return &documents{signers: s, opened: map[[32]byte]*release.Opened{}}, nil
}

func (d *documents) open(envelope []byte) (*release.Opened, error) {
	key := sha256.Sum256(envelope)
	d.mu.Lock()
	o := d.opened[key]
	d.mu.Unlock()
	if o != nil {
		return o, nil
	}
	o, err := release.OpenReference(envelope, d.signers.Keys, d.signers.Threshold)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.opened) >= maxOpened {
		clear(d.opened)
	}
	d.opened[key] = o
	return o, nil
}

// load verifies what the storage holds: the signatures, and that it is the very
// document that the mark of its name is of, so that an older envelope put back
// into the storage is found out.
func (d *documents) load(r StoredReference) (*release.Opened, error) {
	o, err := d.open(r.Envelope)
	if err != nil {
		return nil, err
	}
	if o.Reference.Name != r.Name {
		return nil, cause.New(cause.PolicyOtherName, "reference values %q are stored as %q", o.Reference.Name, r.Name)
	}
	if got := markOf(o); got != r.Mark {
		return nil, cause.New(cause.PolicyBelowFloor, "reference values %q: version %d %s in storage, the mark is version %d %s", r.Name, got.Version, got.Digest, r.Mark.Version, r.Mark.Digest)
	}
	return o, nil
}

func markOf(o *release.Opened) ReferenceMark {
	return ReferenceMark{Version: o.Reference.Version, Digest: o.Digest}
}

// rule is the one that a resource is judged by, and what the records call the
// document that it is of.
func (s *Server) rule(g Grounds, u kbs.ResourceURI) (r *release.Rule, document string, err error) {
	none := kbs.NewError(kbs.VariantPolicyDeny, "there is no release rule for %s", u)
	if s.documents == nil {
		if g.Rule == nil {
			return nil, "", none
		}
		return g.Rule, "", nil
	}
	stored, err := g.Reference()
	if err != nil {
		return nil, "", err
	}
	if stored == nil {
		return nil, "", none
	}
	document = fmt.Sprintf("%s version %d %s", stored.Name, stored.Mark.Version, stored.Mark.Digest)
	o, err := s.documents.load(*stored)
	if err == nil {
		err = o.CheckExpiry(s.now())
	}
	if err != nil {
		return nil, document, kbs.NewError(kbs.VariantPolicyDeny, "%s: %s", u, err)
	}
	if r = o.Rule(u.String()); r == nil {
		return nil, document, none
	}
	return r, document, nil
}

// adminReferences is everything about reference documents; name is empty for
// the list.
func (s *Server) adminReferences(w http.ResponseWriter, r *http.Request, name string) error {
	if r.URL.Path == adminclient.PathReferences && r.Method == http.MethodGet {
		return s.adminNames(w, r, "reference.list", s.store.References)
	}
	if !policyName.MatchString(name) {
		return kbs.NewError(kbs.VariantInvalidRequestPath, "document name %q is not a DNS label", name)
	}
	switch r.Method {
	case http.MethodGet:
		return s.adminDo(r, "reference.show", name, func(done func() error) error {
			v, err := s.describeReference(name)
			if err == nil {
				err = answer(w, v, done)
			}
			return err
		})
	case http.MethodPut:
		return s.adminDo(r, "reference.set", name, func(done func() error) error {
			b, err := body(w, r, dsse.MaxSize)
			if err != nil {
				return err
			}
			return s.putReference(name, b, done)
		})
	case http.MethodDelete:
		return s.adminDo(r, "reference.delete", name, func(done func() error) error { return s.store.DeleteReference(name, done) })
	}
	return kbs.NewError(kbs.VariantInvalidRequestPath, "method %s is not known for %s", r.Method, r.URL.Path)
}

// adminNames answers with a list of names.
func (s *Server) adminNames(w http.ResponseWriter, r *http.Request, op string, list func() ([]string, error)) error {
	return s.adminDo(r, op, "", func(done func() error) error {
		names, err := list()
		if err == nil {
			err = answer(w, names, done)
		}
		return err
	})
}

func (s *Server) putReference(name string, envelope []byte, done func() error) error {
	if s.documents == nil {
		return kbs.NewError(kbs.VariantPolicyDeny, "reference documents are not taken: the configuration names no ruleSigners")
	}
	o, err := s.documents.open(envelope)
	if err != nil {
		return err
	}
	if o.Reference.Name != name {
		return cause.New(cause.PolicyOtherName, "the document's name is %q, not %q", o.Reference.Name, name)
	}
	if err := o.CheckExpiry(s.now()); err != nil {
		return err
	}
	var paths []string
	for uri := range o.Reference.Rules() {
		u, err := kbs.ParseResourceURI(uri)
		if err != nil {
			return cause.Wrap(cause.Internal, err)
		}
		paths = append(paths, u.Path())
	}
	slices.Sort(paths)
	return s.store.PutReference(name, markOf(o), paths, envelope, done)
}

// describeReference verifies a stored document and says what it is.
func (s *Server) describeReference(name string) (*adminclient.Reference, error) {
	envelope, mark, err := s.store.Reference(name)
	if err != nil {
		return nil, err
	}
	if s.documents == nil {
		return nil, kbs.NewError(kbs.VariantPolicyDeny, "the configuration names no ruleSigners to verify it by")
	}
	o, err := s.documents.load(StoredReference{Name: name, Mark: mark, Envelope: envelope})
	if err != nil {
		return nil, err
	}
	v := &adminclient.Reference{Name: name, Version: mark.Version, Digest: mark.Digest, Expires: o.Reference.Expires, Signers: o.Signers, Envelope: envelope}
	for uri := range o.Reference.Rules() {
		v.Resources = append(v.Resources, uri)
	}
	slices.Sort(v.Resources)
	return v, nil
}

// adminInstances is everything about instances; rest is what follows the
// instance endpoint, or the whole path of the list.
func (s *Server) adminInstances(w http.ResponseWriter, r *http.Request, rest string) error {
	if rest == adminclient.PathInstances {
		if r.Method != http.MethodGet {
			return kbs.NewError(kbs.VariantInvalidRequestPath, "method %s is not known for %s", r.Method, r.URL.Path)
		}
		return s.adminDo(r, "instance.list", "", func(done func() error) error {
			list, err := s.store.Instances()
			if err == nil {
				err = answer(w, list, done)
			}
			return err
		})
	}
	id, tombstone := rest, false
	if r.Method == http.MethodPut {
		id, tombstone = strings.CutSuffix(rest, "/tombstone")
	}
	if !instanceID.MatchString(id) || (r.Method != http.MethodGet && !tombstone) {
		return kbs.NewError(kbs.VariantInvalidRequestPath, "Request path %s is invalid", r.URL.Path)
	}
	if tombstone {
		return s.adminDo(r, "instance.tombstone", id, func(done func() error) error { return s.store.SetTombstone(id, done) })
	}
	return s.adminDo(r, "instance.show", id, func(done func() error) error {
		i, err := s.store.InstanceByID(id)
		if err == nil {
			err = answer(w, i, done)
		}
		return err
	})
}
