package platform

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// paravisor plays Azure's HCL on a real TPM: after a write to the user-data's
// index it puts a new report, signed by a made chip, into the report's index.
type paravisor struct {
	transport.TPMCloser
	t      *testing.T
	kind   uint32
	chain  *snptest.Chain
	ak     *rsa.PublicKey
	asleep bool // makes no new report
}

const ccNVWrite = 0x137

func (p *paravisor) Send(in []byte) ([]byte, error) {
	out, err := p.TPMCloser.Send(in)
	if err == nil && !p.asleep && binary.BigEndian.Uint32(in[6:]) == ccNVWrite && bytes.Contains(in[:22], []byte{0x01, 0x40, 0x00, 0x02}) {
		user, found, err := (&TPM{t: p.TPMCloser}).readNV(nvHCLUserData, 64)
		if err != nil || !found {
			p.t.Errorf("user-data: %t, %v", found, err)
		}
		p.write(user)
	}
	return out, err
}

// report is an HCL report with the user-data.
func (p *paravisor) report(user []byte) []byte {
	e := base64.RawURLEncoding.EncodeToString
	runtime := fmt.Appendf(nil, `{"keys":[{"kid":"HCLAkPub","key_ops":["sign"],"kty":"RSA","e":"AQAB","n":"%s"}],"user-data":"%s"}`,
		e(p.ak.N.Bytes()), strings.ToUpper(hex.EncodeToString(user)))
	sum := sha256.Sum256(runtime)
	var data [64]byte
	copy(data[:], sum[:])
	hardware := make([]byte, 1184)
	if p.kind == hclSNP {
		copy(hardware, p.chain.Report(p.t, data, snptest.Options{}))
	} else {
		copy(hardware[128:], data[:])
	}
	le := binary.LittleEndian
	out := []byte(hclMagic)
	for _, v := range []uint32{2, uint32(hclJSON + len(runtime)), 2, 0, 0, 0, 0} {
		out = le.AppendUint32(out, v)
	}
	out = append(out, hardware...)
	for _, v := range []uint32{uint32(20 + len(runtime)), 1, p.kind, 1, uint32(len(runtime))} {
		out = le.AppendUint32(out, v)
	}
	return append(out, runtime...)
}

// write puts a report into its index, always of the same size.
func (p *paravisor) write(user []byte) {
	data := p.report(user)
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	h := &TPM{t: p.TPMCloser}
	public, name, err := h.nvPublic(nvHCLReport)
	if err == nil && public == nil {
		_, err = tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: nvHCLReport, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NT: tpm2.TPMNTOrdinary},
		})}.Execute(p.TPMCloser)
		if err == nil {
			_, name, err = h.nvPublic(nvHCLReport)
		}
	}
	for at := 0; at < len(data) && err == nil; at += 512 {
		_, err = tpm2.NVWrite{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: nvHCLReport, Name: name},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: data[at:min(at+512, len(data))]}, Offset: uint16(at)}.Execute(p.TPMCloser)
		// The first write changes the index's Name.
		if err == nil {
			_, name, err = h.nvPublic(nvHCLReport)
		}
	}
	if err != nil {
		p.t.Errorf("write the HCL report: %v", err)
	}
}

// azureTPM is a TPM with the AK and the report that Azure leaves in it.
func azureTPM(t *testing.T, kind uint32) (*TPM, *paravisor) {
	t.Helper()
	_, p := start(t)
	made, err := p.createPrimary(akRSA)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle:     &tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name},
		PersistentHandle: azureAK,
	}).Execute(p.t); err != nil {
		t.Fatal(err)
	}
	public, err := made.OutPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm2.Pub(*public)
	if err != nil {
		t.Fatal(err)
	}
	hcl := &paravisor{TPMCloser: p.t, t: t, kind: kind, chain: snptest.New(t, snptest.Config{}), ak: key.(*rsa.PublicKey)}
	hcl.write(make([]byte, userDataSize))
	p.t = hcl
	return p, hcl
}

