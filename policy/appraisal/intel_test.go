package appraisal

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tdx-guest/pcs"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
)

func revoke(list string, serial int64) func(string, *x509.RevocationList) {
	return func(name string, l *x509.RevocationList) {
		if name == list {
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(serial), RevocationTime: l.ThisUpdate})
		}
	}
}

// Lesson 38: what a vendor revoked is refused.
func TestLesson38_TDXRevoked(t *testing.T) {
	for what, r := range map[string]struct {
		config tdxtest.Config
		checks []string
	}{
		"the PCK certificate":      {tdxtest.Config{List: revoke("pck", tdxtest.SerialPCK)}, []string{CheckTDXRevocation}},
		"the intermediate CA":      {tdxtest.Config{List: revoke("root", tdxtest.SerialCA)}, []string{CheckTDXRevocation}},
		"the signer of collateral": {tdxtest.Config{List: revoke("root", tdxtest.SerialSigner)}, []string{CheckTDXTCBInfo, CheckTDXQEIdentity}},
		"the TCB level": {tdxtest.Config{TCBInfo: func(m map[string]any) {
			m["tcbLevels"].([]any)[0].(map[string]any)["tcbStatus"] = "Revoked"
		}}, []string{CheckTDXTCBStatus}},
		"the TDX module's level": {tdxtest.Config{TCBInfo: func(m map[string]any) { moduleLevel(m)["tcbStatus"] = "Revoked" }}, []string{CheckTDXTCBStatus}},
		"the QE's level": {tdxtest.Config{QEIdentity: func(m map[string]any) {
			m["tcbLevels"].([]any)[0].(map[string]any)["tcbStatus"] = "Revoked"
		}}, []string{CheckTDXTCBStatus}},
	} {
		t.Run(what, func(t *testing.T) {
			c := newTDX(t, r.config).sign(t)
			refused(t, c.appraise(t), r.checks...)
			// Not even where collateral may be missing.
			c.verifier.Collateral.Policy = collateral.Policy{Revocation: collateral.IfPresent, TCBInfo: collateral.IfPresent}
			refused(t, c.appraise(t), r.checks...)
		})
	}
	c := newTDX(t, tdxtest.Config{List: revoke("pck", tdxtest.SerialPCK+1)}).sign(t)
	accepted(t, c.appraise(t))
}

func moduleLevel(info map[string]any) map[string]any {
	return info["tdxModuleIdentities"].([]any)[0].(map[string]any)["tcbLevels"].([]any)[0].(map[string]any)
}

