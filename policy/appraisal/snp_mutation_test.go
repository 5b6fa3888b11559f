package appraisal

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func offline(r recorded, v *SNP, t testing.TB) (*Appraisal, error) {
	t.Helper()
	return v.AppraiseRaw(r.raw, r.certs, Input{Dialect: kbs.DialectKBS, Time: amdTime, Offline: &Offline{}})
}

// Every byte of a recorded report, signed or not, and every bit of the fields
// before REPORT_DATA: changed alone, the report is refused.
func TestEveryByteOfAReportFlipped(t *testing.T) {
	for name, r := range allRecorded(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := lenient()
			a, err := offline(r, v, t)
			if err != nil {
				t.Fatal(err)
			}
			mustPass(t, a)
			step := 1
			if name != "hostdata" {
				step = 5 // of 4 × 1184 signatures, which take a second per thousand
			}
			for i := 0; i < len(r.raw); i += step {
				for bit := range 8 {
					if bit > 0 && (i >= 0x50 || step > 1) {
						break
					}
					m := recorded{bytes.Clone(r.raw), r.certs}
					m.raw[i] ^= 1 << bit
					a, err := offline(m, v, t)
					if err != nil {
						t.Fatalf("byte %#x, bit %d: %v", i, bit, err)
					}
					if a.Verdict.Refusal() == nil || a.Facts.SNP != nil || a.Facts.Identity != "" {
						t.Fatalf("byte %#x, bit %d: accepted, or has facts", i, bit)
					}
				}
			}
		})
	}
}

func TestReportCutAnywhere(t *testing.T) {
	r := v2Report(t)
	v := lenient()
	for n := range r.raw {
		if a, err := offline(recorded{r.raw[:n], r.certs}, v, t); err == nil {
			t.Fatalf("%d bytes: %v", n, a.Verdict.Refusal())
		}
	}
	if _, err := offline(recorded{append(bytes.Clone(r.raw), 0), r.certs}, v, t); err == nil {
		t.Error("a byte too many")
	}
}

// Lesson 10: each member of Trustee's report, changed alone on the wire, is
// refused. The table is as long as the structure.
func TestLesson10_EachSNPFieldMutated(t *testing.T) {
	changes := map[string]func(r *kbs.SNPReport){
		"version":            func(r *kbs.SNPReport) { r.Version++ },
		"guest_svn":          func(r *kbs.SNPReport) { r.GuestSVN++ },
		"policy":             func(r *kbs.SNPReport) { r.Policy ^= 1 << 16 },
		"family_id":          func(r *kbs.SNPReport) { r.FamilyID[15] ^= 1 },
		"image_id":           func(r *kbs.SNPReport) { r.ImageID[0] ^= 1 },
		"vmpl":               func(r *kbs.SNPReport) { r.VMPL ^= 1 },
		"sig_algo":           func(r *kbs.SNPReport) { r.SigAlgo++ },
		"current_tcb":        func(r *kbs.SNPReport) { r.CurrentTCB.Microcode++ },
		"plat_info":          func(r *kbs.SNPReport) { r.PlatInfo ^= 1 },
		"key_info":           func(r *kbs.SNPReport) { r.KeyInfo ^= 1 << 2 },
		"report_data":        func(r *kbs.SNPReport) { r.ReportData[63] ^= 1 },
		"measurement":        func(r *kbs.SNPReport) { r.Measurement[47] ^= 1 },
		"host_data":          func(r *kbs.SNPReport) { r.HostData[31] ^= 1 },
		"id_key_digest":      func(r *kbs.SNPReport) { r.IDKeyDigest[0] ^= 1 },
		"author_key_digest":  func(r *kbs.SNPReport) { r.AuthorKeyDigest[0] ^= 1 },
		"report_id":          func(r *kbs.SNPReport) { r.ReportID[0] ^= 1 },
		"report_id_ma":       func(r *kbs.SNPReport) { r.ReportIDMA[0] ^= 1 },
		"reported_tcb":       func(r *kbs.SNPReport) { r.ReportedTCB.SNP-- },
		"cpuid_fam_id":       func(r *kbs.SNPReport) { *r.CPUIDFamily++ },
		"cpuid_mod_id":       func(r *kbs.SNPReport) { *r.CPUIDModel++ },
		"cpuid_step":         func(r *kbs.SNPReport) { *r.CPUIDStepping++ },
		"chip_id":            func(r *kbs.SNPReport) { r.ChipID[0] ^= 1 },
		"committed_tcb":      func(r *kbs.SNPReport) { r.CommittedTCB.TEE++ },
		"current":            func(r *kbs.SNPReport) { r.Current.Build++ },
		"committed":          func(r *kbs.SNPReport) { r.Committed.Build-- },
		"launch_tcb":         func(r *kbs.SNPReport) { r.LaunchTCB.Bootloader++ },
		"launch_mit_vector":  func(r *kbs.SNPReport) { one := uint64(1); r.LaunchMitVector = &one },
		"current_mit_vector": func(r *kbs.SNPReport) { one := uint64(1); r.CurrentMitVector = &one },
		"signature":          func(r *kbs.SNPReport) { r.Signature.S[0] ^= 1 },
	}
	of := reflect.TypeFor[kbs.SNPReport]()
	for i := range of.NumField() {
		name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
		change, ok := changes[name]
		if !ok {
			t.Errorf("%s is not in the table", name)
			continue
		}
		ev, err := kbs.DecodeSNPEvidence(read(t, "trustee-snp-evidence.json"))
		if err != nil {
			t.Fatal(err)
		}
		change(&ev.Report)
		primary, err := json.Marshal(ev)
		if err != nil {
			t.Fatal(err)
		}
		a, err := lenient().Appraise(Input{Dialect: kbs.DialectKBS, Time: amdTime, Primary: primary, Offline: &Offline{}})
		if err != nil || a.Verdict.Refusal() == nil || a.Facts.SNP != nil {
			t.Errorf("%s changed: accepted, or has facts (%v)", name, err)
		}
	}
	if len(changes) != of.NumField() {
		t.Errorf("%d changes for %d members", len(changes), of.NumField())
	}
}

