package launch

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/control"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func TestLaunch(t *testing.T) {
	w := newWorld()
	w.policies["v1"] = testPolicy(1, "web", "db")
	a, q := newTestAgent(t, w, t.TempDir())
	if err := a.launch(t.Context()); err != nil {
		t.Fatal(err)
	}
	calls := w.calls()
	before := func(first, then string) {
		t.Helper()
		i, j := slices.Index(calls, first), slices.Index(calls, then)
		if i < 0 || j < 0 || i > j {
			t.Errorf("%q (%d) is not before %q (%d) in %v", first, i, then, j, calls)
		}
	}
	for _, name := range []string{"web", "db"} {
		before("signature "+name, "fetch "+name)
		before("attestation "+name, "fetch "+name)
		before("append image "+name, "resource kbs:///default/key/"+name)
		before("resource kbs:///default/key/"+name, "fetch "+name)
		before("fetch "+name, "sbom /root-of-"+name)
	}
	// Nothing is started before everything is verified, and starts follow the policy's order.
	before("sbom /root-of-web", "start web-v1")
	before("sbom /root-of-db", "start web-v1")
	before("healthy web-v1", "healthy db-v1")
	if got := w.podman.running(); got != "cvm-shop-db-v1 cvm-shop-web-v1" {
		t.Errorf("running: %s", got)
	}
	if !q.has("READY=1") || !q.has("STATUS=launch: fetch/web ok") {
		t.Errorf("service manager heard %v", q.lines)
	}
	st := a.Status()
	if st.State != control.StateReady || st.Policy.Version != 1 || len(st.Workloads) != 2 || !st.Workloads[0].Healthy || st.Broker.InstanceID != "i-1" {
		t.Errorf("%+v", st)
	}
	var names []string
	for _, p := range st.Phases {
		if p.Outcome != control.OK && p.Outcome != control.Skipped {
			t.Errorf("phase %s/%s is %s", p.Name, p.Workload, p.Outcome)
		}
		if !slices.Contains(names, p.Name) {
			names = append(names, p.Name)
		}
	}
	for _, want := range []string{"policy", "attest", "resolve", "signature", "attestation", "measure", "key", "fetch", "sbom", "start", "healthy", "ready"} {
		if !slices.Contains(names, want) {
			t.Errorf("phase %s is not in %v", want, names)
		}
	}
}

// Every phase that fails ends the launch with its name and cause, and leaves
// nothing behind.
func TestLaunchFailures(t *testing.T) {
	for name, tc := range map[string]struct {
		call  string
		code  cause.Code
		phase string
		world func(w *world)
	}{
		"a launch bound to another policy":       {call: "platform", code: cause.LaunchBinding, phase: "policy: "},
		"an unsigned policy":                     {call: "policy", code: cause.PolicyUnsigned, phase: "policy: "},
		"a foreign extend of the register":       {call: "log", code: cause.EventLogDiverged, phase: "policy: "},
		"a platform that the policy leaves out":  {code: cause.PlatformNotAllowed, phase: "policy: ", world: func(w *world) { w.policies["v1"].Platforms = []policy.Platform{"snp"} }},
		"evidence that the broker refuses":       {call: "attest", code: cause.AttestationRefused, phase: "attest: "},
		"a token without a version mark":         {code: cause.BrokerMarkMissing, phase: "attest: ", world: func(w *world) { w.claims.HasMark = false }},
		"a version below the broker's mark":      {code: cause.PolicyBelowFloor, phase: "attest: ", world: func(w *world) { w.claims.VersionMark = 2 }},
		"a policy expired at the broker's time":  {code: cause.PolicyExpired, phase: "attest: ", world: func(w *world) { w.claims.IssuedAt = time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC) }},
		"signers that the broker does not name":  {code: cause.PolicySignature, phase: "attest: ", world: func(w *world) { w.claims.Signers = []string{"other"} }},
		"an image that is not there":             {call: "resolve", code: cause.ImageNotFound, phase: "resolve/web: "},
		"a plain image where the policy forbids": {call: "encryption", code: cause.EncryptionRequired, phase: "resolve/web: "},
		"an unsigned image":                      {call: "signature", code: cause.ImageUnsigned, phase: "signature/web: "},
		"an SBOM by another key":                 {call: "attestation", code: cause.SBOMSignature, phase: "attestation/web: "},
		"a log that cannot be written":           {call: "append image web", code: cause.EventLogWrite, phase: "measure/web: "},
		"a key that is refused":                  {call: "resource", code: cause.KeyRefused, phase: "key/web: "},
		"a tampered layer":                       {call: "fetch", code: cause.LayerMismatch, phase: "fetch/web: "},
		"a full disk":                            {call: "fetch", code: cause.StorageFull, phase: "fetch/web: "},
		"an SBOM that differs":                   {call: "sbom", code: cause.SBOMDiffers, phase: "sbom/web: "},
		"a container that does not start":        {call: "start", code: cause.WorkloadStart, phase: "start/web: "},
		"another image in podman":                {call: "start", code: cause.WorkloadOtherImage, phase: "start/web: "},
		"a workload that stays unhealthy":        {call: "healthy", code: cause.WorkloadUnhealthy, phase: "healthy/web: "},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.policies["v1"] = testPolicy(1, "web")
			if tc.call != "" {
				w.fail[tc.call] = func() error { return cause.New(tc.code, "said so") }
			}
			if tc.world != nil {
				tc.world(w)
			}
			a, _ := newTestAgent(t, w, t.TempDir())
			err := a.launch(t.Context())
			if cause.Of(err) != tc.code || !strings.HasPrefix(err.Error(), tc.phase+string(tc.code)+": ") {
				t.Errorf("%v, expected %s%s", err, tc.phase, tc.code)
			}
			if len(w.podman.containers) != 0 || len(w.images) != 0 {
				t.Errorf("left over: %v, %v", w.podman.containers, w.images)
			}
			if a.Status().State == control.StateReady {
				t.Error("ready after a failure")
			}
		})
	}
	t.Run("no initdata", func(t *testing.T) {
		a, _ := newTestAgent(t, newWorld(), t.TempDir())
		if err := os.Remove(a.config.Initdata); err != nil {
			t.Fatal(err)
		}
		if err := a.launch(t.Context()); cause.Of(err) != cause.PolicyMissing {
			t.Errorf("%v", err)
		}
	})
	t.Run("an oversized initdata", func(t *testing.T) {
		a, _ := newTestAgent(t, newWorld(), t.TempDir())
		if err := os.WriteFile(a.config.Initdata, make([]byte, maxInitdata+1), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := a.launch(t.Context()); cause.Of(err) != cause.PolicyTooLarge {
			t.Errorf("%v", err)
		}
	})
}

