package broker

import (
	"container/list"
	"crypto/sha256"
	"errors"
	"sync"
	"time"
)

// inMemory is the part of a session that memorySessions alone knows.
type inMemory struct {
	element *list.Element
	digest  [32]byte // of the token, the key in byToken
}

// memorySessions are the sessions of one process. What lives at a graceful stop
// is written to the store, sealed, and read back at the next start; after a
// crash guests attest again.
type memorySessions struct {
	store *Store // nil: nothing is kept

	mu      sync.Mutex
	closed  bool
	most    int
	held    int // sum of the sizes of attested sessions
	now     func() time.Time
	byID    map[string]*session
	byToken map[[32]byte]*session
	order   *list.List // by age, oldest first; all live equally long
}

// newSessions makes the sessions and continues those that the store has.
func newSessions(store *Store, most int, now func() time.Time) (*memorySessions, error) {
	s := &memorySessions{store: store, most: most, now: now, byID: map[string]*session{}, byToken: map[[32]byte]*session{}, order: list.New()}
	if store == nil {
		return s, nil
	}
	kept, err := store.takeSessions()
	if err != nil {
		return nil, err
	}
	for _, n := range kept {
		if err := s.open(n); err != nil {
			return nil, err
		}
		if n.token != "" {
			n.spent = true
			if err := s.attested(n); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

var errStopping = errors.New("the broker is stopping")

func (s *memorySessions) open(n *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errStopping
	}
	s.expire()
	for len(s.byID) >= s.most {
		s.remove(s.order.Front().Value.(*session))
	}
	n.element = s.order.PushBack(n)
	s.byID[n.id] = n
	return nil
}

func (s *memorySessions) get(id string) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	return s.byID[id], nil
}

func (s *memorySessions) getByToken(token string) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	return s.byToken[sha256.Sum256([]byte(token))], nil
}

// claim: the caller holds n.mu.
func (s *memorySessions) claim(n *session) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || n.spent || s.byID[n.id] != n {
		return false, nil
	}
	n.spent = true
	return true, nil
}

// attested: the caller holds n.mu.
func (s *memorySessions) attested(n *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID[n.id] != n {
		return nil // it expired meanwhile
	}
	n.digest = sha256.Sum256([]byte(n.token))
	s.byToken[n.digest] = n
	s.held += n.size
	for e := s.order.Front(); e != nil && s.held > maxHeld; {
		old := e.Value.(*session)
		e = e.Next()
		if old != n && s.byToken[old.digest] == old {
			s.remove(old)
		}
	}
	return nil
}

func (s *memorySessions) end(n *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(n)
	return nil
}

// expire drops what is past its life; the caller holds mu.
func (s *memorySessions) expire() {
	now := s.now()
	for e := s.order.Front(); e != nil; e = s.order.Front() {
		n := e.Value.(*session)
		if now.Before(n.expires) {
			return
		}
		s.remove(n)
	}
}

// remove forgets n; the caller holds mu.
func (s *memorySessions) remove(n *session) {
	if s.byID[n.id] != n {
		return
	}
	delete(s.byID, n.id)
	if s.byToken[n.digest] == n {
		delete(s.byToken, n.digest)
		s.held -= n.size
	}
	s.order.Remove(n.element)
}

func (s *memorySessions) live() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byID)
}

// close keeps the sessions that are open or attested. From here on no nonce is
// consumed, so that none can be consumed again after the next start.
func (s *memorySessions) close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.expire()
	var list []*session
	for e := s.order.Front(); e != nil; e = e.Next() {
		list = append(list, e.Value.(*session))
	}
	s.mu.Unlock()
	if s.store == nil {
		return nil
	}
	return s.store.keepSessions(list)
}
