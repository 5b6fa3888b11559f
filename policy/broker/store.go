package broker

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// MaxResource bounds one resource, in bytes.
const MaxResource = 1 << 20

var (
	errNotFound = errors.New("not found")

	bucketResources = []byte("resources")
	bucketRules     = []byte("rules")
	bucketMarks     = []byte("marks")
	bucketInstances = []byte("instances")
	bucketMeta      = []byte("meta")
	buckets         = [][]byte{bucketResources, bucketRules, bucketMarks, bucketInstances, bucketSessions, bucketMeta, bucketReferences, bucketReferenceMarks, bucketReferenceIndex}
	keyCheck        = []byte("kek-check")
	keyData         = []byte("data-key") // wrapped by a token; not sealed
)

// Instance is one guest that has attested, known by its attested key.
type Instance struct {
	ID        string    `json:"id"` // 32 hex digits, random
	FirstSeen time.Time `json:"firstSeen"`
	LastSeen  time.Time `json:"lastSeen,omitzero"` // to a day
	Tombstone bool      `json:"tombstone"`         // nothing is released to it any more; never cleared
}

// transaction is one atomic piece of work on sealed values by bucket and name.
// Within it everything is of one moment, and its writes take effect together
// or not at all.
type transaction interface {
	// read returns the sealed value, or nil when there is none.
	read(bucket, key []byte) ([]byte, error)
	write(bucket, key, sealed []byte) error
	// remove also succeeds when there is nothing.
	remove(bucket, key []byte) error
	each(bucket []byte, f func(key, sealed []byte) error) error
}

// backend is where sealed values are: a bbolt file or a PostgreSQL database.
// A function that returns an error undoes its transaction, and is run once.
type backend interface {
	view(f func(tx transaction) error) error
	// update sees what every earlier update wrote, and no other runs beside it.
	update(f func(tx transaction) error) error
	// get is a view of one value, nil when there is none.
	get(bucket, key []byte) ([]byte, error)
	// insert is update for a value that is made once and is in the way of many
	// at the same time: it keeps a value that is there and returns what is there
	// after it. Concurrent ones may share the cost of becoming durable.
	insert(bucket, key, sealed []byte) ([]byte, error)
	close() error
}

// Store keeps resources, rules, marks and instances in a backend. Names are in
// the clear; every value is sealed with AES-256-GCM under the KEK, with bucket
// and name as additional data, so that no value can be moved to another name.
// Replacing everything, or one value, by an older copy is not detected.
type Store struct {
	backend backend
	aead    cipher.AEAD
}

// newStore seals b under the data key of k; a KEK other than the one that the
// backend was first used with is refused. It closes b when it fails.
func newStore(b backend, k kek.Source) (*Store, error) {
	s := &Store{backend: b}
	if err := b.update(func(tx transaction) error { return s.unlock(tx, k) }); err != nil {
		_ = b.close()
		return nil, cause.New(cause.StorageFailed, "storage: %w", err)
	}
	return s, nil
}

