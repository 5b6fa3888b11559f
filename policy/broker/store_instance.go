package broker

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
)

// Instance returns the instance of an attested identity and makes it at the
// first call: a random id that the identity keeps. That it was seen is written
// once a day: a guest that is known costs a read.
func (s *Store) Instance(identity string, now time.Time) (inst Instance, err error) {
	key, now := []byte(identity), now.UTC()
	b, err := s.read(bucketInstances, identity)
	if errors.Is(err, errNotFound) {
		id := make([]byte, 16)
		rand.Read(id)
		if b, err = json.Marshal(Instance{ID: hex.EncodeToString(id), FirstSeen: now, LastSeen: now}); err != nil {
			return inst, err
		}
		// Another session of the same guest may be first: then its instance counts.
		var sealed []byte
		if sealed, err = s.backend.insert(bucketInstances, key, s.seal(bucketInstances, key, b)); err == nil {
			b, err = s.unseal(bucketInstances, key, sealed)
		}
	}
	if err != nil {
		return inst, err
	}
	if err := json.Unmarshal(b, &inst); err != nil {
		return inst, err
	}
	if now.Sub(inst.LastSeen) < 24*time.Hour {
		return inst, nil
	}
	return inst, s.backend.update(func(tx transaction) error {
		return s.changeInstance(tx, key, func(i *Instance) bool {
			i.LastSeen = now
			inst = *i // with a tombstone that was set meanwhile
			return true
		})
	})
}

// changeInstance runs f on an instance that is there, and keeps what it made of
// it or, when f says false, removes it.
func (s *Store) changeInstance(tx transaction, key []byte, f func(i *Instance) bool) error {
	b, err := s.get(tx, bucketInstances, key)
	if err != nil {
		return err
	}
	var i Instance
	if err := json.Unmarshal(b, &i); err != nil {
		return err
	}
	if !f(&i) {
		return tx.remove(bucketInstances, key)
	}
	if b, err = json.Marshal(i); err != nil {
		return err
	}
	return s.put(tx, bucketInstances, key, b)
}

// PruneInstances forgets instances that were last seen before a time, and says
// how many: launched guests have identities of their own, so that the table
// would grow with every launch. Whoever comes back gets a new id. A tombstone is
// never forgotten.
func (s *Store) PruneInstances(before time.Time) (n int, err error) {
	old := func(i Instance) bool {
		seen := i.LastSeen
		if seen.IsZero() { // written by an earlier version
			seen = i.FirstSeen
		}
		return !i.Tombstone && seen.Before(before)
	}
	var keys [][]byte
	err = s.backend.view(func(tx transaction) error {
		return s.eachInstance(tx, func(identity string, i Instance) error {
			if old(i) {
				keys = append(keys, []byte(identity))
			}
			return nil
		})
	})
	if err != nil {
		return 0, err
	}
	// A few at a time: guests that attest meanwhile do not wait for all.
	for chunk := range slices.Chunk(keys, 64) {
		gone := 0
		err := s.backend.update(func(tx transaction) error {
			for _, key := range chunk {
				err := s.changeInstance(tx, key, func(i *Instance) bool {
					if !old(*i) { // it came back
						return true
					}
					gone++
					return false
				})
				if err != nil && !errors.Is(err, errNotFound) { // another broker was first
					return err
				}
			}
			return nil
		})
		if err != nil {
			return n, err
		}
		n += gone
	}
	return n, nil
}

// eachInstance calls f with every instance and the identity that it is bound to.
func (s *Store) eachInstance(tx transaction, f func(identity string, i Instance) error) error {
	return tx.each(bucketInstances, func(k, sealed []byte) error {
		b, err := s.unseal(bucketInstances, k, sealed)
		if err != nil {
			return err
		}
		var i Instance
		if err := json.Unmarshal(b, &i); err != nil {
			return err
		}
		return f(string(k), i)
	})
}

func listed(identity string, i Instance) adminclient.Instance {
	return adminclient.Instance{ID: i.ID, Identity: identity, FirstSeen: i.FirstSeen, LastSeen: i.LastSeen, Tombstone: i.Tombstone}
}

// Instances lists all instances, by identity.
func (s *Store) Instances() ([]adminclient.Instance, error) {
	list := []adminclient.Instance{}
	err := s.backend.view(func(tx transaction) error {
		return s.eachInstance(tx, func(identity string, i Instance) error {
			list = append(list, listed(identity, i))
			return nil
		})
	})
	return list, err
}

// InstanceByID returns one instance, or errNotFound.
func (s *Store) InstanceByID(id string) (found adminclient.Instance, err error) {
	list, err := s.Instances()
	if err != nil {
		return found, err
	}
	for _, i := range list {
		if i.ID == id {
			return i, nil
		}
	}
	return found, errNotFound
}

// SetTombstone marks an instance as destroyed, or says errNotFound. Nothing is
// released to it from then on, by any session; there is no way back. Doing it
// again changes nothing.
func (s *Store) SetTombstone(id string, record func() error) error {
	return s.change(record, func(tx transaction) error {
		var key []byte
		var inst Instance
		err := s.eachInstance(tx, func(identity string, i Instance) error {
			if i.ID == id {
				key, inst = []byte(identity), i
			}
			return nil
		})
		if err != nil {
			return err
		}
		if key == nil {
			return errNotFound
		}
		inst.Tombstone = true
		b, err := json.Marshal(inst)
		if err != nil {
			return err
		}
		return s.put(tx, bucketInstances, key, b)
	})
}
