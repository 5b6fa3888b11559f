package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/broker/postgrestest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// postgres is one server for all tests of the package.
var postgres = sync.OnceValues(postgrestest.Start)

func TestMain(m *testing.M) {
	code := m.Run()
	if started.Load() {
		if s, err := postgres(); err == nil {
			s.Stop()
		}
	}
	os.Exit(code)
}

var started atomic.Bool

func database(t testing.TB) string {
	t.Helper()
	started.Store(true)
	s, err := postgres()
	if err != nil {
		t.Fatal(err)
	}
	return s.Database(t)
}

func openDatabase(t testing.TB, dsn string, b byte) *Store {
	t.Helper()
	s, err := OpenPostgresStore(context.Background(), dsn, 8, fixed(bytes.Repeat([]byte{b}, kek.Size)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func pool(s *Store) *pgxpool.Pool { return s.backend.(*postgresBackend).pool }

// What every backend does.
func TestBackends(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) *Store{
		"bbolt": func(t *testing.T) *Store {
			s, err := openStore(t, filepath.Join(t.TempDir(), "db"), 1)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			return s
		},
		"PostgreSQL": func(t *testing.T) *Store { return openDatabase(t, database(t), 1) },
	} {
		t.Run(name, func(t *testing.T) { testBackend(t, open(t)) })
	}
}

func testBackend(t *testing.T, s *Store) {
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	other := kbs.ResourceURI{Repository: "a", Type: "key", Tag: "2"}
	if _, err := s.Resource(keyOne); !errors.Is(err, errNotFound) {
		t.Errorf("nothing is there: %v", err)
	}
	for _, err := range []error{
		s.PutResource(keyOne, []byte("old"), onRecord), s.PutResource(keyOne, []byte("new"), onRecord),
		s.PutResource(other, make([]byte, MaxResource), onRecord), s.PutRule(keyOne, anyPolicy(), onRecord),
		s.RaiseMark("shop", adminclient.Mark{Version: 3}, onRecord),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if b, err := s.Resource(keyOne); err != nil || string(b) != "new" {
		t.Errorf("%q, %v", b, err)
	}
	// What cannot be put on record is undone.
	no := errors.New("no record")
	for what, err := range map[string]error{
		"put":    s.PutResource(keyOne, []byte("unrecorded"), func() error { return no }),
		"delete": s.DeleteResource(keyOne, func() error { return no }),
		"mark":   s.RaiseMark("shop", adminclient.Mark{Version: 9}, func() error { return no }),
	} {
		if !errors.Is(err, no) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if b, err := s.Resource(keyOne); err != nil || string(b) != "new" {
		t.Errorf("after unrecorded changes: %q, %v", b, err)
	}
	if err := s.RaiseMark("shop", adminclient.Mark{Version: 2}, onRecord); cause.Of(err) != cause.PolicyBelowFloor {
		t.Errorf("a mark went down: %v", err)
	}
	if m, err := s.Mark("shop"); err != nil || m.Version != 3 {
		t.Errorf("%+v, %v", m, err)
	}
	if names, err := s.list(bucketResources); err != nil || strings.Join(names, " ") != "kbs:///a/key/1 kbs:///a/key/2" {
		t.Errorf("%v, %v", names, err)
	}
	testMovedValue(t, s, other)

	// Many sessions of one guest that is new: one instance.
	var ids sync.Map
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			i, err := s.Instance("tpm:00", time.Now())
			if err != nil {
				t.Error(err)
			}
			ids.Store(i.ID, true)
		})
	}
	wg.Wait()
	n := 0
	ids.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("one identity got %d instances", n)
	}
	testPruning(t, s)
	if err := s.DeleteResource(keyOne, onRecord); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rule(keyOne); !errors.Is(err, errNotFound) {
		t.Errorf("the rule outlived its resource: %v", err)
	}
	if err := s.DeleteResource(keyOne, onRecord); !errors.Is(err, errNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

// More than a page of guests that never come back are forgotten; a destroyed
// one, and one that was seen since, are not.
func testPruning(t *testing.T, s *Store) {
	t.Helper()
	long, lately := time.Now().AddDate(0, 0, -100), time.Now().AddDate(0, 0, -1)
	ids := map[string]string{}
	see := func(identity string, at time.Time) {
		t.Helper()
		i, err := s.Instance(identity, at)
		if err != nil {
			t.Fatal(err)
		}
		if id, ok := ids[identity]; ok && id != i.ID {
			t.Errorf("%s got another id", identity)
		}
		ids[identity] = i.ID
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := w; i < 520; i += 8 {
				if _, err := s.Instance(fmt.Sprintf("snp:%04d", i), long); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	see("snp:destroyed", long)
	see("snp:back", long)
	see("snp:back", lately)
	if err := s.SetTombstone(ids["snp:destroyed"], onRecord); err != nil {
		t.Fatal(err)
	}
	if n, err := s.PruneInstances(time.Now().AddDate(0, 0, -90)); n != 520 || err != nil {
		t.Errorf("%d instances were forgotten, expected 520, %v", n, err)
	}
	see("snp:destroyed", long)
	see("snp:back", lately)
	list, err := s.Instances()
	if err != nil || len(list) != 3 {
		t.Errorf("%d instances are left, expected 3, %v", len(list), err)
	}
	for _, i := range list {
		if i.Tombstone != (i.Identity == "snp:destroyed") {
			t.Errorf("%+v", i)
		}
	}
}

// An attacker with the storage moves one value to another name.
func testMovedValue(t *testing.T, s *Store, to kbs.ResourceURI) {
	t.Helper()
	err := s.backend.update(func(tx transaction) error {
		b, err := tx.read(bucketResources, []byte(keyOne.Path()))
		if err != nil {
			return err
		}
		if bytes.Contains(b, []byte("new")) {
			t.Error("a resource is in the clear")
		}
		return tx.write(bucketResources, []byte(to.Path()), bytes.Clone(b))
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resource(to); err == nil || errors.Is(err, errNotFound) {
		t.Errorf("a moved value was read: %v", err)
	}
}

// Brokers that start together on an empty database agree on one schema and one
// key; another KEK, and a database of a newer program, are refused.
func TestPostgresStart(t *testing.T) {
	dsn := database(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			s, err := OpenPostgresStore(context.Background(), dsn, 2, fixed(bytes.Repeat([]byte{1}, kek.Size)))
			if err != nil {
				t.Error(err)
				return
			}
			_ = s.Close()
		})
	}
	wg.Wait()
	if _, err := OpenPostgresStore(context.Background(), dsn, 2, fixed(bytes.Repeat([]byte{2}, kek.Size))); err == nil || !strings.Contains(err.Error(), "KEK") {
		t.Errorf("another KEK: %v", err)
	}
	s := openDatabase(t, dsn, 1)
	if _, err := pool(s).Exec(context.Background(), "INSERT INTO cvm_broker_schema VALUES (99)"); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenPostgresStore(context.Background(), dsn, 2, fixed(bytes.Repeat([]byte{1}, kek.Size))); err == nil || !strings.Contains(err.Error(), "version 99") {
		t.Errorf("a newer schema: %v", err)
	}
}

// A token's data key is made once, and kept wrapped beside what it seals.
func TestDataKeyIsMadeOnce(t *testing.T) {
	dsn := database(t)
	token := &wrapping{}
	for range 3 {
		s, err := OpenPostgresStore(context.Background(), dsn, 2, token)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
	}
	if token.made != 1 {
		t.Errorf("%d data keys were made", token.made)
	}
	if _, err := OpenPostgresStore(context.Background(), dsn, 2, &wrapping{}); err == nil {
		t.Error("another token opened it")
	}
	made := database(t)
	openDatabase(t, made, 1)
	if _, err := OpenPostgresStore(context.Background(), made, 2, &wrapping{}); err == nil || !strings.Contains(err.Error(), "KEK") {
		t.Errorf("a token in place of a file: %v", err)
	}
}

// wrapping plays a token; TestToken in package kek has a real one.
type wrapping struct {
	made int
	last []byte
}

func (w *wrapping) DataKey(kept []byte) (key, keep []byte, err error) {
	if kept != nil {
		if w.last == nil {
			return nil, nil, errors.New("not wrapped here")
		}
		return bytes.Clone(w.last), nil, nil
	}
	w.made++
	w.last = bytes.Repeat([]byte{byte(w.made)}, kek.Size)
	return bytes.Clone(w.last), []byte("wrapped"), nil
}

func TestPostgresDSN(t *testing.T) {
	for dsn, want := range map[string]string{
		"host=/run/postgresql dbname=b":                               "",
		"host=127.0.0.1 user=u password=secret sslmode=disable":       "",
		"postgres://u:secret@db.example/b?sslmode=verify-full":        "",
		"postgres://u:secret@db.example/b":                            "verify-full", // pgx: prefer
		"postgres://u:secret@db.example/b?sslmode=disable":            "verify-full",
		"postgres://u:secret@db.example/b?sslmode=require":            "verify-full",
		"host=/run/a,db.example dbname=b sslmode=disable":             "verify-full",
		"postgres://u:secret@db.example:notaport/b":                   "cannot be read",
		"host=localhost user=u password=secret sslmode=somethingelse": "cannot be read",
	} {
		_, err := postgresConfig(dsn, 0)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: %v", dsn, err)
		}
	}
	t.Setenv("PGPASSWORD", "secret")
	if _, err := postgresConfig("host=/run/postgresql", 0); err == nil || !strings.Contains(err.Error(), "PGPASSWORD") || strings.Contains(err.Error(), "secret") {
		t.Errorf("a password in the environment: %v", err)
	}
}

// The DSN's file is as secret as a key.
func TestPostgresDSNFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dsn")
	if err := os.WriteFile(path, []byte(database(t)+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := &Config{Postgres: &PostgresConfig{DSNFile: path}}
	if _, err := c.store(context.Background(), fixed(make([]byte, kek.Size))); err == nil || !strings.Contains(err.Error(), "only its owner") {
		t.Errorf("%v", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := c.store(context.Background(), fixed(make([]byte, kek.Size)))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(); err == nil || cause.Of(err) != cause.StorageFailed {
		t.Errorf("a closed database: %v", err)
	}
}

func sharedSessions(t *testing.T, dsn string, most int, now func() time.Time) *postgresSessions {
	t.Helper()
	s, err := openDatabase(t, dsn, 1).sessions(most, now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.close() })
	return s.(*postgresSessions)
}

// Of all claims on one nonce, by three brokers at the same time, one wins.
func TestSharedNonceIsConsumedOnce(t *testing.T) {
	dsn := database(t)
	var brokers []*postgresSessions
	for range 3 {
		brokers = append(brokers, sharedSessions(t, dsn, 1000, time.Now))
	}
	for i := range 100 {
		n := newSession("tpm", kbs.DialectKBS, nil, time.Now())
		if err := brokers[i%3].open(n); err != nil {
			t.Fatal(err)
		}
		var won atomic.Int32
		var wg sync.WaitGroup
		for k := range 6 {
			wg.Go(func() {
				b := brokers[k%3]
				m, err := b.get(n.id)
				if err != nil || m == nil || m.nonce != n.nonce {
					t.Errorf("the session of another broker: %+v, %v", m, err)
					return
				}
				ok, err := b.claim(m)
				if err != nil {
					t.Error(err)
				}
				if !ok {
					return
				}
				won.Add(1)
				m.token = fmt.Sprintf("token-%d-%d", i, k)
				if err := b.attested(m); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d claims on one nonce won", won.Load())
		}
		m, err := brokers[(i+1)%3].get(n.id)
		if err != nil || m == nil || !m.attested() || !m.spent {
			t.Fatalf("the attested session: %+v, %v", m, err)
		}
		if again, err := brokers[(i+2)%3].getByToken(m.token); err != nil || again == nil || again.id != n.id {
			t.Errorf("by its token: %+v, %v", again, err)
		}
	}
}

func TestSharedSessionsAreBounded(t *testing.T) {
	var skew atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(skew.Load())) }
	s := sharedSessions(t, database(t), 32, now)
	count := func() (n int) {
		if err := pool(s.store).QueryRow(context.Background(), "SELECT count(*) FROM cvm_broker_session").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	var last *session
	for range 200 {
		last = newSession("tpm", kbs.DialectKBS, nil, now())
		if err := s.open(last); err != nil {
			t.Fatal(err)
		}
		if n := count(); n > 32 {
			t.Fatalf("%d sessions, at most 32", n)
		}
	}
	if n, err := s.get(last.id); err != nil || n == nil {
		t.Errorf("the newest had to go: %v", err)
	}
	// In bytes: the oldest attested ones go.
	for i := range 8 {
		n := newSession("tpm", kbs.DialectKBS, nil, now().Add(time.Second))
		if err := s.open(n); err != nil {
			t.Fatal(err)
		}
		n.size = maxHeld / 4
		attestedNow(t, s, n, fmt.Sprint(i))
		last = n
	}
	if err := s.trim(context.Background()); err != nil {
		t.Fatal(err)
	}
	var held int64
	if err := pool(s.store).QueryRow(context.Background(), "SELECT coalesce(sum(bytes), 0) FROM cvm_broker_session").Scan(&held); err != nil || held > maxHeld || held == 0 {
		t.Errorf("%d bytes held, %v", held, err)
	}
	if n, err := s.getByToken(last.token); err != nil || n == nil {
		t.Errorf("the newest had to go: %v", err)
	}
	// In time.
	skew.Store(int64(SessionLife + 2*time.Second))
	if n, err := s.get(last.id); err != nil || n != nil {
		t.Errorf("a session outlives its time: %+v, %v", n, err)
	}
	if err := s.trim(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := count(); n != 0 || s.live() != 0 {
		t.Errorf("%d expired sessions are still there", n)
	}
}
