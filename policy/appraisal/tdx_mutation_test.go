package appraisal

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tdx-guest/abi"
	tdxpb "github.com/google/go-tdx-guest/proto/tdx"
	"github.com/google/go-tdx-guest/verify"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// field is a part of a version 4 quote. An empty check says that the quote is
// not even read.
type field struct {
	name     string
	from, to int
	check    string
}

func tdxFields(q *tdxQuote) []field {
	const sig = tdxHeaderSize + tdxBodySize + 4
	const qe = sig + 128 + 6
	const auth = qe + 384 + 64
	pem := auth + 2 + len(q.qeAuth) + 6
	fields := []field{
		{"version", 0, 2, CheckTDXVersion},
		{"attestation key type", 2, 4, CheckTDXHeader},
		{"TEE type", 4, 8, CheckTDXHeader},
		{"QE SVN", 8, 10, CheckTDXSignature},
		{"PCE SVN", 10, 12, CheckTDXSignature},
		{"QE vendor", 12, 28, CheckTDXHeader},
		{"user data", 28, 48, CheckTDXSignature},
		{"size of the signature data", 632, 636, ""},
		{"signature", sig, sig + 64, CheckTDXSignature},
		{"attestation key", sig + 64, sig + 128, CheckTDXSignature},
		{"certification data type", sig + 128, sig + 130, ""},
		{"certification data size", sig + 130, sig + 134, ""},
		{"QE signature", qe + 384, qe + 448, CheckTDXQESignature},
		{"QE authentication data size", auth, auth + 2, ""},
		{"QE authentication data", auth + 2, pem - 6, CheckTDXQEData},
		{"PCK chain type", pem - 6, pem - 4, ""},
		{"PCK chain size", pem - 4, pem, ""},
		{"PCK chain, the leaf's body", pem + 200, pem + 201, CheckTDXChain},
	}
	for _, f := range []field{
		{"TEE_TCB_SVN", 0, 16, ""}, {"MRSEAM", 16, 64, ""}, {"MRSIGNERSEAM", 64, 112, ""}, {"SEAMATTRIBUTES", 112, 120, ""},
		{"TDATTRIBUTES", 120, 128, ""}, {"XFAM", 128, 136, ""}, {"MRTD", 136, 184, ""}, {"MRCONFIGID", 184, 232, ""},
		{"MROWNER", 232, 280, ""}, {"MROWNERCONFIG", 280, 328, ""}, {"RTMR0", 328, 376, ""}, {"RTMR1", 376, 424, ""},
		{"RTMR2", 424, 472, ""}, {"RTMR3", 472, 520, ""}, {"REPORTDATA", 520, 584, ""},
	} {
		fields = append(fields, field{f.name, 48 + f.from, 48 + f.to, CheckTDXSignature})
	}
	for _, f := range []field{
		{"CPUSVN", 0, 16, ""}, {"MISCSELECT", 16, 20, ""}, {"reserved 1", 20, 48, ""}, {"ATTRIBUTES", 48, 64, ""}, {"MRENCLAVE", 64, 96, ""},
		{"reserved 2", 96, 128, ""}, {"MRSIGNER", 128, 160, ""}, {"reserved 3", 160, 256, ""}, {"ISVPRODID", 256, 258, ""},
		{"ISVSVN", 258, 260, ""}, {"reserved 4", 260, 320, ""}, {"REPORTDATA", 320, 384, ""},
	} {
		fields = append(fields, field{"QE " + f.name, qe + f.from, qe + f.to, CheckTDXQESignature})
	}
	return fields
}

// Lesson 10: every field of header, TD report and QE parts, changed at its
// first and last byte, is refused by the check that is about it, for a made
// quote and for a real one. go-tdx-guest is asked too.
func TestLesson10_EachTDXFieldMutated(t *testing.T) {
	made := newTDX(t, tdxtest.Config{}).sign(t)
	for name, c := range map[string]struct {
		v     *TDX
		quote []byte
		in    Input
	}{
		"made": {made.verifier, made.quote, made.in},
		"real": {&TDX{}, testFile(t, "tdx-quote-v4.bin"), Input{Dialect: kbs.DialectKBS, Time: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), Offline: &Offline{}}},
	} {
		q, err := parseTDXQuote(c.quote)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range tdxFields(q) {
			for _, at := range []int{f.from, f.to - 1} {
				t.Run(fmt.Sprintf("%s quote, %s, byte %d", name, f.name, at-f.from), func(t *testing.T) {
					changed := slices.Clone(c.quote)
					changed[at] ^= 0x10
					a, err := c.v.AppraiseRaw(changed, nil, c.in)
					switch {
					case f.check == "" && err == nil:
						t.Fatalf("it is read: %v", a.Verdict.Refusal())
					case f.check != "" && err != nil:
						t.Fatalf("expected %s to fail, found the error %v", f.check, err)
					case f.check != "":
						refused(t, a, f.check)
						if a.Facts.TDX != nil || a.Facts.Identity != "" {
							t.Errorf("facts of a quote that nobody vouches for: %+v", a.Facts)
						}
					}
				})
			}
		}
	}
}