// Missing collateral follows the policy: refused, or listed as not checked and
// no fact.
func TestLesson38_TDXCollateralMissing(t *testing.T) {
	for what, r := range map[string]struct {
		without []string
		policy  collateral.Policy
		failed  []string // none: accepted
		skipped []string
	}{
		"PCK list, required":  {[]string{tdxtest.PCKCRL}, collateral.Policy{}, []string{CheckTDXRevocation}, nil},
		"root list, required": {[]string{tdxtest.RootCRL}, collateral.Policy{Revocation: collateral.Require}, []string{CheckTDXRevocation}, nil},
		"both lists, if present": {[]string{tdxtest.PCKCRL, tdxtest.RootCRL}, collateral.Policy{Revocation: collateral.IfPresent},
			nil, []string{CheckTDXRevocation}},
		"PCK list, if present":      {[]string{tdxtest.PCKCRL}, collateral.Policy{Revocation: collateral.IfPresent}, nil, nil},
		"TCB info, required":        {[]string{tdxtest.TCBInfo}, collateral.Policy{Revocation: collateral.IfPresent}, []string{CheckTDXTCBInfo}, nil},
		"QE identity, required":     {[]string{tdxtest.QEIdentity}, collateral.Policy{}, []string{CheckTDXQEIdentity}, nil},
		"TCB info, if present":      {[]string{tdxtest.TCBInfo}, collateral.Policy{TCBInfo: collateral.IfPresent}, nil, []string{CheckTDXTCBInfo, CheckTDXTCBStatus}},
		"QE identity, if present":   {[]string{tdxtest.QEIdentity}, collateral.Policy{TCBInfo: collateral.IfPresent}, nil, []string{CheckTDXQEIdentity, CheckTDXTCBStatus}},
		"all of it, if present":     {[]string{tdxtest.TCBInfo, tdxtest.QEIdentity, tdxtest.PCKCRL, tdxtest.RootCRL}, collateral.Policy{Revocation: collateral.IfPresent, TCBInfo: collateral.IfPresent}, nil, []string{CheckTDXRevocation, CheckTDXTCBInfo, CheckTDXQEIdentity, CheckTDXTCBStatus}},
		"all of it, required":       {[]string{tdxtest.TCBInfo, tdxtest.QEIdentity, tdxtest.PCKCRL, tdxtest.RootCRL}, collateral.Policy{}, []string{CheckTDXRevocation, CheckTDXTCBInfo, CheckTDXQEIdentity}, nil},
		"nothing missing, required": {nil, collateral.Policy{}, nil, nil},
	} {
		t.Run(what, func(t *testing.T) {
			c := newTDX(t, tdxtest.Config{}, r.without...).sign(t)
			c.verifier.Collateral.Policy = r.policy
			a := c.appraise(t)
			if r.failed != nil {
				refused(t, a, r.failed...)
			} else {
				accepted(t, a)
			}
			for _, name := range r.skipped {
				if a.Verdict.Outcome(name) != NotChecked || !slices.ContainsFunc(a.Verdict.Checks, func(c Check) bool { return c.Name == name && c.Outcome == NotChecked }) {
					t.Errorf("%s is not listed as not checked", name)
				}
			}
			lists := !slices.Contains(r.without, tdxtest.PCKCRL) && !slices.Contains(r.without, tdxtest.RootCRL)
			status := !slices.Contains(r.without, tdxtest.TCBInfo) && !slices.Contains(r.without, tdxtest.QEIdentity)
			if f := a.Facts.TDX; f.NotRevoked != lists || (f.TCBStatus != "") != status {
				t.Errorf("not revoked %t, status %q", f.NotRevoked, f.TCBStatus)
			}
		})
	}
	c := newTDX(t, tdxtest.Config{}).sign(t)
	c.verifier = &TDX{Roots: c.platform.Roots()}
	refused(t, c.appraise(t), CheckTDXRevocation, CheckTDXTCBInfo, CheckTDXQEIdentity)
}

