package broker_test

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/image-build/measurecmd"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/broker"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

// measured is the document with a launch of the image that `cvmctl measure pcr`
// adds to it, and that launch.
func measured(t *testing.T, into *release.Reference, argv ...string) (*release.Reference, release.Launch) {
	t.Helper()
	text, err := into.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "reference.yaml") // JSON is YAML
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	c := measurecmd.Command()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetArgs(append([]string{"pcr", "--uki", "../../image-build/measure/testdata/uki.efi", "--format", "reference-values", "--label", "measured", "--into", path}, argv...))
	if err := c.Execute(); err != nil {
		t.Fatal(err)
	}
	d, err := release.DecodeReferenceYAML(out.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range d.Launch {
		if l.Label == "measured" {
			return d, l
		}
	}
	t.Fatalf("no launch in\n%s", out.String())
	return nil, release.Launch{}
}

// The document that `cvmctl measure pcr --into` prints for an Azure platform,
// signed and given to a broker, releases to a guest that booted the image behind
// that paravisor, and to none that differs in one register or in the paravisor.
func TestMeasuredDocumentReleasesOnAzure(t *testing.T) {
	signer := dssetest.New(t, "ecdsa")
	p := &platforms{snp: snptest.New(t, snptest.Config{}), tdx: tdxtest.New(t, tdxtest.Config{})}
	snp := &appraisal.SNP{Roots: p.snp.Roots(), Collateral: p.snp.Collateral(t)}
	tdx := &appraisal.TDX{Roots: p.tdx.Roots(), Collateral: p.tdx.Source(t)}
	p.world = newWorldOf(t, time.Now, &broker.RuleSigners{Keys: []crypto.PublicKey{signer.PublicKey()}, Threshold: 1}, &appraisal.AzureSNP{SNP: snp}, &appraisal.AzureTDX{TDX: tdx})
	if err := p.admin.PutResource(t.Context(), "kbs:///"+keyPath, []byte(keyText)); err != nil {
		t.Fatal(err)
	}
	paravisor := tdxtest.Report{MRTD: [48]byte{1}, RTMR: [4][48]byte{{2}, {3}, {4}}}
	guest := func(t *testing.T, tee string, pcrs map[int][32]byte, r tdxtest.Report) *guest {
		t.Helper()
		g := p.open(t, tee, "P-256")
		evidence := p.tdx.AzureEvidence
		if tee == "az-snp-vtpm" {
			evidence = func(t testing.TB, rd [48]byte, r tdxtest.Report, o snptest.AzureOptions, _ ...func(*tdxtest.Parts)) json.RawMessage {
				o.Report.Measurement = r.MRTD[:]
				return p.snp.AzureEvidence(t, rd, o)
			}
		}
		if a := g.attest(t, g.request("", string(evidence(t, g.reportData(""), r, snptest.AzureOptions{PCRs: pcrs})), "")); a.status != 200 {
			t.Fatalf("attest: %d %s", a.status, a.body)
		}
		return g
	}
	version := uint64(1)
	for _, tee := range []string{"az-snp-vtpm", "az-tdx-vtpm"} {
		t.Run(tee, func(t *testing.T) {
			// The paravisor's values are those of a guest that one trusts.
			f := guest(t, tee, nil, paravisor).facts(t, tee)
			base := &release.Reference{APIVersion: release.ReferenceAPIVersion, Name: "rules", Version: version, Launch: []release.Launch{observed(f)},
				Resources: []release.Resource{{Resource: []string{"kbs:///" + keyPath}, Platforms: []string{tee}, AnyPolicy: true}}}
			// A launch of another image: there is always one that the command adds to.
			other := strings.Repeat("e", 64)
			base.Launch[0].PCRs = map[string]string{"2": other, "4": other, "9": other, "11": other, "12": release.ZeroPCR, "13": release.ZeroPCR}
			argv := []string{"--platform", tee}
			if s := f.SNP; s != nil {
				argv = append(argv, "--paravisor", s.Measurement)
				b := s.ReportedTCB
				base.TCB = release.TCB{SNP: &release.SNPTCB{Minimum: map[string]release.SNPMinimum{s.Product: {Bootloader: &b.Bootloader, TEE: &b.TEE, SNP: &b.SNP, Microcode: &b.Microcode}}}}
			} else {
				argv = append(argv, "--paravisor", strings.ToUpper(f.TDX.MRTD))
				for i := range 3 {
					argv = append(argv, "--paravisor-rtmr"+strconv.Itoa(i), f.TDX.RTMRs[i])
				}
			}
			document, launch := measured(t, base, argv...)
			version = document.Version + 1
			envelope, err := release.SignReference(document, signer)
			if err == nil {
				err = p.admin.PutReference(t.Context(), "rules", envelope)
			}
			if err != nil {
				t.Fatal(err)
			}
			pcrs := map[int][32]byte{}
			for i, v := range launch.PCRs {
				n, _ := strconv.Atoi(i)
				b, err := hex.DecodeString(v)
				if err != nil {
					t.Fatal(err)
				}
				pcrs[n] = [32]byte(b)
			}
			g := guest(t, tee, pcrs, paravisor)
			if a := g.get(t, keyPath); a.status != 200 || string(g.key.decrypt(t, a.body)) != keyText {
				t.Fatalf("the image that was measured: %d %s", a.status, a.body)
			}
			refused := func(row string, pcrs map[int][32]byte, r tdxtest.Report) {
				t.Helper()
				if a := guest(t, tee, pcrs, r).get(t, keyPath); a.status != 401 || !strings.Contains(a.body, "PolicyDeny") || !strings.Contains(a.body, row+":") {
					t.Errorf("%s: %d %s", row, a.status, a.body)
				}
			}
			for _, i := range []int{2, 4, 9, 11, 12, 13} {
				moved := maps.Clone(pcrs)
				moved[i] = [32]byte{0xff}
				refused(fmt.Sprintf("pcr-%d", i), moved, paravisor)
			}
			r := paravisor
			r.MRTD[1] ^= 1
			if f.SNP != nil {
				refused(appraisal.CheckSNPMeasured, pcrs, r)
				return
			}
			refused(appraisal.CheckMRTD, pcrs, r)
			for i := range 3 {
				r := paravisor
				r.RTMR[i][1] ^= 1
				refused(fmt.Sprintf("rtmr-%d", i), pcrs, r)
			}
		})
	}
}
