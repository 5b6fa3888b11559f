package appraisal

import (
	"encoding/hex"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// What a quote's extraData may be, in a session and offline.
func TestExtraData(t *testing.T) {
	var session [kbs.ReportDataSize]byte
	for i := range session {
		session[i] = byte(i + 1)
	}
	padded := append(slices.Clone(session[:]), make([]byte, 16)...)
	for what, c := range map[string]struct {
		offline *Offline
		extra   []byte
		want    Outcome
	}{
		"a session's, cut":                     {nil, session[:32], Passed},
		"a session's, padded":                  {nil, padded, Passed},
		"a session's, as it is":                {nil, session[:], Failed},
		"a session's, cut short":               {nil, session[:31], Failed},
		"a session's first half":               {nil, append(slices.Clone(session[:32]), make([]byte, 32)...), Failed},
		"a session's, padded with something":   {nil, append(slices.Clone(session[:]), slices.Repeat([]byte{1}, 16)...), Failed},
		"none in a session":                    {nil, nil, Failed},
		"offline, unknown":                     {&Offline{}, session[:32], NotChecked},
		"offline, report data cut":             {&Offline{ReportData: session[:]}, session[:32], Passed},
		"offline, report data padded":          {&Offline{ReportData: session[:]}, padded, Passed},
		"offline, a caller's short nonce":      {&Offline{ReportData: []byte{1, 2, 3}}, []byte{1, 2, 3}, Passed},
		"offline, another nonce":               {&Offline{ReportData: []byte{1, 2, 3}}, []byte{1, 2, 4}, Failed},
		"offline, a nonce and more":            {&Offline{ReportData: []byte{1, 2, 3}}, []byte{1, 2, 3, 0}, Failed},
		"offline, empty is not unknown":        {&Offline{ReportData: []byte{}}, session[:32], Failed},
		"offline, the session's is not looked": {&Offline{ReportData: []byte{9}}, session[:32], Failed},
	} {
		v := NewVerdict("other")
		checkExtraData(v, Input{ReportData: session, Offline: c.offline}, c.extra)
		if got := v.Outcome(CheckReportData); got != c.want {
			t.Errorf("%s: %s, expected %s", what, got, c.want)
		}
		if required := slices.Contains(v.Required, CheckReportData); required != (c.want != NotChecked) {
			t.Errorf("%s: required %t", what, required)
		}
	}
}

// Trustee's recorded evidence is accepted offline by its listed AK, with and
// without the report data that it was made for, and in a session of that
// report data.
func TestTrusteeTPMEvidenceOffline(t *testing.T) {
	b, err := os.ReadFile("testdata/trustee-tpm-evidence.json")
	if err != nil {
		t.Fatal(err)
	}
	ev, err := kbs.DecodeTPMEvidence(b)
	if err != nil {
		t.Fatal(err)
	}
	rd, _ := hex.DecodeString("a04182b506878d4f29b91ee606a71a0d3361ccf1b22db20c98adcaa537bea393ef0e41a18b3569ab678f1497fbc5c120")
	v := &TPM{TrustedAKs: []string{spkiFingerprint(ev.AKPublic)}}
	in := Input{Dialect: kbs.DialectKBS, Primary: b, Time: time.Unix(1750000000, 0)}
	for what, c := range map[string]struct {
		offline *Offline
		session []byte
		row     Outcome
	}{
		"offline, report data unknown": {&Offline{}, nil, NotChecked},
		"offline, report data given":   {&Offline{ReportData: rd}, nil, Passed},
		"offline, another":             {&Offline{ReportData: rd[1:]}, nil, Failed},
		"in its session":               {nil, rd, Passed},
		"in another session":           {nil, rd[1:], Failed},
	} {
		in := in
		in.Offline = c.offline
		copy(in.ReportData[:], c.session)
		a, err := v.Appraise(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := a.Verdict.Outcome(CheckReportData); got != c.row {
			t.Errorf("%s: report-data %s, expected %s", what, got, c.row)
		}
		if err := a.Verdict.Refusal(); (err == nil) != (c.row != Failed) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
