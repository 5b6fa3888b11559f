package broker

import (
	"bytes"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// boltBackend is the embedded storage: one file, one process.
type boltBackend struct{ db *bolt.DB }

// OpenStore opens or creates embedded storage, a file of mode 0600. A KEK other
// than the one that the file was made with is refused.
func OpenStore(path string, k kek.Source) (*Store, error) {
	b, err := openBolt(path)
	if err != nil {
		return nil, err
	}
	return newStore(b, k)
}

func openBolt(path string) (*boltBackend, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		return nil, cause.New(cause.StorageFailed, "storage %s: %w", path, err)
	}
	// How long an insert waits for company. bbolt's 10 ms would be most of what
	// a guest waits for its token.
	db.MaxBatchDelay = time.Millisecond
	err = db.Update(func(tx *bolt.Tx) error {
		for _, b := range buckets {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		_ = db.Close()
		return nil, cause.New(cause.StorageFailed, "storage %s: %w", path, err)
	}
	return &boltBackend{db: db}, nil
}

func (b *boltBackend) close() error { return b.db.Close() }

func (b *boltBackend) view(f func(tx transaction) error) error {
	return b.db.View(func(tx *bolt.Tx) error { return f(boltTx{tx}) })
}

func (b *boltBackend) update(f func(tx transaction) error) error {
	return b.db.Update(func(tx *bolt.Tx) error { return f(boltTx{tx}) })
}

func (b *boltBackend) get(bucket, key []byte) (sealed []byte, err error) {
	err = b.db.View(func(tx *bolt.Tx) error {
		sealed = bytes.Clone(tx.Bucket(bucket).Get(key))
		return nil
	})
	return sealed, err
}

func (b *boltBackend) insert(bucket, key, sealed []byte) (is []byte, err error) {
	err = b.db.Batch(func(tx *bolt.Tx) error { // may run more than once
		bk := tx.Bucket(bucket)
		if old := bk.Get(key); old != nil {
			is = bytes.Clone(old)
			return nil
		}
		is = sealed
		return bk.Put(key, sealed)
	})
	return is, err
}

// boltTx lends bbolt's memory: what it returns is good within the transaction.
type boltTx struct{ tx *bolt.Tx }

func (t boltTx) read(bucket, key []byte) ([]byte, error) { return t.tx.Bucket(bucket).Get(key), nil }

func (t boltTx) write(bucket, key, sealed []byte) error { return t.tx.Bucket(bucket).Put(key, sealed) }

func (t boltTx) remove(bucket, key []byte) error { return t.tx.Bucket(bucket).Delete(key) }

func (t boltTx) each(bucket []byte, f func(key, sealed []byte) error) error {
	return t.tx.Bucket(bucket).ForEach(f)
}
