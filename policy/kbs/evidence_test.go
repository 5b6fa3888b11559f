package kbs

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"
)

// testdata/trustee-*.json: confidential-containers/trustee, Apache-2.0, as its
// guest sends them; snp-report-v2.bin from the same place.

func vector(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSNPReportHasOneForm(t *testing.T) {
	e, err := DecodeSNPEvidence(vector(t, "trustee-snp-evidence.json"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := e.Report.Raw()
	if err != nil {
		t.Fatal(err)
	}
	again, err := SNPReportFromRaw(raw)
	if err != nil {
		t.Fatal(err)
	}
	want, got := &e.Report, again
	a, _ := json.Marshal(want)
	b, _ := json.Marshal(got)
	if !bytes.Equal(a, b) {
		t.Fatalf("%s\n%s", a, b)
	}
	if e.Report.Version != 3 || e.CertChain[0].Type != CertVCEK {
		t.Fatalf("version %d, first certificate %s", e.Report.Version, e.CertChain[0].Type)
	}
}

func TestRawSNPReportSurvives(t *testing.T) {
	raw := vector(t, "snp-report-v2.bin")
	r, err := SNPReportFromRaw(raw)
	if err != nil {
		t.Fatal(err)
	}
	back, err := r.Raw()
	if err != nil || !bytes.Equal(raw, back) {
		t.Fatalf("%v", err)
	}
	for n := range raw {
		if _, err := SNPReportFromRaw(raw[:n]); err == nil {
			t.Fatalf("%d bytes were accepted", n)
		}
	}
	raw[0x4f] = 1
	if _, err := SNPReportFromRaw(raw); err == nil {
		t.Fatal("a reserved byte was dropped")
	}
}

func TestAzureEvidenceForm(t *testing.T) {
	good := vector(t, "trustee-az-snp-vtpm-evidence-v2.json")
	e, err := DecodeAzureEvidence("az-snp-vtpm", good)
	if err != nil {
		t.Fatal(err)
	}
	if len(e.Quote.PCRs) != 24 || len(e.HCLReport) == 0 || len(e.VCEK) == 0 {
		t.Fatalf("%d PCRs, HCL report of %d bytes", len(e.Quote.PCRs), len(e.HCLReport))
	}
	if _, err := DecodeAzureEvidence("az-tdx-vtpm", good); err == nil {
		t.Fatal("SNP evidence was read as TDX's")
	}
	if _, err := DecodeAzureEvidence("az-snp-vtpm", bytes.Replace(good, []byte(`"version": 2`), []byte(`"version": 1`), 1)); err == nil {
		t.Fatal("version 1 was read")
	}
}

func TestEvidenceOfAMillionElementsIsRefused(t *testing.T) {
	big := append(append([]byte(`{"attestation_report":{"measurement":[0`), bytes.Repeat([]byte(",0"), 1e6-1)...), `]}}`...)
	if _, err := DecodeSNPEvidence(big); err == nil {
		t.Fatal("accepted")
	}
}

func FuzzSNPEvidence(f *testing.F) {
	f.Add(vector(f, "trustee-snp-evidence.json"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := DecodeSNPEvidence(b)
		if err != nil {
			return
		}
		if _, err := e.Report.Raw(); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzSNPReport(f *testing.F) {
	f.Add(vector(f, "snp-report-v2.bin"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := SNPReportFromRaw(b)
		if err != nil {
			return
		}
		if back, err := r.Raw(); err != nil || !bytes.Equal(back, b) {
			t.Fatal("another report came back")
		}
	})
}

func FuzzTDXEvidence(f *testing.F) {
	f.Add([]byte(`{"cc_eventlog":null,"quote":"AAAA"}`))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = DecodeTDXEvidence(b) })
}

func FuzzAzureEvidence(f *testing.F) {
	f.Add(vector(f, "trustee-az-snp-vtpm-evidence-v2.json"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = DecodeAzureEvidence("az-snp-vtpm", b)
		_, _ = DecodeAzureEvidence("az-tdx-vtpm", b)
	})
}
