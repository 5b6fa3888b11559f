package kbs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
)

// SNPReportSize is the size of an attestation report, in bytes (SEV-SNP ABI
// 1.58, table 23), SNPSignedSize that of the part that is signed.
const (
	SNPReportSize = 1184
	SNPSignedSize = 0x2a0
)

// Bytes is a JSON array of integers of 0 to 255, as serde writes a byte array.
type Bytes []byte

// MarshalJSON writes the array.
func (b Bytes) MarshalJSON() ([]byte, error) {
	out := make([]byte, 0, 2+4*len(b))
	out = append(out, '[')
	for i, c := range b {
		if i > 0 {
			out = append(out, ',')
		}
		out = strconv.AppendUint(out, uint64(c), 10)
	}
	return append(out, ']'), nil
}

// UnmarshalJSON reads the array; anything but such integers is an error. It
// is read here and not by encoding/json, which takes as long for the few
// thousand integers of a report and its certificates as the verification of
// the report's signature.
func (b *Bytes) UnmarshalJSON(data []byte) error {
	if string(data) == "null" {
		*b = nil
		return nil
	}
	if len(data) < 2 || data[0] != '[' || data[len(data)-1] != ']' {
		return errors.New("not an array of integers of 0 to 255")
	}
	rest := skipSpace(data[1 : len(data)-1])
	out := make(Bytes, 0, len(rest)/3+1)
	for more := len(rest) > 0; more; {
		rest = skipSpace(rest)
		n, digits := 0, 0
		for digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9' && n <= 255 {
			n = 10*n + int(rest[digits]-'0')
			digits++
		}
		if digits == 0 || n > 255 || digits > 1 && rest[0] == '0' {
			return fmt.Errorf("element %d is not an integer of 0 to 255", len(out))
		}
		out = append(out, byte(n))
		rest = skipSpace(rest[digits:])
		if more = len(rest) > 0; more {
			if rest[0] != ',' {
				return fmt.Errorf("element %d is not an integer of 0 to 255", len(out)-1)
			}
			rest = rest[1:]
		}
	}
	*b = out
	return nil
}

func skipSpace(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t' || b[0] == '\r' || b[0] == '\n') {
		b = b[1:]
	}
	return b
}

// SNPTCB is a TCB version by its parts. FMC is there on Turin and later alone.
type SNPTCB struct {
	FMC        *uint8 `json:"fmc"`
	Bootloader uint8  `json:"bootloader"`
	TEE        uint8  `json:"tee"`
	SNP        uint8  `json:"snp"`
	Microcode  uint8  `json:"microcode"`
}

// raw is the TCB_VERSION of the ABI, table 3 (and its Turin form).
func (t SNPTCB) raw() [8]byte {
	if t.FMC != nil {
		return [8]byte{*t.FMC, t.Bootloader, t.TEE, t.SNP, 0, 0, 0, t.Microcode}
	}
	return [8]byte{t.Bootloader, t.TEE, 0, 0, 0, 0, t.SNP, t.Microcode}
}

func tcbFromRaw(b []byte, turin bool) SNPTCB {
	if turin {
		return SNPTCB{FMC: &b[0], Bootloader: b[1], TEE: b[2], SNP: b[3], Microcode: b[7]}
	}
	return SNPTCB{Bootloader: b[0], TEE: b[1], SNP: b[6], Microcode: b[7]}
}

// SNPFirmware is a firmware version.
type SNPFirmware struct {
	Major uint8 `json:"major"`
	Minor uint8 `json:"minor"`
	Build uint8 `json:"build"`
}

// SNPSignature is the report's ECDSA P-384 signature: R and S little-endian,
// 72 bytes each.
type SNPSignature struct {
	R Bytes `json:"r"`
	S Bytes `json:"s"`
}

