package platform

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
)

// Bounds of a CC event log, in bytes: as it is sent, and with the padding that
// fills the firmware's area.
const (
	maxCCEL     = 512 << 10
	maxCCELArea = 4 << 20
)

// Values of a crypto-agile log (TCG PC Client Platform Firmware Profile 1.06,
// sections 10.2 and 10.4; UEFI 2.10, section 38.4.1 for the register numbers).
const (
	evNoAction  = 0x03
	evEventTag  = 0x06
	algSHA384   = 0x0c
	rtmr3Number = 4          // CC measurement register numbers begin with MRTD
	endOfLog    = 0xffffffff // the firmware fills the rest of its area with ones
	ourTag      = 0x634d7643 // "CvMc": the tag of our events, and no one's else
	headerSize  = 4 + 4 + 20 + 4
	maxAlgs     = 8 // of one log, more than there are TCG hashes
)

// appendCCEL returns the firmware's log without its padding, followed by the
// agent's events as TCG_PCR_EVENT2 records for RTMR3, and what the whole
// replays to. The digest of a record is the one that was extended: of the
// event's canonical JSON, which is the tagged event's data.
func appendCCEL(log []byte, events []eventlog.Event) ([]byte, [4][48]byte, error) {
	var rtmrs [4][48]byte
	end, err := walkCCEL(log, func(register uint32, digest []byte) {
		extendRTMR(&rtmrs[register-1], digest)
	})
	if err != nil {
		return nil, rtmrs, err
	}
	out := bytes.NewBuffer(bytes.Clone(log[:end]))
	for _, e := range events {
		data, err := e.Canonical()
		if err != nil {
			return nil, rtmrs, err
		}
		digest := sha512.Sum384(data)
		for _, v := range []uint32{rtmr3Number, evEventTag, 1} {
			_ = binary.Write(out, binary.LittleEndian, v) // a Buffer takes all
		}
		_ = binary.Write(out, binary.LittleEndian, uint16(algSHA384))
		out.Write(digest[:])
		for _, v := range []uint32{uint32(8 + len(data)), ourTag, uint32(len(data))} {
			_ = binary.Write(out, binary.LittleEndian, v)
		}
		out.Write(data)
		extendRTMR(&rtmrs[rtmr3Number-1], digest[:])
	}
	if out.Len() > maxCCEL {
		return nil, rtmrs, fmt.Errorf("the CC event log with the agent's events has %d bytes, at most %d are sent", out.Len(), maxCCEL)
	}
	return out.Bytes(), rtmrs, nil
}

func extendRTMR(r *[48]byte, digest []byte) {
	*r = sha512.Sum384(append(r[:], digest...))
}

// walkCCEL goes through a log, calls extend for each SHA-384 digest that was
// extended, and returns where the padding begins. Every length is checked
// against what is left, and the events end within maxCCEL.
func walkCCEL(log []byte, extend func(register uint32, digest []byte)) (end int, err error) {
	r := reader{data: log}
	sizes, err := specID(&r)
	if err != nil {
		return 0, err
	}
	for {
		if end = r.at; end > maxCCEL {
			return 0, fmt.Errorf("CC event log of more than %d bytes", maxCCEL)
		}
		if len(r.data) == r.at {
			return end, nil
		}
		register := r.u32()
		if r.err == nil && register == endOfLog {
			return end, nil
		}
		kind, count := r.u32(), r.u32()
		var digest []byte
		for i := uint32(0); i < count && r.err == nil; i++ {
			alg := r.u16()
			size, known := sizes[alg]
			if !known {
				return 0, fmt.Errorf("CC event log: digest algorithm %#x at %d is not in its header", alg, end)
			}
			if d := r.take(uint64(size)); alg == algSHA384 {
				if digest != nil {
					return 0, fmt.Errorf("CC event log: record at %d has two SHA-384 digests", end)
				}
				digest = d
			}
		}
		r.take(uint64(r.u32()))
		if r.err != nil {
			return 0, fmt.Errorf("CC event log: record at %d: %w", end, r.err)
		}
		if kind == evNoAction {
			continue
		}
		if len(digest) != sha512.Size384 || register < 1 || register > rtmr3Number {
			return 0, fmt.Errorf("CC event log: record at %d has no SHA-384 digest, or is of no RTMR", end)
		}
		extend(register, digest)
	}
}

// specID reads the first record, which is in the SHA-1 form and lists the
// digest sizes of all others.
func specID(r *reader) (map[uint16]uint16, error) {
	header := r.take(headerSize)
	if r.err != nil {
		return nil, fmt.Errorf("CC event log: header: %w", r.err)
	}
	event := reader{data: r.take(uint64(binary.LittleEndian.Uint32(header[headerSize-4:])))}
	if r.err != nil || binary.LittleEndian.Uint32(header[4:]) != evNoAction ||
		!bytes.Equal(event.take(16), []byte("Spec ID Event03\x00")) {
		return nil, errors.New("CC event log: it does not begin with a Spec ID event")
	}
	event.take(8) // class, version, errata, size of UINTN
	sizes := map[uint16]uint16{}
	n := event.u32()
	for range min(n, maxAlgs) {
		alg, size := event.u16(), event.u16()
		sizes[alg] = size
	}
	if event.err != nil || n > maxAlgs || len(sizes) != int(n) || sizes[algSHA384] != sha512.Size384 {
		return nil, errors.New("CC event log: its Spec ID event lists no SHA-384")
	}
	return sizes, nil
}

// reader takes little-endian values off a byte string; its first error stays.
type reader struct {
	data []byte
	at   int
	err  error
}

func (r *reader) take(n uint64) []byte {
	if r.err != nil {
		return nil
	}
	if n > uint64(len(r.data)-r.at) {
		r.err = fmt.Errorf("%d bytes expected, %d are left", n, len(r.data)-r.at)
		return nil
	}
	out := r.data[r.at : r.at+int(n)]
	r.at += int(n)
	return out
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}
