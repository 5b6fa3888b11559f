package broker

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// kekSize is the size of the key-encryption key, in bytes (AES-256).
const kekSize = 32

// MaxResource bounds one resource, in bytes.
const MaxResource = 1 << 20

var (
	errNotFound = errors.New("not found")

	bucketResources = []byte("resources")
	bucketRules     = []byte("rules")
	bucketMarks     = []byte("marks")
	bucketInstances = []byte("instances")
	bucketMeta      = []byte("meta")
	keyCheck        = []byte("kek-check")
)

// Instance is one guest that has attested, known by its attested key.
type Instance struct {
	ID        string    `json:"id"` // 32 hex digits, random
	FirstSeen time.Time `json:"firstSeen"`
	Tombstone bool      `json:"tombstone"` // nothing is released to it any more; never cleared
}

// Store keeps resources, rules, marks and instances in one bbolt file. Names
// are in the clear; every value is sealed with AES-256-GCM under the KEK, with
// bucket and name as additional data, so that no value can be moved to another
// name. Replacing the whole file by an older one is not detected.
type Store struct {
	db   *bolt.DB
	aead cipher.AEAD
}

// OpenStore opens or creates the file, mode 0600. kek has 32 bytes; a KEK
// other than the one that the file was made with is refused.
func OpenStore(path string, kek []byte) (*Store, error) {
	if len(kek) != kekSize {
		return nil, cause.New(cause.Config, "the KEK has %d bytes, expected %d", len(kek), kekSize)
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		return nil, cause.New(cause.StorageFailed, "storage %s: %w", path, err)
	}
	s := &Store{db: db, aead: aead}
	if err := s.prepare(); err != nil {
		_ = db.Close()
		return nil, cause.New(cause.StorageFailed, "storage %s: %w", path, err)
	}
	return s, nil
}

func (s *Store) prepare() error {
	return s.db.Update(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{bucketResources, bucketRules, bucketMarks, bucketInstances, bucketMeta} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		if sealed := meta.Get(keyCheck); sealed != nil {
			if _, err := s.unseal(bucketMeta, keyCheck, sealed); err != nil {
				return errors.New("the KEK is not the one that this storage was made with")
			}
			return nil
		}
		return meta.Put(keyCheck, s.seal(bucketMeta, keyCheck, nil))
	})
}

// Close closes the file.
func (s *Store) Close() error { return s.db.Close() }

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

func (s *Store) get(tx *bolt.Tx, bucket, key []byte) ([]byte, error) {
	sealed := tx.Bucket(bucket).Get(key)
	if sealed == nil {
		return nil, errNotFound
	}
	return s.unseal(bucket, key, sealed)
}

func (s *Store) read(bucket []byte, key string) (value []byte, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		value, err = s.get(tx, bucket, []byte(key))
		return err
	})
	return value, err
}

// change runs a transaction and, once it is known to apply, record: when that
// fails nothing is changed, so no change is ever there that is not on record.
func (s *Store) change(record func() error, f func(tx *bolt.Tx) error) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		if err := f(tx); err != nil {
			return err
		}
		return record()
	})
}

func (s *Store) write(bucket []byte, key string, value []byte, record func() error) error {
	return s.change(record, func(tx *bolt.Tx) error {
		return tx.Bucket(bucket).Put([]byte(key), s.seal(bucket, []byte(key), value))
	})
}

func (s *Store) list(bucket []byte) ([]string, error) {
	names := []string{}
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucket).ForEach(func(k, _ []byte) error {
			names = append(names, "kbs:///"+string(k))
			return nil
		})
	})
	return names, err
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

// DeleteResource removes a resource and its rule; errNotFound when there is no
// such resource. bbolt reuses the page but does not overwrite it: what is left
// is sealed.
func (s *Store) DeleteResource(u kbs.ResourceURI, record func() error) error {
	return s.change(record, func(tx *bolt.Tx) error {
		key := []byte(u.Path())
		if tx.Bucket(bucketResources).Get(key) == nil {
			return errNotFound
		}
		if err := tx.Bucket(bucketRules).Delete(key); err != nil {
			return err
		}
		return tx.Bucket(bucketResources).Delete(key)
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
	return s.change(record, func(tx *bolt.Tx) error {
		if tx.Bucket(bucketRules).Get([]byte(u.Path())) == nil {
			return errNotFound
		}
		return tx.Bucket(bucketRules).Delete([]byte(u.Path()))
	})
}

// RaiseMark sets the mark of a policy name; a lower version than the present
// one is refused with cause policy-version-below-floor.
func (s *Store) RaiseMark(name string, m adminclient.Mark, record func() error) error {
	return s.change(record, func(tx *bolt.Tx) error {
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
		return tx.Bucket(bucketMarks).Put([]byte(name), s.seal(bucketMarks, []byte(name), b))
	})
}

// Mark returns the mark of a policy name; zero when there is none.
func (s *Store) Mark(name string) (m adminclient.Mark, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		m, err = s.mark(tx, name)
		return err
	})
	return m, err
}

func (s *Store) mark(tx *bolt.Tx, name string) (m adminclient.Mark, err error) {
	b, err := s.get(tx, bucketMarks, []byte(name))
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
	Instance Instance
	Rule     *release.Rule // nil: there is none
	Mark     func(policy string) (adminclient.Mark, error)
}

// Release returns a resource if judge, which sees the rule that is in force
// for exactly these bytes, has no objection. errNotFound says that it was
// granted and is not there. Reading both in one transaction matters: an admin
// who tightens a rule and then replaces the resource must not have the new
// bytes go out by the old rule.
func (s *Store) Release(identity string, u kbs.ResourceURI, judge func(Grounds) error) (data []byte, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
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
		if err := judge(g); err != nil {
			return err
		}
		data, err = s.get(tx, bucketResources, []byte(u.Path()))
		return err
	})
	return data, err
}

// Instance returns the instance of an attested identity and makes it at the
// first call: a random id that the identity keeps.
func (s *Store) Instance(identity string, now time.Time) (inst Instance, err error) {
	b, err := s.read(bucketInstances, identity)
	if err == nil {
		return inst, json.Unmarshal(b, &inst)
	}
	if !errors.Is(err, errNotFound) {
		return inst, err
	}
	err = s.db.Update(func(tx *bolt.Tx) error {
		// Another session of the same guest may have been first.
		if b, err := s.get(tx, bucketInstances, []byte(identity)); err == nil {
			return json.Unmarshal(b, &inst)
		} else if !errors.Is(err, errNotFound) {
			return err
		}
		id := make([]byte, 16)
		rand.Read(id)
		inst = Instance{ID: hex.EncodeToString(id), FirstSeen: now.UTC()}
		b, err := json.Marshal(inst)
		if err != nil {
			return err
		}
		return tx.Bucket(bucketInstances).Put([]byte(identity), s.seal(bucketInstances, []byte(identity), b))
	})
	return inst, err
}
