package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const (
	postgresConnections = 16 // default
	maxPostgres         = 256
	postgresWait        = 10 * time.Second // for one operation, waiting for a connection included
)

// The advisory locks of this program, within the database.
const (
	lockSchema  = 0x6376_6d62_0001 // "cvmb"
	lockUpdate  = 0x6376_6d62_0002
	lockTrimmer = 0x6376_6d62_0003
)

// schema is the steps from nothing to the present form; a step is never
// changed once it is released, a new one is appended.
//
// Sessions are not logged: a crash of the database empties the table, so that
// no nonce that was consumed comes back as one that was not.
var schema = []string{`
CREATE TABLE cvm_broker_value (
	bucket text COLLATE "C" NOT NULL,
	name   text COLLATE "C" NOT NULL,
	value  bytea NOT NULL,
	PRIMARY KEY (bucket, name)
);
CREATE UNLOGGED TABLE cvm_broker_session (
	id      text COLLATE "C" PRIMARY KEY,
	token   bytea UNIQUE,
	state   text NOT NULL CHECK (state IN ('open', 'spent', 'attested')),
	expires timestamptz NOT NULL,
	bytes   bigint NOT NULL,
	value   bytea NOT NULL
);
CREATE INDEX cvm_broker_session_expires ON cvm_broker_session (expires);
`}

// postgresBackend is a database that several brokers share.
type postgresBackend struct{ pool *pgxpool.Pool }

// OpenPostgresStore connects to the database of a DSN (a libpq URL or
// key=value list) and brings its schema up to date. connections bounds the
// pool; 0 is the default. A connection over a network has to be TLS with the
// server's name verified.
func OpenPostgresStore(ctx context.Context, dsn string, connections int, k kek.Source) (*Store, error) {
	b, err := openPostgres(ctx, dsn, connections)
	if err != nil {
		return nil, err
	}
	return newStore(b, k)
}

func openPostgres(ctx context.Context, dsn string, connections int) (*postgresBackend, error) {
	c, err := postgresConfig(dsn, connections)
	if err != nil {
		return nil, cause.New(cause.Config, "postgres: %w", err)
	}
	pool, err := pgxpool.NewWithConfig(ctx, c)
	if err != nil {
		return nil, cause.New(cause.StorageFailed, "postgres: %w", err)
	}
	b := &postgresBackend{pool: pool}
	if err := b.migrate(ctx); err != nil {
		pool.Close()
		return nil, cause.New(cause.StorageFailed, "postgres: %w", err)
	}
	return b, nil
}

// postgresConfig reads a DSN. pgx would take what the DSN leaves out from the
// environment, where no secret belongs: that is refused by name.
func postgresConfig(dsn string, connections int) (*pgxpool.Config, error) {
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); strings.HasPrefix(name, "PG") {
			return nil, fmt.Errorf("%s is set in the environment: the DSN file alone says how to connect", name)
		}
	}
	c, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, errors.New("the DSN cannot be read") // pgx's words could show a part of it
	}
	if err := secured(c); err != nil {
		return nil, err
	}
	if connections == 0 {
		connections = postgresConnections
	}
	c.MaxConns = int32(min(connections, maxPostgres))
	c.MinIdleConns = min(2, c.MaxConns)
	c.ConnConfig.ConnectTimeout = 5 * time.Second
	for name, v := range map[string]string{
		"application_name": "cvm-broker", "statement_timeout": "5000", "lock_timeout": "5000",
		"idle_in_transaction_session_timeout": "10000",
	} {
		c.ConnConfig.RuntimeParams[name] = v
	}
	return c, nil
}

// secured refuses ways to the server on which somebody else could answer.
func secured(c *pgxpool.Config) error {
	ways := []*pgconn.FallbackConfig{{Host: c.ConnConfig.Host, TLSConfig: c.ConnConfig.TLSConfig}}
	for _, w := range append(ways, c.ConnConfig.Fallbacks...) {
		ip := net.ParseIP(w.Host)
		local := strings.HasPrefix(w.Host, "/") || (ip != nil && ip.IsLoopback())
		verified := w.TLSConfig != nil && !w.TLSConfig.InsecureSkipVerify
		if !local && !verified {
			return fmt.Errorf("host %s: expected sslmode=verify-full, a socket's directory or a loopback address", w.Host)
		}
	}
	return nil
}

