package platform_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/platformtest"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// session is what keyrelease does with an attester, and what the broker then
// knows.
func session(t *testing.T, a platform.Attester, dialect string, log []byte, initdata []byte) appraisal.Input {
	t.Helper()
	ctx := context.Background()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := kbs.NewTEEPubKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, 32)
	_, _ = rand.Read(raw)
	nonce := base64.StdEncoding.EncodeToString(raw)
	var extra kbs.AdditionalCVMAgent
	events := log
	if dialect == kbs.Dialect {
		if extra, err = a.Additional(ctx, nonce, nil); err != nil {
			t.Fatal(err)
		}
		extra.EventLog, events = log, nil
	}
	additional, err := extra.Encode()
	if err != nil {
		t.Fatal(err)
	}
	reportData, err := kbs.ReportData(additional, nonce, public)
	if err != nil {
		t.Fatal(err)
	}
	primary, err := a.Evidence(ctx, reportData, events)
	if err != nil {
		t.Fatal(err)
	}
	return appraisal.Input{Dialect: dialect, Primary: primary, Additional: additional, ReportData: reportData,
		InitData: initdata, Nonce: nonce, Time: time.Now()}
}

// accepted appraises and wants every required check to pass.
func accepted(t *testing.T, v appraisal.Verifier, in appraisal.Input) appraisal.Facts {
	t.Helper()
	a, err := v.Appraise(in)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Verdict.Refusal(); err != nil {
		t.Fatalf("refused: %v", err)
	}
	return a.Facts
}

var firstEvents = []eventlog.Event{
	{Kind: eventlog.KindPolicy, Policy: "demo", PolicyVersion: 1, PolicyDigest: "sha256:" + strings.Repeat("ab", 32), Signers: []string{strings.Repeat("cd", 32)}},
	{Kind: eventlog.KindImage, Workload: "web", Image: "registry.example/web@sha256:" + strings.Repeat("1", 64)},
}

