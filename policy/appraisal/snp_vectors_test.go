package appraisal

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/proto/sevsnp"
	"github.com/google/go-sev-guest/verify"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// amdTime is a time at which the certificates of all recorded evidence are valid.
var amdTime = time.Date(2026, 2, 1, 0, 0, 0, 0, time.UTC)

// lenient judges without revocation lists, which the vectors have none of.
func lenient() *SNP {
	return &SNP{Collateral: &collateral.Source{Policy: collateral.Policy{Revocation: collateral.IfPresent}}}
}

func rows(t testing.TB, v *Verdict) {
	t.Helper()
	for _, c := range v.Checks {
		t.Logf("%-24s %-12s expected %s, found %s", c.Name, c.Outcome, c.Expected, c.Found)
	}
}

// recorded is a raw report with its certificates.
type recorded struct {
	raw   []byte
	certs []kbs.SNPCert
}

func hostDataReport(t testing.TB) recorded {
	t.Helper()
	var certs struct{ VCEKCert, CertificateChain string }
	if err := json.Unmarshal(read(t, "snp-report-hostdata-certs.json"), &certs); err != nil {
		t.Fatal(err)
	}
	r := recorded{raw: read(t, "snp-report-hostdata.bin")}
	for i, rest := 0, []byte(certs.VCEKCert+certs.CertificateChain); len(bytes.TrimSpace(rest)) > 0; i++ {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			t.Fatal("not PEM")
		}
		r.certs = append(r.certs, kbs.SNPCert{Type: []kbs.CertType{kbs.CertVCEK, kbs.CertASK, kbs.CertARK}[i], Data: b.Bytes})
	}
	return r
}

func v2Report(t testing.TB) recorded {
	return recorded{read(t, "snp-report-v2.bin"), []kbs.SNPCert{{Type: kbs.CertVCEK, Data: read(t, "snp-report-v2-vcek.der")}}}
}

func trusteeReport(t testing.TB) recorded {
	t.Helper()
	ev, err := kbs.DecodeSNPEvidence(read(t, "trustee-snp-evidence.json"))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := ev.Report.Raw()
	if err != nil {
		t.Fatal(err)
	}
	return recorded{raw, ev.CertChain}
}

func azureReport(t testing.TB) recorded {
	t.Helper()
	ev := azureSNPEvidence(t)
	return recorded{ev.HCLReport[hclHeader : hclHeader+hclRoom], []kbs.SNPCert{{Type: kbs.CertVCEK, Data: kbs.Bytes(ev.VCEK)}}}
}

func allRecorded(t testing.TB) map[string]recorded {
	return map[string]recorded{"hostdata": hostDataReport(t), "version 2": v2Report(t), "trustee": trusteeReport(t), "azure": azureReport(t)}
}

// Every recorded report is genuine: signature, AMD's chain, chip, TCB.
func TestRecordedReportsPass(t *testing.T) {
	for name, r := range allRecorded(t) {
		t.Run(name, func(t *testing.T) {
			a, err := lenient().AppraiseRaw(r.raw, r.certs, Input{Dialect: kbs.DialectKBS, Time: amdTime, Offline: &Offline{}})
			if err != nil {
				t.Fatal(err)
			}
			rows(t, a.Verdict)
			if err := a.Verdict.Refusal(); err != nil {
				t.Fatal(err)
			}
			s := a.Facts.SNP
			if s == nil || s.Measurement != hex.EncodeToString(r.raw[0x90:0xc0]) || s.SigningKey != "vcek" || s.NotRevoked || s.Policy&snpPolicyDebug != 0 ||
				a.Facts.Identity != "snp:"+hex.EncodeToString(r.raw[0x140:0x160]) {
				t.Fatalf("%+v", a.Facts)
			}
			want := map[string]string{"trustee": "Genoa"}[name]
			if want == "" {
				want = "Milan"
			}
			if s.Product != want {
				t.Fatalf("product %s, expected %s", s.Product, want)
			}
		})
	}
}

// go-sev-guest's own verdict on the same reports, at a time when they are good
// and at one when they are not. Trustee's is of a CPU that it does not know.
func TestGoSevGuestAgrees(t *testing.T) {
	for name, r := range allRecorded(t) {
		if name == "trustee" {
			continue
		}
		report, err := abi.ReportToProto(r.raw)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []time.Time{amdTime, amdTime.AddDate(10, 0, 0), amdTime.AddDate(-10, 0, 0)} {
			for _, leaf := range []kbs.Bytes{r.certs[0].Data, flipped(r.certs[0].Data, len(r.certs[0].Data)-1)} {
				theirs := verify.SnpAttestation(&sevsnp.Attestation{Report: report, CertificateChain: &sevsnp.CertificateChain{VcekCert: leaf}},
					&verify.Options{DisableCertFetching: true, Now: at})
				ours, err := lenient().AppraiseRaw(r.raw, []kbs.SNPCert{{Type: kbs.CertVCEK, Data: leaf}}, Input{Dialect: kbs.DialectKBS, Time: at, Offline: &Offline{}})
				if err != nil {
					t.Fatal(err)
				}
				if (theirs == nil) != (ours.Verdict.Refusal() == nil) {
					t.Errorf("%s at %s: %v, go-sev-guest says %v", name, at, ours.Verdict.Refusal(), theirs)
				}
			}
		}
	}
}

func TestHostDataIsThePolicys(t *testing.T) {
	policy, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(read(t, "snp-report-hostdata-policy.b64"))))
	if err != nil {
		t.Fatal(err)
	}
	r := hostDataReport(t)
	a, err := lenient().AppraiseRaw(r.raw, r.certs, Input{Dialect: kbs.DialectKBS, Time: amdTime, Offline: &Offline{}})
	if err != nil || a.Verdict.Refusal() != nil {
		t.Fatal(err, a.Verdict.Refusal())
	}
	sum := sha256.Sum256(policy)
	if a.Facts.SNP.HostData != hex.EncodeToString(sum[:]) || a.Facts.SNP.HostData[:8] != "cadd74f7" {
		t.Fatalf("HOST_DATA %s, the policy's digest is %x", a.Facts.SNP.HostData, sum)
	}
}

// Trustee's evidence in a session of the report data that it was made for.
func TestTrusteeSNPEvidence(t *testing.T) {
	r := trusteeReport(t)
	in := Input{Dialect: kbs.DialectKBS, Time: amdTime, Primary: read(t, "trustee-snp-evidence.json"), Offline: &Offline{ReportData: r.raw[0x50:0x90]}}
	a, err := lenient().Appraise(in)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Verdict.Refusal(); err != nil {
		t.Fatal(err)
	}
	in.Offline = nil // a session's 48 bytes and zeros are not what the recording has
	if a, err = lenient().Appraise(in); err != nil || a.Verdict.Outcome(CheckReportData) != Failed || a.Verdict.Refusal() == nil {
		t.Fatalf("foreign report data: %v, %v", a.Verdict.Outcome(CheckReportData), err)
	}
}