// Where the fields are is read by the library in its own way: both find the
// same values, each of its own, so none is at another's offset.
func TestLesson10_TDXOffsets(t *testing.T) {
	c := newTDX(t, tdxtest.Config{})
	c.report.MRConfigID, c.report.RTMR[3] = fill(7), fill(8)
	c.sign(t)
	for name, raw := range map[string][]byte{"made": c.quote, "real": testFile(t, "tdx-quote-v4.bin")} {
		parsed, err := abi.QuoteToProto(raw)
		if err != nil {
			t.Fatal(err)
		}
		q, err := parseTDXQuote(raw)
		if err != nil {
			t.Fatal(err)
		}
		b, f := parsed.(*tdxpb.QuoteV4).GetTdQuoteBody(), q.facts()
		for what, v := range map[string]struct {
			got  string
			want []byte
		}{
			"MRTD": {f.MRTD, b.MrTd}, "MRCONFIGID": {f.MRConfigID, b.MrConfigId}, "MROWNER": {f.MROwner, b.MrOwner}, "MROWNERCONFIG": {f.MROwnerConfig, b.MrOwnerConfig},
			"MRSEAM": {f.MRSEAM, b.MrSeam}, "RTMR0": {f.RTMRs[0], b.Rtmrs[0]}, "RTMR1": {f.RTMRs[1], b.Rtmrs[1]}, "RTMR2": {f.RTMRs[2], b.Rtmrs[2]}, "RTMR3": {f.RTMRs[3], b.Rtmrs[3]},
			"TDATTRIBUTES": {f.TDAttributes, b.TdAttributes}, "XFAM": {f.XFAM, b.Xfam}, "TEE_TCB_SVN": {f.TEETCBSVN, b.TeeTcbSvn},
			"REPORTDATA": {hex.EncodeToString(q.reportData()), b.ReportData}, "MRSIGNERSEAM": {hex.EncodeToString(q.mrSignerSEAM()), b.MrSignerSeam}, "SEAMATTRIBUTES": {hex.EncodeToString(q.seamAttributes()), b.SeamAttributes},
		} {
			if v.got != hex.EncodeToString(v.want) {
				t.Errorf("%s quote: %s is %s, the library reads %x", name, what, v.got, v.want)
			}
		}
	}
}

// Every byte that a signature covers, and the signatures themselves.
func TestTDXEveryByteFlipped(t *testing.T) {
	c := newTDX(t, tdxtest.Config{})
	for _, version := range []uint16{4, 5} {
		c.report.Version = version
		c.sign(t)
		q, err := parseTDXQuote(c.quote)
		if err != nil {
			t.Fatal(err)
		}
		for i := range len(c.quote) - len(q.chain) {
			changed := slices.Clone(c.quote)
			changed[i] ^= 1
			a, err := c.verifier.AppraiseRaw(changed, nil, c.in)
			if err == nil && a.Verdict.Refusal() == nil {
				t.Errorf("version %d, byte %d changed: accepted", version, i)
			}
		}
	}
}

// Versions 4 and 5 are cut off at every length; nothing panics, nothing passes.
func TestTDXTruncated(t *testing.T) {
	c := newTDX(t, tdxtest.Config{})
	for _, version := range []uint16{4, 5} {
		c.report.Version = version
		c.sign(t)
		for n := range len(c.quote) {
			if a, err := c.verifier.AppraiseRaw(c.quote[:n], nil, c.in); err == nil {
				t.Fatalf("version %d cut to %d bytes is read: %v", version, n, a.Verdict.Refusal())
			}
		}
		// Inner lengths that lie, the outer one made to fit.
		for n := range len(c.quote) - 640 {
			cut := slices.Clone(c.quote[:len(c.quote)-n-1])
			at := 632
			if version == 5 {
				at = 48 + 6 + 648
			}
			if len(cut) < at+4 {
				break
			}
			binary.LittleEndian.PutUint32(cut[at:], uint32(len(cut)-at-4))
			if a, err := c.verifier.AppraiseRaw(cut, nil, c.in); err == nil && a.Verdict.Refusal() == nil {
				t.Fatalf("version %d with signature data of %d bytes is accepted", version, len(cut)-at-4)
			}
		}
	}
	// The bytes that the library, given them first, would not survive.
	short := slices.Clone(c.platform.Quote(t, tdxtest.Report{}))
	binary.LittleEndian.PutUint32(short[632:], 0)
	if _, err := c.verifier.AppraiseRaw(short, nil, c.in); err == nil {
		t.Error("a quote without signature data is read")
	}
}