// Collateral that is there and wrong is refused, whatever may be missing.
func TestTDXCollateralWrong(t *testing.T) {
	now := time.Now()
	past := func(l *x509.RevocationList) { l.NextUpdate = now.Add(-time.Minute) }
	future := func(l *x509.RevocationList) { l.ThisUpdate = now.Add(time.Minute) }
	list := func(want string, change func(*x509.RevocationList)) tdxtest.Config {
		return tdxtest.Config{List: func(name string, l *x509.RevocationList) {
			if name == want {
				change(l)
			}
		}}
	}
	set := func(name string, value any) func(map[string]any) { return func(m map[string]any) { m[name] = value } }
	info := func(name string, value any) tdxtest.Config { return tdxtest.Config{TCBInfo: set(name, value)} }
	identity := func(name string, value any) tdxtest.Config { return tdxtest.Config{QEIdentity: set(name, value)} }
	cert := func(want string, change func(*x509.Certificate)) tdxtest.Config {
		return tdxtest.Config{Certificate: func(name string, c *x509.Certificate) {
			if name == want {
				change(c)
			}
		}}
	}
	ended := func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }
	notYet := func(c *x509.Certificate) { c.NotBefore = now.Add(time.Hour) }
	for what, r := range map[string]struct {
		config tdxtest.Config
		check  string
	}{
		"PCK list ended":               {list("pck", past), CheckTDXRevocation},
		"PCK list of tomorrow":         {list("pck", future), CheckTDXRevocation},
		"root list ended":              {list("root", past), CheckTDXRevocation},
		"root list of tomorrow":        {list("root", future), CheckTDXRevocation},
		"TCB info ended":               {info("nextUpdate", now.Add(-time.Minute).UTC().Format(time.RFC3339)), CheckTDXTCBInfo},
		"TCB info of tomorrow":         {info("issueDate", now.Add(time.Hour).UTC().Format(time.RFC3339)), CheckTDXTCBInfo},
		"TCB info of another platform": {info("fmspc", "00806f000000"), CheckTDXTCBInfo},
		"TCB info of another PCE":      {info("pceId", "0001"), CheckTDXTCBInfo},
		"TCB info for SGX":             {info("id", "SGX"), CheckTDXTCBInfo},
		"TCB info version 2":           {info("version", 2), CheckTDXTCBInfo},
		"TCB info without levels":      {info("tcbLevels", []any{}), CheckTDXTCBLevel},
		"TCB info without modules":     {info("tdxModuleIdentities", []any{}), CheckTDXTCBLevel},
		"an unknown status":            {tdxtest.Config{TCBInfo: func(m map[string]any) { moduleLevel(m)["tcbStatus"] = "Fine" }}, CheckTDXTCBInfo},
		"a module by another signer": {tdxtest.Config{TCBInfo: func(m map[string]any) {
			m["tdxModuleIdentities"].([]any)[0].(map[string]any)["mrsigner"] = strings.Repeat("01", 48)
		}}, CheckTDXTCBLevel},
		"QE identity ended":               {identity("nextUpdate", now.Add(-time.Minute).UTC().Format(time.RFC3339)), CheckTDXQEIdentity},
		"QE identity of tomorrow":         {identity("issueDate", now.Add(time.Hour).UTC().Format(time.RFC3339)), CheckTDXQEIdentity},
		"QE identity of the SGX QE":       {identity("id", "QE"), CheckTDXQEIdentity},
		"QE identity version 1":           {identity("version", 1), CheckTDXQEIdentity},
		"QE identity without levels":      {identity("tcbLevels", []any{}), CheckTDXQEIdentity},
		"QE identity with a short mask":   {identity("attributesMask", "FB"), CheckTDXQEIdentity},
		"QE identity of another signer":   {identity("mrsigner", strings.Repeat("ab", 32)), CheckTDXQEIdentity},
		"PCK certificate ended":           {cert("pck", ended), CheckTDXChain},
		"PCK certificate not yet valid":   {cert("pck", notYet), CheckTDXChain},
		"CA ended":                        {cert("ca", ended), CheckTDXChain},
		"CA not yet valid":                {cert("ca", notYet), CheckTDXChain},
		"root ended":                      {cert("root", ended), CheckTDXChain},
		"root not yet valid":              {cert("root", notYet), CheckTDXChain},
		"signer ended":                    {cert("signer", ended), CheckTDXTCBInfo},
		"signer not yet valid":            {cert("signer", notYet), CheckTDXQEIdentity},
		"a signer that is no TCB signer":  {cert("signer", func(c *x509.Certificate) { c.Subject.CommonName = cnPCK }), CheckTDXTCBInfo},
		"a PCK certificate by its name":   {cert("pck", func(c *x509.Certificate) { c.Subject.CommonName = cnTCBSigning }), CheckTDXChain},
		"a PCK certificate that is a CA":  {cert("pck", func(c *x509.Certificate) { c.IsCA = true }), CheckTDXChain},
		"an intermediate by another name": {cert("ca", func(c *x509.Certificate) { c.Subject.CommonName = "Intel" }), CheckTDXChain},
		"a PCK certificate without TCB":   {cert("pck", func(c *x509.Certificate) { c.ExtraExtensions = nil }), CheckTDXChain},
	} {
		t.Run(what, func(t *testing.T) {
			c := newTDX(t, r.config).sign(t)
			c.verifier.Collateral.Policy = collateral.Policy{Revocation: collateral.IfPresent, TCBInfo: collateral.IfPresent}
			refused(t, c.appraise(t), r.check)
		})
	}
}

