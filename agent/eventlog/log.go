package eventlog

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/google/go-eventlog/cel"
	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Register is the hardware register behind a log.
//
// Extend extends by the digest of the register's own hash, SHA-256 for a PCR
// and SHA-384 for an RTMR; when it fails, whether it extended is unknown, and
// the log finds out by Read. Read returns the register's value, 32 or 48 bytes.
type Register interface {
	Name() string // "pcr14", "rtmr3", or NameHead where there is none
	Index() int   // IndexPCR14 or IndexRTMR3
	Extend(ctx context.Context, digests map[crypto.Hash][]byte) error
	Read(ctx context.Context) ([]byte, error)
}

// FileName is the log's file inside its directory: CEL-TLV bytes, so that any
// tool can replay it.
const FileName = "eventlog.cel"

// Log is an open event log. It is safe for concurrent use.
type Log struct {
	path string
	reg  Register
	typ  cel.MRType
	hash crypto.Hash // of the register's bank
	lock *os.File

	mu      sync.Mutex
	data    []byte    // every record that is in the file
	settled int       // bytes of data whose records are extended
	state   *Replayed // of data
	broken  error     // the register is not what the log says: nothing is appended any more
}

// Open opens, or begins, the log in dir, which must exist and be on storage
// that lives as long as the register (a tmpfs: both end with the boot). The
// log must replay to the register; an append that was cut off before its
// extend is extended now, once. Everything else fails with
// cause.EventLogDiverged. Only one process can have the log open.
func Open(ctx context.Context, dir string, reg Register) (*Log, error) {
	l := &Log{path: filepath.Join(dir, FileName), reg: reg}
	switch {
	case strings.HasPrefix(reg.Name(), "pcr") && reg.Index() == IndexPCR14:
		l.typ, l.hash = cel.PCRType, crypto.SHA256
	case reg.Name() == NameHead && reg.Index() == IndexPCR14:
		l.typ, l.hash = cel.PCRType, crypto.SHA256
	case strings.HasPrefix(reg.Name(), "rtmr") && reg.Index() == IndexRTMR3:
		l.typ, l.hash = cel.CCMRType, crypto.SHA384
	default:
		return nil, cause.New(cause.EventLogDiverged, "register %s (index %d) is none of PCR 14 and RTMR3", reg.Name(), reg.Index())
	}
	if err := l.acquire(); err != nil {
		return nil, err
	}
	if err := l.load(ctx); err != nil {
		l.lock.Close()
		return nil, err
	}
	return l, nil
}

// acquire takes the lock that keeps two agents from extending one register.
func (l *Log) acquire() error {
	f, err := os.OpenFile(l.path+".lock", os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return cause.New(cause.EventLogWrite, "open event log: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return cause.New(cause.EventLogWrite, "event log %s is held by another process: %w", l.path, err)
	}
	l.lock = f
	return nil
}

func (l *Log) load(ctx context.Context) error {
	data, err := bounded.ReadFile(l.path, MaxLog)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return cause.New(cause.EventLogDiverged, "read event log: %w", err)
	}
	if l.state, err = Replay(data); err != nil {
		return err
	}
	l.data = data
	for _, rec := range l.state.cel.Records() {
		if rec.IndexType != l.typ {
			return cause.New(cause.EventLogDiverged, "the event log is of another register than %s", l.reg.Name())
		}
	}
	if n := len(l.state.Events); n > 0 {
		// What Open found may lack its last extend; settle finds out.
		if l.settled, err = lastRecord(data); err != nil {
			return err
		}
	}
	return l.settle(ctx)
}

// lastRecord returns the offset of the last record of a log that replayed.
func lastRecord(data []byte) (off int, err error) {
	for rest := data; len(rest) > 0; {
		off = len(data) - len(rest)
		for range 4 {
			if _, _, rest, err = firstTLV(rest, MaxLog); err != nil {
				return 0, cause.Wrap(cause.EventLogDiverged, err)
			}
		}
	}
	return off, nil
}

// values returns what the register holds without and with the last record.
func (l *Log) values() (before, after []byte) {
	if l.typ == cel.CCMRType {
		return l.state.before384[:], l.state.SHA384[:]
	}
	return l.state.before256[:], l.state.SHA256[:]
}

// settle makes the register and the file agree: it extends the last record if
// the register lacks exactly that one, and refuses any other difference.
// l.mu is held, or l is not shared yet.
func (l *Log) settle(ctx context.Context) error {
	if l.broken != nil {
		return l.broken
	}
	before, after := l.values()
	got, err := l.reg.Read(ctx)
	if err != nil {
		return cause.Wrap(cause.TPMUnavailable, fmt.Errorf("read %s: %w", l.reg.Name(), err))
	}
	pending := l.settled < len(l.data)
	if pending && bytes.Equal(got, before) {
		digests := l.state.cel.Records()[len(l.state.Events)-1].Digests
		extendErr := l.reg.Extend(ctx, digests)
		// An error does not say that nothing was extended (the answer may be
		// what got lost): only the register does.
		if got, err = l.reg.Read(ctx); err != nil {
			return cause.Wrap(cause.TPMUnavailable, fmt.Errorf("read %s: %w", l.reg.Name(), err))
		}
		if extendErr != nil && bytes.Equal(got, before) {
			return cause.Wrap(cause.TPMUnavailable, fmt.Errorf("extend %s: %w", l.reg.Name(), extendErr))
		}
	}
	if !bytes.Equal(got, after) {
		l.broken = cause.New(cause.EventLogDiverged, "%s holds %x, the event log of %d events replays to %x", l.reg.Name(), got, len(l.state.Events), after)
		return l.broken
	}
	l.settled = len(l.data)
	return nil
}

