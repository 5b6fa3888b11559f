package broker

import (
	"encoding/json"

	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
)

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
	return adminclient.Instance{ID: i.ID, Identity: identity, FirstSeen: i.FirstSeen, Tombstone: i.Tombstone}
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
