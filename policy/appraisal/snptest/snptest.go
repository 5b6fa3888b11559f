// Package snptest makes SEV-SNP evidence under a chain of its own, with the
// made keys of go-sev-guest's test package. A verifier takes it only when that
// chain is configured as its root. No program imports it.
package snptest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/kds"
	sevtest "github.com/google/go-sev-guest/testing"
	"github.com/google/go-sev-guest/verify/trust"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Config says what the chain is of. The zero value is a Milan chip.
type Config struct {
	Line    string      // "Milan" (default), "Genoa" or "Turin"
	TCB     *kbs.SNPTCB // what VCEK and VLEK are for; default: DefaultTCB
	ChipID  []byte      // 64 bytes, 8 for Turin; default: all 0xc1
	Created time.Time   // ARK and ASK last 25 years from here, VCEK and VLEK 7; default: a year ago
	Serial  *big.Int    // of the ASK and ASVK; default: 0xa5
}

// Chain is ARK, ASK, ASVK, VCEK and VLEK with their keys. It is safe for
// concurrent use.
type Chain struct {
	Signer *sevtest.AmdSigner
	Config Config
}

// DefaultTCB is the TCB of a chain that names none.
func DefaultTCB(line string) kbs.SNPTCB {
	t := kbs.SNPTCB{Bootloader: 4, TEE: 1, SNP: 24, Microcode: 219}
	if line == "Turin" {
		fmc := uint8(1)
		t.FMC = &fmc
	}
	return t
}

// New makes a chain.
func New(t testing.TB, c Config) *Chain {
	t.Helper()
	if c.Line == "" {
		c.Line = "Milan"
	}
	if c.TCB == nil {
		tcb := DefaultTCB(c.Line)
		c.TCB = &tcb
	}
	if c.ChipID == nil {
		c.ChipID = bytes.Repeat([]byte{0xc1}, 64)
		if c.Line == "Turin" {
			c.ChipID = c.ChipID[:8]
		}
	}
	if c.Created.IsZero() {
		c.Created = time.Now().AddDate(-1, 0, 0)
	}
	if c.Serial == nil {
		c.Serial = big.NewInt(0xa5)
	}
	b := &sevtest.AmdSignerBuilder{
		Keys: sevtest.DefaultAmdKeys(), ProductName: c.Line + "-B0", CSPID: "snptest",
		ArkCreationTime: c.Created, AskCreationTime: c.Created, AsvkCreationTime: c.Created, VcekCreationTime: c.Created, VlekCreationTime: c.Created,
		AskCustom: sevtest.CertOverride{SerialNumber: c.Serial}, AsvkCustom: sevtest.CertOverride{SerialNumber: c.Serial},
		VcekCustom: sevtest.CertOverride{Extensions: extensions(c, false)}, VlekCustom: sevtest.CertOverride{Extensions: extensions(c, true)},
	}
	signer, err := b.TestOnlyCertChain()
	if err != nil {
		t.Fatal(err)
	}
	return &Chain{Signer: signer, Config: c}
}

// extensions are AMD's for the configured TCB and chip.
func extensions(c Config, vlek bool) []pkix.Extension {
	parts := kds.TCBParts{BlSpl: c.TCB.Bootloader, TeeSpl: c.TCB.TEE, SnpSpl: c.TCB.SNP, UcodeSpl: c.TCB.Microcode}
	id := append(bytes.Clone(c.ChipID), make([]byte, max(0, 64-len(c.ChipID)))...)
	if vlek {
		id = nil
	}
	e := sevtest.CustomExtensions(parts, id, "snptest", c.Line+"-B0")
	if c.TCB.FMC == nil {
		return e
	}
	turin := e[:0:0]
	for _, x := range e {
		switch {
		case x.Id.Equal(kds.OidSpl4), x.Id.Equal(kds.OidSpl5), x.Id.Equal(kds.OidSpl6), x.Id.Equal(kds.OidSpl7):
			continue
		case x.Id.Equal(kds.OidHwid):
			x.Value = bytes.Clone(c.ChipID)
		}
		turin = append(turin, x)
	}
	fmc, _ := asn1.Marshal(int(*c.TCB.FMC))
	return append(turin, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1, 3, 9}, Value: fmc})
}

// Roots are for appraisal.SNP.
func (c *Chain) Roots() map[string][]*trust.AMDRootCerts {
	r := trust.AMDRootCertsProduct(c.Config.Line)
	r.ProductCerts = &trust.ProductCerts{Ark: c.Signer.Ark, Ask: c.Signer.Ask, Asvk: c.Signer.Asvk}
	return map[string][]*trust.AMDRootCerts{c.Config.Line: {r}}
}

// CRL is a list by the ARK, DER, that revokes the serial numbers.
func (c *Chain) CRL(t testing.TB, from, until time.Time, revoked ...*big.Int) []byte {
	t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: from, NextUpdate: until, SignatureAlgorithm: x509.SHA384WithRSAPSS}
	for _, n := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: from})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, c.Signer.Ark, c.Signer.Keys.Ark)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// Collateral is a source that requires revocation lists and has this chain's,
// empty and valid for a day around now.
func (c *Chain) Collateral(t testing.TB) *collateral.Source {
	t.Helper()
	now := time.Now()
	return c.CollateralWith(t, c.CRL(t, now.Add(-time.Hour), now.Add(24*time.Hour)))
}