// Pieces of another platform, or changed on the way, are refused.
func TestTDXCollateralForged(t *testing.T) {
	c := newTDX(t, tdxtest.Config{}).sign(t)
	other := tdxtest.New(t, tdxtest.Config{}).Pieces()
	good := c.platform.Pieces()
	// A second member with the name that is signed: the library would merge it
	// into what it has verified.
	twice := good[tdxtest.TCBInfo]
	twice.Body = append([]byte(`{"tcbInfo":{"tdxModuleIdentities":[]},`), twice.Body[1:]...)
	spelled := good[tdxtest.TCBInfo]
	spelled.Body = append([]byte(`{"TcbInfo":{"tcbLevels":[]},`), spelled.Body[1:]...)
	bare := good[tdxtest.TCBInfo]
	bare.Header = nil
	unsigned := good[tdxtest.QEIdentity]
	unsigned.Body = bytes.Replace(unsigned.Body, []byte(`"signature"`), []byte(`"signed"`), 1)
	changed := good[tdxtest.QEIdentity]
	changed.Body = bytes.Replace(changed.Body, []byte(`"isvsvn":4`), []byte(`"isvsvn":3`), 1)
	spaced := good[tdxtest.QEIdentity]
	spaced.Body = bytes.Replace(spaced.Body, []byte(`"version":2`), []byte(`"version": 2`), 1)
	flipped := good[tdxtest.PCKCRL]
	flipped.Body = slices.Clone(flipped.Body)
	flipped.Body[len(flipped.Body)-1] ^= 1

	for what, r := range map[string]struct {
		address string
		piece   collateral.Piece
		check   string
	}{
		"TCB info by another signer":        {tdxtest.TCBInfo, other[tdxtest.TCBInfo], CheckTDXTCBInfo},
		"TCB info twice":                    {tdxtest.TCBInfo, twice, CheckTDXTCBInfo},
		"TCB info without a chain":          {tdxtest.TCBInfo, bare, CheckTDXTCBInfo},
		"QE identity in place of TCB info":  {tdxtest.TCBInfo, collateral.Piece{Header: good[tdxtest.TCBInfo].Header, Body: good[tdxtest.QEIdentity].Body}, CheckTDXTCBInfo},
		"QE identity without a signature":   {tdxtest.QEIdentity, unsigned, CheckTDXQEIdentity},
		"QE identity with a number changed": {tdxtest.QEIdentity, changed, CheckTDXQEIdentity},
		"QE identity with a space":          {tdxtest.QEIdentity, spaced, CheckTDXQEIdentity},
		"QE identity that is no JSON":       {tdxtest.QEIdentity, collateral.Piece{Header: good[tdxtest.QEIdentity].Header, Body: []byte("{")}, CheckTDXQEIdentity},
		"PCK list with a bit changed":       {tdxtest.PCKCRL, flipped, CheckTDXRevocation},
		"PCK list of another CA":            {tdxtest.PCKCRL, other[tdxtest.PCKCRL], CheckTDXRevocation},
		"root list in place of the PCK's":   {tdxtest.PCKCRL, good[tdxtest.RootCRL], CheckTDXRevocation},
		"PCK list in place of the root's":   {tdxtest.RootCRL, good[tdxtest.PCKCRL], CheckTDXRevocation},
		"a list that is no list":            {tdxtest.RootCRL, collateral.Piece{Body: []byte("x")}, CheckTDXRevocation},
	} {
		t.Run(what, func(t *testing.T) {
			s := c.platform.Source(t, r.address)
			if err := s.Put(r.address, r.piece); err != nil {
				t.Fatal(err)
			}
			s.Policy = collateral.Policy{Revocation: collateral.IfPresent, TCBInfo: collateral.IfPresent}
			c.verifier = &TDX{Roots: c.platform.Roots(), Collateral: s}
			refused(t, c.appraise(t), r.check)
		})
	}
	// A member that only looks like it changes nothing.
	s := c.platform.Source(t, tdxtest.TCBInfo)
	if err := s.Put(tdxtest.TCBInfo, spelled); err != nil {
		t.Fatal(err)
	}
	c.verifier = &TDX{Roots: c.platform.Roots(), Collateral: s}
	accepted(t, c.appraise(t))
}

