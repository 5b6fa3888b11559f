package appraisal

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-sev-guest/client"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// snpSession is one attestation under dialect cvm-agent/1 by a made chip.
type snpSession struct {
	verifier *SNP
	chain    *snptest.Chain
	options  snptest.Options
	nonce    string
	key      kbs.TEEPubKey
	add      kbs.AdditionalCVMAgent
	in       Input
}

func newSNPSession(t testing.TB, c snptest.Config) *snpSession {
	t.Helper()
	chain := snptest.New(t, c)
	initdata, err := policy.PackInitdata("sha256", map[string]string{"a": "b"})
	if err != nil {
		t.Fatal(err)
	}
	in, err := policy.ParseInitdata(initdata)
	if err != nil {
		t.Fatal(err)
	}
	return &snpSession{
		verifier: &SNP{Roots: chain.Roots(), Collateral: chain.Collateral(t)}, chain: chain,
		options: snptest.Options{HostData: in.HostData()},
		nonce:   "bm9uY2U=", key: kbs.TEEPubKey{Kty: "EC", Crv: "P-256", Alg: kbs.AlgECDH, X: "x", Y: "y"},
		add: kbs.AdditionalCVMAgent{EventLog: snpLog(t)},
		in:  Input{Dialect: kbs.Dialect, InitData: initdata, Time: time.Now()},
	}
}

// bind computes report_data over what s says now.
func (s *snpSession) bind(t testing.TB) {
	t.Helper()
	var err error
	if s.in.Additional, err = s.add.Encode(); err != nil {
		t.Fatal(err)
	}
	if s.in.ReportData, err = kbs.ReportData(s.in.Additional, s.nonce, s.key); err != nil {
		t.Fatal(err)
	}
}

func (s *snpSession) appraise(t testing.TB) *Appraisal {
	t.Helper()
	s.bind(t)
	s.in.Primary = s.chain.Evidence(t, s.in.ReportData, s.options)
	a, err := s.verifier.Appraise(s.in)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func mustPass(t testing.TB, a *Appraisal) {
	t.Helper()
	if err := a.Verdict.Refusal(); err != nil {
		rows(t, a.Verdict)
		t.Fatal(err)
	}
}

// mustFail requires the named check among those that failed, and a refusal.
func mustFail(t testing.TB, a *Appraisal, check string) {
	t.Helper()
	if a.Verdict.Outcome(check) != Failed || a.Verdict.Refusal() == nil {
		rows(t, a.Verdict)
		t.Errorf("%s: %s", check, a.Verdict.Outcome(check))
	}
}

func TestMadeSNPEvidencePasses(t *testing.T) {
	for name, c := range map[string]struct {
		config  snptest.Config
		options snptest.Options
	}{
		"Milan":                 {},
		"Genoa, version 5":      {snptest.Config{Line: "Genoa"}, snptest.Options{Version: 5}},
		"Turin, version 4":      {snptest.Config{Line: "Turin"}, snptest.Options{Version: 4}},
		"VLEK":                  {snptest.Config{}, snptest.Options{VLEK: true}},
		"VLEK on Turin":         {snptest.Config{Line: "Turin"}, snptest.Options{VLEK: true}},
		"VMPL 3":                {snptest.Config{}, snptest.Options{VMPL: 3}},
		"a chip id that is hid": {snptest.Config{}, snptest.Options{MaskChip: true}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSNPSession(t, c.config)
			c.options.HostData = s.options.HostData
			s.options = c.options
			s.options.ReportID = bytes.Repeat([]byte{7}, 32)
			a := s.appraise(t)
			mustPass(t, a)
			f := a.Facts
			if f.Identity != "snp:"+strings.Repeat("07", 32) || f.SNP == nil || f.Launch == nil || f.Log == nil || f.Log.Register != "report_data" || f.Log.Running.Policy != "shop" {
				t.Fatalf("%+v", f)
			}
			want := snptest.DefaultTCB(s.chain.Config.Line)
			kind := "vcek"
			if c.options.VLEK {
				kind = "vlek"
			}
			if f.SNP.SigningKey != kind || f.SNP.Product != s.chain.Config.Line || !f.SNP.NotRevoked || f.SNP.ReportedTCB != snpTCB(want) || f.SNP.VMPL != c.options.VMPL {
				t.Fatalf("%+v", *f.SNP)
			}
			// The same certificates again, from what is known.
			mustPass(t, s.appraise(t))
			if n := s.verifier.chains.order.Len(); n != 1 {
				t.Fatalf("%d chains known", n)
			}
		})
	}
}

