// Package audit is the key broker's audit log: NDJSON, append-only, each line
// chained to the one before by SHA-256.
package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Record is one line of the audit log. It names what was decided and why, and
// never holds a secret, a token, a cookie or a resource.
type Record struct {
	Seq      uint64 `json:"seq"`
	Time     string `json:"time"`             // RFC 3339, UTC, milliseconds
	Prev     string `json:"prev"`             // SHA-256 of the line before, lowercase hex; 64 zeros in the first
	Broker   string `json:"broker,omitempty"` // name of the broker, where several share a database and each has its own log
	Op       string `json:"op"`               // auth, attest, release, admin.<what>, start, stop, prune, recovered
	Peer     string `json:"peer,omitempty"`
	Session  string `json:"session,omitempty"` // first 16 hex digits of the cookie's SHA-256
	TEE      string `json:"tee,omitempty"`
	Dialect  string `json:"dialect,omitempty"`
	Identity string `json:"identity,omitempty"`
	Instance string `json:"instance,omitempty"`
	Resource string `json:"resource,omitempty"`
	Policy   string `json:"policy,omitempty"` // name and version that the evidence proves
	Rules    string `json:"rules,omitempty"`  // name, version and digest of the reference document that decided
	Outcome  string `json:"outcome"`          // ok or refused
	Verdict  string `json:"verdict,omitempty"`
	Reason   string `json:"reason,omitempty"`
}

// maxRecord bounds one line, in bytes.
const maxRecord = 64 << 10

var firstPrev = strings.Repeat("0", 64)

// Log is the broker's append-only, hash-chained NDJSON log. Cutting records
// off its end leaves a chain that is whole: compare the head that
// `cvmctl broker audit verify` prints with one that was kept elsewhere.
//
// Records of concurrent callers share one fsync: while one is under way those
// that come are chained and wait for the next, which takes them all.
type Log struct {
	// Wrote, when set before the first Write, is told how long each Write took.
	Wrote func(time.Duration)

	broker string
	now    func() time.Time

	mu   sync.Mutex
	file *os.File
	seq  uint64 // of the last record that is chained, written or waiting
	head string
	next *batch // chained and waiting; nil: none
	busy bool   // somebody writes
	err  error  // a failed write leaves an unknown tail: nothing is written after it
}

// batch is the records that one fsync makes durable.
type batch struct {
	lines []byte
	done  chan struct{}
	err   error // once done
}

// Head is the end of a chain.
type Head struct {
	Records uint64 `json:"records"`
	Hash    string `json:"hash"` // SHA-256 of the last line
}

// Open opens or creates the log, mode 0600, after verifying the whole
// chain. A last line that a crash left without its newline is cut off, and a
// record says so.
func Open(path string, now func() time.Time) (*Log, error) { return OpenAs("", path, now) }

// OpenAs is Open for one of several brokers: its name is in each record.
func OpenAs(broker, path string, now func() time.Time) (*Log, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, cause.New(cause.StorageFailed, "audit log: %w", err)
	}
	a := &Log{file: f, now: now, broker: broker}
	head, whole, torn, err := verifyChain(f)
	if err == nil && torn {
		err = f.Truncate(whole)
	}
	if err != nil {
		_ = f.Close()
		return nil, cause.New(cause.StorageFailed, "audit log %s: %w", path, err)
	}
	a.seq, a.head = head.Records, head.Hash
	if torn {
		if err := a.Write(Record{Op: "recovered", Outcome: "ok", Reason: "an incomplete last line was cut off"}); err != nil {
			_ = f.Close()
			return nil, err
		}
	}
	return a, nil
}

// Write appends a record and waits until it is on disk.
func (a *Log) Write(r Record) error {
	if a.Wrote != nil {
		defer func(start time.Time) { a.Wrote(time.Since(start)) }(time.Now())
	}
	a.mu.Lock()
	b, err := a.chain(r)
	if err != nil {
		a.mu.Unlock()
		return err
	}
	if a.busy { // who writes now takes this batch next
		a.mu.Unlock()
		<-b.done
		return b.err
	}
	a.busy = true
	a.flush()
	if a.next == nil {
		a.busy = false
	} else { // not this caller's any more, who has waited long enough
		go a.flushAll()
	}
	a.mu.Unlock()
	return b.err
}

