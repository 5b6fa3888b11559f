// Package platformtest is the hardware of tests: SEV-SNP and TDX guests whose
// reports are signed under roots that the test made. No program imports it: a
// linter rule says so.
package platformtest

import (
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/faketsm"
	sev "github.com/google/go-sev-guest/client"
	tdx "github.com/google/go-tdx-guest/client"
	labi "github.com/google/go-tdx-guest/client/linuxabi"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// Paths that the real kernel has.
const (
	DeviceSEV = "/dev/sev-guest"
	DeviceTDX = "/dev/tdx_guest"
	RTMR3     = "/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384"
	CCEL      = "/sys/firmware/acpi/tables/data/CCEL"
)

// Files are the files of a guest by path. A nil value is a device node.
type Files struct {
	mu sync.Mutex
	m  map[string][]byte
	// onWrite takes a write; true: it did.
	onWrite func(path string, data []byte) bool
}

// NewFiles makes them.
func NewFiles(paths ...string) *Files {
	f := &Files{m: map[string][]byte{}}
	for _, p := range paths {
		f.m[p] = nil
	}
	return f
}

// Set puts or, with nil data and gone, removes a file.
func (f *Files) Set(path string, data []byte) { f.mu.Lock(); defer f.mu.Unlock(); f.m[path] = data }

// Remove removes a file.
func (f *Files) Remove(path string) { f.mu.Lock(); defer f.mu.Unlock(); delete(f.m, path) }

// Exists implements platform.Files.
func (f *Files) Exists(path string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.m[path]
	return ok
}

// Read implements platform.Files.
func (f *Files) Read(path string, max int64) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	data, ok := f.m[path]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("%s has more than %d bytes: %w", path, max, bounded.ErrTooLarge)
	}
	return append([]byte(nil), data...), nil
}