// A made chain is nobody's but in the test that configures it.
func TestMadeChainIsNotAMDs(t *testing.T) {
	s := newSNPSession(t, snptest.Config{})
	s.verifier.Roots = nil
	a := s.appraise(t)
	mustFail(t, a, CheckSNPChain)
	if a.Facts.SNP != nil || a.Facts.Identity != "" || a.Facts.Launch != nil {
		t.Fatalf("facts of a report that nothing proves: %+v", a.Facts)
	}
}

func TestSNPNeedsNoCredential(t *testing.T) {
	c, p, err := (&SNP{}).Challenge(&kbs.CVMAgentAuth{Version: kbs.Dialect}, nil)
	if c != nil || p != nil || err != nil {
		t.Fatal(c, p, err)
	}
}

// Lesson 5: a launch that is bound to nothing is not "unset, go on".
func TestLesson05_ZeroHostData(t *testing.T) {
	s := newSNPSession(t, snptest.Config{})
	s.options.HostData = make([]byte, 32)
	a := s.appraise(t)
	mustFail(t, a, CheckLaunch)
	if a.Facts.Launch != nil {
		t.Fatal("launch facts of an unbound launch")
	}
	s.options.HostData = bytes.Repeat([]byte{1}, 32)
	mustFail(t, s.appraise(t), CheckLaunch)
}

// Lesson 9: evidence whose log is missing is refused.
func TestLesson09_SNPLogMissing(t *testing.T) {
	s := newSNPSession(t, snptest.Config{})
	s.add.EventLog = nil
	mustFail(t, s.appraise(t), CheckEventLog)
	for what, log := range map[string][]byte{
		"cut": snpLog(t)[:len(snpLog(t))-1], "with one byte changed": flipped(snpLog(t), 40), "of something else": []byte("log"),
	} {
		s.add.EventLog = log
		a := s.appraise(t)
		if mustFail(t, a, CheckEventLog); a.Facts.Log != nil {
			t.Errorf("a log %s has facts", what)
		}
	}
}

func flipped(b []byte, i int) []byte {
	b = bytes.Clone(b)
	b[i] ^= 1
	return b
}

// Lesson 11: key, nonce and log are tied to the report by report_data.
func TestLesson11_SNPSwapKeyNonceLog(t *testing.T) {
	for what, swap := range map[string]func(s *snpSession){
		"key":                         func(s *snpSession) { s.key.X = "z" },
		"nonce":                       func(s *snpSession) { s.nonce = "bm9uY2V=" },
		"log":                         func(s *snpSession) { s.add.EventLog = snpLog(t, "another") },
		"no log":                      func(s *snpSession) { s.add.EventLog = nil },
		"something beside":            func(s *snpSession) { s.add.Instance = "x" },
		"a report of another session": func(s *snpSession) { s.in.Primary = s.chain.Evidence(t, [48]byte{1}, s.options) },
	} {
		s := newSNPSession(t, snptest.Config{})
		mustPass(t, s.appraise(t))
		swap(s)
		s.bind(t)
		a, err := s.verifier.Appraise(s.in)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(what, func(t *testing.T) { mustFail(t, a, CheckReportData) })
		if a.Facts.Log != nil {
			t.Errorf("%s: a log that report_data does not cover has facts", what)
		}
	}
	// What follows the 48 bytes is zero or the report is of something else.
	s := newSNPSession(t, snptest.Config{})
	s.options.Change = func(r *kbs.SNPReport) { r.ReportData[63] = 1 }
	mustFail(t, s.appraise(t), CheckReportData)
}