// Lesson 10: each expected value wrong alone, in a report that is genuinely
// signed, is refused by the check that is about it.
func TestLesson10_EachSNPExpectationAlone(t *testing.T) {
	change := func(f func(r *kbs.SNPReport)) snptest.Options { return snptest.Options{Change: f} }
	for what, c := range map[string]struct {
		check   string
		options snptest.Options
	}{
		"version 2 on the wire":        {CheckSNPVersion, snptest.Options{Version: 2}},
		"version 6":                    {CheckSNPVersion, snptest.Options{Version: 6}},
		"version 0xffffffff":           {CheckSNPVersion, snptest.Options{Version: 0xffffffff}},
		"another algorithm":            {CheckSNPAlgorithm, change(func(r *kbs.SNPReport) { r.SigAlgo = 2 })},
		"no algorithm":                 {CheckSNPAlgorithm, change(func(r *kbs.SNPReport) { r.SigAlgo = 0 })},
		"debug":                        {CheckSNPDebug, snptest.Options{Policy: 0x30000 | 1<<19}},
		"migration agent":              {CheckSNPMigration, snptest.Options{Policy: 0x30000 | 1<<18}},
		"a migration agent is there":   {CheckSNPMigration, change(func(r *kbs.SNPReport) { r.ReportIDMA = make(kbs.Bytes, 32) })},
		"bit 17 of the policy clear":   {CheckSNPPolicyForm, snptest.Options{Policy: 0x10000}},
		"bit 26 of the policy":         {CheckSNPPolicyForm, snptest.Options{Policy: 0x30000 | 1<<26}},
		"bit 63 of the policy":         {CheckSNPPolicyForm, snptest.Options{Policy: 0x30000 | 1<<63}},
		"author key without its flag":  {CheckSNPAuthorKey, change(func(r *kbs.SNPReport) { r.AuthorKeyDigest[0], r.IDKeyDigest[0] = 1, 1 })},
		"the flag without author key":  {CheckSNPAuthorKey, change(func(r *kbs.SNPReport) { r.KeyInfo |= 1 })},
		"author key without ID key":    {CheckSNPAuthorKey, change(func(r *kbs.SNPReport) { r.KeyInfo |= 1; r.AuthorKeyDigest[0] = 1 })},
		"VMPL 4":                       {CheckSNPVMPL, snptest.Options{VMPL: 4}},
		"a report the host asked for":  {CheckSNPVMPL, snptest.Options{VMPL: 0xffffffff}},
		"committed above current":      {CheckSNPTCBOrder, change(func(r *kbs.SNPReport) { r.CommittedTCB.SNP++ })},
		"reported above current":       {CheckSNPTCBOrder, change(func(r *kbs.SNPReport) { r.CurrentTCB.Microcode-- })},
		"firmware rolled back":         {CheckSNPTCBOrder, change(func(r *kbs.SNPReport) { r.Current.Minor-- })},
		"reported TCB of another cert": {CheckSNPCertTCB, change(func(r *kbs.SNPReport) { r.ReportedTCB.SNP-- })},
		"another chip":                 {CheckSNPChip, change(func(r *kbs.SNPReport) { r.ChipID[63] ^= 1 })},
		"CPU of Genoa":                 {CheckSNPChain, change(func(r *kbs.SNPReport) { *r.CPUIDModel = 0x11 })},
		"CPU of no product":            {CheckSNPProduct, change(func(r *kbs.SNPReport) { *r.CPUIDFamily = 0x17 })},
		"CPU model of no product":      {CheckSNPProduct, change(func(r *kbs.SNPReport) { *r.CPUIDModel = 0x50 })},
		"key_info says VLEK":           {CheckSNPSigningKey, change(func(r *kbs.SNPReport) { r.KeyInfo = 1 << 2 })},
		"key_info says none":           {CheckSNPSigningKey, change(func(r *kbs.SNPReport) { r.KeyInfo = 7 << 2 })},
		"key_info says key 3":          {CheckSNPReserved, change(func(r *kbs.SNPReport) { r.KeyInfo = 3 << 2 })},
		"the chip's key is masked":     {CheckSNPSigningKey, change(func(r *kbs.SNPReport) { r.KeyInfo |= 2 })},
		"bit 5 of key_info":            {CheckSNPReserved, change(func(r *kbs.SNPReport) { r.KeyInfo |= 1 << 5 })},
		"bit 31 of key_info":           {CheckSNPReserved, change(func(r *kbs.SNPReport) { r.KeyInfo |= 1 << 31 })},
		"bit 6 of plat_info":           {CheckSNPReserved, change(func(r *kbs.SNPReport) { r.PlatInfo |= 1 << 6 })},
		"bit 63 of plat_info":          {CheckSNPReserved, change(func(r *kbs.SNPReport) { r.PlatInfo |= 1 << 63 })},
		"mitigations before version 5": {CheckSNPReserved, change(func(r *kbs.SNPReport) { one := uint64(1); r.LaunchMitVector = &one })},
	} {
		t.Run(what, func(t *testing.T) {
			s := newSNPSession(t, snptest.Config{})
			c.options.HostData = s.options.HostData
			s.options = c.options
			s.bind(t)
			// Not by way of SNPEvidence's JSON form alone: a version that it cannot
			// carry is still to be judged.
			var padded [64]byte
			copy(padded[:], s.in.ReportData[:])
			r := s.chain.SNPReport(padded, s.options)
			raw, err := r.Raw()
			if err != nil {
				t.Fatal(err)
			}
			if err := s.chain.Sign(raw); err != nil {
				t.Fatal(err)
			}
			r.Signature.R, r.Signature.S = raw[0x2a0:0x2a0+72], raw[0x2a0+72:0x2a0+144]
			if s.in.Primary, err = json.Marshal(kbs.SNPEvidence{Report: *r, CertChain: s.chain.Certs(false)}); err != nil {
				t.Fatal(err)
			}
			a, err := s.verifier.Appraise(s.in)
			if err != nil {
				t.Fatal(err)
			}
			mustFail(t, a, c.check)
			// Nothing else is wrong with it.
			for _, name := range []string{CheckSNPSignature, CheckReportData} {
				if name != c.check && a.Verdict.Outcome(name) == Failed && c.check != CheckSNPAlgorithm && c.check != CheckSNPPolicyForm {
					t.Errorf("%s failed as well", name)
				}
			}
		})
	}
}