// Write implements platform.Files.
func (f *Files) Write(path string, data []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.m[path]; !ok {
		return &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	if f.onWrite != nil && f.onWrite(path, data) {
		return nil
	}
	return &fs.PathError{Op: "write", Path: path, Err: fs.ErrPermission}
}

// Bare is hardware without a TEE.
func Bare(files *Files) platform.Hardware {
	if files == nil {
		files = NewFiles()
	}
	return platform.Hardware{Files: files}
}

// SNPByDevice is a SEV-SNP guest whose kernel has the ioctl device alone.
func SNPByDevice(d sev.Device) platform.Hardware {
	return platform.Hardware{Files: NewFiles(DeviceSEV), SEV: func(string) (sev.Device, error) { return d, nil }}
}

// SNPByTSM is a SEV-SNP guest whose kernel has configfs-tsm; floor is the most
// privileged level that it may ask for. The device node is there, and not
// usable: what asks it fails.
func SNPByTSM(d *snptest.Device, floor uint) platform.Hardware {
	answer := func(in [64]byte, level uint) (out, aux []byte, err error) {
		at := *d
		at.Options.VMPL = uint32(level)
		at.Options.NoCerts = true
		if out, err = at.GetRawQuote(in); err != nil || d.Options.NoCerts {
			return out, nil, err
		}
		aux, err = d.Chain.Signer.CertTableBytes()
		return out, aux, err
	}
	return platform.Hardware{Files: NewFiles(DeviceSEV), TSM: TSM("sev_guest", floor, answer),
		SEV: func(string) (sev.Device, error) { return nil, fs.ErrPermission }}
}

// TSM is configfs-tsm with one provider.
func TSM(provider string, floor uint, answer func(in [64]byte, level uint) (out, aux []byte, err error)) configfsi.Client {
	s := faketsm.ReportV7(floor)
	make0 := s.MakeEntry
	s.MakeEntry = func() *faketsm.ReportEntry {
		e := make0()
		e.WriteGeneration = 1 // attributes can be read before the first write, as the kernel's can
		return e
	}
	s.ReadAttr = func(e *faketsm.ReportEntry, attr string) ([]byte, error) {
		switch attr {
		case "provider":
			return []byte(provider + "\n"), nil
		case "privlevel_floor":
			return fmt.Appendf(nil, "%d\n", floor), nil
		case "outblob", "auxblob":
			var in [64]byte
			copy(in[:], e.InAttrs["inblob"].Value)
			level, err := configfsi.Kstrtouint(e.InAttrs["privlevel"].Value, 10, 32)
			if err != nil {
				return nil, err
			}
			out, aux, err := answer(in, uint(level))
			if attr == "auxblob" {
				out = aux
			}
			return out, err
		}
		return nil, fs.ErrNotExist
	}
	return &faketsm.Client{Subsystems: map[string]configfsi.Client{"report": s}}
}

// TD is a TDX guest: its registers, its CPU and its quoting host.
type TD struct {
	Files *Files

	t    testing.TB
	host *tdxtest.Platform
	mu   sync.Mutex
	r    tdxtest.Report
}

// NewTD makes a guest that was launched as r says. Its kernel can extend RTMR3.
func NewTD(t testing.TB, host *tdxtest.Platform, r tdxtest.Report) *TD {
	td := &TD{t: t, host: host, r: r, Files: NewFiles(DeviceTDX)}
	td.Files.Set(RTMR3, r.RTMR[3][:])
	td.Files.onWrite = func(path string, data []byte) bool {
		if path != RTMR3 || len(data) != sha512.Size384 {
			return false
		}
		td.mu.Lock()
		defer td.mu.Unlock()
		td.r.RTMR[3] = sha512.Sum384(append(td.r.RTMR[3][:], data...))
		value := td.r.RTMR[3]
		td.Files.m[RTMR3] = value[:]
		return true
	}
	return td
}

// Registers are the RTMRs as they are now.
func (td *TD) Registers() [4][48]byte {
	td.mu.Lock()
	defer td.mu.Unlock()
	return td.r.RTMR
}

// ByDevice is the guest with a kernel that has the ioctl device alone.
func (td *TD) ByDevice() platform.Hardware {
	return platform.Hardware{Files: td.Files, TDX: func(string) (tdx.Device, error) { return td, nil }}
}

// ByTSM is the guest with a kernel that has configfs-tsm.
func (td *TD) ByTSM() platform.Hardware {
	h := td.ByDevice()
	h.TSM = TSM("tdx_guest", 0, func(in [64]byte, _ uint) (out, aux []byte, err error) { return td.quote(in), nil, nil })
	return h
}

func (td *TD) quote(reportData [64]byte) []byte {
	td.mu.Lock()
	r := td.r
	td.mu.Unlock()
	r.ReportData = reportData
	return td.host.Quote(td.t, r)
}

// Open implements client.Device.
func (*TD) Open(string) error { return nil }

// Close implements client.Device.
func (*TD) Close() error { return nil }

// Ioctl implements client.Device.
func (td *TD) Ioctl(command uintptr, arg any) (uintptr, error) {
	switch request := arg.(type) {
	case *labi.TdxReportReq:
		td.mu.Lock()
		defer td.mu.Unlock()
		report := request.TdReport[:]
		copy(report[128:], request.ReportData[:])
		copy(report[512+64:], td.r.MRConfigID[:])
		for i, v := range td.r.RTMR {
			copy(report[512+208+48*i:], v[:])
		}
		return labi.TdxAttestSuccess, nil
	case *labi.TdxQuoteReq:
		header, ok := request.Buffer.(*labi.TdxQuoteHdr)
		if !ok {
			break
		}
		quote := td.quote([64]byte(header.Data[128:192]))
		header.OutLen = uint32(copy(header.Data[:], quote))
		return labi.TdxAttestSuccess, nil
	}
	return 0, fmt.Errorf("command %#x with %T", command, arg)
}

// EventLog is a small CC event log with one event for each of the first three
// RTMRs, padded as firmware pads it, and what it replays to.
func EventLog() (log []byte, rtmrs [4][48]byte) {
	le := binary.LittleEndian
	// TCG_EfiSpecIDEvent: SHA-384 alone.
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0c, 0, 48, 0, 0)
	log = le.AppendUint32(log, 0)
	log = le.AppendUint32(log, 3)
	log = append(log, make([]byte, 20)...)
	log = le.AppendUint32(log, uint32(len(spec)))
	log = append(log, spec...)
	for i := range 3 {
		data := []byte(strings.Repeat(string(rune('a'+i)), 7))
		digest := sha512.Sum384(data)
		for _, v := range []uint32{uint32(i + 1), 0x80000001, 1} {
			log = le.AppendUint32(log, v)
		}
		log = le.AppendUint16(log, 0x0c)
		log = append(log, digest[:]...)
		log = le.AppendUint32(log, uint32(len(data)))
		log = append(log, data...)
		rtmrs[i] = sha512.Sum384(append(rtmrs[i][:], digest[:]...))
	}
	for range 300 {
		log = append(log, 0xff)
	}
	return log, rtmrs
}
