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

// checkLaunch compares the initdata with the quoted PCR 8. Without initdata
// the row says so, and no rule that names a policy can hold.
func checkLaunch(t *Verdict, facts *Facts, initdata []byte) {
	if initdata == nil {
		t.Skip(CheckLaunch, "", "the evidence came without init-data")
		return
	}
	const expected = "PCR 8 == SHA-256(0^32 || digest of the init-data)"
	in, err := policy.ParseInitdata(initdata)
	if err != nil {
		t.Fail(CheckLaunch, expected, err.Error())
		return
	}
	value, ok := facts.PCRs[pcrLaunch]
	if !ok {
		t.Fail(CheckLaunch, expected, "PCR 8 is not covered by the quote")
		return
	}
	pcr, err := hex.DecodeString(value)
	if err == nil {
		err = policy.CheckBindingPCR8(in, pcr)
	}
	if err != nil {
		t.Fail(CheckLaunch, expected, err.Error())
		return
	}
	t.Pass(CheckLaunch, expected, value)
	facts.Launch = &LaunchFacts{Digest: hex.EncodeToString(in.Digest()), Initdata: in}
}

// checkLog replays the event log and compares it with the quoted PCR 14.
// Under dialect cvm-agent/1 a missing log is a refusal, never an omission.
func checkLog(t *Verdict, facts *Facts, log []byte, dialect string) {
	const expected = "a log that replays to PCR 14"
	if len(log) == 0 {
		if dialect == kbs.Dialect {
			t.Fail(CheckEventLog, expected, "no log in the evidence")
		} else {
			t.Skip(CheckEventLog, expected, "not in dialect "+dialect)
		}
		return
	}
	value, ok := facts.PCRs[pcrEvents]
	if !ok {
		t.Fail(CheckEventLog, expected, "PCR 14 is not covered by the quote")
		return
	}
	r, err := eventlog.Replay(log)
	if err != nil {
		t.Fail(CheckEventLog, expected, err.Error())
		return
	}
	if got := hex.EncodeToString(r.SHA256[:]); got != value {
		t.Fail(CheckEventLog, "PCR 14 "+value, "replay "+got)
		return
	}
	l, err := logFacts(r)
	if err != nil {
		t.Fail(CheckEventLog, "a log that begins with the launch policy", err.Error())
		return
	}
	t.Pass(CheckEventLog, expected, fmt.Sprintf("%d events, PCR 14 %s", len(r.Events), value))
	facts.Log = l
}

// logFacts reads what a replayed log says.
func logFacts(r *eventlog.Replayed) (*LogFacts, error) {
	state := r.Running()
	i := slices.IndexFunc(r.Events, func(e eventlog.Event) bool { return e.Kind == eventlog.KindPolicy })
	if i < 0 || state.Policy == "" {
		return nil, cause.New(cause.EventLogDiverged, "no launch policy in the log")
	}
	first := r.Events[i]
	l := &LogFacts{
		First:     Set{Policy: first.Policy, Version: first.PolicyVersion, Digest: first.PolicyDigest, Signers: first.Signers},
		Running:   set(&state.Set),
		Destroyed: state.Destroyed,
		Debug:     state.Debug,
	}
	if state.Staged != nil {
		staged := set(state.Staged)
		l.Staged = &staged
	}
	return l, nil
}

func set(s *eventlog.Set) Set {
	out := Set{Policy: s.Policy, Version: s.Version, Digest: s.Digest, Signers: s.Signers}
	for _, i := range s.Images {
		out.Images = append(out.Images, i.Image)
	}
	return out
}
