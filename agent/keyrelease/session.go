package keyrelease

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Claims are what the broker's verified token says. Under dialect kbs only
// IssuedAt and Expires are set.
type Claims struct {
	HasMark     bool   // the token speaks of the policy at all
	PolicyName  string // the policy that the evidence proved
	VersionMark uint64 // lowest version that may run; 0: the broker has no mark
	Signers     []string
	InstanceID  string
	Tombstone   bool
	IssuedAt    time.Time // the broker's clock
	Expires     time.Time
}

// Session is one attested session. It may be used by several goroutines.
type Session struct {
	client *Client
	base   *url.URL     // where it was opened: the cookie goes nowhere else
	cookie *http.Cookie // of this session
	public kbs.TEEPubKey
	claims Claims
	quoted [sha256.Size]byte // of the event log that the quote covers

	mu  sync.Mutex
	key *ecdsa.PrivateKey // nil once closed
}

// Token returns the verified claims.
func (s *Session) Token() Claims { return s.claims }

// Resource gets one resource, given as kbs://[host]/repository/type/tag. The
// host is ignored: only the policy's broker is asked. A refusal by a rule is
// cause.KeyRefused and final; a broker that does not answer is tried again
// until ctx ends. A broker that has forgotten the session (it was restarted,
// or the session's life is over), and one that does not answer where the policy
// names others, is cause.BrokerUnavailable at once, for only a new session can
// help. No key is given by a session that is older than the last event: that is
// cause.KeyRefused too. The caller zeroises what it gets.
func (s *Session) Resource(ctx context.Context, uri string) ([]byte, error) {
	u, err := kbs.ParseResourceURI(uri)
	if err != nil {
		return nil, cause.New(cause.KeyMalformed, "%w", err)
	}
	if err := s.current(); err != nil {
		return nil, err
	}
	body, err := retry(ctx, s.client, func() ([]byte, error) {
		body, _, err := s.client.do(ctx, http.MethodGet, s.base, kbs.PathResource+u.Path(), s.cookie, nil)
		return body, s.client.route.leave(s.base, refusal(cause.KeyRefused, sessionGone(err)))
	})
	if err != nil {
		return nil, err
	}
	if err := s.current(); err != nil { // an event came while the broker answered
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key == nil {
		return nil, cause.New(cause.Internal, "the session is closed")
	}
	return decrypt(body, s.key)
}

// current refuses a session whose quote is older than the last event.
func (s *Session) current() error {
	if sha256.Sum256(s.client.c.EventLog()) != s.quoted {
		return cause.New(cause.KeyRefused, "this session is older than the last event of the log: a key needs a new one")
	}
	return nil
}

// errSessionGone marks the end of a session: trying again in it is of no use.
var errSessionGone = errors.New("the broker no longer knows this session")

// sessionGone tells "who are you" from a refusal.
func sessionGone(err error) error {
	var answer *kbs.Error
	if !errors.As(err, &answer) {
		return err
	}
	switch answer.Variant() {
	case kbs.VariantTokenNotFound, kbs.VariantTokenVerifierError:
		return cause.New(cause.BrokerUnavailable, "%w: %w", errSessionGone, answer)
	}
	return err
}

// Close zeroises the session's private key.
func (s *Session) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key == nil {
		return
	}
	// The bits of a big.Int are its memory.
	clear(s.key.D.Bits()) //nolint:staticcheck // D is deprecated for computing with it, which this is not
	s.key = nil
}

// jweMembers are the members of the one JWE form that is spoken (RFC 7516,
// section 7.2.2, flattened; no aad, no unprotected headers).
type jweMembers struct {
	Protected    string `json:"protected"`
	EncryptedKey string `json:"encrypted_key"`
	IV           string `json:"iv"`
	Ciphertext   string `json:"ciphertext"`
	Tag          string `json:"tag"`
}

// decrypt opens a resource. Nothing but ECDH-ES+A256KW with A256GCM to this
// session's key is accepted; a body that is not such a JWE is refused, never
// taken as the resource itself.
func decrypt(body []byte, key *ecdsa.PrivateKey) ([]byte, error) {
	var m jweMembers
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return nil, cause.New(cause.KeyMalformed, "the released resource is not a flattened JWE: %w", err)
	}
	if m.Protected == "" || m.EncryptedKey == "" || m.IV == "" || m.Tag == "" {
		return nil, cause.New(cause.KeyMalformed, "the released resource is not a flattened JWE: a member is missing")
	}
	object, err := jose.ParseEncryptedJSON(string(body),
		[]jose.KeyAlgorithm{jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		return nil, cause.New(cause.KeyMalformed, "the released resource's JWE: %w", err)
	}
	data, err := object.Decrypt(key)
	if err != nil {
		return nil, cause.New(cause.KeyMalformed, "the released resource does not decrypt with this session's key")
	}
	return data, nil
}