// Reserved bytes of a genuinely signed raw report are refused wherever they lie.
func TestReservedBytesOfASignedReport(t *testing.T) {
	c := snptest.New(t, snptest.Config{})
	v := &SNP{Roots: c.Roots(), Collateral: c.Collateral(t)}
	for version, ranges := range map[uint32][][2]int{
		2: {{0x4c, 0x50}, {0x188, 0x1a0}, {0x1eb, 0x1ec}, {0x1ef, 0x1f0}, {0x1f8, 0x2a0}, {0x3a, 0x3e}, {0x182, 0x186}, {0x1e2, 0x1e6}, {0x1f2, 0x1f6}},
		3: {{0x4c, 0x50}, {0x18b, 0x1a0}, {0x1f8, 0x2a0}},
		4: {{0x18b, 0x1a0}, {0x1f8, 0x2a0}},
		5: {{0x18b, 0x1a0}, {0x208, 0x2a0}},
	} {
		good := c.Report(t, [64]byte{}, snptest.Options{Version: version})
		in := Input{Dialect: kbs.DialectKBS, Time: c.Config.Created.AddDate(1, 0, 0), Offline: &Offline{}}
		a, err := v.AppraiseRaw(good, c.Certs(false), in)
		if err != nil {
			t.Fatal(err)
		}
		mustPass(t, a)
		for _, r := range ranges {
			for _, i := range []int{r[0], (r[0] + r[1]) / 2, r[1] - 1} {
				raw := bytes.Clone(good)
				raw[i] = 0x80
				if err := c.Sign(raw); err != nil {
					t.Fatal(err)
				}
				a, err := v.AppraiseRaw(raw, c.Certs(false), in)
				if err != nil {
					t.Fatal(err)
				}
				if a.Verdict.Outcome(CheckSNPReserved) != Failed {
					t.Errorf("version %d, byte %#x: %v", version, i, a.Verdict.Refusal())
				}
			}
		}
		for _, i := range []int{0x2a0 + 144, kbs.SNPReportSize - 1} { // after the signature, unsigned
			raw := bytes.Clone(good)
			raw[i] = 1
			if a, err := v.AppraiseRaw(raw, c.Certs(false), in); err != nil || a.Verdict.Outcome(CheckSNPReserved) != Failed {
				t.Errorf("version %d, byte %#x: %v", version, i, err)
			}
		}
	}
	raw := c.Report(t, [64]byte{}, snptest.Options{})
	binary.LittleEndian.PutUint32(raw, 1)
	if a, err := v.AppraiseRaw(raw, c.Certs(false), Input{Offline: &Offline{}}); err != nil || a.Verdict.Outcome(CheckSNPVersion) != Failed {
		t.Errorf("version 1: %v", err)
	}
}
