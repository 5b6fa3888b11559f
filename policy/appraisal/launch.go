package appraisal

import (
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// launchField is where a platform holds the initdata's digest.
type launchField struct {
	expected string // as the table says it
	value    string // lowercase hex; "" when the evidence does not prove it
	check    func(*policy.Initdata, []byte) error
}

func launchPCR8(f *Facts) launchField {
	return launchField{"PCR 8 == SHA-256(0^32 || digest of the init-data)", f.PCRs[pcrLaunch], policy.CheckBindingPCR8}
}

func launchHostData(f *SNPFacts) launchField {
	return launchField{"HOST_DATA == digest of the init-data, not zero", f.HostData, policy.CheckBindingHostData}
}

func launchMRConfigID(f *TDXFacts) launchField {
	return launchField{"MRCONFIGID == digest of the init-data, not zero", f.MRConfigID, policy.CheckBindingMRConfigID}
}

// checkLaunch compares the initdata with the field that the launch is bound
// by. Without initdata the row says so, and no rule that names a policy can
// hold.
func checkLaunch(t *Verdict, facts *Facts, initdata []byte, field launchField) {
	if initdata == nil {
		t.Skip(CheckLaunch, "", "the evidence came without init-data")
		return
	}
	if field.value == "" { // before the text is parsed, for it costs the peer nothing
		t.Fail(CheckLaunch, field.expected, "the evidence does not cover it")
		return
	}
	in, err := policy.ParseInitdata(initdata)
	if err != nil {
		t.Fail(CheckLaunch, field.expected, err.Error())
		return
	}
	value, err := hex.DecodeString(field.value)
	if err == nil {
		err = field.check(in, value)
	}
	if err != nil {
		t.Fail(CheckLaunch, field.expected, err.Error())
		return
	}
	t.Pass(CheckLaunch, field.expected, field.value)
	facts.Launch = &LaunchFacts{Digest: hex.EncodeToString(in.Digest()), Initdata: in}
}

// logRegister is what an event log must replay to.
type logRegister struct {
	name  string // "PCR 14", "RTMR3"; "report_data" where there is none
	value string // lowercase hex; "" when the evidence does not prove it
}

func registerPCR14(f *Facts) logRegister { return logRegister{"PCR 14", f.PCRs[pcrEvents]} }

func registerRTMR3(f *TDXFacts) logRegister {
	if len(f.RTMRs) != 4 {
		return logRegister{name: "RTMR3"}
	}
	return logRegister{"RTMR3", f.RTMRs[3]}
}

// noRegister is plain SNP's: the log is worth as much as report_data, which
// covers it, and is checked elsewhere.
var noRegister = logRegister{name: "report_data"}

// noReport stands for noRegister where no genuine report is there to cover a log.
var noReport = logRegister{name: "a report that counts"}

func (r logRegister) replayed(log *eventlog.Replayed) string {
	if r.name == "RTMR3" {
		return hex.EncodeToString(log.SHA384[:])
	}
	return hex.EncodeToString(log.SHA256[:])
}

// checkLog replays the event log and compares it with its register. Under
// dialect cvm-agent/1 a missing log is a refusal, never an omission.
func checkLog(t *Verdict, facts *Facts, log []byte, dialect string, reg logRegister) {
	expected := "a log that replays to " + reg.name
	if reg == noRegister {
		expected = "a log that replays and that report_data covers"
	}
	if len(log) == 0 {
		if dialect == kbs.Dialect {
			t.Fail(CheckEventLog, expected, "no log in the evidence")
		} else {
			t.Skip(CheckEventLog, expected, "not in dialect "+dialect)
		}
		return
	}
	if reg.value == "" && reg != noRegister {
		t.Fail(CheckEventLog, expected, "the evidence does not cover "+reg.name)
		return
	}
	// Before the replay: a large log takes sixty times as long as the rest of an
	// appraisal, which a peer without genuine evidence is not given.
	if reg == noRegister && t.Outcome(CheckReportData) != Passed {
		t.Fail(CheckEventLog, expected, "report_data did not pass")
		return
	}
	r, err := eventlog.Replay(log)
	if err != nil {
		t.Fail(CheckEventLog, expected, err.Error())
		return
	}
	if got := reg.replayed(r); reg != noRegister && got != reg.value {
		t.Fail(CheckEventLog, reg.name+" "+reg.value, "replay "+got)
		return
	}
	l, err := logFacts(r)
	if err != nil {
		t.Fail(CheckEventLog, "a log that begins with the launch policy", err.Error())
		return
	}
	l.Register = reg.name
	t.Pass(CheckEventLog, expected, fmt.Sprintf("%d events, %s %s", len(r.Events), reg.name, reg.value))
	facts.Log = l
}

// logFacts reads what a replayed log says.
func logFacts(r *eventlog.Replayed) (*LogFacts, error) {
	state := r.Running()
	i := slices.IndexFunc(r.Events, func(e eventlog.Event) bool { return e.Kind == eventlog.KindPolicy })
	if i < 0 || state.Policy == "" {
		return nil, cause.New(cause.EventLogDiverged, "no launch policy in the log")
	}
	l := &LogFacts{
		First:     named(r.Events[i]),
		Running:   set(&state.Set),
		Destroyed: state.Destroyed,
		Debug:     state.Debug,
	}
	for _, e := range r.Events {
		if e.Policy != "" && e.PolicyDigest != "" && !slices.ContainsFunc(l.Policies, func(s Set) bool { return s.is(named(e)) }) {
			l.Policies = append(l.Policies, named(e))
		}
	}
	if state.Staged != nil {
		staged := set(state.Staged)
		l.Staged = &staged
	}
	return l, nil
}

// named is the policy that an event names, without images.
func named(e eventlog.Event) Set {
	return Set{Policy: e.Policy, Version: e.PolicyVersion, Digest: e.PolicyDigest, Signers: e.Signers}
}

func set(s *eventlog.Set) Set {
	out := Set{Policy: s.Policy, Version: s.Version, Digest: s.Digest, Signers: s.Signers}
	for _, i := range s.Images {
		out.Images = append(out.Images, i.Image)
	}
	return out
}
