package broker

import "time"

// observe is told what took how long.
type observe func(operation string, d time.Duration)

func (o observe) since(operation string, start time.Time) { o(operation, time.Since(start)) }

// timedBackend reports on every operation.
type timedBackend struct {
	backend
	observe observe
}

func (b timedBackend) view(f func(tx transaction) error) error {
	defer b.observe.since("view", time.Now())
	return b.backend.view(f)
}

func (b timedBackend) update(f func(tx transaction) error) error {
	defer b.observe.since("update", time.Now())
	return b.backend.update(f)
}

func (b timedBackend) get(bucket, key []byte) ([]byte, error) {
	defer b.observe.since("get", time.Now())
	return b.backend.get(bucket, key)
}

func (b timedBackend) insert(bucket, key, sealed []byte) ([]byte, error) {
	defer b.observe.since("insert", time.Now())
	return b.backend.insert(bucket, key, sealed)
}

// timedSessions reports on sessions that are in a database.
type timedSessions struct {
	sessions
	observe observe
}

func (s timedSessions) open(n *session) error {
	defer s.observe.since("session.open", time.Now())
	return s.sessions.open(n)
}

func (s timedSessions) get(id string) (*session, error) {
	defer s.observe.since("session.get", time.Now())
	return s.sessions.get(id)
}

func (s timedSessions) getByToken(token string) (*session, error) {
	defer s.observe.since("session.get", time.Now())
	return s.sessions.getByToken(token)
}

func (s timedSessions) claim(n *session) (bool, error) {
	defer s.observe.since("session.claim", time.Now())
	return s.sessions.claim(n)
}

func (s timedSessions) attested(n *session) error {
	defer s.observe.since("session.attested", time.Now())
	return s.sessions.attested(n)
}
