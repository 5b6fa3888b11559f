package broker

import (
	"container/list"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// SessionLife is how long a session and its token live.
const SessionLife = 5 * time.Minute

// session is one run of the protocol. Its nonce, and the secret in pending,
// are good for one attestation: a failed one ends the session.
type session struct {
	id      string // cookie: 32 hex digits
	label   string // what logs call it; does not give the cookie away
	nonce   string // standard base64 of 32 bytes
	tee     string
	dialect string
	expires time.Time
	pending *appraisal.Pending

	mu       sync.Mutex // held during an attestation, and to read what it left
	spent    bool       // an attestation was tried
	token    string     // set once attested
	key      kbs.TEEPubKey
	facts    appraisal.Facts
	instance Instance
	size     int // bytes of the evidence whose facts are kept

	element *list.Element
	digest  [32]byte // of the token, the key in sessions.byToken
}

// maxHeld bounds the evidence behind all attested sessions together, in bytes:
// any genuine TPM can have 2 MiB of initdata, ten thousand times.
const maxHeld = 256 << 20

// sessions holds the sessions, bounded in number, time and what they keep.
// When it is full the oldest one goes, so that nobody can lock others out for
// longer than it takes them to start again.
type sessions struct {
	mu      sync.Mutex
	most    int
	held    int // sum of the sizes of attested sessions
	now     func() time.Time
	byID    map[string]*session
	byToken map[[32]byte]*session
	order   *list.List // by age, oldest first; all live equally long
}

func newSessions(most int, now func() time.Time) *sessions {
	return &sessions{most: most, now: now, byID: map[string]*session{}, byToken: map[[32]byte]*session{}, order: list.New()}
}

// open makes a session with a new random id and nonce.
func (s *sessions) open(tee, dialect string, pending *appraisal.Pending) *session {
	id, nonce := make([]byte, 16), make([]byte, kbs.NonceSize)
	rand.Read(id)
	rand.Read(nonce)
	n := &session{
		id:      hex.EncodeToString(id),
		nonce:   base64.StdEncoding.EncodeToString(nonce),
		tee:     tee,
		dialect: dialect,
		expires: s.now().Add(SessionLife),
		pending: pending,
	}
	label := sha256.Sum256([]byte(n.id))
	n.label = hex.EncodeToString(label[:8])

	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	for len(s.byID) >= s.most {
		s.remove(s.order.Front().Value.(*session))
	}
	n.element = s.order.PushBack(n)
	s.byID[n.id] = n
	return n
}

// get returns the live session of a cookie, or nil.
func (s *sessions) get(id string) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	return s.byID[id]
}

// getByToken returns the live session that the exact token was issued to.
func (s *sessions) getByToken(token string) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire()
	return s.byToken[sha256.Sum256([]byte(token))]
}

// attested files the session under its token.
func (s *sessions) attested(n *session, token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID[n.id] != n {
		return // it expired meanwhile
	}
	n.digest = sha256.Sum256([]byte(token))
	s.byToken[n.digest] = n
	s.held += n.size
	for e := s.order.Front(); e != nil && s.held > maxHeld; {
		old := e.Value.(*session)
		e = e.Next()
		if old != n && s.byToken[old.digest] == old {
			s.remove(old)
		}
	}
}

// end forgets a session.
func (s *sessions) end(n *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(n)
}

// expire drops what is past its life; the caller holds mu.
func (s *sessions) expire() {
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
func (s *sessions) remove(n *session) {
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

func (s *sessions) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byID)
}
