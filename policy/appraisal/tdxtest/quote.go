package tdxtest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"slices"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Report is what a TD may choose, or the host for it. The zero value of a
// register is zero.
type Report struct {
	ReportData    [64]byte
	MRTD          [48]byte
	RTMR          [4][48]byte
	MRConfigID    [48]byte
	MROwner       [48]byte
	MROwnerConfig [48]byte
	Attributes    uint64 // zero: SEPT_VE_DISABLE
	XFAM          uint64 // zero: 0xe742e7 without what the module refuses
	MRServiceTD   [48]byte
	Version       uint16 // 0 and 4: version 4; 5: version 5 with a TD report 1.5
}

// Parts are a quote before it is signed; a test changes what it likes.
type Parts struct {
	Header      []byte // 48 bytes
	Body        []byte // the TD report; in version 5 its type and size before it
	QEReport    []byte // 384 bytes; its report data are set after the change
	QEAuth      []byte
	Chain       []byte // PEM
	Attestation *ecdsa.PrivateKey
	PCK         *ecdsa.PrivateKey
	KeepQEData  bool // leave the QE report's report data as changed
}

// Quote makes a quote and signs it, with the changes made before.
func (p *Platform) Quote(t testing.TB, r Report, changes ...func(*Parts)) []byte {
	t.Helper()
	if r.Version == 0 {
		r.Version = 4
	}
	if r.Attributes == 0 {
		r.Attributes = 1 << 28
	}
	if r.XFAM == 0 {
		r.XFAM = 0x642e7
	}
	header := make([]byte, 48)
	binary.LittleEndian.PutUint16(header, r.Version)
	binary.LittleEndian.PutUint16(header[2:], 2)
	binary.LittleEndian.PutUint32(header[4:], 0x81)
	copy(header[12:], []byte{0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07})

	var body bytes.Buffer
	if r.Version == 5 {
		body.Write(binary.LittleEndian.AppendUint32([]byte{3, 0}, 648))
	}
	body.Write([]byte{moduleSVN, 1, svn, svn, svn, svn, svn, svn, svn, svn, svn, svn, svn, svn, svn, svn})
	module := sha256.Sum256([]byte("TDX module"))
	body.Write(append(module[:], module[:16]...))
	body.Write(make([]byte, 48+8)) // MRSIGNERSEAM, SEAMATTRIBUTES
	body.Write(binary.LittleEndian.AppendUint64(nil, r.Attributes))
	body.Write(binary.LittleEndian.AppendUint64(nil, r.XFAM))
	for _, m := range [][48]byte{r.MRTD, r.MRConfigID, r.MROwner, r.MROwnerConfig, r.RTMR[0], r.RTMR[1], r.RTMR[2], r.RTMR[3]} {
		body.Write(m[:])
	}
	body.Write(r.ReportData[:])
	if r.Version == 5 {
		body.Write(make([]byte, 16)) // TEE_TCB_SVN_2
		body.Write(r.MRServiceTD[:])
	}

	report := make([]byte, 384)
	copy(report, slices.Repeat([]byte{svn}, 16))
	copy(report[48:], []byte{0x15, 0, 0, 0, 0, 0, 0, 0, 0xe7})
	copy(report[128:], qeSigner[:])
	binary.LittleEndian.PutUint16(report[256:], qeProduct)
	binary.LittleEndian.PutUint16(report[258:], qeSVN)

	parts := &Parts{Header: header, Body: body.Bytes(), QEReport: report, QEAuth: slices.Repeat([]byte{7}, 32),
		Chain: slices.Clone(p.Chain), Attestation: p.attestation, PCK: p.keys["pck"]}
	for _, change := range changes {
		change(parts)
	}
	return parts.assemble(t)
}

func (p *Parts) assemble(t testing.TB) []byte {
	t.Helper()
	key, err := p.Attestation.PublicKey.Bytes()
	check(t, err)
	key = key[1:]
	if !p.KeepQEData {
		sum := sha256.Sum256(append(slices.Clone(key), p.QEAuth...))
		copy(p.QEReport[320:], append(sum[:], make([]byte, 32)...))
	}
	var cert bytes.Buffer
	cert.Write(p.QEReport)
	cert.Write(sign(t, p.PCK, p.QEReport))
	cert.Write(binary.LittleEndian.AppendUint16(nil, uint16(len(p.QEAuth))))
	cert.Write(p.QEAuth)
	cert.Write([]byte{5, 0})
	cert.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(p.Chain))))
	cert.Write(p.Chain)

	signed := append(slices.Clone(p.Header), p.Body...)
	var data bytes.Buffer
	data.Write(sign(t, p.Attestation, signed))
	data.Write(key)
	data.Write([]byte{6, 0})
	data.Write(binary.LittleEndian.AppendUint32(nil, uint32(cert.Len())))
	data.Write(cert.Bytes())
	return append(binary.LittleEndian.AppendUint32(signed, uint32(data.Len())), data.Bytes()...)
}

// AzureEvidence is the primary evidence of TEE "az-tdx-vtpm": the quote is over
// the runtime data that names the vTPM's AK, the AK's over reportData. What r
// says of report data does not count.
func (p *Platform) AzureEvidence(t testing.TB, reportData [kbs.ReportDataSize]byte, r Report, o snptest.AzureOptions, changes ...func(*Parts)) json.RawMessage {
	t.Helper()
	return snptest.Azure(t, reportData, o, 4, func(rd [64]byte, ev *kbs.AzureEvidence) []byte {
		r.ReportData = rd
		ev.TDQuote = p.Quote(t, r, changes...)
		td := make([]byte, 1024) // a TDREPORT; its MAC is worth nothing here
		td[0] = 0x81
		copy(td[128:], rd[:])
		return td
	})
}

// InstanceJWS is member cvm-agent-instance: the nonce, signed by key, whose
// public half is in the header.
func InstanceJWS(t testing.TB, key *ecdsa.PrivateKey, nonce string) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, &jose.SignerOptions{EmbedJWK: true})
	check(t, err)
	obj, err := s.Sign([]byte(nonce))
	check(t, err)
	out, err := obj.CompactSerialize()
	check(t, err)
	return out
}

// NewKey makes a P-256 key.
func NewKey(t testing.TB) *ecdsa.PrivateKey { return newKey(t) }