// CollateralWith is a source that requires revocation lists and has crl for
// VCEKs and VLEKs of this line; nil: none.
func (c *Chain) CollateralWith(t testing.TB, crl []byte) *collateral.Source {
	t.Helper()
	s := &collateral.Source{Dir: t.TempDir()}
	for _, signer := range []abi.ReportSigner{abi.VcekReportSigner, abi.VlekReportSigner} {
		if crl == nil {
			break
		}
		if err := s.Put(kds.CrlLinkByKey(c.Config.Line, signer), collateral.Piece{Body: crl}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// Options say what a report holds. The zero value is a report of version 3, VMPL
// 0, a production guest policy and the chain's chip and TCB.
type Options struct {
	Version     uint32 // 2 to 5
	Measurement []byte // 48 bytes; default: all 0x4d
	HostData    []byte // 32 bytes; default: zero
	ReportID    []byte // 32 bytes; default: random
	Policy      uint64 // guest policy; default 0x30000
	VMPL        uint32
	VLEK        bool                 // sign with the VLEK
	MaskChip    bool                 // CHIP_ID zero
	Change      func(*kbs.SNPReport) // last, before signing; may be nil
	NoCerts     bool                 // evidence without certificates
}

// SNPReport is the unsigned report of o.
func (c *Chain) SNPReport(reportData [64]byte, o Options) *kbs.SNPReport {
	or := func(b []byte, size int, fill byte) kbs.Bytes {
		if b == nil {
			return bytes.Repeat([]byte{fill}, size)
		}
		return bytes.Clone(b)
	}
	if o.ReportID == nil {
		o.ReportID = make([]byte, 32)
		_, _ = rand.Read(o.ReportID)
	}
	if o.Policy == 0 {
		o.Policy = 0x30000
	}
	if o.Version == 0 {
		o.Version = 3
	}
	tcb := *c.Config.TCB
	r := &kbs.SNPReport{
		Version: o.Version, Policy: o.Policy, VMPL: o.VMPL, SigAlgo: abi.SignEcdsaP384Sha384, PlatInfo: 0x25,
		FamilyID: or(nil, 16, 0), ImageID: or(nil, 16, 0), ReportData: reportData[:], Measurement: or(o.Measurement, 48, 0x4d),
		HostData: or(o.HostData, 32, 0), IDKeyDigest: or(nil, 48, 0), AuthorKeyDigest: or(nil, 48, 0),
		ReportID: or(o.ReportID, 32, 0), ReportIDMA: or(nil, 32, 0xff),
		CurrentTCB: tcb, ReportedTCB: tcb, CommittedTCB: tcb, LaunchTCB: tcb,
		Current: kbs.SNPFirmware{Major: 1, Minor: 55, Build: 40}, Committed: kbs.SNPFirmware{Major: 1, Minor: 55, Build: 40},
		ChipID:    append(bytes.Clone(c.Config.ChipID), make([]byte, 64-len(c.Config.ChipID))...),
		Signature: kbs.SNPSignature{R: make(kbs.Bytes, 72), S: make(kbs.Bytes, 72)},
	}
	if o.VLEK {
		r.KeyInfo = abi.ComposeSignerInfo(abi.SignerInfo{SigningKey: abi.VlekReportSigner})
	}
	if o.MaskChip {
		r.ChipID = make(kbs.Bytes, 64)
	}
	if o.Version >= 3 {
		cpu := map[string][3]uint8{"Milan": {0x19, 0x01, 1}, "Genoa": {0x19, 0x11, 1}, "Turin": {0x1a, 0x02, 1}}[c.Config.Line]
		r.CPUIDFamily, r.CPUIDModel, r.CPUIDStepping = &cpu[0], &cpu[1], &cpu[2]
	}
	if o.Version >= 5 {
		r.LaunchMitVector, r.CurrentMitVector = new(uint64), new(uint64)
	}
	if o.Change != nil {
		o.Change(r)
	}
	return r
}

// Report is a signed report as the firmware writes it.
func (c *Chain) Report(t testing.TB, reportData [64]byte, o Options) []byte {
	t.Helper()
	raw, err := c.SNPReport(reportData, o).Raw()
	if err == nil {
		err = c.Sign(raw)
	}
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// Sign signs a raw report with the key that its key_info names; any but the
// VLEK is taken for the VCEK.
func (c *Chain) Sign(raw []byte) error {
	key := c.Signer.Keys.Vcek
	if raw[0x48]>>2&7 == byte(abi.VlekReportSigner) {
		key = c.Signer.Keys.Vlek
	}
	sum := sha512.Sum384(abi.SignedComponent(raw))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		return err
	}
	return abi.SetSignature(r, s, raw)
}

// Certs are the host's certificate table: the signing certificate, ASK or
// ASVK, and ARK.
func (c *Chain) Certs(vlek bool) []kbs.SNPCert {
	s := c.Signer
	if vlek {
		return []kbs.SNPCert{{Type: kbs.CertVLEK, Data: s.Vlek.Raw}, {Type: kbs.CertASK, Data: s.Asvk.Raw}, {Type: kbs.CertARK, Data: s.Ark.Raw}}
	}
	return []kbs.SNPCert{{Type: kbs.CertVCEK, Data: s.Vcek.Raw}, {Type: kbs.CertASK, Data: s.Ask.Raw}, {Type: kbs.CertARK, Data: s.Ark.Raw}}
}

// Evidence is the primary evidence of TEE "snp", JSON, over the report data of
// a KBS session.
func (c *Chain) Evidence(t testing.TB, reportData [kbs.ReportDataSize]byte, o Options) json.RawMessage {
	t.Helper()
	var padded [64]byte
	copy(padded[:], reportData[:])
	report, err := kbs.SNPReportFromRaw(c.Report(t, padded, o))
	if err != nil {
		t.Fatal(err)
	}
	ev := kbs.SNPEvidence{Report: *report}
	if !o.NoCerts {
		ev.CertChain = c.Certs(o.VLEK)
	}
	b, err := json.Marshal(ev)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
