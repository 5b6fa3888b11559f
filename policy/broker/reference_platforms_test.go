package broker_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

// booted are the PCRs of a guest that booted an image.
var booted = map[int][32]byte{2: {2}, 4: {4}, 9: {9}, 11: {11}}

// bootedEvidence is the evidence of a guest that booted an image on a platform.
func (p *platforms) bootedEvidence(t *testing.T, tee string, rd [48]byte) string {
	t.Helper()
	var field [64]byte
	copy(field[:], rd[:])
	report := tdxtest.Report{ReportData: field, MRTD: [48]byte{1}, RTMR: [4][48]byte{{2}, {3}, {4}}}
	switch tee {
	case "az-snp-vtpm":
		return string(p.snp.AzureEvidence(t, rd, snptest.AzureOptions{PCRs: booted}))
	case "az-tdx-vtpm":
		return string(p.tdx.AzureEvidence(t, rd, report, snptest.AzureOptions{PCRs: booted}))
	case "tpm":
		if bytes.Equal(p.tpm.Read(4), make([]byte, 32)) {
			for i, v := range booted {
				p.tpm.Extend(i, v[:])
			}
		}
		e := p.tpm.Evidence(rd, 0, 2, 4, 8, 9, 11, 12, 13)
		pcrs, err := json.Marshal(e.Quote.PCRs)
		if err != nil {
			t.Fatal(err)
		}
		b64 := base64.StdEncoding.EncodeToString
		return `{"tpm_quote":{"signature":"` + b64(e.Quote.Signature) + `","message":"` + b64(e.Quote.Message) + `","pcrs":` + string(pcrs) + `},"ak_public":"` + b64(e.AKPublic) + `"}`
	}
	return p.evidence(t, tee, rd, false)
}

