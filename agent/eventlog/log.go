package eventlog

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/google/go-eventlog/cel"
	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The registers that events are measured into: both cannot be reset while the
// guest runs (PCR 16 and 23 can).
const (
	PCRIndex  = 14
	RTMRIndex = 3
)

// FileName is the log's name within the run directory.
const FileName = "eventlog.cel"

// Register is the hardware register behind a log.
type Register interface {
	Name() string // "PCR14", "RTMR3"
	Index() int
	Hash() crypto.Hash // SHA-256 for a PCR, SHA-384 for an RTMR
	// Extend extends the register by the digest given for its Hash. An error
	// means that it is unknown whether the register moved.
	Extend(ctx context.Context, digests map[crypto.Hash][]byte) error
	// Read returns the register's value, Hash().Size() bytes.
	Read(ctx context.Context) ([]byte, error)
}

// Log is an open event log. It may be used by several goroutines.
type Log struct {
	mu   sync.Mutex
	path string
	reg  Register
	data []byte
	st   *Replayed
	// broken is set when the register may no longer match: nothing is appended
	// after it, and a restart decides from the register itself.
	broken error
}

// Open opens the log of dir, which survives restarts of the daemon but not of
// the guest. The log must replay to the register, or, after a kill between
// writing and extending, to the register as it was before the last record,
// which is then extended, once. Anything else is cause.EventLogDiverged.
func Open(ctx context.Context, dir string, reg Register) (*Log, error) {
	l := &Log{path: filepath.Join(dir, FileName), reg: reg}
	data, err := readLog(l.path)
	if err != nil {
		return nil, err
	}
	value, err := reg.Read(ctx)
	if err != nil {
		return nil, cause.Wrap(cause.TPMUnavailable, fmt.Errorf("read %s: %w", reg.Name(), err))
	}
	offsets, end, err := frame(data)
	if err != nil {
		return nil, cause.New(cause.EventLogDiverged, "event log: %w", err)
	}
	// A torn tail was never extended: the extend comes after the fsync.
	torn := end != len(data)
	data = data[:end]
	whole, err := Replay(data)
	if err != nil {
		return nil, err
	}
	switch {
	case bytes.Equal(value, whole.value(reg.Hash())):
	case !torn && len(offsets) > 0:
		last := offsets[len(offsets)-1]
		before, err := Replay(data[:last])
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(value, before.value(reg.Hash())) {
			return nil, diverged(reg, value, whole)
		}
		digest, err := whole.Events[len(whole.Events)-1].GenerateDigest(reg.Hash())
		if err != nil {
			return nil, cause.New(cause.EventLogDiverged, "last event: %w", err)
		}
		if err := reg.Extend(ctx, map[crypto.Hash][]byte{reg.Hash(): digest}); err != nil {
			return nil, cause.Wrap(cause.TPMUnavailable, fmt.Errorf("extend %s: %w", reg.Name(), err))
		}
		now, err := reg.Read(ctx)
		if err != nil {
			return nil, cause.Wrap(cause.TPMUnavailable, fmt.Errorf("read %s: %w", reg.Name(), err))
		}
		if !bytes.Equal(now, whole.value(reg.Hash())) {
			return nil, diverged(reg, now, whole)
		}
	default:
		return nil, diverged(reg, value, whole)
	}
	if torn {
		if err := os.Truncate(l.path, int64(end)); err != nil {
			return nil, cause.New(cause.EventLogWrite, "cut the torn end off the event log: %w", err)
		}
	}
	l.data, l.st = data, whole
	return l, nil
}

// Append logs e: written and synced, then extended. It fails without a trace
// when e is not explained by the events before it. When the extend fails, the
// log is closed to further events, since the register's value is unknown.
func (l *Log) Append(ctx context.Context, e Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.append(ctx, e)
}

// AppendOnce is Append, but does nothing when e has been logged already and
// still stands: a restart or a retry does not repeat it.
func (l *Log) AppendOnce(ctx context.Context, e Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken == nil && l.st.State.done(e) {
		return nil
	}
	return l.append(ctx, e)
}

