package broker

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// SessionLife is how long a session and its token live.
const SessionLife = 5 * time.Minute

// maxHeld bounds what all attested sessions keep together, in bytes:
// any genuine TPM can have 2 MiB of initdata, ten thousand times.
const maxHeld = 256 << 20

// session is one run of the protocol. Its nonce, and the secret in pending,
// are good for one attestation: a failed one ends the session.
type session struct {
	id      string // cookie: 32 hex digits
	label   string // what logs call it; does not give the cookie away
	nonce   string // standard base64 of 32 bytes
	tee     string
	dialect string
	expires time.Time

	mu       sync.Mutex // held during an attestation, and to read what it left
	spent    bool       // an attestation was tried
	pending  *appraisal.Pending
	token    string // set once attested
	key      kbs.TEEPubKey
	facts    appraisal.Facts
	instance Instance
	size     int // about the bytes that its facts keep

	inMemory
}

// sessions holds the sessions, bounded in number, time and what they keep.
// When it is full the oldest one goes, so that nobody can lock others out for
// longer than it takes them to start again.
type sessions interface {
	// open keeps a new session.
	open(n *session) error
	// get returns the live session of a cookie, or nil.
	get(id string) (*session, error)
	// getByToken returns the live session that the exact token was issued to.
	getByToken(token string) (*session, error)
	// claim consumes a session's nonce. Of all claims, by however many brokers,
	// one at most is granted.
	claim(n *session) (bool, error)
	// attested files a claimed session under its token; it need not live any more.
	attested(n *session) error
	// end forgets a session.
	end(n *session) error
	// live is about how many there are.
	live() int
	// close keeps, where sessions would be lost otherwise, what can go on later.
	close() error
}

// newSession makes a session with a new random id and nonce.
func newSession(tee, dialect string, pending *appraisal.Pending, now time.Time) *session {
	id, nonce := make([]byte, 16), make([]byte, kbs.NonceSize)
	rand.Read(id)
	rand.Read(nonce)
	n := &session{
		id:      hex.EncodeToString(id),
		nonce:   base64.StdEncoding.EncodeToString(nonce),
		tee:     tee,
		dialect: dialect,
		expires: now.Add(SessionLife).UTC(),
		pending: pending,
	}
	n.label = label(n.id)
	return n
}

// idKey is what a store calls a session, the cookie's SHA-256 in hex: who reads the
// store has no cookie.
func idKey(id string) []byte {
	d := sha256.Sum256([]byte(id))
	return []byte(hex.EncodeToString(d[:]))
}

func label(id string) string { return string(idKey(id)[:16]) }

// keptSession is a session at rest. It holds the secret of a challenge and a
// token, so it is only ever written sealed.
type keptSession struct {
	ID       string             `json:"id"`
	Nonce    string             `json:"nonce"`
	TEE      string             `json:"tee"`
	Dialect  string             `json:"dialect"`
	Expires  time.Time          `json:"expires"`
	Pending  *appraisal.Pending `json:"pending,omitempty"`
	Token    string             `json:"token,omitempty"`
	Key      kbs.TEEPubKey      `json:"key"`
	Facts    appraisal.Facts    `json:"facts"`
	Initdata *keptInitdata      `json:"initdata,omitempty"`
	Instance Instance           `json:"instance"`
	Size     int                `json:"size"`
}

// keptInitdata is what facts leave out of their JSON.
type keptInitdata struct {
	Algorithm string            `json:"algorithm"`
	Data      map[string]string `json:"data"`
}

// encode is called by who holds n.mu, or has n alone.
func (n *session) encode() ([]byte, error) {
	k := keptSession{
		ID: n.id, Nonce: n.nonce, TEE: n.tee, Dialect: n.dialect, Expires: n.expires, Pending: n.pending,
		Token: n.token, Key: n.key, Facts: n.facts, Instance: n.instance, Size: n.size,
	}
	if l := n.facts.Launch; l != nil && l.Initdata != nil {
		k.Initdata = &keptInitdata{l.Initdata.Algorithm, l.Initdata.Data}
	}
	return json.Marshal(k)
}

// decodeSession reads what was sealed by encode.
func decodeSession(b []byte) (*session, error) {
	var k keptSession
	if err := json.Unmarshal(b, &k); err != nil {
		return nil, fmt.Errorf("a stored session: %w", err)
	}
	n := &session{
		id: k.ID, label: label(k.ID), nonce: k.Nonce, tee: k.TEE, dialect: k.Dialect, expires: k.Expires, pending: k.Pending,
		token: k.Token, key: k.Key, facts: k.Facts, instance: k.Instance, size: k.Size,
	}
	if l := n.facts.Launch; l != nil && k.Initdata != nil {
		l.Initdata = &policy.Initdata{Algorithm: k.Initdata.Algorithm, Data: k.Initdata.Data}
	}
	return n, nil
}