func TestWhatNobodyChecksIsListed(t *testing.T) {
	s := newSNPSession(t, snptest.Config{})
	s.add.Activation, s.add.Instance = []byte{1}, "a.b.c"
	s.bind(t)
	var m map[string]json.RawMessage
	if err := json.Unmarshal([]byte(s.in.Additional), &m); err != nil {
		t.Fatal(err)
	}
	m["nvidia"] = json.RawMessage(`{}`)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	s.in.Additional = string(b)
	if s.in.ReportData, err = kbs.ReportData(s.in.Additional, s.nonce, s.key); err != nil {
		t.Fatal(err)
	}
	var ev kbs.SNPEvidence
	if err := json.Unmarshal(s.chain.Evidence(t, s.in.ReportData, s.options), &ev); err != nil {
		t.Fatal(err)
	}
	ev.CertChain = append(ev.CertChain, kbs.SNPCert{Type: "OTHER:ecae0c0f-9502-43b1-afa2-0ae2e0d565b6", Data: kbs.Bytes{1}})
	if s.in.Primary, err = json.Marshal(ev); err != nil {
		t.Fatal(err)
	}
	a, err := s.verifier.Appraise(s.in)
	if err != nil {
		t.Fatal(err)
	}
	mustPass(t, a)
	for _, name := range []string{"nvidia", "cvm-agent-activation", "cvm-agent-instance", "certificate:ecae0c0f-9502-43b1-afa2-0ae2e0d565b6"} {
		if !slices.Contains(a.Facts.Not, name) {
			t.Errorf("%s is not among %q", name, a.Facts.Not)
		}
	}
}

// The made device speaks go-sev-guest's interfaces.
func TestMadeDevice(t *testing.T) {
	s := newSNPSession(t, snptest.Config{})
	s.bind(t)
	d := &snptest.Device{Chain: s.chain, Options: s.options}
	var rd [64]byte
	copy(rd[:], s.in.ReportData[:])
	raw, certs, err := client.GetRawExtendedReport(d, rd) //nolint:staticcheck // its successor opens the device file itself
	if err != nil || len(certs) == 0 {
		t.Fatal(len(certs), err)
	}
	quote, err := d.GetRawQuote(rd)
	if err != nil || len(quote) != len(raw)+len(certs) {
		t.Fatal(len(quote), err)
	}
	for what, raw := range map[string][]byte{"ioctl": raw, "quote provider": quote[:kbs.SNPReportSize]} {
		a, err := s.verifier.AppraiseRaw(raw, s.chain.Certs(false), s.in)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(what, func(t *testing.T) { mustPass(t, a) })
		if a.Facts.SNP.HostData != hex.EncodeToString(s.options.HostData) {
			t.Error(a.Facts.SNP.HostData)
		}
	}
}

func TestSNPEvidenceThatCannotBeRead(t *testing.T) {
	s := newSNPSession(t, snptest.Config{})
	mustPass(t, s.appraise(t))
	good := string(s.in.Primary)
	for what, primary := range map[string]string{
		"nothing": "", "an array": "[]", "no report": "{}",
		"a report cut short":     strings.Replace(good, `"measurement":[77,`, `"measurement":[`, 1),
		"a byte of 256":          strings.Replace(good, `"measurement":[77,`, `"measurement":[256,`, 1),
		"a byte that is text":    strings.Replace(good, `"measurement":[77,`, `"measurement":["M",`, 1),
		"a duplicate member":     strings.Replace(good, `"vmpl":0`, `"vmpl":0,"vmpl":0`, 1),
		"too many certificates":  strings.Replace(good, `"cert_chain":[`, `"cert_chain":[`+strings.Repeat(`{"cert_type":"VCEK","data":[1]},`, 16), 1),
		"an array of 10^6":       strings.Replace(good, `"measurement":[77,`, `"measurement":[`+strings.Repeat("77,", 1e6), 1),
		"something after":        good + "{}",
		"cut in the middle":      good[:len(good)/2],
		"2 MiB of space":         strings.Repeat(" ", 2<<20) + good,
		"part of the CPU's name": strings.Replace(good, `"cpuid_step":1`, `"cpuid_step":null`, 1),
	} {
		s.in.Primary = json.RawMessage(primary)
		if a, err := s.verifier.Appraise(s.in); err == nil {
			t.Errorf("%s: %+v", what, a.Verdict.Refusal())
		}
	}
	s.in.Primary = json.RawMessage(good)
	s.in.Additional = "{"
	if _, err := s.verifier.Appraise(s.in); err == nil {
		t.Error("additional evidence that is no JSON")
	}
	if tee := (&SNP{}).TEE(); tee != "snp" {
		t.Error(tee)
	}
}