func TestTDXWrongVersions(t *testing.T) {
	c := newTDX(t, tdxtest.Config{}).sign(t)
	for _, version := range []uint16{0, 1, 2, 3, 6, 0x0400, 0xffff} {
		changed := slices.Clone(c.quote)
		binary.LittleEndian.PutUint16(changed, version)
		a, err := c.verifier.AppraiseRaw(changed, nil, c.in)
		if err != nil {
			t.Fatal(err)
		}
		refused(t, a, CheckTDXVersion)
	}
	c.report.Version = 5
	c.sign(t)
	for what, change := range map[string]func([]byte){
		"an SGX enclave's body": func(b []byte) { b[48] = 1 },
		"an unknown body type":  func(b []byte) { b[48] = 4 },
		"another body size":     func(b []byte) { b[50]++ },
	} {
		changed := slices.Clone(c.quote)
		change(changed)
		a, err := c.verifier.AppraiseRaw(changed, nil, c.in)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		refused(t, a, CheckTDXVersion)
	}
}

// Signed by a genuine platform, and still refused.
func TestTDXSignedButWrong(t *testing.T) {
	c := newTDX(t, tdxtest.Config{})
	other := tdxtest.New(t, tdxtest.Config{})
	body := func(at int, b ...byte) func(*tdxtest.Parts) { return func(p *tdxtest.Parts) { copy(p.Body[at:], b) } }
	for what, r := range map[string]struct {
		check  string
		change func(*tdxtest.Parts)
	}{
		"debug":                          {CheckTDXDebug, body(120, 1)},
		"another bit of the TUD group":   {CheckTDXDebug, body(120, 0x10)},
		"migratable":                     {CheckTDXMigratable, body(123, 0x30)},
		"reserved attribute bit 8":       {CheckTDXAttributes, body(121, 1)},
		"reserved attribute bit 24":      {CheckTDXAttributes, body(123, 0x11)},
		"reserved attribute bit 32":      {CheckTDXAttributes, body(124, 1)},
		"XFAM without SSE":               {CheckTDXXFAM, body(128, 0xe5)},
		"XFAM with a reserved bit":       {CheckTDXXFAM, body(128, 0xf7)},
		"XFAM with a high bit":           {CheckTDXXFAM, body(135, 0x80)},
		"another signer of the module":   {CheckTDXModule, body(64, 1)},
		"SEAM attributes":                {CheckTDXModule, body(112, 1)},
		"no module":                      {CheckTDXModule, body(16, make([]byte, 48)...)},
		"TEE type of SGX":                {CheckTDXHeader, func(p *tdxtest.Parts) { p.Header[4] = 0 }},
		"key type 3":                     {CheckTDXHeader, func(p *tdxtest.Parts) { p.Header[2] = 3 }},
		"another QE vendor":              {CheckTDXHeader, func(p *tdxtest.Parts) { p.Header[12]++ }},
		"another attestation key":        {CheckTDXQEData, func(p *tdxtest.Parts) { p.KeepQEData = true }},
		"a QE report by another machine": {CheckTDXQESignature, func(p *tdxtest.Parts) { p.PCK = tdxtest.NewKey(t) }},
		"the chain of another root":      {CheckTDXChain, func(p *tdxtest.Parts) { p.Chain = other.Chain }},
		"no chain":                       {CheckTDXChain, func(p *tdxtest.Parts) { p.Chain = nil }},
		"a chain without its root":       {CheckTDXChain, func(p *tdxtest.Parts) { p.Chain = p.Chain[:bytes.LastIndex(p.Chain, []byte("-----BEGIN"))] }},
		"module svn below its levels":    {CheckTDXTCBLevel, body(0, 1)},
		"module version unknown":         {CheckTDXTCBLevel, body(1, 9)},
		"TEE svn below all levels":       {CheckTDXTCBLevel, body(5, 1)},
		"QE of another signer":           {CheckTDXQEIdentity, func(p *tdxtest.Parts) { p.QEReport[128]++ }},
		"QE of another product":          {CheckTDXQEIdentity, func(p *tdxtest.Parts) { p.QEReport[256]++ }},
		"QE svn below its levels":        {CheckTDXQEIdentity, func(p *tdxtest.Parts) { p.QEReport[258] = 0 }},
		"QE in debug mode":               {CheckTDXQEIdentity, func(p *tdxtest.Parts) { p.QEReport[48] |= 2 }},
		"QE with MISCSELECT":             {CheckTDXQEIdentity, func(p *tdxtest.Parts) { p.QEReport[16] = 1 }},
	} {
		t.Run(what, func(t *testing.T) { refused(t, c.sign(t, r.change).appraise(t), r.check) })
	}
	c.report.Version, c.report.MRServiceTD = 5, fill(9)
	refused(t, c.sign(t).appraise(t), CheckTDXMigratable)
}