// SNPReport is an attestation report in the JSON form that Trustee's guest
// sends. Reserved bytes have no member: in a report that has this form they
// are zero, or its signature fails.
type SNPReport struct {
	Version          uint32       `json:"version"`
	GuestSVN         uint32       `json:"guest_svn"`
	Policy           uint64       `json:"policy"`
	FamilyID         Bytes        `json:"family_id"` // 16
	ImageID          Bytes        `json:"image_id"`  // 16
	VMPL             uint32       `json:"vmpl"`
	SigAlgo          uint32       `json:"sig_algo"`
	CurrentTCB       SNPTCB       `json:"current_tcb"`
	PlatInfo         uint64       `json:"plat_info"`
	KeyInfo          uint32       `json:"key_info"`
	ReportData       Bytes        `json:"report_data"`       // 64
	Measurement      Bytes        `json:"measurement"`       // 48
	HostData         Bytes        `json:"host_data"`         // 32
	IDKeyDigest      Bytes        `json:"id_key_digest"`     // 48
	AuthorKeyDigest  Bytes        `json:"author_key_digest"` // 48
	ReportID         Bytes        `json:"report_id"`         // 32
	ReportIDMA       Bytes        `json:"report_id_ma"`      // 32
	ReportedTCB      SNPTCB       `json:"reported_tcb"`
	CPUIDFamily      *uint8       `json:"cpuid_fam_id"` // from version 3 on
	CPUIDModel       *uint8       `json:"cpuid_mod_id"`
	CPUIDStepping    *uint8       `json:"cpuid_step"`
	ChipID           Bytes        `json:"chip_id"` // 64
	CommittedTCB     SNPTCB       `json:"committed_tcb"`
	Current          SNPFirmware  `json:"current"`
	Committed        SNPFirmware  `json:"committed"`
	LaunchTCB        SNPTCB       `json:"launch_tcb"`
	LaunchMitVector  *uint64      `json:"launch_mit_vector,omitempty"` // from version 5 on
	CurrentMitVector *uint64      `json:"current_mit_vector,omitempty"`
	Signature        SNPSignature `json:"signature"`
}

// field is one byte field of the report: where it lies and how long it is.
type field struct {
	name   string
	offset int
	size   int
	bytes  *Bytes
}

func (r *SNPReport) fields() []field {
	return []field{
		{"family_id", 0x10, 16, &r.FamilyID}, {"image_id", 0x20, 16, &r.ImageID},
		{"report_data", 0x50, 64, &r.ReportData}, {"measurement", 0x90, 48, &r.Measurement},
		{"host_data", 0xc0, 32, &r.HostData}, {"id_key_digest", 0xe0, 48, &r.IDKeyDigest},
		{"author_key_digest", 0x110, 48, &r.AuthorKeyDigest}, {"report_id", 0x140, 32, &r.ReportID},
		{"report_id_ma", 0x160, 32, &r.ReportIDMA}, {"chip_id", 0x1a0, 64, &r.ChipID},
		{"signature.r", SNPSignedSize, 72, &r.Signature.R}, {"signature.s", SNPSignedSize + 72, 72, &r.Signature.S},
	}
}

// tcbField is one TCB version of the report.
type tcbField struct {
	name   string
	offset int
	tcb    *SNPTCB
}

func (r *SNPReport) tcbs() []tcbField {
	return []tcbField{
		{"current_tcb", 0x38, &r.CurrentTCB}, {"reported_tcb", 0x180, &r.ReportedTCB},
		{"committed_tcb", 0x1e0, &r.CommittedTCB}, {"launch_tcb", 0x1f0, &r.LaunchTCB},
	}
}

