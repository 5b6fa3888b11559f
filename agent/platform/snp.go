package platform

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"slices"
	"sync"

	"github.com/google/go-configfs-tsm/report"
	"github.com/google/go-sev-guest/abi"
	sev "github.com/google/go-sev-guest/client"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// maxCertTable bounds the host's certificate table, in bytes.
const maxCertTable = 512 << 10

// maxVMPL is the least privileged level.
const maxVMPL = 3

// SNP makes SEV-SNP reports. The firmware answers the guest over a channel that
// the host cannot read or change, so what a report says of this guest needs no
// signature here; the certificates come from the host and are carried along
// unread.
type SNP struct {
	*snpDevice
	vmpl uint
}

// snpDevice is the guest's one way to the firmware.
type snpDevice struct {
	h      Hardware
	device string // "" when configfs-tsm alone is there
	tsm    bool   // configfs-tsm has provider sev_guest

	mu sync.Mutex
}

// TEE implements Attester.
func (s *SNP) TEE() string { return string(policy.PlatformSNP) }

// Register implements Attester: plain SEV-SNP has no runtime register.
func (s *SNP) Register() eventlog.Register { return nil }

// Auth implements Attester.
func (s *SNP) Auth(context.Context) (*kbs.CVMAgentAuth, error) {
	return &kbs.CVMAgentAuth{Version: kbs.Dialect}, nil
}

// Additional implements Attester: REPORT_ID names the instance.
func (s *SNP) Additional(context.Context, string, *kbs.CVMAgentChallenge) (kbs.AdditionalCVMAgent, error) {
	return kbs.AdditionalCVMAgent{}, nil
}

// CheckLaunch implements Attester with HOST_DATA of this guest's own report.
func (s *SNP) CheckLaunch(ctx context.Context, initdata *policy.Initdata) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// HOST_DATA is the same at every level: the lowest that this guest may ask
	// for is taken, since the policy, which names one, is not verified yet.
	level, err := s.lowest(ctx)
	if err != nil {
		return err
	}
	r, _, err := s.report(ctx, fresh(), level)
	if err != nil {
		return err
	}
	return policy.CheckBindingHostData(initdata, r.HostData)
}

// Evidence implements Attester: a report at the policy's VMPL and the host's
// certificates.
func (s *SNP) Evidence(ctx context.Context, reportData [kbs.ReportDataSize]byte, _ []byte) (json.RawMessage, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, certs, err := s.report(ctx, padded(reportData), s.vmpl)
	if err != nil {
		return nil, err
	}
	if r.VMPL != uint32(s.vmpl) {
		return nil, cause.New(cause.EvidenceFailed, "the report is of VMPL %d, asked for %d", r.VMPL, s.vmpl)
	}
	e := kbs.SNPEvidence{Report: *r}
	if e.CertChain, err = certChain(certs); err != nil {
		return nil, err
	}
	return json.Marshal(e)
}

// fresh is report_data that no earlier report has.
func fresh() (data [64]byte) {
	_, _ = rand.Read(data[:]) // never fails
	return data
}

// report gets a report by configfs-tsm, or by the device where the kernel has
// no such provider. mu is held.
func (s *snpDevice) report(ctx context.Context, data [64]byte, vmpl uint) (*kbs.SNPReport, []byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	var raw, certs []byte
	var err error
	if s.tsm {
		var answer *report.Response
		if answer, err = s.h.tsmReport(data, providerSEV, &vmpl, true); err == nil {
			raw, certs = answer.OutBlob, answer.AuxBlob
		}
	} else {
		raw, certs, err = s.byDevice(data, vmpl)
	}
	if err != nil {
		return nil, nil, cause.New(cause.EvidenceFailed, "get a SEV-SNP report at VMPL %d: %w", vmpl, err)
	}
	r, err := kbs.SNPReportFromRaw(raw)
	if err != nil {
		return nil, nil, cause.New(cause.EvidenceFailed, "%w", err)
	}
	if !bytes.Equal(r.ReportData, data[:]) {
		return nil, nil, cause.New(cause.EvidenceFailed, "the report is over other report_data than was asked for")
	}
	return r, certs, nil
}

