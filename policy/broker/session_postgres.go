package broker

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// trimEvery is how often a broker removes what has expired and looks how many
// sessions there are.
const trimEvery = 2 * time.Second

// postgresSessions are the sessions of all brokers of one database. Each row is
// sealed under the KEK and named by the SHA-256 of the cookie; its state says
// whether the nonce is still good. All brokers need the right time.
type postgresSessions struct {
	store *Store
	pool  *pgxpool.Pool
	most  int
	now   func() time.Time

	mu    sync.Mutex
	about int // sessions at the last look, and those that this broker opened since

	stop   context.CancelFunc
	closed chan struct{}
}

func newPostgresSessions(store *Store, pool *pgxpool.Pool, most int, now func() time.Time) *postgresSessions {
	ctx, stop := context.WithCancel(context.Background())
	s := &postgresSessions{store: store, pool: pool, most: most, now: now, stop: stop, closed: make(chan struct{})}
	go func() {
		defer close(s.closed)
		t := time.NewTicker(trimEvery)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				// A failure shows in the requests that need the database.
				_ = s.trim(ctx)
			}
		}
	}()
	return s
}

func (s *postgresSessions) close() error {
	s.stop()
	<-s.closed
	return nil
}

func within() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), postgresWait)
}

func (s *postgresSessions) seal(n *session) ([]byte, error) {
	b, err := n.encode()
	if err != nil {
		return nil, err
	}
	return s.store.seal(bucketSessions, idKey(n.id), b), nil
}

func (s *postgresSessions) open(n *session) error {
	sealed, err := s.seal(n)
	if err != nil {
		return err
	}
	ctx, cancel := within()
	defer cancel()
	if s.live() >= s.most {
		if err := s.trim(ctx); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.about++
	s.mu.Unlock()
	_, err = s.pool.Exec(ctx, "INSERT INTO cvm_broker_session (id, state, expires, bytes, value) VALUES ($1, 'open', $2, 0, $3)",
		string(idKey(n.id)), n.expires, sealed)
	return storageError(err)
}

func (s *postgresSessions) get(id string) (*session, error) {
	ctx, cancel := within()
	defer cancel()
	return s.row(s.pool.QueryRow(ctx, "SELECT id, state, value FROM cvm_broker_session WHERE id = $1 AND expires > $2", string(idKey(id)), s.now()))
}

func (s *postgresSessions) getByToken(token string) (*session, error) {
	ctx, cancel := within()
	defer cancel()
	d := sha256.Sum256([]byte(token))
	return s.row(s.pool.QueryRow(ctx, "SELECT id, state, value FROM cvm_broker_session WHERE token = $1 AND expires > $2", d[:], s.now()))
}

func (s *postgresSessions) row(r pgx.Row) (*session, error) {
	var key, state string
	var sealed []byte
	err := r.Scan(&key, &state, &sealed)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, storageError(err)
	}
	b, err := s.store.unseal(bucketSessions, []byte(key), sealed)
	if err != nil {
		return nil, err
	}
	n, err := decodeSession(b)
	if err != nil {
		return nil, err
	}
	n.spent = state != "open"
	if !s.now().Before(n.expires) { // what is sealed counts, not the column
		return nil, nil
	}
	return n, nil
}

func (s *postgresSessions) claim(n *session) (bool, error) {
	ctx, cancel := within()
	defer cancel()
	tag, err := s.pool.Exec(ctx, "UPDATE cvm_broker_session SET state = 'spent' WHERE id = $1 AND state = 'open' AND expires > $2", string(idKey(n.id)), s.now())
	if err != nil {
		return false, storageError(err)
	}
	n.spent = true
	return tag.RowsAffected() == 1, nil
}

func (s *postgresSessions) attested(n *session) error {
	sealed, err := s.seal(n)
	if err != nil {
		return err
	}
	ctx, cancel := within()
	defer cancel()
	d := sha256.Sum256([]byte(n.token))
	_, err = s.pool.Exec(ctx, "UPDATE cvm_broker_session SET state = 'attested', token = $2, bytes = $3, value = $4 WHERE id = $1 AND state = 'spent'",
		string(idKey(n.id)), d[:], n.size, sealed)
	return storageError(err)
}

func (s *postgresSessions) end(n *session) error {
	ctx, cancel := within()
	defer cancel()
	_, err := s.pool.Exec(ctx, "DELETE FROM cvm_broker_session WHERE id = $1", string(idKey(n.id)))
	return storageError(err)
}

func (s *postgresSessions) live() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.about
}

// trim removes what has expired and, when there is too much, the oldest, with
// some room so that it is not soon called again. One broker at a time does it.
// Between two looks each broker can open as many as were left at the first:
// the bound is most times the number of brokers at the worst.
func (s *postgresSessions) trim(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, postgresWait)
	defer cancel()
	about := 0
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		var mine bool
		if err := tx.QueryRow(ctx, "SELECT pg_try_advisory_xact_lock($1)", int64(lockTrimmer)).Scan(&mine); err != nil {
			return err
		}
		if mine {
			if _, err := tx.Exec(ctx, "DELETE FROM cvm_broker_session WHERE expires <= $1", s.now()); err != nil {
				return err
			}
		}
		var bytes int64
		look := func() error {
			return tx.QueryRow(ctx, "SELECT count(*), coalesce(sum(bytes), 0) FROM cvm_broker_session").Scan(&about, &bytes)
		}
		if err := look(); err != nil {
			return err
		}
		if !mine || (about < s.most && bytes <= maxHeld) {
			return nil
		}
		if about >= s.most {
			if _, err := tx.Exec(ctx, "DELETE FROM cvm_broker_session WHERE id IN (SELECT id FROM cvm_broker_session ORDER BY expires DESC OFFSET $1)", s.most-1-s.most/16); err != nil {
				return err
			}
		}
		if bytes > maxHeld {
			if _, err := tx.Exec(ctx, `DELETE FROM cvm_broker_session WHERE id IN (SELECT id FROM
				(SELECT id, sum(bytes) OVER (ORDER BY expires DESC, id) AS held FROM cvm_broker_session WHERE state = 'attested') AS by_age WHERE held > $1)`, int64(maxHeld)); err != nil {
				return err
			}
		}
		return look()
	})
	if err != nil {
		return storageError(err)
	}
	s.mu.Lock()
	s.about = about
	s.mu.Unlock()
	return nil
}