// Raw writes the report as the firmware signed it: SNPReportSize bytes.
func (r *SNPReport) Raw() ([]byte, error) {
	b := make([]byte, SNPReportSize)
	le := binary.LittleEndian
	le.PutUint32(b[0:], r.Version)
	le.PutUint32(b[4:], r.GuestSVN)
	le.PutUint64(b[8:], r.Policy)
	le.PutUint32(b[0x30:], r.VMPL)
	le.PutUint32(b[0x34:], r.SigAlgo)
	le.PutUint64(b[0x40:], r.PlatInfo)
	le.PutUint32(b[0x48:], r.KeyInfo)
	for _, f := range r.fields() {
		if len(*f.bytes) != f.size {
			return nil, fmt.Errorf("attestation_report.%s has %d bytes, expected %d", f.name, len(*f.bytes), f.size)
		}
		copy(b[f.offset:], *f.bytes)
	}
	for _, t := range r.tcbs() {
		raw := t.tcb.raw()
		copy(b[t.offset:], raw[:])
	}
	if (r.CPUIDFamily == nil) != (r.CPUIDModel == nil) || (r.CPUIDFamily == nil) != (r.CPUIDStepping == nil) {
		return nil, fmt.Errorf("attestation_report: cpuid_fam_id, cpuid_mod_id and cpuid_step are there together or not at all")
	}
	if r.CPUIDFamily != nil {
		b[0x188], b[0x189], b[0x18a] = *r.CPUIDFamily, *r.CPUIDModel, *r.CPUIDStepping
	}
	copy(b[0x1e8:], []byte{r.Current.Build, r.Current.Minor, r.Current.Major})
	copy(b[0x1ec:], []byte{r.Committed.Build, r.Committed.Minor, r.Committed.Major})
	if r.LaunchMitVector != nil {
		le.PutUint64(b[0x1f8:], *r.LaunchMitVector)
	}
	if r.CurrentMitVector != nil {
		le.PutUint64(b[0x200:], *r.CurrentMitVector)
	}
	return b, nil
}

// SNPReportFromRaw takes a raw report apart. A report that this form cannot
// carry byte for byte is an error: reserved bytes that are set, or a size that
// is not SNPReportSize.
func SNPReportFromRaw(b []byte) (*SNPReport, error) {
	if len(b) != SNPReportSize {
		return nil, fmt.Errorf("attestation report has %d bytes, expected %d", len(b), SNPReportSize)
	}
	le := binary.LittleEndian
	r := &SNPReport{
		Version: le.Uint32(b[0:]), GuestSVN: le.Uint32(b[4:]), Policy: le.Uint64(b[8:]),
		VMPL: le.Uint32(b[0x30:]), SigAlgo: le.Uint32(b[0x34:]),
		PlatInfo: le.Uint64(b[0x40:]), KeyInfo: le.Uint32(b[0x48:]),
		Current:   SNPFirmware{Build: b[0x1e8], Minor: b[0x1e9], Major: b[0x1ea]},
		Committed: SNPFirmware{Build: b[0x1ec], Minor: b[0x1ed], Major: b[0x1ee]},
	}
	for _, f := range r.fields() {
		*f.bytes = slices.Clone(b[f.offset : f.offset+f.size])
	}
	// Family 1Ah and later has the TCB form with an FMC. Version 2 names no CPU.
	turin := r.Version >= 3 && b[0x188] >= 0x1a
	for _, t := range r.tcbs() {
		*t.tcb = tcbFromRaw(slices.Clone(b[t.offset:t.offset+8]), turin)
	}
	if r.Version >= 3 {
		r.CPUIDFamily, r.CPUIDModel, r.CPUIDStepping = new(uint8), new(uint8), new(uint8)
		*r.CPUIDFamily, *r.CPUIDModel, *r.CPUIDStepping = b[0x188], b[0x189], b[0x18a]
	}
	if r.Version >= 5 {
		r.LaunchMitVector, r.CurrentMitVector = new(uint64), new(uint64)
		*r.LaunchMitVector, *r.CurrentMitVector = le.Uint64(b[0x1f8:]), le.Uint64(b[0x200:])
	}
	back, err := r.Raw()
	if err != nil {
		return nil, err
	}
	for i := range back {
		if back[i] != b[i] {
			return nil, fmt.Errorf("attestation report of version %d has a reserved byte set at %#x", r.Version, i)
		}
	}
	return r, nil
}