// Append writes e to the log, durably, and then extends the register. When it
// fails before the extend the event stays pending: the next Append, or the
// next Open, extends it, and an Append of the same event is that retry. An
// event that the order does not allow is refused with nothing written.
func (l *Log) Append(ctx context.Context, e Event) error { return l.append(ctx, e, false) }

// AppendOnce is Append for a caller that may have been restarted or is
// retrying: an event that already has its effect is left as it is, and
// nothing is extended.
func (l *Log) AppendOnce(ctx context.Context, e Event) error { return l.append(ctx, e, true) }

func (l *Log) append(ctx context.Context, e Event, once bool) error {
	e = e.normal()
	canonical, err := e.Canonical()
	if err != nil {
		return cause.Wrap(cause.Internal, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	pending := l.settled < len(l.data)
	if err := l.settle(ctx); err != nil {
		return err
	}
	if pending {
		if last, err := l.state.Events[len(l.state.Events)-1].Canonical(); err == nil && bytes.Equal(last, canonical) {
			return nil
		}
	}
	if once && l.has(e) {
		return nil
	}
	next, rec, err := l.next(e, canonical)
	if err != nil {
		return err
	}
	// Write-ahead: the record is on storage before the register changes, so
	// a kill in between leaves a log that is exactly one extend ahead.
	if err := writeWhole(l.path, next); err != nil {
		return cause.New(cause.EventLogWrite, "write event log: %w", err)
	}
	state, err := Replay(next)
	if err != nil {
		return cause.New(cause.Internal, "event log after %s event (record %d): %w", e.Kind, rec.RecNum, err)
	}
	l.data, l.state = next, state
	return l.settle(ctx)
}

// has says whether e needs no append. The first launch's events are there once
// per boot, so their presence is enough; an upgrade's can come again (the same
// version staged anew after a roll-back), so they count in the current set.
func (l *Log) has(e Event) bool {
	if e.Kind == KindPolicy || e.Kind == KindImage {
		return slices.ContainsFunc(l.state.Events, func(o Event) bool { return reflect.DeepEqual(o, e) })
	}
	return l.state.state.done(e)
}

// next encodes the log with one more record.
func (l *Log) next(e Event, canonical []byte) ([]byte, cel.Record, error) {
	state := l.state.state.clone()
	if err := state.apply(e); err != nil {
		return nil, cel.Record{}, cause.New(cause.Internal, "event log: %w", err)
	}
	d, err := content(canonical).GenerateDigest(l.hash)
	if err != nil {
		return nil, cel.Record{}, cause.Wrap(cause.Internal, err)
	}
	rec := cel.Record{
		RecNum: uint64(len(l.state.Events)), Index: uint8(l.reg.Index()), IndexType: l.typ,
		Digests: map[crypto.Hash][]byte{l.hash: d}, Content: cel.TLV{Type: ContentType, Value: canonical},
	}
	var buf bytes.Buffer
	buf.Write(l.data)
	if err := rec.EncodeCELR(&buf); err != nil {
		return nil, rec, cause.Wrap(cause.Internal, err)
	}
	if buf.Len() > MaxLog || rec.RecNum >= MaxRecords {
		return nil, rec, cause.New(cause.EventLogWrite, "the event log is full (%d records, %d bytes)", rec.RecNum, len(l.data))
	}
	return buf.Bytes(), rec, nil
}

// writeWhole replaces the file whole or not at all, and the change survives a
// power cut once it returns.
func writeWhole(path string, data []byte) error {
	if err := renameio.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// Bytes returns the CEL-TLV bytes of every event that is in the register. It
// waits for an append that is under way: the bytes never lag the register.
func (l *Log) Bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.data[:l.settled])
}

// Events returns the events, one that is still pending included.
func (l *Log) Events() []Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	events := slices.Clone(l.state.Events)
	for i := range events {
		events[i].Signers = slices.Clone(events[i].Signers)
	}
	return events
}

// State returns what the log says is running and staged.
func (l *Log) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.Running()
}

// Check reads the register and fails with cause.EventLogDiverged when it is
// not what the log replays to: somebody else extended it.
func (l *Log) Check(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.settle(ctx)
}

// Close gives up the log. It writes nothing: every append is already durable.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken == nil {
		l.broken = cause.New(cause.Internal, "the event log is closed")
	}
	return l.lock.Close()
}
