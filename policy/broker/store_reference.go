package broker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

var (
	bucketReferences     = []byte("references")      // document name → envelope as received
	bucketReferenceMarks = []byte("reference-marks") // document name → ReferenceMark; outlives the document
	bucketReferenceIndex = []byte("reference-index") // resource path → document name
)

// ReferenceMark is the high-water mark of a document name.
type ReferenceMark = adminclient.ReferenceMark

// PutReference stores a reference document as it was received and makes it the
// one of all resources that it names; paths are theirs. A version below the
// mark, the mark's version with another digest, and a resource that belongs to
// another document are refused.
func (s *Store) PutReference(name string, m ReferenceMark, paths []string, envelope []byte, record func() error) error {
	return s.change(record, func(tx transaction) error {
		old, err := s.referenceMark(tx, name)
		if err != nil {
			return err
		}
		if err := old.Follows(name, m); err != nil {
			return err
		}
		if err := s.unindex(tx, name); err != nil {
			return err
		}
		for _, p := range paths {
			other, err := s.get(tx, bucketReferenceIndex, []byte(p))
			if err == nil {
				return cause.New(cause.PolicyInvalid, "kbs:///%s belongs to the document %q", p, other)
			}
			if !errors.Is(err, errNotFound) {
				return err
			}
			if err := s.put(tx, bucketReferenceIndex, []byte(p), []byte(name)); err != nil {
				return err
			}
		}
		b, err := json.Marshal(m)
		if err != nil {
			return err
		}
		if err := s.put(tx, bucketReferenceMarks, []byte(name), b); err != nil {
			return err
		}
		return s.put(tx, bucketReferences, []byte(name), envelope)
	})
}

// unindex takes a document's resources out of the index.
func (s *Store) unindex(tx transaction, name string) error {
	var mine [][]byte
	err := tx.each(bucketReferenceIndex, func(k, sealed []byte) error {
		owner, err := s.unseal(bucketReferenceIndex, k, sealed)
		if err == nil && string(owner) == name {
			mine = append(mine, bytes.Clone(k))
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, k := range mine {
		if err := tx.remove(bucketReferenceIndex, k); err != nil {
			return err
		}
	}
	return nil
}

// Reference returns a document as it was received, with its mark; errNotFound
// when there is none.
func (s *Store) Reference(name string) (envelope []byte, m ReferenceMark, err error) {
	err = s.backend.view(func(tx transaction) error {
		envelope, m, err = s.reference(tx, name)
		return err
	})
	return envelope, m, err
}

func (s *Store) reference(tx transaction, name string) ([]byte, ReferenceMark, error) {
	envelope, err := s.get(tx, bucketReferences, []byte(name))
	if err != nil {
		return nil, ReferenceMark{}, err
	}
	m, err := s.referenceMark(tx, name)
	return envelope, m, err
}

// referenceFor is the document that a resource belongs to; nil: none.
func (s *Store) referenceFor(tx transaction, u kbs.ResourceURI) (*StoredReference, error) {
	name, err := s.get(tx, bucketReferenceIndex, []byte(u.Path()))
	if errors.Is(err, errNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	envelope, m, err := s.reference(tx, string(name))
	if err != nil { // a missing one must not pass for a missing resource
		return nil, fmt.Errorf("reference values %s: %s", name, err.Error())
	}
	return &StoredReference{Name: string(name), Mark: m, Envelope: envelope}, nil
}

// StoredReference is a document as the storage has it: to be verified before
// anything in it is believed.
type StoredReference struct {
	Name     string
	Mark     ReferenceMark
	Envelope []byte
}

// References lists the documents' names.
func (s *Store) References() ([]string, error) { return s.names(bucketReferences) }

// Marks lists the policy names that have a version mark.
func (s *Store) Marks() ([]string, error) { return s.names(bucketMarks) }

func (s *Store) names(bucket []byte) ([]string, error) {
	names := []string{}
	err := s.backend.view(func(tx transaction) error {
		return tx.each(bucket, func(k, _ []byte) error {
			names = append(names, string(k))
			return nil
		})
	})
	return names, err
}

// DeleteReference removes a document, or says errNotFound. Its resources are
// released to nobody from then on; its mark stays.
func (s *Store) DeleteReference(name string, record func() error) error {
	return s.change(record, func(tx transaction) error {
		if err := there(tx, bucketReferences, []byte(name)); err != nil {
			return err
		}
		if err := s.unindex(tx, name); err != nil {
			return err
		}
		return tx.remove(bucketReferences, []byte(name))
	})
}

// referenceMark is zero when there is none.
func (s *Store) referenceMark(tx transaction, name string) (m ReferenceMark, err error) {
	b, err := s.get(tx, bucketReferenceMarks, []byte(name))
	if errors.Is(err, errNotFound) {
		return m, nil
	}
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(b, &m)
}