// A status is a fact for rules; the worst of platform, module and QE counts.
func TestTDXStatusIsTheWorst(t *testing.T) {
	for what, r := range map[string]struct {
		platform, module, qe string
		want                 string
	}{
		"all up to date":               {"UpToDate", "UpToDate", "UpToDate", "UpToDate"},
		"old platform, new module":     {"OutOfDate", "UpToDate", "UpToDate", "OutOfDate"},
		"old module, new platform":     {"UpToDate", "OutOfDate", "UpToDate", "OutOfDate"},
		"old QE":                       {"UpToDate", "UpToDate", "OutOfDate", "OutOfDate"},
		"hardening":                    {"SWHardeningNeeded", "UpToDate", "UpToDate", "SWHardeningNeeded"},
		"configuration":                {"ConfigurationNeeded", "UpToDate", "UpToDate", "ConfigurationNeeded"},
		"both":                         {"ConfigurationAndSWHardeningNeeded", "UpToDate", "UpToDate", "ConfigurationAndSWHardeningNeeded"},
		"configuration and old module": {"ConfigurationNeeded", "OutOfDate", "UpToDate", "OutOfDateConfigurationNeeded"},
		"old and configuration":        {"OutOfDateConfigurationNeeded", "UpToDate", "UpToDate", "OutOfDateConfigurationNeeded"},
		"hardening and old QE":         {"SWHardeningNeeded", "UpToDate", "OutOfDate", "OutOfDate"},
	} {
		t.Run(what, func(t *testing.T) {
			first := func(m map[string]any) map[string]any { return m["tcbLevels"].([]any)[0].(map[string]any) }
			c := newTDX(t, tdxtest.Config{
				TCBInfo: func(m map[string]any) {
					first(m)["tcbStatus"], first(m)["advisoryIDs"] = r.platform, []string{"INTEL-SA-2", "INTEL-SA-1"}
					moduleLevel(m)["tcbStatus"], moduleLevel(m)["advisoryIDs"] = r.module, []string{"INTEL-SA-1"}
				},
				// A QE changes seldom: its date says nothing of the platform.
				QEIdentity: func(m map[string]any) { first(m)["tcbStatus"], first(m)["tcbDate"] = r.qe, "2023-01-01T00:00:00Z" },
			}).sign(t)
			a := c.appraise(t)
			accepted(t, a)
			if a.Facts.TDX.TCBDate != "2026-03-01T00:00:00Z" {
				t.Errorf("date %s", a.Facts.TDX.TCBDate)
			}
			if f := a.Facts.TDX; f.TCBStatus != r.want || f.QEStatus != r.qe || !slices.Equal(f.Advisories, []string{"INTEL-SA-1", "INTEL-SA-2"}) {
				t.Errorf("%q, QE %q, %v", f.TCBStatus, f.QEStatus, f.Advisories)
			}
		})
	}
	// The second level is reached by a platform that misses the first in one part.
	raise := func(m map[string]any) {
		m["tcbLevels"].([]any)[0].(map[string]any)["tcb"].(map[string]any)["sgxtcbcomponents"].([]any)[15] = map[string]any{"svn": 6}
	}
	a := newTDX(t, tdxtest.Config{TCBInfo: raise}).sign(t).appraise(t)
	accepted(t, a)
	if a.Facts.TDX.TCBStatus != "OutOfDate" || !slices.Equal(a.Facts.TDX.Advisories, []string{"INTEL-SA-00001"}) {
		t.Fatalf("%+v", a.Facts.TDX)
	}
	old := func(m map[string]any) { moduleLevel(m)["tcbDate"] = "2025-01-01T00:00:00Z" }
	if f := newTDX(t, tdxtest.Config{TCBInfo: old}).sign(t).appraise(t).Facts.TDX; f.TCBDate != "2025-01-01T00:00:00Z" {
		t.Errorf("date %s, the module's is earlier than the platform's", f.TCBDate)
	}
	if got := mergeStatus([]pcs.TcbLevel{{TcbStatus: "UpToDate"}, {TcbStatus: "something new"}}); got != "Revoked" {
		t.Errorf("an unknown status is %q", got)
	}
}

