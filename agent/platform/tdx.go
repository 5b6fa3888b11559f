package platform

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"io/fs"
	"sync"

	"github.com/google/go-configfs-tsm/report"
	tdx "github.com/google/go-tdx-guest/client"
	labi "github.com/google/go-tdx-guest/client/linuxabi"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Paths of the kernel. Measurements can be read and extended since Linux 6.16
// (Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest).
const (
	pathRTMR3 = "/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384"
	pathCCEL  = "/sys/firmware/acpi/tables/data/CCEL"
)

// Offsets in a TDREPORT (TDX module ABI 1.5, TDREPORT_STRUCT and TDINFO_STRUCT).
const (
	tdReportData   = 128 // REPORTMACSTRUCT.REPORTDATA, 64 bytes
	tdReportConfig = 512 + 64
	tdReportRTMR0  = 512 + 208
)

// maxTDQuote bounds a quote, in bytes.
const maxTDQuote = 64 << 10

// TDX makes TDX quotes. What is compared in the guest comes from a TDREPORT,
// which the CPU gives without the host; the quote itself passes through the
// host and is for the verifier.
type TDX struct {
	h      Hardware
	device string
	tsm    bool // configfs-tsm has provider tdx_guest
	dir    string

	mu sync.Mutex // extend, report and quote are of one moment each
}

// TEE implements Attester.
func (t *TDX) TEE() string { return string(policy.PlatformTDX) }

// Register implements Attester.
func (t *TDX) Register() eventlog.Register { return rtmr3{t} }

// Auth implements Attester.
func (t *TDX) Auth(context.Context) (*kbs.CVMAgentAuth, error) {
	return &kbs.CVMAgentAuth{Version: kbs.Dialect}, nil
}

// Additional implements Attester: TDX gives an instance no name of its own, so
// a key of this boot does.
func (t *TDX) Additional(_ context.Context, nonce string, _ *kbs.CVMAgentChallenge) (kbs.AdditionalCVMAgent, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	token, err := signInstance(t.dir, nonce)
	if err != nil {
		return kbs.AdditionalCVMAgent{}, err
	}
	return kbs.AdditionalCVMAgent{Instance: token}, nil
}

// CheckLaunch implements Attester with MRCONFIGID of this guest's own TDREPORT.
// A quote would not do: it comes from the host.
func (t *TDX) CheckLaunch(ctx context.Context, initdata *policy.Initdata) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, err := t.report(ctx)
	if err != nil {
		return err
	}
	return policy.CheckBindingMRConfigID(initdata, r[tdReportConfig:tdReportConfig+48])
}

// Evidence implements Attester: a quote, and the CC event log where it replays
// to the RTMRs. Under dialect kbs the agent's events follow the firmware's, for
// all four must replay; where they travel beside, they explain RTMR3.
func (t *TDX) Evidence(ctx context.Context, reportData [kbs.ReportDataSize]byte, events []byte) (json.RawMessage, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	quote, err := t.quote(ctx, padded(reportData))
	if err != nil {
		return nil, err
	}
	log, err := t.log(ctx, events)
	if err != nil {
		return nil, err
	}
	return json.Marshal(kbs.TDXEvidence{EventLog: log, Quote: quote})
}

// quote gets a quote by configfs-tsm, or by the device where the kernel has no
// such provider. mu is held.
func (t *TDX) quote(ctx context.Context, data [64]byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var quote []byte
	var err error
	if t.tsm {
		var answer *report.Response
		if answer, err = t.h.tsmReport(data, providerTDX, nil, false); err == nil {
			quote = answer.OutBlob
		}
	} else {
		err = t.withDevice(func(d tdx.Device) (err error) {
			quote, err = tdx.GetRawQuote(d, data)
			return err
		})
	}
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "get a TDX quote: %w", err)
	}
	if len(quote) == 0 || len(quote) > maxTDQuote {
		return nil, cause.New(cause.EvidenceFailed, "the TDX quote has %d bytes, expected 1 to %d", len(quote), maxTDQuote)
	}
	return quote, nil
}

