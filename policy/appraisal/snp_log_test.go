package appraisal

import (
	"context"
	"crypto"
	"crypto/sha256"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// pcr14 is a register in memory.
type pcr14 struct{ value [32]byte }

func (*pcr14) Name() string { return "pcr14" }
func (*pcr14) Index() int   { return eventlog.IndexPCR14 }

func (p *pcr14) Read(context.Context) ([]byte, error) { return p.value[:], nil }

func (p *pcr14) Extend(_ context.Context, d map[crypto.Hash][]byte) error {
	p.value = sha256.Sum256(append(p.value[:], d[crypto.SHA256]...))
	return nil
}

// logOf is a log of a launch policy named name, and what PCR 14 holds after it.
func logOf(t testing.TB, name string) ([]byte, [32]byte) {
	t.Helper()
	reg := &pcr14{}
	l, err := eventlog.Open(t.Context(), t.TempDir(), reg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = l.Append(t.Context(), eventlog.Event{
		Kind: eventlog.KindPolicy, Policy: name, PolicyVersion: 1,
		PolicyDigest: "sha256:" + strings.Repeat("a", 64), Signers: []string{strings.Repeat("b", 64)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return l.Bytes(), reg.value
}

// snpLog is a log that replays, of the launch policy "shop" or another.
func snpLog(t testing.TB, name ...string) []byte {
	t.Helper()
	log, _ := logOf(t, append(name, "shop")[0])
	return log
}

// A log is replayed for who has genuine evidence: the row says that nothing
// covers it, where a replay would have found what is wrong with it.
func TestALogThatNothingCoversIsNotReplayed(t *testing.T) {
	verdict, facts := NewVerdict(), Facts{}
	broken := []byte("no log at all")
	for name, c := range map[string]struct {
		reg  logRegister
		data func()
	}{
		"SNP without a genuine report":   {noReport, func() { verdict.Pass(CheckReportData, "", "") }},
		"SNP with another's report_data": {noRegister, func() { verdict.Fail(CheckReportData, "", "") }},
		"a register without a value":     {logRegister{name: "PCR 14"}, func() {}},
	} {
		verdict = NewVerdict()
		c.data()
		checkLog(verdict, &facts, broken, kbs.Dialect, c.reg)
		row := verdict.Checks[len(verdict.Checks)-1]
		if row.Outcome != Failed || facts.Log != nil || strings.Contains(row.Found, "event log") {
			t.Errorf("%s: %+v", name, row)
		}
	}
}

// The same of init-data: its text is parsed once the register that it is held
// against is proven.
func TestInitdataThatNothingCoversIsNotParsed(t *testing.T) {
	verdict, facts := NewVerdict(), Facts{}
	checkLaunch(verdict, &facts, []byte("no init-data at all"), launchHostData(&SNPFacts{}))
	if row := verdict.Checks[0]; row.Outcome != Failed || facts.Launch != nil || !strings.Contains(row.Found, "does not cover") {
		t.Errorf("%+v", row)
	}
}
