package appraisal

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// hclKind is the kind of hardware report inside an HCL report.
type hclKind uint32

const (
	hclSNP hclKind = 2
	hclTDX hclKind = 4
)

func (k hclKind) String() string {
	switch k {
	case hclSNP:
		return "snp"
	case hclTDX:
		return "tdx"
	}
	return fmt.Sprintf("kind %d", uint32(k))
}

// Layout of what Azure's paravisor (HCL) leaves in NV index 0x01400001: a
// header of 32 bytes, room for a hardware report, a head of 20 bytes, and the
// runtime data. Integers are little-endian.
const (
	hclMagic      = "HCLA"
	hclHeader     = 32
	hclRoom       = 1184 // an SNP report, or a TDREPORT and zeros
	hclTDReport   = 1024
	hclDataHead   = 20
	hclSHA256     = 1 // the hash that ties the runtime data to the hardware report
	hclAKCert     = 2 // the request type of a report about an AK
	hclMaxRuntime = 32 << 10
	hclMaxKeys    = 16
	hclUserData   = 64
	hclAKName     = "HCLAkPub"
)

// hclReport is an HCL report taken apart. Nothing in it is judged: the
// runtime data is worth something once the hardware report names its hash, and
// the hardware report once it is verified.
type hclReport struct {
	kind     hclKind
	report   []byte // an SNP report of 1184 bytes or a TDREPORT of 1024
	runtime  []byte // exact bytes of the runtime data
	ak       *rsa.PublicKey
	akSPKI   []byte // DER
	userData []byte // 64 bytes; nil when the runtime data has none
}

// parseHCL reads an HCL report. What surrounds the hardware report and the
// runtime data is covered by neither, so that only one value of it is taken.
func parseHCL(b []byte) (*hclReport, error) {
	const head = hclHeader + hclRoom + hclDataHead
	if len(b) < head {
		return nil, fmt.Errorf("HCL report has %d bytes, expected at least %d", len(b), head)
	}
	at := func(offset int) uint32 { return binary.LittleEndian.Uint32(b[offset:]) }
	data := hclHeader + hclRoom
	size := at(data + 16)
	if size == 0 || size > hclMaxRuntime || int(size) > len(b)-head {
		return nil, fmt.Errorf("HCL report: runtime data of %d bytes, expected 1 to %d and not beyond the report's end", size, hclMaxRuntime)
	}
	if string(b[:4]) != hclMagic {
		return nil, fmt.Errorf("HCL report begins with %q, expected %q", b[:4], hclMagic)
	}
	for _, f := range []struct {
		name      string
		found     uint32
		low, high uint32
	}{
		{"version", at(4), 1, 2},
		{"size", at(8), head + size, head + size},
		{"request type", at(12), hclAKCert, hclAKCert},
		{"status", at(16), 0, 0},
		{"data size", at(data), hclDataHead + size, hclDataHead + size},
		{"data version", at(data + 4), 1, 1},
		{"hash type", at(data + 12), hclSHA256, hclSHA256},
	} {
		if f.found < f.low || f.found > f.high {
			return nil, fmt.Errorf("HCL report: %s is %d, expected %d to %d", f.name, f.found, f.low, f.high)
		}
	}
	h := &hclReport{kind: hclKind(at(data + 8)), runtime: b[head : head+int(size)]}
	room := b[hclHeader:data]
	switch h.kind {
	case hclSNP:
		h.report = room
	case hclTDX:
		h.report = room[:hclTDReport]
	default:
		return nil, fmt.Errorf("HCL report: hardware report of kind %d, expected %d (SNP) or %d (TDX)", h.kind, hclSNP, hclTDX)
	}
	for _, zero := range [][]byte{b[20:hclHeader], room[len(h.report):], b[head+int(size):]} {
		if !allZero(zero) {
			return nil, errors.New("HCL report: reserved bytes or padding are not zero")
		}
	}
	if err := h.parseRuntime(); err != nil {
		return nil, fmt.Errorf("HCL runtime data: %w", err)
	}
	return h, nil
}

// parseRuntime reads the claims. Members that are not known here are left
// alone: the exact bytes are what the hardware report covers.
func (h *hclReport) parseRuntime() error {
	if err := bounded.CheckJSON(h.runtime, bounded.Limits{Bytes: hclMaxRuntime, Depth: 8, Nodes: 512}); err != nil {
		return err
	}
	var claims struct {
		Keys     []json.RawMessage `json:"keys"`
		UserData *string           `json:"user-data"`
	}
	if err := josejson.Unmarshal(h.runtime, &claims); err != nil {
		return err
	}
	if len(claims.Keys) > hclMaxKeys {
		return fmt.Errorf("%d keys, at most %d are read", len(claims.Keys), hclMaxKeys)
	}
	for _, raw := range claims.Keys {
		var id struct {
			Kid string `json:"kid"`
		}
		if err := josejson.Unmarshal(raw, &id); err != nil {
			return err
		}
		if id.Kid != hclAKName {
			continue
		}
		if h.ak != nil {
			return errors.New("two keys named " + hclAKName)
		}
		if err := h.setAK(raw); err != nil {
			return fmt.Errorf("%s: %w", hclAKName, err)
		}
	}
	if h.ak == nil {
		return errors.New("no key named " + hclAKName)
	}
	if claims.UserData != nil {
		data, err := hex.DecodeString(*claims.UserData)
		if err != nil || len(data) != hclUserData {
			return fmt.Errorf("user-data is not %d bytes in hex", hclUserData)
		}
		h.userData = data
	}
	return nil
}

func (h *hclReport) setAK(raw []byte) error {
	var k jose.JSONWebKey
	if err := k.UnmarshalJSON(raw); err != nil {
		return err
	}
	ak, ok := k.Key.(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("%T, expected a public RSA key", k.Key)
	}
	if err := strongKey(ak); err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(ak)
	if err != nil {
		return err
	}
	h.ak, h.akSPKI = ak, spki
	return nil
}

// identity is Facts.Identity of the Azure forms.
func (h *hclReport) identity() string { return "az-ak:" + spkiFingerprint(h.akSPKI) }

func allZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