// flushAll is called by who set busy.
func (a *Log) flushAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.next != nil {
		a.flush()
	}
	a.busy = false
}

// chain gives r its place and adds it to the batch that is written next; the
// caller holds mu.
func (a *Log) chain(r Record) (*batch, error) {
	if a.err != nil {
		return nil, a.err
	}
	r.Seq, r.Prev, r.Broker = a.seq+1, a.head, a.broker
	r.Time = a.now().UTC().Format("2006-01-02T15:04:05.000Z07:00")
	// Both can hold a peer's text. Whatever it is, the record is written: cut
	// so that it fits even when every byte becomes a \u escape.
	r.Reason, r.Verdict = cut(r.Reason), cut(r.Verdict)
	line, err := json.Marshal(r)
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	if len(line) >= maxRecord {
		return nil, cause.New(cause.Internal, "an audit record has %d bytes", len(line))
	}
	a.seq, a.head = r.Seq, lineHash(line)
	if a.next == nil {
		a.next = &batch{done: make(chan struct{})}
	}
	a.next.lines = append(append(a.next.lines, line...), '\n')
	return a.next, nil
}

// flush writes the waiting batch. The caller holds mu, which is free while the
// disk works, and is the only one who writes.
func (a *Log) flush() {
	b := a.next
	a.next = nil
	if a.err == nil {
		a.mu.Unlock()
		_, err := a.file.Write(b.lines)
		if err == nil {
			err = a.file.Sync()
		}
		a.mu.Lock()
		if err != nil && a.err == nil {
			a.err = cause.New(cause.StorageFailed, "audit log: %w", err)
		}
		if err != nil {
			b.err = a.err
		}
	} else { // chained to a record that is not there
		b.err = a.err
	}
	close(b.done)
}

func cut(s string) string {
	const most = 4 << 10
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// Close closes the file. A Write that it overtakes fails.
func (a *Log) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = cause.New(cause.StorageFailed, "audit log: closed")
	}
	return a.file.Close()
}

// Verify reads a whole log and returns its head. A broken chain, a gap or
// an incomplete last line is an error that names the line.
func Verify(r io.Reader) (Head, error) {
	head, _, torn, err := verifyChain(r)
	if err == nil && torn {
		err = fmt.Errorf("line %d is incomplete", head.Records+1)
	}
	if err != nil {
		return Head{}, cause.New(cause.AuditBroken, "audit log: %w", err)
	}
	return head, nil
}

// verifyChain returns the head, the length of all whole lines in bytes, and
// whether something without a newline follows.
func verifyChain(r io.Reader) (head Head, whole int64, torn bool, err error) {
	head.Hash = firstPrev
	in := bufio.NewReaderSize(r, maxRecord)
	for {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return head, whole, len(line) > 0, nil
		}
		at := head.Records + 1
		if errors.Is(err, bufio.ErrBufferFull) {
			return head, whole, false, fmt.Errorf("line %d has more than %d bytes", at, maxRecord)
		}
		if err != nil {
			return head, whole, false, err
		}
		whole += int64(len(line))
		line = bytes.TrimSuffix(line, []byte("\n"))
		var rec Record
		if err := bounded.DecodeJSON(line, &rec, bounded.Limits{Bytes: maxRecord, Depth: 2}); err != nil {
			return head, whole, false, fmt.Errorf("line %d: %w", at, err)
		}
		if rec.Seq != at || rec.Prev != head.Hash {
			return head, whole, false, fmt.Errorf("line %d does not follow the line before: sequence %d, expected %d; previous hash %.16s…, expected %.16s…", at, rec.Seq, at, rec.Prev, head.Hash)
		}
		head = Head{Records: at, Hash: lineHash(line)}
	}
}

func lineHash(line []byte) string {
	d := sha256.Sum256(line)
	return hex.EncodeToString(d[:])
}