// A level is reached in every part or not at all, and a module of version 0 is
// judged by the TCB info's own components and signer.
func TestTDXLevelParts(t *testing.T) {
	first := func(m map[string]any) map[string]any {
		return m["tcbLevels"].([]any)[0].(map[string]any)["tcb"].(map[string]any)
	}
	component := func(m map[string]any, kind string, i, svn int) {
		first(m)[kind].([]any)[i] = map[string]any{"svn": svn}
	}
	for what, r := range map[string]struct {
		change func(map[string]any)
		module byte // TEE_TCB_SVN[1]
		want   string
	}{
		"PCE too low":            {func(m map[string]any) { first(m)["pcesvn"] = 14 }, 1, "OutOfDate"},
		"PCE just so":            {func(m map[string]any) { first(m)["pcesvn"] = 13 }, 1, "UpToDate"},
		"first CPU part too low": {func(m map[string]any) { component(m, "sgxtcbcomponents", 0, 6) }, 1, "OutOfDate"},
		"third TDX part too low": {func(m map[string]any) { component(m, "tdxtcbcomponents", 2, 6) }, 1, "OutOfDate"},
		"last TDX part too low":  {func(m map[string]any) { component(m, "tdxtcbcomponents", 15, 6) }, 1, "OutOfDate"},
		"module parts of version 1 stand in the module": {func(m map[string]any) {
			component(m, "tdxtcbcomponents", 0, 99)
			component(m, "tdxtcbcomponents", 1, 99)
		}, 1, "UpToDate"},
		"version 0":                 {func(m map[string]any) { component(m, "tdxtcbcomponents", 1, 0) }, 0, "UpToDate"},
		"version 0, module too low": {func(m map[string]any) { component(m, "tdxtcbcomponents", 1, 0); component(m, "tdxtcbcomponents", 0, 7) }, 0, ""},
		"version 0 by another signer": {func(m map[string]any) {
			component(m, "tdxtcbcomponents", 1, 0)
			m["tdxModule"].(map[string]any)["mrsigner"] = strings.Repeat("01", 48)
		}, 0, ""},
		"version 0 with other attributes": {func(m map[string]any) {
			component(m, "tdxtcbcomponents", 1, 0)
			m["tdxModule"].(map[string]any)["attributes"] = strings.Repeat("01", 8)
		}, 0, ""},
		"too few parts": {func(m map[string]any) {
			for _, l := range m["tcbLevels"].([]any) {
				l.(map[string]any)["tcb"].(map[string]any)["sgxtcbcomponents"] = []any{}
			}
		}, 1, ""},
	} {
		t.Run(what, func(t *testing.T) {
			c := newTDX(t, tdxtest.Config{TCBInfo: r.change})
			a := c.sign(t, func(p *tdxtest.Parts) { p.Body[1] = r.module }).appraise(t)
			if r.want == "" {
				refused(t, a, CheckTDXTCBLevel)
				return
			}
			accepted(t, a)
			if a.Facts.TDX.TCBStatus != r.want {
				t.Errorf("status %s, expected %s", a.Facts.TDX.TCBStatus, r.want)
			}
		})
	}
}

