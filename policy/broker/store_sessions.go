package broker

import (
	"bytes"
	"fmt"
	"slices"
	"time"
)

var bucketSessions = []byte("sessions")

// sessions returns the sessions that go with this store, at most most: in the
// database where several brokers share one, else in memory.
func (s *Store) sessions(most int, now func() time.Time) (sessions, error) {
	if p, ok := s.backend.(*postgresBackend); ok {
		return newPostgresSessions(s, p.pool, most, now), nil
	}
	return newSessions(s, most, now)
}

// keepSessions writes sessions of embedded storage in one transaction. One
// that is being attested at this moment is left out: its nonce is spent.
func (s *Store) keepSessions(list []*session) error {
	err := s.backend.update(func(tx transaction) error {
		for _, n := range list {
			if !n.mu.TryLock() {
				continue
			}
			b, err := []byte(nil), error(nil)
			if !n.spent || n.token != "" {
				b, err = n.encode()
			}
			n.mu.Unlock()
			if err != nil {
				return err
			}
			if b == nil {
				continue
			}
			if err := s.put(tx, bucketSessions, idKey(n.id), b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("sessions: %w", err)
	}
	return nil
}

// takeSessions returns what keepSessions wrote, oldest first, and removes it
// before it returns: whatever happens next, no session comes back a second time.
func (s *Store) takeSessions() ([]*session, error) {
	var list []*session
	err := s.backend.update(func(tx transaction) error {
		var keys [][]byte
		err := tx.each(bucketSessions, func(k, sealed []byte) error {
			keys = append(keys, bytes.Clone(k))
			b, err := s.unseal(bucketSessions, k, sealed)
			if err != nil {
				return err
			}
			// One that another version wrote is dropped: its guest attests again.
			if n, err := decodeSession(b); err == nil {
				list = append(list, n)
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, k := range keys {
			if err := tx.remove(bucketSessions, k); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("sessions: %w", err)
	}
	slices.SortFunc(list, func(a, b *session) int { return a.expires.Compare(b.expires) })
	return list, nil
}