// report gets a TDREPORT, which the CPU makes. mu is held.
func (t *TDX) report(ctx context.Context) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	request := labi.TdxReportReq{ReportData: fresh()}
	err := t.withDevice(func(d tdx.Device) error {
		result, err := d.Ioctl(labi.IocTdxGetReport, &request)
		if err == nil && result != labi.TdxAttestSuccess {
			err = errors.New("TDG.MR.REPORT was refused")
		}
		return err
	})
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "get a TDREPORT: %w", err)
	}
	r := request.TdReport[:]
	if !bytes.Equal(r[tdReportData:tdReportData+64], request.ReportData[:]) {
		return nil, cause.New(cause.EvidenceFailed, "the TDREPORT is over other report_data than was asked for")
	}
	return r, nil
}

func (t *TDX) withDevice(do func(tdx.Device) error) (err error) {
	if t.device == "" {
		return errors.New("there is no device /dev/tdx_guest")
	}
	d, err := t.h.TDX(t.device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return do(d)
}

// log is the CC event log followed by events; nil when there is none or it does
// not replay to the RTMRs that the CPU holds now. mu is held.
func (t *TDX) log(ctx context.Context, events []byte) ([]byte, error) {
	raw, err := t.h.Files.Read(pathCCEL, maxCCELArea)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, bounded.ErrTooLarge):
		return nil, nil
	case err != nil:
		return nil, cause.New(cause.EvidenceFailed, "read the CC event log: %w", err)
	}
	var own []eventlog.Event
	if len(events) > 0 {
		r, err := eventlog.Replay(events)
		if err != nil {
			return nil, err
		}
		own = r.Events
	}
	log, rtmrs, err := appendCCEL(raw, own)
	if err != nil {
		// The firmware's log is no part of what is trusted: without it a
		// verifier still has the registers.
		return nil, nil
	}
	now, err := t.report(ctx)
	if err != nil {
		return nil, err
	}
	for i, v := range rtmrs {
		if at := tdReportRTMR0 + 48*i; bytes.Equal(v[:], now[at:at+48]) {
			continue
		}
		beside := events == nil && i == 3 && v == [48]byte{}
		if !beside {
			return nil, nil
		}
	}
	return log, nil
}

// rtmr3 is the register of the event log.
type rtmr3 struct{ t *TDX }

func (r rtmr3) Name() string { return "rtmr3" }
func (r rtmr3) Index() int   { return eventlog.IndexRTMR3 }

// Extend implements eventlog.Register: a write of the digest extends.
func (r rtmr3) Extend(ctx context.Context, digests map[crypto.Hash][]byte) error {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	digest := digests[crypto.SHA384]
	if len(digest) != crypto.SHA384.Size() {
		return cause.New(cause.Internal, "digest of %d bytes, expected %d", len(digest), crypto.SHA384.Size())
	}
	return rtmrError(r.t.h.Files.Write(pathRTMR3, digest))
}

// Read implements eventlog.Register.
func (r rtmr3) Read(ctx context.Context) ([]byte, error) {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	value, err := r.t.h.Files.Read(pathRTMR3, 48)
	if err != nil {
		return nil, rtmrError(err)
	}
	if len(value) != crypto.SHA384.Size() {
		return nil, cause.New(cause.EvidenceFailed, "%s has %d bytes, expected %d", pathRTMR3, len(value), crypto.SHA384.Size())
	}
	return value, nil
}

// rtmrError tells a kernel without the interface from one that refuses.
func rtmrError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return cause.New(cause.RTMRUnavailable, "no %s: Linux 6.16 or newer extends RTMR3", pathRTMR3)
	}
	return cause.New(cause.EvidenceFailed, "RTMR3: %w", err)
}
