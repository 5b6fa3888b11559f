package eventlog

import (
	"bytes"
	"crypto"
	_ "crypto/sha256" // SHA-256 of PCRs
	_ "crypto/sha512" // SHA-384 of RTMRs
	"encoding/binary"
	"fmt"

	"github.com/google/go-eventlog/cel"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// tlvHeader is the size of a CEL TLV's type and length, in bytes.
const tlvHeader = 5

// Replayed is what a log says, and the register values that it replays to.
type Replayed struct {
	Events []Event
	SHA256 [32]byte // the register of a log whose records carry SHA-256 (PCR 14)
	SHA384 [48]byte // the register of a log whose records carry SHA-384 (RTMR3)
	State  State
}

// Running is what the log says of the guest at its end.
func (r *Replayed) Running() State { return r.State }

// Replay decodes a log and replays it: each record's digest must be the hash
// of its content, the records numbered from 0 without a gap, and each event
// explained by the ones before it. An empty log replays to zero registers.
func Replay(data []byte) (*Replayed, error) {
	r, _, err := replay(data)
	if err != nil {
		return nil, cause.New(cause.EventLogDiverged, "event log: %w", err)
	}
	return r, nil
}

// replay also returns the offset at which each record begins.
func replay(data []byte) (*Replayed, []int, error) {
	if len(data) > MaxSize {
		return nil, nil, fmt.Errorf("%d bytes, at most %d", len(data), MaxSize)
	}
	offsets, rest, err := frame(data)
	if err != nil {
		return nil, nil, err
	}
	if rest != len(data) {
		return nil, nil, fmt.Errorf("record %d is cut off", len(offsets))
	}
	r := &Replayed{}
	if len(data) == 0 {
		return r, nil, nil
	}
	log, err := cel.DecodeToCEL(bytes.NewBuffer(data))
	if err != nil {
		return nil, nil, err
	}
	first := log.Records()[0]
	for n, rec := range log.Records() {
		if rec.RecNum != uint64(n) {
			return nil, nil, fmt.Errorf("record %d is numbered %d", n, rec.RecNum)
		}
		// go-eventlog checks the register types against each other only.
		if rec.IndexType != first.IndexType || rec.Index != first.Index {
			return nil, nil, fmt.Errorf("record %d is of another register", n)
		}
		event, err := parseEvent(rec.Content)
		if err != nil {
			return nil, nil, fmt.Errorf("record %d: %w", n, err)
		}
		if err := r.extend(rec); err != nil {
			return nil, nil, fmt.Errorf("record %d: %w", n, err)
		}
		if r.State, err = r.State.next(event); err != nil {
			return nil, nil, fmt.Errorf("record %d: %w", n, err)
		}
		r.Events = append(r.Events, event)
	}
	return r, offsets, nil
}

// extend replays one record's digest. A record carries exactly the digest of
// its register's bank.
func (r *Replayed) extend(rec cel.Record) error {
	h := crypto.SHA256
	switch {
	case rec.IndexType == cel.PCRType && rec.Index == PCRIndex:
	case rec.IndexType == cel.CCMRType && rec.Index == RTMRIndex:
		h = crypto.SHA384
	default:
		return fmt.Errorf("register %d of type %d is not one that events are measured into", rec.Index, rec.IndexType)
	}
	want, err := contentDigest(rec.Content, h)
	if err != nil {
		return err
	}
	if len(rec.Digests) != 1 || !bytes.Equal(rec.Digests[h], want) {
		return fmt.Errorf("digest is not the %v of the content", h)
	}
	d := h.New()
	if h == crypto.SHA256 {
		d.Write(r.SHA256[:])
		d.Write(want)
		copy(r.SHA256[:], d.Sum(nil))
	} else {
		d.Write(r.SHA384[:])
		d.Write(want)
		copy(r.SHA384[:], d.Sum(nil))
	}
	return nil
}

// frame walks the TLVs, four a record, without trusting a length: go-eventlog
// allocates what a length field says before it looks whether it is there. It
// returns where records begin and the end of the last whole one.
func frame(data []byte) (offsets []int, end int, err error) {
	at := 0
	for at < len(data) {
		start := at
		for field := range 4 {
			if len(data)-at < tlvHeader {
				return offsets, start, nil
			}
			n := int64(binary.BigEndian.Uint32(data[at+1 : at+tlvHeader]))
			if n > maxEvent+2*tlvHeader {
				return nil, 0, fmt.Errorf("record %d: field %d says %d bytes", len(offsets), field, n)
			}
			if int64(len(data)-at-tlvHeader) < n {
				return offsets, start, nil
			}
			if field == 2 {
				if err := frameDigests(data[at+tlvHeader : at+tlvHeader+int(n)]); err != nil {
					return nil, 0, fmt.Errorf("record %d: %w", len(offsets), err)
				}
			}
			at += tlvHeader + int(n)
		}
		offsets = append(offsets, start)
		if len(offsets) > maxEvents {
			return nil, 0, fmt.Errorf("more than %d records", maxEvents)
		}
	}
	return offsets, at, nil
}

// frameDigests holds the nested digest list to its bounds.
func frameDigests(list []byte) error {
	for len(list) > 0 {
		if len(list) < tlvHeader {
			return fmt.Errorf("digest list is cut off")
		}
		n := int64(binary.BigEndian.Uint32(list[1:tlvHeader]))
		if n > int64(len(list)-tlvHeader) {
			return fmt.Errorf("digest of %d bytes in %d", n, len(list)-tlvHeader)
		}
		list = list[tlvHeader+int(n):]
	}
	return nil
}