// The policy is in the register before anything runs, and until the launch is
// ready the control socket answers reads only.
func TestLesson06_MeasuredBeforeAnythingRuns(t *testing.T) {
	w := newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	a, _ := newTestAgent(t, w, t.TempDir())
	w.fail["healthy"] = func() error {
		if err := a.Upgrade(t.Context(), []byte("v1")); cause.Of(err) != cause.NotReady {
			t.Errorf("upgrade before ready: %v", err)
		}
		if err := a.Destroy(t.Context()); cause.Of(err) != cause.NotReady {
			t.Errorf("destroy before ready: %v", err)
		}
		if st := a.Status(); st.State != control.StateStarting || len(st.Phases) == 0 {
			t.Errorf("status before ready: %+v", st)
		}
		return nil
	}
	if err := a.launch(t.Context()); err != nil {
		t.Fatal(err)
	}
	calls := w.calls()
	measured := slices.Index(calls, "append policy ")
	for _, later := range []string{"attest", "resolve web", "append image web", "start web-v1"} {
		if i := slices.Index(calls, later); measured < 0 || i < measured {
			t.Errorf("%s (%d) came before the policy was measured (%d)", later, i, measured)
		}
	}
	if slices.Index(calls, "append image web") > slices.Index(calls, "start web-v1") {
		t.Error("the container started before its image was measured")
	}
}

