package appraisal

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	tdxtesting "github.com/google/go-tdx-guest/testing"
	"github.com/google/go-tdx-guest/testing/testdata"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func testFile(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// tdxCase is a TD on a made platform, asked by a session of ours.
type tdxCase struct {
	platform *tdxtest.Platform
	verifier *TDX
	report   tdxtest.Report
	add      kbs.AdditionalCVMAgent
	ccel     []byte
	nonce    string
	key      kbs.TEEPubKey
	in       Input
	quote    []byte
}

func newTDX(t testing.TB, c tdxtest.Config, without ...string) *tdxCase {
	t.Helper()
	p := tdxtest.New(t, c)
	now := c.Now
	if now.IsZero() {
		now = time.Now()
	}
	return &tdxCase{
		platform: p,
		verifier: &TDX{Roots: p.Roots(), Collateral: p.Source(t, without...)},
		report:   tdxtest.Report{MRTD: fill(1), MROwner: fill(2), MROwnerConfig: fill(3), RTMR: [4][48]byte{fill(4), fill(5), fill(6)}},
		nonce:    "bm9uY2U=",
		key:      kbs.TEEPubKey{Kty: "EC", Crv: "P-256", Alg: "ECDH-ES+A256KW", X: "x", Y: "y"},
		in:       Input{Dialect: kbs.DialectKBS, Time: now},
	}
}

func fill(b byte) (out [48]byte) {
	copy(out[:], bytes.Repeat([]byte{b}, 48))
	return out
}

// ours makes it a session of dialect cvm-agent/1 with the log and an instance
// key.
func (c *tdxCase) ours(t testing.TB, log []byte) *tdxCase {
	t.Helper()
	c.in.Dialect, c.in.Nonce = kbs.Dialect, c.nonce
	c.add = kbs.AdditionalCVMAgent{EventLog: log, Instance: tdxtest.InstanceJWS(t, tdxtest.NewKey(t), c.nonce)}
	return c
}

// sign makes the quote over what c says now.
func (c *tdxCase) sign(t testing.TB, changes ...func(*tdxtest.Parts)) *tdxCase {
	t.Helper()
	c.bind(t)
	copy(c.report.ReportData[:], c.in.ReportData[:])
	c.quote = c.platform.Quote(t, c.report, changes...)
	return c
}

// bind computes what a verifier expects, without making a quote over it.
func (c *tdxCase) bind(t testing.TB) {
	t.Helper()
	var err error
	if c.in.Dialect == kbs.Dialect {
		if c.in.Additional, err = c.add.Encode(); err != nil {
			t.Fatal(err)
		}
	}
	if c.in.ReportData, err = kbs.ReportData(c.in.Additional, c.nonce, c.key); err != nil {
		t.Fatal(err)
	}
}

func (c *tdxCase) appraise(t testing.TB) *Appraisal {
	t.Helper()
	primary, err := json.Marshal(kbs.TDXEvidence{EventLog: c.ccel, Quote: c.quote})
	if err != nil {
		t.Fatal(err)
	}
	c.in.Primary = primary
	a, err := c.verifier.Appraise(c.in)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func accepted(t testing.TB, a *Appraisal) {
	t.Helper()
	if err := a.Verdict.Refusal(); err != nil {
		t.Fatalf("refused: %v", err)
	}
}

// refused wants a refusal with each named check failed.
func refused(t testing.TB, a *Appraisal, checks ...string) {
	t.Helper()
	err := a.Verdict.Refusal()
	if err == nil {
		t.Fatalf("accepted, expected %v to fail: %+v", checks, a.Verdict.Checks)
	}
	for _, name := range checks {
		if a.Verdict.Outcome(name) != Failed || !strings.Contains(err.Error(), name) {
			t.Errorf("%s did not fail: %v", name, err)
		}
	}
}

func TestGenuineTDXQuotePasses(t *testing.T) {
	for name, version := range map[string]uint16{"version 4": 4, "version 5": 5} {
		t.Run(name, func(t *testing.T) {
			c := newTDX(t, tdxtest.Config{})
			c.report.Version = version
			a := c.sign(t).appraise(t)
			accepted(t, a)
			f := a.Facts.TDX
			if f == nil || f.QuoteVersion != version || f.MRTD != strings.Repeat("01", 48) || f.MRConfigID != strings.Repeat("00", 48) ||
				f.MROwner != strings.Repeat("02", 48) || f.MROwnerConfig != strings.Repeat("03", 48) ||
				!slices.Equal(f.RTMRs, []string{strings.Repeat("04", 48), strings.Repeat("05", 48), strings.Repeat("06", 48), strings.Repeat("00", 48)}) ||
				f.TDAttributes != "0000001000000000" || f.XFAM != "e742060000000000" || f.TEETCBSVN[:6] != "060105" || len(f.MRSEAM) != 96 ||
				f.TCBStatus != "UpToDate" || f.QEStatus != "UpToDate" || f.TCBDate != "2026-03-01T00:00:00Z" || f.FMSPC != tdxtest.FMSPC || !f.NotRevoked {
				t.Fatalf("%+v", f)
			}
			if !strings.HasPrefix(a.Facts.Identity, "tdx-launch:") || len(a.Facts.Identity) != len("tdx-launch:")+64 {
				t.Fatalf("identity %q", a.Facts.Identity)
			}
			// A second look, out of memory, says the same.
			accepted(t, c.appraise(t))
		})
	}
}

// The real quote: Intel's chain vouches for it, yet it is of a debug TD and its
// collateral is not to be had, or of another time.
func TestVectorTDXQuote(t *testing.T) {
	v := &TDX{}
	at := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	a, err := v.AppraiseRaw(testFile(t, "tdx-quote-v4.bin"), nil, Input{Dialect: kbs.DialectKBS, Time: at, Offline: &Offline{}})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{CheckTDXVersion, CheckTDXHeader, CheckTDXChain, CheckTDXSignature, CheckTDXQESignature, CheckTDXQEData, CheckTDXLibrary, CheckTDXMigratable, CheckTDXAttributes, CheckTDXXFAM, CheckTDXModule} {
		if a.Verdict.Outcome(name) != Passed {
			t.Errorf("%s: %v", name, a.Verdict.Refusal())
		}
	}
	refused(t, a, CheckTDXDebug, CheckTDXRevocation, CheckTDXTCBInfo, CheckTDXQEIdentity)
	if a.Facts.TDX == nil || a.Facts.TDX.MRTD[:16] != "705ee9381b8633a9" || a.Facts.TDX.TCBStatus != "" || a.Facts.TDX.NotRevoked {
		t.Errorf("%+v", a.Facts.TDX)
	}
	if a.Verdict.Outcome(CheckReportData) != NotChecked {
		t.Error("report data was compared with nothing")
	}
}

// go-tdx-guest's sample: a quote of a production machine with Intel's own
// collateral of its time.
func sampleSource(t testing.TB) *collateral.Source {
	t.Helper()
	s := &collateral.Source{Dir: t.TempDir()}
	for address, r := range tdxtesting.TestGetter.Responses {
		if err := s.Put(address, collateral.Piece{Header: r.Header, Body: r.Body}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func TestSampleOfGoTDXGuest(t *testing.T) {
	v := &TDX{Collateral: sampleSource(t)}
	in := Input{Dialect: kbs.DialectKBS, Time: time.Date(2023, 7, 1, 1, 0, 0, 0, time.UTC), Offline: &Offline{}}
	const length = 4935
	if a, err := v.AppraiseRaw(testdata.RawQuote, nil, in); err == nil {
		t.Fatalf("a quote with other bytes after its end is read: %v", a.Verdict)
	}
	a, err := v.AppraiseRaw(append(slices.Clone(testdata.RawQuote[:length]), 0, 0, 0), nil, in)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range a.Verdict.Checks {
		if slices.Contains(a.Verdict.Required, c.Name) != (c.Outcome == Passed) && c.Name != CheckTDXTCBLevel && c.Name != CheckTDXTCBStatus {
			t.Errorf("%+v", c)
		}
	}
	// The TCB info that comes with the sample asks for more than its machine
	// has; the library's own tests say the same.
	refused(t, a, CheckTDXTCBLevel)
	f := a.Facts.TDX
	if f == nil || f.FMSPC != "50806f000000" || f.QEStatus != "UpToDate" || !f.NotRevoked || f.TCBStatus != "" {
		t.Fatalf("%+v", f)
	}

	// A day after the last of it, and before any of it, it is worth nothing.
	for what, c := range map[string]struct {
		at     time.Time
		checks []string
	}{
		"lists and identity ended": {time.Date(2023, 7, 9, 0, 0, 0, 0, time.UTC), []string{CheckTDXRevocation, CheckTDXQEIdentity}},
		"all but the chain ended":  {time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), []string{CheckTDXRevocation, CheckTDXTCBInfo, CheckTDXQEIdentity}},
		"the chain ended":          {time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC), []string{CheckTDXChain, CheckTDXLibrary}},
		"before the chain":         {time.Date(2018, 1, 1, 0, 0, 0, 0, time.UTC), []string{CheckTDXChain, CheckTDXLibrary}},
		"before the lists":         {time.Date(2023, 6, 1, 0, 0, 0, 0, time.UTC), []string{CheckTDXRevocation, CheckTDXTCBInfo, CheckTDXQEIdentity}},
	} {
		for _, v := range []*TDX{v, {Collateral: sampleSource(t)}} { // with and without a memory
			in.Time = c.at
			a, err := v.AppraiseRaw(testdata.RawQuote[:length], nil, in)
			if err != nil {
				t.Fatal(err)
			}
			t.Run(what, func(t *testing.T) { refused(t, a, c.checks...) })
		}
	}
}

func TestTDXNeedsATime(t *testing.T) {
	c := newTDX(t, tdxtest.Config{}).sign(t)
	c.in.Time = time.Time{}
	if _, err := c.verifier.AppraiseRaw(c.quote, nil, c.in); err == nil {
		t.Fatal("without a time the clock of this machine was used")
	}
}

// The root that a verifier without roots trusts is Intel's, by the fingerprint
// that Intel publishes.
func TestIntelRoot(t *testing.T) {
	block, rest := pem.Decode(intelRootPEM)
	if block == nil || len(rest) > 0 {
		t.Fatal("not one PEM certificate")
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(block.Bytes)); got != "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3" {
		t.Fatalf("fingerprint %s", got)
	}
	c := newTDX(t, tdxtest.Config{}).sign(t)
	c.verifier = &TDX{Collateral: c.verifier.Collateral}
	refused(t, c.appraise(t), CheckTDXChain, CheckTDXLibrary)
}