// What is remembered is not believed for longer than it is valid, nor when the
// source has something else.
func TestTDXMemoryKeepsDates(t *testing.T) {
	c := newTDX(t, tdxtest.Config{}).sign(t)
	accepted(t, c.appraise(t))
	c.in.Time = c.in.Time.Add(31 * 24 * time.Hour)
	refused(t, c.appraise(t), CheckTDXRevocation, CheckTDXTCBInfo, CheckTDXQEIdentity)
	c.in.Time = c.in.Time.AddDate(8, 0, 0)
	refused(t, c.appraise(t), CheckTDXChain)
	c.in.Time = c.in.Time.AddDate(-12, 0, 0)
	refused(t, c.appraise(t), CheckTDXChain)
}

// A signer's certificate that ends before what it signed does.
func TestTDXMemoryKeepsTheSignersDates(t *testing.T) {
	now := time.Now()
	c := newTDX(t, tdxtest.Config{Certificate: func(name string, cert *x509.Certificate) {
		if name == "signer" {
			cert.NotAfter = now.Add(time.Hour)
		}
	}}).sign(t)
	accepted(t, c.appraise(t))
	c.in.Time = now.Add(2 * time.Hour)
	refused(t, c.appraise(t), CheckTDXTCBInfo, CheckTDXQEIdentity)
}

// A list that came anew is read anew.
func TestTDXMemoryFollowsTheSource(t *testing.T) {
	c := newTDX(t, tdxtest.Config{}).sign(t)
	clock := time.Now()
	c.verifier.Collateral.Now = func() time.Time { return clock }
	accepted(t, c.appraise(t))
	list := c.platform.List(t, "pck", func(l *x509.RevocationList) { revoke("pck", tdxtest.SerialPCK)("pck", l) })
	if err := c.verifier.Collateral.Put(tdxtest.PCKCRL, collateral.Piece{Body: list}); err != nil {
		t.Fatal(err)
	}
	accepted(t, c.appraise(t))
	clock = clock.Add(2 * time.Hour)
	refused(t, c.appraise(t), CheckTDXRevocation)
}

// As on AMD's: a critical extension may turn a list into one of something else.
func TestTDXListWithACriticalExtension(t *testing.T) {
	p := tdxtest.New(t, tdxtest.Config{})
	for critical, refused := range map[bool]bool{false: false, true: true} {
		list := p.List(t, "root", func(l *x509.RevocationList) {
			l.ExtraExtensions = []pkix.Extension{{Id: []int{2, 5, 29, 28}, Critical: critical, Value: []byte{0x30, 0}}}
		})
		if _, err := parseCRL(list, p.Root); (err != nil) != refused {
			t.Errorf("critical %t: %v", critical, err)
		}
	}
}

func FuzzIntelDocument(f *testing.F) {
	p := tdxtest.New(f, tdxtest.Config{})
	f.Add(p.Pieces()[tdxtest.TCBInfo].Body)
	f.Add(p.Pieces()[tdxtest.QEIdentity].Body)
	signer := x509.Certificate{PublicKey: p.CA.PublicKey, PublicKeyAlgorithm: x509.ECDSA}
	f.Fuzz(func(t *testing.T, b []byte) {
		var info pcs.TcbInfo
		if err := decodeSigned(b, tcbInfoName, &signer, &info); err == nil {
			t.Fatal("accepted under another key")
		}
		if json.Unmarshal(b, &info) == nil {
			q := &tdxQuote{body: make([]byte, tdxBodySize)}
			q.body[1] = 1
			ext := &pcs.PckExtensions{TCB: pcs.PckCertTCB{CPUSvnComponents: make([]byte, 16)}}
			_, _ = matchTCB(&info, q, ext)
		}
		var id pcs.EnclaveIdentity
		if json.Unmarshal(b, &id) == nil {
			_, _ = matchQE(&id, make([]byte, qeReportSize))
		}
	})
}

func FuzzIntelCRL(f *testing.F) {
	p := tdxtest.New(f, tdxtest.Config{})
	f.Add(p.Pieces()[tdxtest.PCKCRL].Body)
	f.Fuzz(func(t *testing.T, b []byte) {
		if list, err := parseCRL(b, p.Root); err == nil {
			t.Fatal("accepted by another issuer", list)
		}
	})
}