// openLog begins a log and writes the first events.
func openLog(t *testing.T, dir string, reg eventlog.Register) *eventlog.Log {
	t.Helper()
	l, err := eventlog.Open(context.Background(), dir, reg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	for _, e := range firstEvents {
		if err := l.AppendOnce(context.Background(), e); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func choose(t *testing.T, h platform.Hardware, o platform.Options, name policy.Platform, vmpl uint) platform.Attester {
	t.Helper()
	a, err := open(t, h, o).Choose([]policy.Platform{name}, vmpl)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestSNPEvidenceIsAccepted(t *testing.T) {
	in := initdata(t)
	chain := snptest.New(t, snptest.Config{})
	turin := snptest.New(t, snptest.Config{Line: "Turin"})
	id := bytes.Repeat([]byte{0x1d}, 32)
	o := snptest.Options{HostData: in.HostData(), ReportID: id}
	vlek := o
	vlek.VLEK = true
	for name, c := range map[string]struct {
		chain *snptest.Chain
		h     func(*snptest.Device) platform.Hardware
		o     snptest.Options
		vmpl  uint
	}{
		"configfs-tsm":             {chain, func(d *snptest.Device) platform.Hardware { return platformtest.SNPByTSM(d, 0) }, o, 0},
		"configfs-tsm, VLEK":       {chain, func(d *snptest.Device) platform.Hardware { return platformtest.SNPByTSM(d, 0) }, vlek, 0},
		"configfs-tsm at VMPL 2":   {chain, func(d *snptest.Device) platform.Hardware { return platformtest.SNPByTSM(d, 2) }, o, 2},
		"configfs-tsm, Turin":      {turin, func(d *snptest.Device) platform.Hardware { return platformtest.SNPByTSM(d, 0) }, o, 0},
		"the ioctl device":         {chain, func(d *snptest.Device) platform.Hardware { return platformtest.SNPByDevice(d) }, o, 0},
		"the ioctl device, VLEK":   {chain, func(d *snptest.Device) platform.Hardware { return platformtest.SNPByDevice(d) }, vlek, 0},
		"the ioctl device, VMPL 1": {chain, func(d *snptest.Device) platform.Hardware { return platformtest.SNPByDevice(d) }, o, 1},
		"the ioctl device, Turin":  {turin, func(d *snptest.Device) platform.Hardware { return platformtest.SNPByDevice(d) }, o, 0},
	} {
		t.Run(name, func(t *testing.T) {
			v := &appraisal.SNP{Roots: c.chain.Roots(), Collateral: c.chain.Collateral(t)}
			a := choose(t, c.h(&snptest.Device{Chain: c.chain, Options: c.o}), platform.Options{}, snp, c.vmpl)
			if a.Register() != nil {
				t.Fatal("plain SEV-SNP has no register")
			}
			dir := t.TempDir()
			log := openLog(t, dir, eventlog.NewHead(dir)).Bytes()
			for _, dialect := range []string{kbs.Dialect, kbs.DialectKBS} {
				f := accepted(t, v, session(t, a, dialect, log, in.Raw))
				if f.SNP == nil || f.SNP.VMPL != uint32(c.vmpl) || f.Launch == nil || f.Identity == "" {
					t.Errorf("%s: %+v", dialect, f)
				}
				if (f.Log != nil) != (dialect == kbs.Dialect) {
					t.Errorf("%s: event log %+v", dialect, f.Log)
				}
			}
		})
	}
	t.Run("a host without certificates", func(t *testing.T) {
		o.NoCerts = true
		d := &snptest.Device{Chain: chain, Options: o}
		for name, h := range map[string]platform.Hardware{"configfs-tsm": platformtest.SNPByTSM(d, 0), "device": platformtest.SNPByDevice(d)} {
			raw, err := choose(t, h, platform.Options{}, snp, 0).Evidence(context.Background(), [48]byte{1}, nil)
			if err != nil || !bytes.Contains(raw, []byte(`"cert_chain":null`)) {
				t.Errorf("%s: %v, %.80s", name, err, raw)
			}
		}
	})
}

func TestSNPEvidenceThatIsNotWhatWasAskedForFails(t *testing.T) {
	chain := snptest.New(t, snptest.Config{})
	for name, c := range map[string]struct {
		h    platform.Hardware
		vmpl uint
		why  string
	}{
		"a level above the floor": {platformtest.SNPByTSM(&snptest.Device{Chain: chain}, 2), 0, "privlevel"},
		"a report of another level": {platformtest.SNPByDevice(&snptest.Device{Chain: chain,
			Options: snptest.Options{Change: func(r *kbs.SNPReport) { r.VMPL = 3 }}}), 0, "VMPL 3, asked for 0"},
		"a report over other data": {platformtest.SNPByDevice(&snptest.Device{Chain: chain,
			Options: snptest.Options{Change: func(r *kbs.SNPReport) { r.ReportData = make([]byte, 64) }}}), 0, "other report_data"},
		"a report of a version with reserved bytes set": {platformtest.SNPByDevice(&snptest.Device{Chain: chain,
			Options: snptest.Options{Change: func(r *kbs.SNPReport) {
				r.SigAlgo = 1
				r.Version = 2
				r.CPUIDStepping = new(uint8)
				*r.CPUIDStepping = 9
			}}}), 0, "reserved"},
	} {
		_, err := choose(t, c.h, platform.Options{}, snp, c.vmpl).Evidence(context.Background(), [48]byte{1}, nil)
		if cause.Of(err) != cause.EvidenceFailed || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s gave %v, expected %s with %q", name, err, cause.EvidenceFailed, c.why)
		}
	}
}

// td is a TDX guest that is launched with initdata, its log written.
func td(t *testing.T, host *tdxtest.Platform) (*platformtest.TD, *policy.Initdata) {
	t.Helper()
	in := initdata(t)
	log, rtmrs := platformtest.EventLog()
	guest := platformtest.NewTD(t, host, tdxtest.Report{MRConfigID: [48]byte(in.MRConfigID()), RTMR: rtmrs})
	guest.Files.Set(platformtest.CCEL, log)
	return guest, in
}

func TestTDXEvidenceIsAccepted(t *testing.T) {
	host := tdxtest.New(t, tdxtest.Config{})
	v := &appraisal.TDX{Roots: host.Roots(), Collateral: host.Source(t)}
	for name, by := range map[string]func(*platformtest.TD) platform.Hardware{
		"configfs-tsm":     (*platformtest.TD).ByTSM,
		"the ioctl device": (*platformtest.TD).ByDevice,
	} {
		t.Run(name, func(t *testing.T) {
			guest, in := td(t, host)
			o := platform.Options{RunDir: t.TempDir()}
			a := choose(t, by(guest), o, tdx, 0)
			dir := t.TempDir()
			log := openLog(t, dir, a.Register())
			if got := guest.Registers()[3]; got == [48]byte{} {
				t.Fatal("RTMR3 was not extended")
			}
			for _, dialect := range []string{kbs.Dialect, kbs.DialectKBS} {
				s := session(t, a, dialect, log.Bytes(), in.Raw)
				ev, err := kbs.DecodeTDXEvidence(s.Primary)
				if err != nil || len(ev.EventLog) == 0 {
					t.Fatalf("%s: %v, cc_eventlog of %d bytes: it replays, and is left out", dialect, err, len(ev.EventLog))
				}
				if tagged := bytes.Contains(ev.EventLog, []byte(`"kind":"image"`)); tagged != (dialect == kbs.DialectKBS) {
					t.Errorf("%s: the agent's events in cc_eventlog: %t", dialect, tagged)
				}
				f := accepted(t, v, s)
				if f.TDX == nil || f.Launch == nil || !strings.HasPrefix(f.Identity, map[string]string{kbs.Dialect: "key:", kbs.DialectKBS: "tdx-launch:"}[dialect]) {
					t.Errorf("%s: %+v", dialect, f)
				}
				if dialect == kbs.Dialect && (f.Log == nil || f.Log.Register != "RTMR3") {
					t.Errorf("event log %+v", f.Log)
				}
			}
			// A restart of the daemon is the same instance, and its log replays.
			first := accepted(t, v, session(t, a, kbs.Dialect, log.Bytes(), in.Raw))
			again := choose(t, by(guest), o, tdx, 0)
			if err := log.Close(); err != nil {
				t.Fatal(err)
			}
			if second := accepted(t, v, session(t, again, kbs.Dialect, openLog(t, dir, again.Register()).Bytes(), in.Raw)); second.Identity != first.Identity {
				t.Errorf("after a restart %s is %s", first.Identity, second.Identity)
			}
			// A reboot is another one: the run directory is gone.
			o.RunDir = t.TempDir()
			if other := accepted(t, v, session(t, choose(t, by(guest), o, tdx, 0), kbs.Dialect, log.Bytes(), in.Raw)); other.Identity == first.Identity {
				t.Error("another boot has the same instance key")
			}
		})
	}
}

// A CC event log that does not replay would make a verifier refuse the quote:
// it is left out, which takes nothing from the registers.
func TestACCEventLogThatDoesNotReplayIsLeftOut(t *testing.T) {
	host := tdxtest.New(t, tdxtest.Config{})
	good, _ := platformtest.EventLog()
	for name, log := range map[string][]byte{
		"of another boot":    bytes.Replace(good, good[100:110], bytes.Repeat([]byte{9}, 10), 1),
		"cut off":            good[:150],
		"empty":              {},
		"not a log":          []byte("not a log"),
		"of half an event":   good[:len(good)-303],
		"larger than can be": make([]byte, 5<<20),
	} {
		t.Run(name, func(t *testing.T) {
			guest, in := td(t, host)
			guest.Files.Set(platformtest.CCEL, log)
			a := choose(t, guest.ByTSM(), platform.Options{}, tdx, 0)
			reg := openLog(t, t.TempDir(), a.Register())
			for _, dialect := range []string{kbs.Dialect, kbs.DialectKBS} {
				s := session(t, a, dialect, reg.Bytes(), in.Raw)
				if !bytes.Contains(s.Primary, []byte(`"cc_eventlog":null`)) {
					t.Errorf("%s: %.100s", dialect, s.Primary)
				}
				accepted(t, &appraisal.TDX{Roots: host.Roots(), Collateral: host.Source(t)}, s)
			}
		})
	}
}

func TestTDXWithoutRTMRInterface(t *testing.T) {
	guest, _ := td(t, tdxtest.New(t, tdxtest.Config{}))
	guest.Files.Remove(platformtest.RTMR3)
	a := choose(t, guest.ByTSM(), platform.Options{}, tdx, 0)
	if _, err := eventlog.Open(context.Background(), t.TempDir(), a.Register()); cause.Of(err) != cause.RTMRUnavailable {
		t.Errorf("got %v, expected %s", err, cause.RTMRUnavailable)
	}
}

// Lesson 35 for the TEEs: extend, quote and status from many goroutines. The
// log of each moment replays to the registers of its quote.
func TestLesson35_TEEsExtendAndQuoteTogether(t *testing.T) {
	host := tdxtest.New(t, tdxtest.Config{})
	guest, _ := td(t, host)
	chain := snptest.New(t, snptest.Config{})
	tdxA := choose(t, guest.ByTSM(), platform.Options{}, tdx, 0)
	snpA := choose(t, platformtest.SNPByTSM(&snptest.Device{Chain: chain}, 0), platform.Options{}, snp, 0)
	dir := t.TempDir()
	logs := map[platform.Attester]*eventlog.Log{tdxA: openLog(t, t.TempDir(), tdxA.Register()), snpA: openLog(t, dir, eventlog.NewHead(dir))}
	ctx := context.Background()
	var wg sync.WaitGroup
	for a, log := range logs {
		for i := range 4 {
			wg.Go(func() {
				image := firstEvents[1]
				image.Workload = "w" + string(rune('a'+i))
				if err := log.AppendOnce(ctx, image); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				if _, err := a.Evidence(ctx, [48]byte{byte(i)}, nil); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				if err := log.Check(ctx); err != nil {
					t.Error(err)
				}
				if _, err := a.Additional(ctx, "bm9uY2U=", nil); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	r, err := eventlog.Replay(logs[tdxA].Bytes())
	if err != nil || len(r.Events) != 6 || r.SHA384 != guest.Registers()[3] {
		t.Errorf("%d events, RTMR3 %x, replay %x, %v", len(r.Events), guest.Registers()[3], r.SHA384, err)
	}
}

// Evidence has the members that kbs-protocol.md names, and no other.
func TestEvidenceMembers(t *testing.T) {
	guest, _ := td(t, tdxtest.New(t, tdxtest.Config{}))
	for name, c := range map[string]struct {
		a    platform.Attester
		want []string
	}{
		"snp": {choose(t, platformtest.SNPByTSM(&snptest.Device{Chain: snptest.New(t, snptest.Config{})}, 0), platform.Options{}, snp, 0), []string{"attestation_report", "cert_chain"}},
		"tdx": {choose(t, guest.ByTSM(), platform.Options{}, tdx, 0), []string{"cc_eventlog", "quote"}},
	} {
		raw, err := c.a.Evidence(context.Background(), [48]byte{1, 2, 3}, nil)
		var members map[string]json.RawMessage
		if err != nil || json.Unmarshal(raw, &members) != nil || len(members) != len(c.want) {
			t.Fatalf("%s: %v, %v", name, members, err)
		}
		for _, m := range c.want {
			if _, ok := members[m]; !ok {
				t.Errorf("%s: no member %s", name, m)
			}
		}
	}
}
