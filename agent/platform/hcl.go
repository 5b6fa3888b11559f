package platform

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// An HCL report, little-endian: 32 bytes of header that begin with the magic,
// 1184 bytes of hardware report (a shorter TDREPORT is padded), then five
// 32-bit words (size, version, kind of report, hash, size of the JSON) and the
// runtime data, which is JSON. The hardware report's report_data begins with
// the hash of that JSON.
const (
	hclMagic    = "HCLA"
	hclHardware = 32
	hclWords    = hclHardware + 1184
	hclJSON     = hclWords + 5*4

	hclSNP = 2
	hclTDX = 4

	maxHCL       = 64 << 10
	tdReportSize = 1024
)

// hclReport is what the guest looks at: it only makes sure that the report is
// the one it asked for. Whether it is genuine is for the verifier.
type hclReport struct {
	kind     uint32
	hardware []byte
	userData []byte // 64 bytes
}

func parseHCL(data []byte) (*hclReport, error) {
	if len(data) < hclJSON || string(data[:len(hclMagic)]) != hclMagic {
		return nil, fmt.Errorf("no HCL report in %d bytes", len(data))
	}
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(data[hclWords+4*i:]) }
	r := &hclReport{kind: word(2), hardware: data[hclHardware:hclWords]}
	if r.kind != hclSNP && r.kind != hclTDX {
		return nil, fmt.Errorf("HCL report of kind %d, expected SEV-SNP (%d) or TDX (%d)", r.kind, hclSNP, hclTDX)
	}
	size := uint64(word(4))
	if size > uint64(len(data)-hclJSON) {
		return nil, fmt.Errorf("HCL report: %d bytes of runtime data, %d are there", size, len(data)-hclJSON)
	}
	text := data[hclJSON : hclJSON+int(size)]
	if err := bounded.CheckJSON(text, bounded.Limits{Bytes: maxHCL, Depth: 8}); err != nil {
		return nil, fmt.Errorf("HCL report: runtime data: %w", err)
	}
	var runtime struct {
		UserData string `json:"user-data"`
	}
	if err := json.Unmarshal(text, &runtime); err != nil {
		return nil, fmt.Errorf("HCL report: runtime data: %w", err)
	}
	var err error
	if r.userData, err = hex.DecodeString(runtime.UserData); err != nil || len(r.userData) > userDataSize {
		return nil, errors.New("HCL report: user-data is not hex of at most 64 bytes")
	}
	return r, nil
}
