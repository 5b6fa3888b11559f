package appraisal

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"github.com/google/go-tdx-guest/abi"
)

// Sizes and codes of Intel's "TDX DCAP Quoting Library API", appendix A.3 and
// A.4, that go-tdx-guest has no exported name for.
const (
	tdxHeaderSize    = 48
	tdxBodySize      = 584 // TD report 1.0
	tdxBody15Size    = 648 // TD report 1.5: TEE_TCB_SVN_2 and MRSERVICETD follow
	tdxBodyType10    = 2
	tdxBodyType15    = 3
	tdxMaxQuote      = 64 << 10
	certQEReport     = 6 // certification data: QE report and what certifies it
	certPCKChain     = 5 // certification data: PCK chain in PEM
	qeReportSize     = 384
	ecdsaSize        = 64 // r ‖ s, or x ‖ y
	qeReportDataFrom = 320
)

// tdxQuote is a quote cut into its parts. Nothing of it is verified.
type tdxQuote struct {
	raw      []byte // without padding
	version  uint16
	bodyType uint16 // of version 5; TD report 1.0 in version 4

	signed    []byte // header to the end of the TD report
	header    []byte
	body      []byte // TD report 1.0, or the same part of 1.5
	serviceTD []byte // MRSERVICETD of TD report 1.5

	signature   []byte
	key         []byte // the attestation key
	qeReport    []byte
	qeSignature []byte
	qeAuth      []byte
	chain       []byte // PEM
}

// tdxVersionError is a version that nothing here reads.
type tdxVersionError struct{ what string }

func (e *tdxVersionError) Error() string { return e.what }

// cutter takes little-endian fields off the front of b, and remembers when
// there were not enough bytes.
type cutter struct {
	b     []byte
	short bool
}

func (c *cutter) take(n uint32) []byte {
	if c.short || uint64(n) > uint64(len(c.b)) {
		c.short = true
		return make([]byte, min(n, 8))
	}
	out := c.b[:n:n]
	c.b = c.b[n:]
	return out
}

func (c *cutter) u16() uint16 { return binary.LittleEndian.Uint16(c.take(2)) }
func (c *cutter) u32() uint32 { return binary.LittleEndian.Uint32(c.take(4)) }

// parseTDXQuote cuts a quote. Every length must come out even; zero bytes
// after the end are padding, any other byte is refused.
func parseTDXQuote(raw []byte) (*tdxQuote, error) {
	if len(raw) > tdxMaxQuote {
		return nil, fmt.Errorf("tdx quote: %d bytes, at most %d are read", len(raw), tdxMaxQuote)
	}
	c := &cutter{b: raw}
	q := &tdxQuote{bodyType: tdxBodyType10}
	q.header = c.take(tdxHeaderSize)
	if c.short {
		return nil, fmt.Errorf("tdx quote: %d bytes, shorter than its header", len(raw))
	}
	q.version = binary.LittleEndian.Uint16(q.header)
	switch q.version {
	case 4:
		q.body = c.take(tdxBodySize)
	case 5:
		q.bodyType = c.u16()
		size := c.u32()
		switch {
		case q.bodyType == tdxBodyType10 && size == tdxBodySize:
			q.body = c.take(tdxBodySize)
		case q.bodyType == tdxBodyType15 && size == tdxBody15Size:
			q.body = c.take(tdxBodySize)
			c.take(abi.TeeTcbSvnSize)
			q.serviceTD = c.take(abi.MrTdSize)
		case !c.short:
			return nil, &tdxVersionError{fmt.Sprintf("5 with body type %d of %d bytes", q.bodyType, size)}
		}
	default:
		return nil, &tdxVersionError{fmt.Sprint(q.version)}
	}
	q.signed = raw[:len(raw)-len(c.b)]
	size := c.u32()
	sig := &cutter{b: c.take(size)}
	if c.short {
		return nil, fmt.Errorf("tdx quote: %d bytes are not enough for its parts", len(raw))
	}
	for _, b := range c.b {
		if b != 0 {
			return nil, fmt.Errorf("tdx quote: %d bytes after its end that are not padding", len(c.b))
		}
	}
	q.raw = raw[:len(raw)-len(c.b)]
	return q, q.parseSignature(sig)
}

func (q *tdxQuote) parseSignature(c *cutter) error {
	q.signature, q.key = c.take(ecdsaSize), c.take(ecdsaSize)
	kind, size := c.u16(), c.u32()
	if c.short || kind != certQEReport || uint64(size) != uint64(len(c.b)) {
		return fmt.Errorf("tdx quote: signature data with certification data of type %d and %d bytes, expected type %d up to the end", kind, size, certQEReport)
	}
	q.qeReport, q.qeSignature = c.take(qeReportSize), c.take(ecdsaSize)
	q.qeAuth = c.take(uint32(c.u16()))
	kind, size = c.u16(), c.u32()
	if c.short || kind != certPCKChain || uint64(size) != uint64(len(c.b)) {
		return fmt.Errorf("tdx quote: QE certification data of type %d and %d bytes, expected type %d up to the end", kind, size, certPCKChain)
	}
	q.chain = c.b
	return nil
}

func (q *tdxQuote) describe() string {
	if q.bodyType == tdxBodyType15 {
		return fmt.Sprintf("%d, TD report 1.5", q.version)
	}
	return fmt.Sprintf("%d, TD report 1.0", q.version)
}

// Offsets of the TD report 1.0, appendix A.3.2.
func (q *tdxQuote) teeTCBSVN() []byte      { return q.body[:16] }
func (q *tdxQuote) mrSEAM() []byte         { return q.body[16:64] }
func (q *tdxQuote) mrSignerSEAM() []byte   { return q.body[64:112] }
func (q *tdxQuote) seamAttributes() []byte { return q.body[112:120] }
func (q *tdxQuote) tdAttributes() []byte   { return q.body[120:128] }
func (q *tdxQuote) xfam() []byte           { return q.body[128:136] }
func (q *tdxQuote) mrTD() []byte           { return q.body[136:184] }
func (q *tdxQuote) mrConfigID() []byte     { return q.body[184:232] }
func (q *tdxQuote) mrOwner() []byte        { return q.body[232:280] }
func (q *tdxQuote) mrOwnerConfig() []byte  { return q.body[280:328] }
func (q *tdxQuote) rtmr(i int) []byte      { return q.body[328+48*i : 376+48*i] }
func (q *tdxQuote) reportData() []byte     { return q.body[520:584] }

// facts are what the quote says, for whoever has verified it.
func (q *tdxQuote) facts() *TDXFacts {
	f := &TDXFacts{
		QuoteVersion:  q.version,
		MRTD:          hex.EncodeToString(q.mrTD()),
		MRConfigID:    hex.EncodeToString(q.mrConfigID()),
		MROwner:       hex.EncodeToString(q.mrOwner()),
		MROwnerConfig: hex.EncodeToString(q.mrOwnerConfig()),
		MRSEAM:        hex.EncodeToString(q.mrSEAM()),
		TDAttributes:  hex.EncodeToString(q.tdAttributes()),
		XFAM:          hex.EncodeToString(q.xfam()),
		TEETCBSVN:     hex.EncodeToString(q.teeTCBSVN()),
	}
	for i := range 4 {
		f.RTMRs = append(f.RTMRs, hex.EncodeToString(q.rtmr(i)))
	}
	return f
}
