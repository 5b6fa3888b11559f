package platform

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-configfs-tsm/report"
	sev "github.com/google/go-sev-guest/client"
	tdx "github.com/google/go-tdx-guest/client"
	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Device nodes by their stable kernel names.
var (
	sevDevices = []string{"/dev/sev-guest"}
	tdxDevices = []string{"/dev/tdx_guest", "/dev/tdx-guest"}
)

// Providers of configfs-tsm reports.
const (
	providerSEV = "sev_guest"
	providerTDX = "tdx_guest"
)

// Hardware is how the kernel is asked about the platform. Linux is the one
// that programs use.
type Hardware struct {
	Files Files
	TSM   configfsi.Client // configfs-tsm; nil when the kernel has none
	SEV   func(path string) (sev.Device, error)
	TDX   func(path string) (tdx.Device, error)
}

// Files are device nodes, sysfs attributes and ACPI tables.
type Files interface {
	// Exists says whether there is something at path; what cannot be looked at
	// counts as there.
	Exists(path string) bool
	// Read reads at most max bytes; more is an error.
	Read(path string, max int64) ([]byte, error)
	// Write writes data with one write(2), as sysfs attributes need it.
	Write(path string, data []byte) error
}

// Linux is the running kernel.
func Linux() Hardware {
	h := Hardware{
		Files: linuxFiles{},
		SEV: func(path string) (sev.Device, error) {
			d := &sev.LinuxDevice{}
			return d, d.Open(path)
		},
		TDX: func(path string) (tdx.Device, error) {
			d := &tdx.LinuxDevice{}
			return d, d.Open(path)
		},
	}
	if c, err := linuxtsm.MakeClient(); err == nil {
		h.TSM = c
	}
	return h
}

type linuxFiles struct{}

func (linuxFiles) Exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func (linuxFiles) Read(path string, max int64) ([]byte, error) {
	// No bounded.ReadFile: sysfs says one page for the size of every attribute.
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return bounded.ReadAll(f, max)
}

func (linuxFiles) Write(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// first returns the first of the paths that exists, or "".
func (h Hardware) first(paths []string) string {
	for _, p := range paths {
		if h.Files.Exists(p) {
			return p
		}
	}
	return ""
}

// provider asks configfs-tsm who makes its reports; "" when nobody does.
func (h Hardware) provider() (string, error) {
	if h.TSM == nil {
		return "", nil
	}
	entry, err := h.TSM.MkdirTemp(configfsi.TsmPrefix+"/report", "entry")
	switch {
	case errors.Is(err, unix.ENXIO), errors.Is(err, fs.ErrNotExist): // no driver has registered
		return "", nil
	case err != nil:
		return "", cause.New(cause.EvidenceFailed, "configfs-tsm: %w", err)
	}
	r, err := report.UnsafeWrap(h.TSM, entry)
	if err != nil {
		return "", cause.New(cause.EvidenceFailed, "configfs-tsm: %w", err)
	}
	name, err := r.ReadOption("provider")
	if err = errors.Join(err, r.Destroy()); err != nil {
		return "", cause.New(cause.EvidenceFailed, "configfs-tsm: %w", err)
	}
	return strings.TrimSpace(string(name)), nil
}

// tsmReport gets one report over data. The entry of each call is its own, so
// nobody else's write can come between.
func (h Hardware) tsmReport(data [64]byte, provider string, level *uint, aux bool) (*report.Response, error) {
	request := &report.Request{InBlob: data[:], GetAuxBlob: aux}
	if level != nil {
		request.Privilege = &report.Privilege{Level: *level}
	}
	r, err := report.Get(h.TSM, request)
	if err != nil {
		return nil, fmt.Errorf("configfs-tsm: %w", err)
	}
	if got := strings.TrimSpace(r.Provider); got != provider {
		return nil, fmt.Errorf("configfs-tsm: the report is by %q, expected %q", got, provider)
	}
	return r, nil
}
