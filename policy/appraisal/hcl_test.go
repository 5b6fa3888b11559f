package appraisal

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func azureSNPEvidence(t testing.TB) *kbs.AzureEvidence {
	t.Helper()
	ev, err := kbs.DecodeAzureEvidence("az-snp-vtpm", read(t, "trustee-az-snp-vtpm-evidence-v2.json"))
	if err != nil {
		t.Fatal(err)
	}
	return ev
}

func TestRealHCLReport(t *testing.T) {
	b := azureSNPEvidence(t).HCLReport
	h, err := parseHCL(b)
	if err != nil {
		t.Fatal(err)
	}
	if h.kind != hclSNP || !bytes.Equal(h.report, b[32:32+1184]) || h.ak.Size() != 256 || len(h.userData) != 64 {
		t.Fatalf("%s, %d bytes, AK of %d, user-data %x", h.kind, len(h.report), h.ak.Size(), h.userData)
	}
	v := NewVerdict("x")
	checkHCLRuntime(v, h, h.report[0x50:0x90])
	if v.Outcome(CheckHCLRuntime) != Passed {
		t.Fatalf("%+v", v.Checks)
	}
	if !strings.HasPrefix(h.identity(), "az-ak:") || len(h.identity()) != 6+64 {
		t.Fatal(h.identity())
	}
}

// hclWith is the real report with other runtime data.
func hclWith(t testing.TB, runtime string) []byte {
	b := bytes.Clone(azureSNPEvidence(t).HCLReport[:1236])
	binary.LittleEndian.PutUint32(b[8:], uint32(1236+len(runtime)))
	binary.LittleEndian.PutUint32(b[1216:], uint32(20+len(runtime)))
	binary.LittleEndian.PutUint32(b[1232:], uint32(len(runtime)))
	return append(b, runtime...)
}

func TestHCLReportRefusals(t *testing.T) {
	good := azureSNPEvidence(t).HCLReport
	real, err := parseHCL(good)
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]json.RawMessage
	if err := json.Unmarshal(real.runtime, &claims); err != nil {
		t.Fatal(err)
	}
	ak := strings.TrimSuffix(strings.TrimPrefix(string(claims["keys"]), "["), "]")
	ak, _, _ = strings.Cut(ak, `,{"kid":"HCLEkPub"`)
	for what, runtime := range map[string]string{
		"no keys":              `{}`,
		"an empty list":        `{"keys":[]}`,
		"another key alone":    `{"keys":[` + strings.Replace(ak, hclAKName, "HCLEkPub", 1) + `]}`,
		"the AK twice":         `{"keys":[` + ak + `,` + ak + `]}`,
		"a duplicate member":   `{"keys":[` + ak + `],"keys":[]}`,
		"an AK of 1024 bits":   `{"keys":[{"kid":"HCLAkPub","kty":"RSA","e":"AQAB","n":"` + strings.Repeat("q", 171) + `"}]}`,
		"an AK that is EC":     `{"keys":[{"kid":"HCLAkPub","kty":"EC","crv":"P-256","x":"AA","y":"AA"}]}`,
		"a symmetric AK":       `{"keys":[{"kid":"HCLAkPub","kty":"oct","k":"AAAA"}]}`,
		"user-data too short":  `{"keys":[` + ak + `],"user-data":"00"}`,
		"user-data not hex":    `{"keys":[` + ak + `],"user-data":"` + strings.Repeat("zz", 64) + `"}`,
		"user-data a number":   `{"keys":[` + ak + `],"user-data":1}`,
		"something after":      `{"keys":[` + ak + `]} {}`,
		"a NUL after":          `{"keys":[` + ak + "]}\x00",
		"not an object":        `[]`,
		"too many keys":        `{"keys":[` + strings.Repeat(`{},`, hclMaxKeys) + ak + `]}`,
		"an array in an array": `{"keys":` + strings.Repeat("[", 20) + strings.Repeat("]", 20) + `}`,
	} {
		if _, err := parseHCL(hclWith(t, runtime)); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	h, err := parseHCL(hclWith(t, `{"keys":[`+ak+`],"more":{"x":[1]}}`))
	if err != nil || h.userData != nil || !h.ak.Equal(real.ak) {
		t.Fatalf("runtime data without user-data: %+v, %v", h, err)
	}
	for n := range len(good) {
		// Only padding may be missing.
		if _, err := parseHCL(good[:n]); (err == nil) != (n >= 1236+len(real.runtime)) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
	// Every byte that neither the hardware report nor the runtime data covers.
	for i := range good {
		if i >= hclHeader && i < hclHeader+hclRoom || i >= 1236 && i < 1236+len(real.runtime) {
			continue
		}
		b := bytes.Clone(good)
		b[i] ^= 0x80
		if _, err := parseHCL(b); err == nil {
			t.Errorf("byte %d changed: accepted", i)
		}
	}
	tdx := bytes.Clone(good)
	binary.LittleEndian.PutUint32(tdx[1224:], uint32(hclTDX))
	if h, err := parseHCL(tdx); err != nil || h.kind != hclTDX || len(h.report) != hclTDReport {
		t.Errorf("%+v, %v", h, err)
	}
	tdx[hclHeader+hclTDReport] = 1
	if _, err := parseHCL(tdx); err == nil {
		t.Error("something after a TDREPORT: accepted")
	}
}

func FuzzHCLReport(f *testing.F) {
	f.Add([]byte(azureSNPEvidence(f).HCLReport))
	f.Add(hclWith(f, `{"keys":[{"kid":"HCLAkPub","kty":"RSA","e":"AQAB","n":"AA"}],"user-data":""}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHCL(b)
		if err != nil {
			return
		}
		if h.ak == nil || len(h.akSPKI) == 0 || h.userData != nil && len(h.userData) != hclUserData {
			t.Fatalf("%+v", h)
		}
		if again, err := parseHCL(b); err != nil || again.identity() != h.identity() {
			t.Fatal("not the same twice")
		}
	})
}