func TestAzureSNPEvidenceIsAccepted(t *testing.T) {
	ctx := context.Background()
	p, hcl := azureTPM(t, hclSNP)
	raw, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: "{}"})
	if err != nil {
		t.Fatal(err)
	}
	in, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "vcek.pem")
	vcek := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: hcl.chain.Signer.Vcek.Raw})
	if err := os.WriteFile(file, vcek, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := openAzure(ctx, p, AzureOptions{VCEK: file})
	if err != nil || a == nil || a.TEE() != "az-snp-vtpm" {
		t.Fatalf("%v, %v", a, err)
	}
	if err := a.CheckLaunch(ctx, in); cause.Of(err) != cause.LaunchUnbound {
		t.Errorf("PCR 8 zero gave %v", err)
	}
	if err := p.ExtendPCR(ctx, PCRLaunch, in.Digest()); err != nil {
		t.Fatal(err)
	}
	if err := a.CheckLaunch(ctx, in); err != nil {
		t.Error(err)
	}
	v := &appraisal.AzureSNP{SNP: &appraisal.SNP{Roots: hcl.chain.Roots(), Collateral: hcl.chain.Collateral(t)}}
	for i := range byte(2) { // the second report replaces the first
		rd := [48]byte{7, i}
		ev, err := a.Evidence(ctx, rd, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := v.Appraise(appraisal.Input{Dialect: kbs.DialectKBS, Primary: ev, ReportData: rd, InitData: raw, Time: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		if err := got.Verdict.Refusal(); err != nil {
			t.Fatalf("refused: %v", err)
		}
		if got.Facts.Launch == nil || !strings.HasPrefix(got.Facts.Identity, "az-ak:") {
			t.Errorf("%+v", got.Facts)
		}
	}

	// The same from the host's service, and what it can get wrong.
	answer := func(string) (int, string) { return 200, "" }
	thim := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata") != "true" {
			t.Error("no Metadata header")
		}
		code, text := answer(r.Method + " " + r.URL.Path)
		w.WriteHeader(code)
		_, _ = io.WriteString(w, text)
	}))
	defer thim.Close()
	a.options = AzureOptions{THIM: thim.URL}
	certificate, err := json.Marshal(map[string]string{"vcekCert": string(vcek), "tcbm": "00"})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		code int
		text string
		ok   bool
	}{
		"the certificate":  {200, string(certificate), true},
		"an error":         {404, "{}", false},
		"nothing":          {200, "", false},
		"no certificate":   {200, `{"vcekCert":"x"}`, false},
		"too much":         {200, `{"vcekCert":"` + strings.Repeat("x", 1<<20) + `"}`, false},
		"a duplicate name": {200, `{"vcekCert":"x",` + string(certificate[1:]), false},
	} {
		answer = func(what string) (int, string) {
			if what != "GET /metadata/THIM/amd/certification" {
				t.Errorf("asked for %s", what)
			}
			return c.code, c.text
		}
		if _, err := a.Evidence(ctx, [48]byte{9}, nil); (err == nil) != c.ok || (!c.ok && cause.Of(err) != cause.EvidenceFailed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	a.options = AzureOptions{}
	if _, err := a.Evidence(ctx, [48]byte{9}, nil); cause.Of(err) != cause.EvidenceFailed || !strings.Contains(err.Error(), "azure.vcek") {
		t.Errorf("nothing configured, and %v", err)
	}
	hcl.asleep = true
	short, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if _, err := a.Evidence(short, [48]byte{10}, nil); cause.Of(err) != cause.EvidenceFailed || !strings.Contains(err.Error(), "user-data") {
		t.Errorf("a report over old user-data gave %v", err)
	}
}

func TestAzureTDXEvidenceIsAccepted(t *testing.T) {
	ctx := context.Background()
	p, _ := azureTPM(t, hclTDX)
	a, err := openAzure(ctx, p, AzureOptions{})
	if err != nil || a == nil || a.TEE() != "az-tdx-vtpm" {
		t.Fatalf("%v, %v", a, err)
	}
	if _, err := a.Evidence(ctx, [48]byte{1}, nil); cause.Of(err) != cause.EvidenceFailed || !strings.Contains(err.Error(), "azure.thim") {
		t.Errorf("nothing configured, and %v", err)
	}
	host := tdxtest.New(t, tdxtest.Config{})
	var asked []byte
	thim := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var q struct{ Report string }
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil || r.Method+r.URL.Path != "POST/acc/tdquote" {
			t.Errorf("%s %s: %v", r.Method, r.URL.Path, err)
		}
		asked, _ = base64.RawURLEncoding.DecodeString(q.Report)
		if len(asked) != tdReportSize {
			t.Errorf("a TDREPORT of %d bytes", len(asked))
			return
		}
		quote := host.Quote(t, tdxtest.Report{ReportData: [64]byte(asked[tdReportData:])})
		_, _ = io.WriteString(w, `{"quote":"`+base64.URLEncoding.EncodeToString(quote)+`"}`)
	}))
	defer thim.Close()
	a.options.THIM = thim.URL
	rd := [48]byte{2}
	raw, err := a.Evidence(ctx, rd, nil)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := kbs.DecodeAzureEvidence("az-tdx-vtpm", raw)
	if err != nil || !bytes.Equal(asked, ev.HCLReport[hclHardware:hclHardware+tdReportSize]) {
		t.Errorf("the host was asked for another report than the evidence has: %v", err)
	}
	v := &appraisal.AzureTDX{TDX: &appraisal.TDX{Roots: host.Roots(), Collateral: host.Source(t)}}
	got, err := v.Appraise(appraisal.Input{Dialect: kbs.DialectKBS, Primary: raw, ReportData: rd, Time: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if err := got.Verdict.Refusal(); err != nil || !strings.HasPrefix(got.Facts.Identity, "az-ak:") {
		t.Errorf("%+v, refused: %v", got.Facts, err)
	}
}

// An index that another owner defined is no HCL report; a broken report is no
// plain vTPM.
func TestWhatIsNoHCLReport(t *testing.T) {
	ctx := context.Background()
	_, p := start(t)
	if a, err := openAzure(ctx, p, AzureOptions{}); a != nil || err != nil {
		t.Errorf("no index gave %v, %v", a, err)
	}
	for name, spoil := range map[string]func(report []byte) []byte{
		"cut off":                  func(r []byte) []byte { return r[:len(r)-1] },
		"a header alone":           func(r []byte) []byte { return r[:hclJSON] },
		"less than a header":       func(r []byte) []byte { return r[:hclJSON-1] },
		"another kind":             func(r []byte) []byte { r[hclWords+8] = 3; return r },
		"a size beyond the end":    func(r []byte) []byte { r[hclWords+19] = 0xff; return r },
		"no JSON":                  func(r []byte) []byte { r[hclJSON] = 'x'; return r },
		"user-data that is no hex": func(r []byte) []byte { return bytes.Replace(r, []byte(`"user-data":"0`), []byte(`"user-data":"x`), 1) },
		"another magic":            func(r []byte) []byte { r[0] = 'h'; return r },
	} {
		p := &paravisor{t: t, kind: hclTDX, ak: &rsa.PublicKey{N: rsaModulus(), E: 65537}}
		if _, err := parseHCL(spoil(p.report(make([]byte, 64)))); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}

func FuzzHCL(f *testing.F) {
	p := &paravisor{kind: hclTDX, ak: &rsa.PublicKey{N: rsaModulus(), E: 65537}}
	f.Add(p.report(make([]byte, 64)))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := parseHCL(data); err == nil && (len(r.hardware) != 1184 || len(r.userData) > userDataSize) {
			t.Errorf("%d bytes of hardware report, %d of user-data", len(r.hardware), len(r.userData))
		}
	})
}
