package snptest

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/client/linuxabi"
	"github.com/google/go-sev-guest/kds"
	pb "github.com/google/go-sev-guest/proto/sevsnp"
)

// Device is a sev-guest device that signs reports over whatever report data
// it is asked for; it is a go-sev-guest client.Device and a QuoteProvider.
type Device struct {
	Chain   *Chain
	Options Options
}

// Open implements client.Device.
func (*Device) Open(string) error { return nil }

// Close implements client.Device.
func (*Device) Close() error { return nil }

// IsSupported implements client.QuoteProvider.
func (*Device) IsSupported() bool { return true }

// Product implements client.Device.
func (d *Device) Product() *pb.SevProduct {
	p, err := kds.ParseProductName(d.Chain.Config.Line+"-B0", abi.VcekReportSigner)
	if err != nil {
		return nil
	}
	return p
}

func (d *Device) report(reportData [64]byte, vmpl uint32) ([]byte, error) {
	o := d.Options
	if vmpl != 0 {
		o.VMPL = vmpl
	}
	raw, err := d.Chain.SNPReport(reportData, o).Raw()
	if err != nil {
		return nil, err
	}
	return raw, d.Chain.Sign(raw)
}

// GetRawQuote implements client.QuoteProvider: a report and the certificate
// table after it.
func (d *Device) GetRawQuote(reportData [64]byte) ([]byte, error) {
	raw, err := d.report(reportData, 0)
	if err != nil || d.Options.NoCerts {
		return raw, err
	}
	certs, err := d.Chain.Signer.CertTableBytes()
	return append(raw, certs...), err
}

// GetRawQuoteAtLevel implements client.LeveledQuoteProvider.
func (d *Device) GetRawQuoteAtLevel(reportData [64]byte, vmpl uint) ([]byte, error) {
	at := *d
	at.Options.VMPL = uint32(vmpl)
	return at.GetRawQuote(reportData)
}

// Ioctl implements client.Device for the two report requests.
func (d *Device) Ioctl(command uintptr, arg any) (uintptr, error) {
	r, ok := arg.(*linuxabi.SnpUserGuestRequest)
	if !ok {
		return 0, fmt.Errorf("request %T", arg)
	}
	var ask *linuxabi.SnpReportReqABI
	switch req := r.ReqData.(type) {
	case *linuxabi.SnpReportReqABI:
		ask = req
	case *linuxabi.SnpExtendedReportReq:
		ask = &req.Data
		var certs []byte
		if !d.Options.NoCerts {
			var err error
			if certs, err = d.Chain.Signer.CertTableBytes(); err != nil {
				return 0, err
			}
		}
		if int(req.CertsLength) < len(certs) {
			r.FwErr, req.CertsLength = uint64(abi.GuestRequestInvalidLength), uint32(len(certs))
			return 0, syscall.EIO
		}
		copy(req.Certs, certs)
	default:
		return 0, fmt.Errorf("command %#x with %T", command, r.ReqData)
	}
	raw, err := d.report(ask.ReportData, ask.Vmpl)
	if err != nil {
		return 0, err
	}
	answer, ok := r.RespData.(*linuxabi.SnpReportRespABI)
	if !ok {
		return 0, errors.New("no place for the report")
	}
	answer.ReportSize = uint32(len(raw))
	copy(answer.Data[:], raw)
	return 0, nil
}