// A broker that fails over costs no second extend.
func TestLesson08_NoSecondExtendOnRetry(t *testing.T) {
	w := newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	a, _ := newTestAgent(t, w, t.TempDir())
	times := 0
	w.fail["attest"] = func() error {
		if times++; times%2 == 1 {
			return cause.New(cause.BrokerUnavailable, "connection reset")
		}
		return nil
	}
	if err := a.launch(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := w.log.kinds(); got != "policy image" {
		t.Errorf("events %q", got)
	}
	// A restart of the daemon repeats nothing either.
	again, _ := newTestAgent(t, w, strings.TrimSuffix(a.config.StateDir, "/state"))
	if err := again.launch(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := w.log.kinds(); got != "policy image" {
		t.Errorf("events after a restart %q", got)
	}
}

// While registry and broker are down the launch waits and says so, then goes on.
func TestLesson20_WaitsForRegistryAndBroker(t *testing.T) {
	w := newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	a, q := newTestAgent(t, w, t.TempDir())
	down := func(code cause.Code, times int) func() error {
		return func() error {
			if times--; times >= 0 {
				return cause.New(code, "connection refused")
			}
			return nil
		}
	}
	w.fail["attest"] = down(cause.BrokerUnavailable, 3)
	w.fail["resolve"] = down(cause.RegistryUnavailable, 3)
	w.fail["fetch"] = down(cause.RegistryUnavailable, 3)
	w.fail["start"] = down(cause.PodmanUnavailable, 3)
	if err := a.launch(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"attest waiting: waiting for broker: connection refused, retry in",
		"resolve/web waiting: waiting for registry", "start/web waiting: waiting for podman"} {
		if !q.has(want) {
			t.Errorf("STATUS never said %q", want)
		}
	}

	w = newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	w.policies["v1"].Upgrade.Deadlines.Registry = policy.Duration(500 * time.Millisecond)
	a, _ = newTestAgent(t, w, t.TempDir())
	w.fail["resolve"] = down(cause.RegistryUnavailable, 1<<30)
	if err := a.launch(t.Context()); cause.Of(err) != cause.RegistryUnavailable {
		t.Errorf("%v, expected registry-unavailable at the deadline", err)
	}
}

// A deadline that falls into a try, not into the pause after it, changes nothing
// about the cause: who was waited for. A verdict in that moment stays one.
func TestADeadlineDoesNotHideWhoWasWaitedFor(t *testing.T) {
	for _, tc := range []struct{ last, want cause.Code }{
		{cause.DeadlineExceeded, cause.PodmanUnavailable},
		{cause.WorkloadStart, cause.WorkloadStart},
	} {
		a, _ := newTestAgent(t, newWorld(), t.TempDir())
		s, tries := a.sequence(t.Context(), "launch"), 0
		s.run("start", time.Second, func(ctx context.Context, st *step) error {
			return a.retry(ctx, st, func(ctx context.Context) error {
				if tries++; tries == 1 {
					return cause.New(cause.PodmanUnavailable, "connection refused")
				}
				<-ctx.Done()
				return cause.New(tc.last, "in the last moment")
			})
		})
		if got := cause.Of(s.failed()); got != tc.want {
			t.Errorf("%s after %d tries: the cause is %s, expected %s", tc.last, tries, got, tc.want)
		}
	}
}

// A refusal is not a blip: it is never asked again.
func TestRefusalsAreNotRepeated(t *testing.T) {
	w := newWorld()
	w.policies["v1"] = testPolicy(1, "web")
	a, _ := newTestAgent(t, w, t.TempDir())
	w.fail["resource"] = func() error { return cause.New(cause.KeyRefused, "by rule") }
	_ = a.launch(t.Context())
	asked := 0
	for _, c := range w.calls() {
		if strings.HasPrefix(c, "resource ") {
			asked++
		}
	}
	if asked != 1 {
		t.Errorf("the key was asked for %d times", asked)
	}
}

func TestPhaseDeadline(t *testing.T) {
	a, _ := newTestAgent(t, newWorld(), t.TempDir())
	s := a.sequence(t.Context(), "launch")
	s.run("slow", 10*time.Millisecond, func(ctx context.Context, _ *step) error { <-ctx.Done(); return ctx.Err() })
	if err := s.failed(); cause.Of(err) != cause.DeadlineExceeded {
		t.Errorf("%v", err)
	}
	ran := false
	s.run("after", time.Second, func(context.Context, *step) error { ran = true; return nil })
	if ran {
		t.Error("a phase after a failure was begun")
	}
}

func TestConfig(t *testing.T) {
	const signer = "trust: {signers: [aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]}\n"
	c, err := DecodeConfig([]byte(signer))
	if err != nil || c.Trust.Threshold != 1 || c.Trust.VersionFloor != 1 || c.ControlSocket == "" {
		t.Errorf("%+v, %v", c, err)
	}
	for name, tc := range map[string]string{
		"no signer":             "tpm: unix:/x\n",
		"a signer that is none": "trust: {signers: [abc]}\n",
		"a signer twice":        strings.Replace(signer, "[", "[aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, ", 1),
		"a threshold too high":  strings.Replace(signer, "}", ", threshold: 2}", 1),
		"an unknown field":      signer + "debug: true\n",
		"a duplicate field":     signer + "tpm: unix:/a\ntpm: unix:/b\n",
		"a relative path":       signer + "runDir: run\n",
		"a TPM of no kind":      signer + "tpm: /dev/tpmrm0\n",
		"two documents":         signer + "---\n" + signer,
	} {
		t.Run(name, func(t *testing.T) {
			if c, err := DecodeConfig([]byte(tc)); err == nil {
				t.Errorf("accepted: %+v", c)
			}
		})
	}
	required, off := policy.Policy{Broker: &policy.Broker{}}, false
	if !c.requireMark(&required) || c.requireMark(&policy.Policy{}) || c.requireMark(&policy.Policy{Broker: &policy.Broker{Dialect: "kbs"}}) {
		t.Error("default of requireBrokerMark")
	}
	c.RequireBrokerMark = &off
	if c.requireMark(&required) {
		t.Error("requireBrokerMark: false")
	}
}

func FuzzDecodeConfig(f *testing.F) {
	f.Add([]byte("trust: {signers: [aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]}\ntpm: unix:/x\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := DecodeConfig(data)
		if err == nil && (len(c.Trust.Signers) == 0 || c.Trust.Threshold < 1) {
			t.Errorf("accepted a configuration that trusts nobody: %+v", c)
		}
	})
}