// migrate runs in one transaction under a lock: of brokers that start together
// one does the work, and a database of a newer program is left alone.
func (b *postgresBackend) migrate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", int64(lockSchema)); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "CREATE TABLE IF NOT EXISTS cvm_broker_schema (version int NOT NULL)"); err != nil {
			return err
		}
		var have int
		if err := tx.QueryRow(ctx, "SELECT coalesce(max(version), 0) FROM cvm_broker_schema").Scan(&have); err != nil {
			return err
		}
		if have > len(schema) {
			return fmt.Errorf("the schema has version %d, this program knows %d", have, len(schema))
		}
		for _, step := range schema[have:] {
			if _, err := tx.Exec(ctx, step); err != nil {
				return err
			}
			have++
			if _, err := tx.Exec(ctx, "INSERT INTO cvm_broker_schema VALUES ($1)", have); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *postgresBackend) close() error {
	b.pool.Close()
	return nil
}

func storageError(err error) error {
	if err == nil {
		return nil
	}
	return cause.New(cause.StorageFailed, "postgres: %w", err)
}

// run runs f in a transaction. What f itself says is returned as it is.
func (b *postgresBackend) run(o pgx.TxOptions, first string, f func(tx transaction) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), postgresWait)
	defer cancel()
	tx, err := b.pool.BeginTx(ctx, o)
	if err != nil {
		return storageError(err)
	}
	// After a commit this does nothing.
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	if first != "" {
		if _, err := tx.Exec(ctx, first); err != nil {
			return storageError(err)
		}
	}
	if err := f(postgresTx{ctx, tx}); err != nil {
		return err
	}
	return storageError(tx.Commit(ctx))
}

func (b *postgresBackend) view(f func(tx transaction) error) error {
	return b.run(pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, "", f)
}

// update: one writer at a time, as with bbolt. Changes are an admin's and rare;
// what many guests do goes through insert and the sessions' own table.
func (b *postgresBackend) update(f func(tx transaction) error) error {
	return b.run(pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, fmt.Sprintf("SELECT pg_advisory_xact_lock(%d)", int64(lockUpdate)), f)
}

const selectValue = "SELECT value FROM cvm_broker_value WHERE bucket = $1 AND name = $2"

func (b *postgresBackend) get(bucket, key []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), postgresWait)
	defer cancel()
	return one(b.pool.QueryRow(ctx, selectValue, string(bucket), string(key)))
}

func (b *postgresBackend) insert(bucket, key, sealed []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), postgresWait)
	defer cancel()
	tag, err := b.pool.Exec(ctx, "INSERT INTO cvm_broker_value VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", string(bucket), string(key), sealed)
	if err != nil {
		return nil, storageError(err)
	}
	if tag.RowsAffected() == 1 {
		return sealed, nil
	}
	is, err := b.get(bucket, key)
	if err == nil && is == nil {
		err = storageError(errors.New("a value went away while it was made"))
	}
	return is, err
}

// one is the value of a row, nil when there is no row.
func one(row pgx.Row) (sealed []byte, err error) {
	err = row.Scan(&sealed)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	return sealed, storageError(err)
}

type postgresTx struct {
	ctx context.Context
	tx  pgx.Tx
}

func (t postgresTx) read(bucket, key []byte) ([]byte, error) {
	return one(t.tx.QueryRow(t.ctx, selectValue, string(bucket), string(key)))
}

func (t postgresTx) write(bucket, key, sealed []byte) error {
	_, err := t.tx.Exec(t.ctx, "INSERT INTO cvm_broker_value VALUES ($1, $2, $3) ON CONFLICT (bucket, name) DO UPDATE SET value = excluded.value", string(bucket), string(key), sealed)
	return storageError(err)
}

func (t postgresTx) remove(bucket, key []byte) error {
	_, err := t.tx.Exec(t.ctx, "DELETE FROM cvm_broker_value WHERE bucket = $1 AND name = $2", string(bucket), string(key))
	return storageError(err)
}

// each reads page by page: a table of a million guests is not held at once, and
// f may use the connection.
func (t postgresTx) each(bucket []byte, f func(key, sealed []byte) error) error {
	const page = 500
	type pair struct {
		name   string
		sealed []byte
	}
	for after := ""; ; {
		rows, err := t.tx.Query(t.ctx, "SELECT name, value FROM cvm_broker_value WHERE bucket = $1 AND name > $2 ORDER BY name LIMIT $3", string(bucket), after, page)
		if err != nil {
			return storageError(err)
		}
		list, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (p pair, err error) {
			err = r.Scan(&p.name, &p.sealed)
			return p, err
		})
		if err != nil {
			return storageError(err)
		}
		for _, p := range list {
			if err := f([]byte(p.name), p.sealed); err != nil {
				return err
			}
			after = p.name
		}
		if len(list) < page {
			return nil
		}
	}
}