// unlock gets the data key. It runs in a transaction so that of brokers that
// start together on an empty database one alone makes a key.
func (s *Store) unlock(tx transaction, k kek.Source) error {
	check, err := tx.read(bucketMeta, keyCheck)
	if err != nil {
		return err
	}
	kept, err := tx.read(bucketMeta, keyData)
	if err != nil {
		return err
	}
	other := errors.New("the KEK is not the one that this storage was made with")
	key, keep, err := k.DataKey(kept)
	if err != nil {
		return err
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	if s.aead, err = cipher.NewGCMWithRandomNonce(block); err != nil {
		return err
	}
	if check != nil {
		if _, err := s.unseal(bucketMeta, keyCheck, check); err != nil || keep != nil {
			return other
		}
		return nil
	}
	if kept != nil { // somebody removed the check
		return other
	}
	if keep != nil {
		if err := tx.write(bucketMeta, keyData, keep); err != nil {
			return err
		}
	}
	return s.put(tx, bucketMeta, keyCheck, nil)
}

// Close closes the backend.
func (s *Store) Close() error { return s.backend.close() }

// additional is the additional data of a value: NUL occurs in no name.
func additional(bucket, key []byte) []byte {
	return slices.Concat([]byte("cvm-broker/v1\x00"), bucket, []byte{0}, key)
}

func (s *Store) seal(bucket, key, value []byte) []byte {
	return s.aead.Seal(nil, nil, value, additional(bucket, key))
}

func (s *Store) unseal(bucket, key, sealed []byte) ([]byte, error) {
	value, err := s.aead.Open(nil, nil, sealed, additional(bucket, key))
	if err != nil {
		return nil, fmt.Errorf("the stored value %s/%s does not unseal", bucket, key)
	}
	return value, nil
}

// get returns the value of a name, or errNotFound.
func (s *Store) get(tx transaction, bucket, key []byte) ([]byte, error) {
	sealed, err := tx.read(bucket, key)
	if err != nil {
		return nil, err
	}
	if sealed == nil {
		return nil, errNotFound
	}
	return s.unseal(bucket, key, sealed)
}

func (s *Store) put(tx transaction, bucket, key, value []byte) error {
	return tx.write(bucket, key, s.seal(bucket, key, value))
}

func (s *Store) read(bucket []byte, key string) ([]byte, error) {
	sealed, err := s.backend.get(bucket, []byte(key))
	if err != nil {
		return nil, err
	}
	if sealed == nil {
		return nil, errNotFound
	}
	return s.unseal(bucket, []byte(key), sealed)
}

// change runs a transaction and, once it is known to apply, record: when that
// fails nothing is changed, so no change is ever there that is not on record.
func (s *Store) change(record func() error, f func(tx transaction) error) error {
	return s.backend.update(func(tx transaction) error {
		if err := f(tx); err != nil {
			return err
		}
		return record()
	})
}

func (s *Store) write(bucket []byte, key string, value []byte, record func() error) error {
	return s.change(record, func(tx transaction) error { return s.put(tx, bucket, []byte(key), value) })
}

func (s *Store) list(bucket []byte) ([]string, error) {
	names := []string{}
	err := s.backend.view(func(tx transaction) error {
		return tx.each(bucket, func(k, _ []byte) error {
			names = append(names, "kbs:///"+string(k))
			return nil
		})
	})
	return names, err
}

// Check says whether the backend answers.
func (s *Store) Check() error {
	_, err := s.read(bucketMeta, string(keyCheck))
	return err
}

// PutResource stores or replaces a resource. In this and all other changes
// record is called before they take effect, and its error undoes them.
func (s *Store) PutResource(u kbs.ResourceURI, data []byte, record func() error) error {
	return s.write(bucketResources, u.Path(), data, record)
}

// Resource returns a resource, or errNotFound.
func (s *Store) Resource(u kbs.ResourceURI) ([]byte, error) {
	return s.read(bucketResources, u.Path())
}

// there says errNotFound for a name without a value.
func there(tx transaction, bucket, key []byte) error {
	sealed, err := tx.read(bucket, key)
	if err == nil && sealed == nil {
		err = errNotFound
	}
	return err
}

// DeleteResource removes a resource and its rule; errNotFound when there is no
// such resource. Backends reuse the space but need not overwrite it: what is
// left is sealed.
func (s *Store) DeleteResource(u kbs.ResourceURI, record func() error) error {
	return s.change(record, func(tx transaction) error {
		key := []byte(u.Path())
		if err := there(tx, bucketResources, key); err != nil {
			return err
		}
		if err := tx.remove(bucketRules, key); err != nil {
			return err
		}
		return tx.remove(bucketResources, key)
	})
}

// PutRule sets the rule of a resource.
func (s *Store) PutRule(u kbs.ResourceURI, r release.Rule, record func() error) error {
	b, err := r.Encode()
	if err != nil {
		return err
	}
	return s.write(bucketRules, u.Path(), b, record)
}

// Rule returns the rule of a resource, or errNotFound.
func (s *Store) Rule(u kbs.ResourceURI) (*release.Rule, error) {
	b, err := s.read(bucketRules, u.Path())
	if err != nil {
		return nil, err
	}
	return release.DecodeRuleJSON(b)
}

// DeleteRule removes a rule, or says errNotFound.
func (s *Store) DeleteRule(u kbs.ResourceURI, record func() error) error {
	return s.change(record, func(tx transaction) error {
		key := []byte(u.Path())
		if err := there(tx, bucketRules, key); err != nil {
			return err
		}
		return tx.remove(bucketRules, key)
	})
}

// RaiseMark sets the mark of a policy name; a lower version than the present
// one is refused with cause policy-version-below-floor.
func (s *Store) RaiseMark(name string, m adminclient.Mark, record func() error) error {
	return s.change(record, func(tx transaction) error {
		old, err := s.mark(tx, name)
		if err != nil {
			return err
		}
		if m.Version < old.Version {
			return cause.New(cause.PolicyBelowFloor, "the mark of %q is %d and never goes down to %d", name, old.Version, m.Version)
		}
		b, err := json.Marshal(m)
		if err != nil {
			return err
		}
		return s.put(tx, bucketMarks, []byte(name), b)
	})
}

// Mark returns the mark of a policy name; zero when there is none.
func (s *Store) Mark(name string) (adminclient.Mark, error) {
	b, err := s.read(bucketMarks, name)
	return decodeMark(b, err)
}

func (s *Store) mark(tx transaction, name string) (adminclient.Mark, error) {
	b, err := s.get(tx, bucketMarks, []byte(name))
	return decodeMark(b, err)
}

func decodeMark(b []byte, err error) (m adminclient.Mark, _ error) {
	if errors.Is(err, errNotFound) {
		return m, nil
	}
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(b, &m)
}

// Grounds is what a release is decided by, all of one moment.
type Grounds struct {
	Instance  Instance
	Rule      *release.Rule // unsigned, of the resource alone; nil: there is none
	Mark      func(policy string) (adminclient.Mark, error)
	Reference func() (*StoredReference, error) // the document that the resource belongs to; nil: none
}

// Release returns a resource if judge, which sees the rule that is in force
// for exactly these bytes, has no objection. errNotFound says that it was
// granted and is not there. Reading both in one transaction matters: an admin
// who tightens a rule and then replaces the resource must not have the new
// bytes go out by the old rule.
func (s *Store) Release(identity string, u kbs.ResourceURI, judge func(Grounds) error) (data []byte, err error) {
	err = s.backend.view(func(tx transaction) error {
		var g Grounds
		b, err := s.get(tx, bucketInstances, []byte(identity))
		if err == nil {
			err = json.Unmarshal(b, &g.Instance)
		}
		if errors.Is(err, errNotFound) { // must not pass for a missing resource
			return fmt.Errorf("instance: %s was never attested", identity)
		}
		if err != nil {
			return fmt.Errorf("instance: %w", err)
		}
		if b, err = s.get(tx, bucketRules, []byte(u.Path())); err == nil {
			g.Rule, err = release.DecodeRuleJSON(b)
		}
		if err != nil && !errors.Is(err, errNotFound) {
			return fmt.Errorf("rule: %w", err)
		}
		g.Mark = func(policy string) (adminclient.Mark, error) { return s.mark(tx, policy) }
		g.Reference = func() (*StoredReference, error) { return s.referenceFor(tx, u) }
		if err := judge(g); err != nil {
			return err
		}
		data, err = s.get(tx, bucketResources, []byte(u.Path()))
		return err
	})
	return data, err
}
