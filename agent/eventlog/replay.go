package eventlog

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"

	"github.com/google/go-eventlog/cel"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The registers that a log can be of: CEL index type and index.
const (
	IndexPCR14 = 14 // cel.PCRType
	IndexRTMR3 = 4  // cel.CCMRType: CC measurement register 4 is RTMR3
)

// Replayed is a log that was read, checked and replayed.
type Replayed struct {
	Events []Event
	SHA256 [32]byte // the register's value in a SHA-256 bank, from zero
	SHA384 [48]byte // the register's value in a SHA-384 bank, from zero

	state State
	// before is the registers' value without the last record: what the
	// register holds when an append was cut off before its extend.
	before256 [32]byte
	before384 [48]byte
	cel       cel.CEL
}

// Running returns what the log says is running and staged.
func (r *Replayed) Running() State { return r.state.clone() }

// Replay reads a log strictly and replays it from zero. Every record must be
// of one register of ours, carry that register's digest, have digests that
// are of its content, and be explained by the order that README.md fixes.
// An empty log replays to zero. The error carries cause.EventLogDiverged.
func Replay(data []byte) (*Replayed, error) {
	r, err := replay(data)
	if err != nil {
		return nil, cause.Wrap(cause.EventLogDiverged, err)
	}
	return r, nil
}

func replay(data []byte) (*Replayed, error) {
	if err := checkShape(data); err != nil {
		return nil, err
	}
	log, err := cel.DecodeToCEL(bytes.NewBuffer(data))
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	r := &Replayed{cel: log}
	for i, rec := range log.Records() {
		if rec.RecNum != uint64(i) {
			return nil, fmt.Errorf("event log: record number %d, expected %d", rec.RecNum, i)
		}
		if rec.IndexType != log.Records()[0].IndexType {
			return nil, fmt.Errorf("event log: record %d is of another kind of register", i)
		}
		if err := checkRegister(rec); err != nil {
			return nil, fmt.Errorf("event log: record %d: %w", i, err)
		}
		if rec.Content.Type != ContentType {
			return nil, fmt.Errorf("event log: record %d has content type %d, expected %d", i, rec.Content.Type, ContentType)
		}
		if err := cel.VerifyDigests(content(rec.Content.Value), rec.Digests); err != nil {
			return nil, fmt.Errorf("event log: record %d: %w", i, err)
		}
		e, err := decodeEvent(rec.Content.Value)
		if err != nil {
			return nil, fmt.Errorf("event log: record %d: %w", i, err)
		}
		if err := r.add(e, rec.Content.Value); err != nil {
			return nil, fmt.Errorf("event log: record %d: %w", i, err)
		}
	}
	return r, nil
}

// add explains e and extends both replayed values by its digest.
func (r *Replayed) add(e Event, canonical []byte) error {
	next := r.state.clone()
	if err := next.apply(e); err != nil {
		return err
	}
	r.state = next
	r.Events = append(r.Events, e)
	r.before256, r.before384 = r.SHA256, r.SHA384
	d256, d384 := sha256.Sum256(canonical), sha512.Sum384(canonical)
	r.SHA256 = sha256.Sum256(append(r.SHA256[:], d256[:]...))
	r.SHA384 = sha512.Sum384(append(r.SHA384[:], d384[:]...))
	return nil
}

// checkRegister requires the register and the digest that belong together.
func checkRegister(rec cel.Record) error {
	var want crypto.Hash
	switch {
	case rec.IndexType == cel.PCRType && rec.Index == IndexPCR14:
		want = crypto.SHA256
	case rec.IndexType == cel.CCMRType && rec.Index == IndexRTMR3:
		want = crypto.SHA384
	default:
		return fmt.Errorf("register type %d index %d is none of PCR 14 and RTMR3", rec.IndexType, rec.Index)
	}
	if _, ok := rec.Digests[want]; !ok || len(rec.Digests) != 1 {
		return fmt.Errorf("%d digests, expected one of %v", len(rec.Digests), want)
	}
	return nil
}

// TLV types of a CEL record, CEL v1 5.1.
const (
	tlvRecNum  = 0
	tlvPCR     = 1
	tlvDigests = 3
	tlvCCMR    = 108

	algSHA256 = 0x0B // TPM_ALG_ID, one byte in a CEL digest
	algSHA384 = 0x0C
)

var digestSize = map[byte]int{algSHA256: 32, algSHA384: 48}

// checkShape walks the TLVs and checks every length before the decoder, which
// allocates what a length field says, sees them.
func checkShape(data []byte) error {
	if len(data) > MaxLog {
		return fmt.Errorf("event log has %d bytes, at most %d are read", len(data), MaxLog)
	}
	for n := 0; len(data) > 0; n++ {
		if n == MaxRecords {
			return fmt.Errorf("event log has more than %d records", MaxRecords)
		}
		for _, f := range []struct {
			name     string
			min, max int
			types    []byte
		}{
			{"record number", 8, 8, []byte{tlvRecNum}},
			{"register index", 1, 1, []byte{tlvPCR, tlvCCMR}},
			{"digests", 5 + 32, 5 + 48, []byte{tlvDigests}},
			{"content", 2, MaxEvent, []byte{ContentType}},
		} {
			typ, value, rest, err := firstTLV(data, f.max)
			if err != nil {
				return fmt.Errorf("event log: record %d: %s: %w", n, f.name, err)
			}
			if bytes.IndexByte(f.types, typ) < 0 || len(value) < f.min {
				return fmt.Errorf("event log: record %d: %s has type %d and %d bytes", n, f.name, typ, len(value))
			}
			if typ == tlvDigests {
				if err := checkDigests(value); err != nil {
					return fmt.Errorf("event log: record %d: %w", n, err)
				}
			}
			data = rest
		}
	}
	return nil
}

func checkDigests(data []byte) error {
	seen := map[byte]bool{}
	for len(data) > 0 {
		alg, value, rest, err := firstTLV(data, 48)
		if err != nil {
			return fmt.Errorf("digests: %w", err)
		}
		if size, ok := digestSize[alg]; !ok || size != len(value) || seen[alg] {
			return fmt.Errorf("digest of algorithm %#x with %d bytes is unknown, misshapen or there twice", alg, len(value))
		}
		seen[alg] = true
		data = rest
	}
	return nil
}

func firstTLV(data []byte, maxLen int) (typ byte, value, rest []byte, err error) {
	if len(data) < 5 {
		return 0, nil, nil, fmt.Errorf("cut off after %d bytes", len(data))
	}
	n := uint64(binary.BigEndian.Uint32(data[1:5]))
	if n > uint64(maxLen) {
		return 0, nil, nil, fmt.Errorf("%d bytes long, at most %d are allowed", n, maxLen)
	}
	if n > uint64(len(data)-5) {
		return 0, nil, nil, fmt.Errorf("cut off: %d bytes of %d", len(data)-5, n)
	}
	return data[0], data[5 : 5+n], data[5+n:], nil
}