// byDevice asks the ioctl interface. An extended report brings the host's
// certificates along; a host that has none gives the plain one.
func (s *snpDevice) byDevice(data [64]byte, vmpl uint) (raw, certs []byte, err error) {
	d, err := s.h.SEV(s.device)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	// The provider that is to replace these opens its device by a global flag.
	raw, certs, err = sev.GetRawExtendedReportAtVmpl(d, data, int(vmpl)) //nolint:staticcheck
	if err == nil && len(raw) == kbs.SNPReportSize {
		return raw, certs, nil
	}
	raw, plainErr := sev.GetRawReportAtVmpl(d, data, int(vmpl)) //nolint:staticcheck
	if plainErr != nil {
		return nil, nil, errors.Join(err, plainErr)
	}
	return raw, nil, nil
}

// lowest is the most privileged VMPL that this guest gets reports at.
func (s *snpDevice) lowest(ctx context.Context) (uint, error) {
	if s.tsm {
		r, err := report.CreateOpenReport(s.h.TSM)
		if err != nil {
			return 0, cause.New(cause.EvidenceFailed, "configfs-tsm: %w", err)
		}
		floor, err := r.PrivilegeLevelFloor()
		if err = errors.Join(err, r.Destroy()); err != nil {
			return 0, cause.New(cause.EvidenceFailed, "configfs-tsm: %w", err)
		}
		if floor > maxVMPL {
			return 0, cause.New(cause.EvidenceFailed, "configfs-tsm: privlevel_floor is %d, expected 0 to %d", floor, maxVMPL)
		}
		return floor, nil
	}
	var errs []error
	for level := range uint(maxVMPL + 1) {
		if _, _, err := s.report(ctx, fresh(), level); err != nil {
			errs = append(errs, err)
			continue
		}
		return level, nil
	}
	return 0, errs[0]
}

// certKinds are the entries of the host's table that a verifier looks at (GHCB
// 2.01, table 6; the CRL's as Linux' SVSM and KDS tools have it).
var certKinds = map[string]kbs.CertType{
	abi.VcekGUID: kbs.CertVCEK, abi.VlekGUID: kbs.CertVLEK,
	abi.AskGUID: kbs.CertASK, abi.ArkGUID: kbs.CertARK,
	"92f81bc3-5811-4d3d-97ff-d19f88dc67ea": kbs.CertCRL,
}

// certChain reads the host's certificate table; nil when there is none. What is
// in the certificates is for the verifier to judge.
func certChain(table []byte) ([]kbs.SNPCert, error) {
	if len(table) > maxCertTable {
		return nil, cause.New(cause.EvidenceFailed, "the host's certificate table has %d bytes, at most %d are read", len(table), maxCertTable)
	}
	if !slices.ContainsFunc(table, func(b byte) bool { return b != 0 }) {
		return nil, nil
	}
	// Not CertTable.Unmarshal: it adds offset and length in 32 bits.
	entries, err := abi.ParseSnpCertTableHeader(table)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "the host's certificate table: %w", err)
	}
	var chain []kbs.SNPCert
	seen := map[kbs.CertType]bool{}
	for _, e := range entries {
		kind, known := certKinds[e.GUID.String()]
		if !known || e.Length == 0 {
			continue
		}
		end := uint64(e.Offset) + uint64(e.Length)
		if end > uint64(len(table)) {
			return nil, cause.New(cause.EvidenceFailed, "the host's certificate table of %d bytes: %s ends at %d", len(table), kind, end)
		}
		if seen[kind] {
			return nil, cause.New(cause.EvidenceFailed, "the host's certificate table has %s twice", kind)
		}
		seen[kind] = true
		chain = append(chain, kbs.SNPCert{Type: kind, Data: slices.Clone(table[e.Offset:end])})
	}
	return chain, nil
}