func (l *Log) append(ctx context.Context, e Event) error {
	if l.broken != nil {
		return cause.New(cause.EventLogDiverged, "event log is closed since an earlier failure: %w", l.broken)
	}
	next, err := l.st.State.next(e)
	if err != nil {
		return cause.New(cause.EventLogDiverged, "event refused: %w", err)
	}
	record, digest, err := l.record(e)
	if err != nil {
		return cause.New(cause.EventLogWrite, "encode event %q: %w", e.Kind, err)
	}
	if len(l.data)+len(record) > MaxSize || len(l.st.Events) >= maxEvents {
		return cause.New(cause.EventLogWrite, "event log is full")
	}
	if err := l.write(record); err != nil {
		return err
	}
	// From here the event is on disk: a kill now makes Open extend it.
	if err := l.reg.Extend(context.WithoutCancel(ctx), map[crypto.Hash][]byte{l.reg.Hash(): digest}); err != nil {
		l.broken = err
		return cause.Wrap(cause.TPMUnavailable, fmt.Errorf("extend %s: %w", l.reg.Name(), err))
	}
	whole, err := Replay(append(append([]byte(nil), l.data...), record...))
	if err != nil {
		l.broken = err
		return err
	}
	value, err := l.reg.Read(context.WithoutCancel(ctx))
	if err != nil {
		l.broken = err
		return cause.Wrap(cause.TPMUnavailable, fmt.Errorf("read %s: %w", l.reg.Name(), err))
	}
	if !bytes.Equal(value, whole.value(l.reg.Hash())) {
		l.broken = diverged(l.reg, value, whole)
		return l.broken
	}
	l.data, l.st = append(l.data, record...), whole
	l.st.State = next
	return nil
}

// Bytes returns the log in its wire form.
func (l *Log) Bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]byte(nil), l.data...)
}

// Events returns the events so far.
func (l *Log) Events() []Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Event(nil), l.st.Events...)
}

// State returns what the log says of the guest now.
func (l *Log) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.st.State
}

// With calls do with the log's bytes while no event can be appended, so that a
// quote taken in do is of exactly these events.
func (l *Log) With(do func(log []byte) error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return do(append([]byte(nil), l.data...))
}

// record encodes e as the next CEL record.
func (l *Log) record(e Event) (raw, digest []byte, err error) {
	h := l.reg.Hash()
	if digest, err = e.GenerateDigest(h); err != nil {
		return nil, nil, err
	}
	content, err := e.TLV()
	if err != nil {
		return nil, nil, err
	}
	rec := cel.Record{
		RecNum: uint64(len(l.st.Events)), Index: uint8(l.reg.Index()), IndexType: cel.PCRType,
		Digests: map[crypto.Hash][]byte{h: digest}, Content: content,
	}
	if h == crypto.SHA384 {
		rec.IndexType = cel.CCMRType
	}
	var buf bytes.Buffer
	if err := rec.EncodeCELR(&buf); err != nil {
		return nil, nil, err
	}
	return buf.Bytes(), digest, nil
}

// write appends record to the file and syncs it; on failure the file is as it
// was, and the register has not moved.
func (l *Log) write(record []byte) error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return cause.New(cause.EventLogWrite, "open the event log: %w", err)
	}
	defer f.Close()
	at := int64(len(l.data))
	_, err = f.WriteAt(record, at)
	if err == nil {
		err = f.Sync()
	}
	if err == nil && at == 0 {
		err = syncDir(filepath.Dir(l.path))
	}
	if err != nil {
		if cut := f.Truncate(at); cut != nil {
			l.broken = cut
		}
		if errors.Is(err, unix.ENOSPC) {
			return cause.New(cause.StorageFull, "write the event log: %w", err)
		}
		return cause.New(cause.EventLogWrite, "write the event log: %w", err)
	}
	return nil
}

func (r *Replayed) value(h crypto.Hash) []byte {
	if h == crypto.SHA384 {
		return r.SHA384[:]
	}
	return r.SHA256[:]
}

func diverged(reg Register, value []byte, r *Replayed) error {
	return cause.New(cause.EventLogDiverged, "the event log replays to %x, %s holds %x: something else extended the register, or the log is not of this boot",
		r.value(reg.Hash()), reg.Name(), value)
}

func readLog(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, cause.New(cause.EventLogDiverged, "open the event log: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, cause.New(cause.EventLogDiverged, "read the event log: %w", err)
	}
	if len(data) > MaxSize {
		return nil, cause.New(cause.EventLogDiverged, "the event log is larger than %d bytes", MaxSize)
	}
	return data, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