// What the library refuses is refused here, on every byte of a quote.
func TestTDXAgreesWithTheLibrary(t *testing.T) {
	c := newTDX(t, tdxtest.Config{}).sign(t)
	q, _ := parseTDXQuote(c.quote)
	own := []string{CheckTDXHeader, CheckTDXChain, CheckTDXSignature, CheckTDXQESignature, CheckTDXQEData}
	for i := 0; i < len(c.quote)-len(q.chain); i += 3 {
		changed := slices.Clone(c.quote)
		changed[i] ^= 0x80
		a, err := c.verifier.AppraiseRaw(changed, nil, c.in)
		if err != nil || a.Verdict.Outcome(CheckTDXVersion) == Failed {
			continue
		}
		quote, err := abi.QuoteToProto(changed)
		if err == nil {
			now := c.in.Time
			err = verify.TdxQuote(quote, &verify.Options{TrustedRoots: c.platform.Roots(), Now: &verify.TimeSet{PckCertChain: now}})
		}
		failed := slices.ContainsFunc(own, func(n string) bool { return a.Verdict.Outcome(n) == Failed })
		if err != nil && !failed {
			t.Errorf("byte %d: the library says %v, our own checks passed", i, err)
		}
	}
}

// The library's word alone refuses: it knows one intermediate, we know two.
func TestTDXLibraryAloneRefuses(t *testing.T) {
	c := newTDX(t, tdxtest.Config{Certificate: func(name string, cert *x509.Certificate) {
		if name == "ca" {
			cert.Subject.CommonName = cnProcessor
		}
	}}).sign(t)
	a := c.appraise(t)
	refused(t, a, CheckTDXLibrary)
	for _, name := range []string{CheckTDXChain, CheckTDXSignature, CheckTDXQESignature, CheckTDXQEData} {
		if a.Verdict.Outcome(name) != Passed {
			t.Errorf("%s: %s", name, a.Verdict.Outcome(name))
		}
	}
	if a.Facts.TDX != nil || a.Facts.Identity != "" {
		t.Errorf("%+v", a.Facts)
	}
}

// Version 5, which the library does not read: our own rows alone keep the facts
// of a quote that nobody vouches for from being facts.
func TestTDXVersion5FactsNeedEachRow(t *testing.T) {
	c := newTDX(t, tdxtest.Config{})
	c.report.Version = 5
	for check, change := range map[string]func(*tdxtest.Parts){
		CheckTDXHeader:      func(p *tdxtest.Parts) { p.Header[4] = 0 },
		CheckTDXQEData:      func(p *tdxtest.Parts) { p.KeepQEData = true },
		CheckTDXQESignature: func(p *tdxtest.Parts) { p.PCK = tdxtest.NewKey(t) },
		CheckTDXChain:       func(p *tdxtest.Parts) { p.Chain = nil },
	} {
		a := c.sign(t, change).appraise(t)
		refused(t, a, check)
		if a.Facts.TDX != nil || a.Facts.Identity != "" {
			t.Errorf("%s failed, and yet: %+v", check, a.Facts)
		}
	}
	c.sign(t)
	for _, at := range []int{54, 54 + 136, 54 + 584, 54 + 647} { // TD report: first byte, MRTD, TEE_TCB_SVN_2, last byte
		changed := slices.Clone(c.quote)
		changed[at] ^= 1
		a, err := c.verifier.AppraiseRaw(changed, nil, c.in)
		if err != nil {
			t.Fatal(err)
		}
		refused(t, a, CheckTDXSignature)
		if a.Facts.TDX != nil {
			t.Errorf("byte %d changed: %+v", at, a.Facts.TDX)
		}
	}
}