// facts are what the broker's own token says that it proved.
func (g *guest) facts(t *testing.T, tee string) (f appraisal.Facts) {
	t.Helper()
	jws, err := jose.ParseSigned(g.token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := jws.Verify(g.w.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	var claims struct {
		Submods map[string]struct {
			Annotated map[string]json.RawMessage `json:"ear.veraison.annotated-evidence"`
		}
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(claims.Submods["cpu0"].Annotated[tee], &f); err != nil {
		t.Fatal(err)
	}
	return f
}

// observed is the launch that facts show, as an operator would write it down.
func observed(f appraisal.Facts) release.Launch {
	l := release.Launch{Label: "guest-1", Platform: f.TEE}
	if s := f.SNP; s != nil {
		l.SNP = &release.SNPLaunch{Measurement: s.Measurement}
	}
	if d := f.TDX; d != nil {
		l.TDX = &release.TDXLaunch{MRTD: d.MRTD, RTMR0: d.RTMRs[0], RTMR1: d.RTMRs[1], RTMR2: d.RTMRs[2], MRSEAM: d.MRSEAM}
	}
	if len(f.PCRs) > 0 {
		l.PCRs = map[string]string{}
		for _, i := range []int{2, 4, 9, 11, 12, 13} {
			l.PCRs[fmt.Sprint(i)] = f.PCRs[i]
		}
	}
	return l
}

// A signed reference document, compiled and judged on the facts that the real
// verifiers prove of every platform: released by what was observed, refused by
// each part of it changed alone, with the row named.
func TestReferenceDocumentOnEveryPlatform(t *testing.T) {
	signer := dssetest.New(t, "ecdsa")
	p := &platforms{snp: snptest.New(t, snptest.Config{}), tdx: tdxtest.New(t, tdxtest.Config{}), tpm: tpmtest.Start(t, tpmtest.NewCA(t), tpmtest.RSA)}
	snp := &appraisal.SNP{Roots: p.snp.Roots(), Collateral: p.snp.Collateral(t)}
	tdx := &appraisal.TDX{Roots: p.tdx.Roots(), Collateral: p.tdx.Source(t)}
	p.world = newWorldOf(t, time.Now, &broker.RuleSigners{Keys: []crypto.PublicKey{signer.PublicKey()}, Threshold: 1},
		snp, &appraisal.AzureSNP{SNP: snp}, tdx, &appraisal.AzureTDX{TDX: tdx}, &appraisal.TPM{TrustedAKs: []string{hexSHA256(p.tpm.AKSPKI)}})
	if err := p.admin.PutResource(t.Context(), "kbs:///"+keyPath, []byte(keyText)); err != nil {
		t.Fatal(err)
	}
	version := uint64(0)
	put := func(launch release.Launch, tcb release.TCB) {
		t.Helper()
		version++
		envelope, err := release.SignReference(&release.Reference{
			APIVersion: release.ReferenceAPIVersion, Name: "rules", Version: version, Launch: []release.Launch{launch}, TCB: tcb,
			Resources: []release.Resource{{Resource: []string{"kbs:///" + keyPath}, Platforms: []string{launch.Platform}, AnyPolicy: true}},
		}, signer)
		if err == nil {
			err = p.admin.PutReference(t.Context(), "rules", envelope)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	other := func(v string) string {
		return strings.Map(func(r rune) rune { return map[bool]rune{true: '2', false: '1'}[r == '1'] }, v)
	}
	for _, tee := range release.Platforms {
		t.Run(tee, func(t *testing.T) {
			g := p.open(t, tee, "P-256")
			if a := g.attest(t, g.request("", p.bootedEvidence(t, tee, g.reportData("")), "")); a.status != 200 {
				t.Fatalf("attest: %d %s", a.status, a.body)
			}
			f := g.facts(t, tee)
			tcb := func(more uint8) release.TCB {
				if f.SNP == nil {
					return release.TCB{}
				}
				r := f.SNP.ReportedTCB
				r.Microcode += more
				return release.TCB{SNP: &release.SNPTCB{RequireRevocation: true, Minimum: map[string]release.SNPMinimum{
					f.SNP.Product: {Bootloader: &r.Bootloader, TEE: &r.TEE, SNP: &r.SNP, Microcode: &r.Microcode}}}}
			}
			put(observed(f), tcb(0))
			if a := g.get(t, keyPath); a.status != 200 || string(g.key.decrypt(t, a.body)) != keyText {
				t.Fatalf("by what was observed: %d %s", a.status, a.body)
			}
			refused := func(row string, l release.Launch, tcb release.TCB) {
				t.Helper()
				put(l, tcb)
				if a := g.get(t, keyPath); a.status != 401 || !strings.Contains(a.body, "PolicyDeny") || !strings.Contains(a.body, row+":") {
					t.Errorf("%s: %d %s", row, a.status, a.body)
				}
			}
			if f.SNP != nil {
				l := observed(f)
				l.SNP.Measurement = other(l.SNP.Measurement)
				refused(appraisal.CheckSNPMeasured, l, tcb(0))
				refused("tcb-microcode", observed(f), tcb(1))
			}
			if f.TDX != nil {
				for row, change := range map[string]func(d *release.TDXLaunch){
					appraisal.CheckMRTD: func(d *release.TDXLaunch) { d.MRTD = other(d.MRTD) }, appraisal.CheckMRSEAM: func(d *release.TDXLaunch) { d.MRSEAM = other(d.MRSEAM) },
					"rtmr-0": func(d *release.TDXLaunch) { d.RTMR0 = other(d.RTMR0) }, "rtmr-1": func(d *release.TDXLaunch) { d.RTMR1 = other(d.RTMR1) }, "rtmr-2": func(d *release.TDXLaunch) { d.RTMR2 = other(d.RTMR2) },
				} {
					l := observed(f)
					change(l.TDX)
					refused(row, l, tcb(0))
				}
				refused(appraisal.CheckTCBDate, observed(f), release.TCB{TDX: &release.TDXTCB{MinimumTCBDate: "2090-01-01T00:00:00Z"}})
			}
			for _, i := range []string{"2", "4", "9", "11"} {
				l := observed(f)
				if l.PCRs == nil {
					break
				}
				l.PCRs = maps.Clone(l.PCRs)
				l.PCRs[i] = other(l.PCRs[i])
				refused("pcr-"+i, l, tcb(0))
			}
		})
	}
}

func hexSHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
