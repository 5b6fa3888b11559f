package chain

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/keyrelease"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// The guest that the rule describes gets its key and a token about its policy;
// and again in a session of its own, as the same instance.
func TestTheLaunchedGuestGetsItsKey(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	ctx := context.Background()
	if err := s.admin.SetMark(ctx, "shop", adminclient.Mark{Version: 2, Signers: []string{v.signer.Fingerprint}}); err != nil {
		t.Fatal(err)
	}
	client := v.client(t, s.policyBroker(t), nil)
	var instance string
	for range 2 {
		session, err := client.Attest(ctx)
		if err != nil {
			t.Fatal(err)
		}
		c := session.Token()
		if !c.HasMark || c.PolicyName != "shop" || c.VersionMark != 2 || len(c.Signers) != 1 || c.Signers[0] != v.signer.Fingerprint || c.Tombstone || c.InstanceID == "" {
			t.Errorf("claims %+v", c)
		}
		if instance != "" && c.InstanceID != instance {
			t.Errorf("instance %s became %s", instance, c.InstanceID)
		}
		instance = c.InstanceID
		if got, err := session.Resource(ctx, webKey); err != nil || !bytes.Equal(got, kek) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		session.Close()
	}
	v.replays(t, 2)
	if audit := s.read(t, "audit.ndjson"); strings.Contains(audit, string(kek)) || strings.Count(audit, `"op":"release"`) != 2 {
		t.Errorf("audit log:\n%s", audit)
	}
}

// Each condition of the rule changed alone refuses the key, not the guest.
func TestARuleThatIsNotTheGuestsRefusesTheKey(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	client := v.client(t, s.policyBroker(t), nil)
	_, other, _ := strings.Cut(imageTwo, "@")
	for what, c := range map[string]struct {
		check  string
		change func(*release.Rule)
	}{
		"another policy":      {appraisal.CheckLaunchPolicy, func(r *release.Rule) { r.Policy.Names = []string{"bank"} }},
		"another signer":      {appraisal.CheckLaunchPolicy, func(r *release.Rule) { r.Policy.Signers = []string{strings.Repeat("a", 64)} }},
		"a higher version":    {appraisal.CheckPolicyVersion, func(r *release.Rule) { r.Policy.MinimumVersion = 3 }},
		"another image":       {appraisal.CheckImage, func(r *release.Rule) { r.Images = []string{other} }},
		"another maker's TPM": {appraisal.CheckEKRoots, func(r *release.Rule) { r.EKRoots = []string{"other"} }},
		"another platform":    {appraisal.CheckPlatform, func(r *release.Rule) { r.Platforms, r.AnyLaunch = []string{"tdx"}, true }},
		"a debug register":    {"pcr-12", func(r *release.Rule) { r.PCRs = map[string][]string{"12": {strings.Repeat("1", 64)}} }},
	} {
		rule := v.rule()
		c.change(&rule)
		s.put(t, rule)
		t.Run(what, func(t *testing.T) { refused(t, client, cause.KeyRefused, c.check+":") })
	}
	if err := s.admin.DeleteRule(context.Background(), webKey); err != nil {
		t.Fatal(err)
	}
	t.Run("no rule", func(t *testing.T) { refused(t, client, cause.KeyRefused, "no release rule") })
}

// mixed answers in part with something else than its own TPM says.
type mixed struct {
	platform.Attester
	activate func(*kbs.CVMAgentChallenge) ([]byte, error)
	evidence func(context.Context, [48]byte, []byte) (json.RawMessage, error)
}

func (m mixed) Additional(ctx context.Context, nonce string, c *kbs.CVMAgentChallenge) (kbs.AdditionalCVMAgent, error) {
	if m.activate != nil {
		secret, err := m.activate(c)
		return kbs.AdditionalCVMAgent{Activation: secret}, err
	}
	return m.Attester.Additional(ctx, nonce, c)
}

func (m mixed) Evidence(ctx context.Context, reportData [48]byte, events []byte) (json.RawMessage, error) {
	if m.evidence != nil {
		return m.evidence(ctx, reportData, events)
	}
	return m.Attester.Evidence(ctx, reportData, events)
}

// A guest that is not what it says does not get as far as a token.
func TestAnotherGuestIsRefused(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	b := s.policyBroker(t)
	newer, _ := v.sign(t, 3)
	log, stranger := v.log.Bytes(), newVM(t, 1)
	for what, c := range map[string]struct {
		check  string
		change func(*keyrelease.Config)
	}{
		"a changed event": {appraisal.CheckEventLog, func(c *keyrelease.Config) {
			c.EventLog = func() []byte { return bytes.Replace(log, []byte("shop"), []byte("shoq"), 1) }
		}},
		"an event left out": {appraisal.CheckEventLog, func(c *keyrelease.Config) {
			c.EventLog = func() []byte { return v.earlier }
		}},
		"an event cut short": {appraisal.CheckEventLog, func(c *keyrelease.Config) {
			c.EventLog = func() []byte { return log[:len(log)-1] }
		}},
		"a secret that is not of this challenge": {appraisal.CheckActivation, func(c *keyrelease.Config) {
			c.Attester = mixed{Attester: v.tpm, activate: func(*kbs.CVMAgentChallenge) ([]byte, error) { return make([]byte, 32), nil }}
		}},
		"the quote of another TPM": {appraisal.CheckAKSame, func(c *keyrelease.Config) {
			c.Attester = mixed{Attester: v.tpm, evidence: stranger.tpm.Evidence}
		}},
		"the initdata of a newer policy": {appraisal.CheckLaunch, func(c *keyrelease.Config) { c.Initdata = newer }},
	} {
		t.Run(what, func(t *testing.T) { refused(t, v.client(t, b, c.change), cause.AttestationRefused, c.check+":") })
	}
	t.Run("a TPM of another maker", func(t *testing.T) {
		refused(t, stranger.client(t, b, nil), cause.AttestationRefused, appraisal.CheckEKChain+":")
	})
	t.Run("the same guest, unchanged", func(t *testing.T) { released(t, v.client(t, b, nil)) })
	t.Run("a foreign extend of PCR 14", func(t *testing.T) {
		if err := v.tpm.ExtendPCR(context.Background(), 14, make([]byte, 32)); err != nil {
			t.Fatal(err)
		}
		refused(t, v.client(t, b, nil), cause.AttestationRefused, appraisal.CheckEventLog+":")
		if err := v.log.AppendOnce(context.Background(), v.event(eventlog.KindPolicyStaged, 3)); cause.Of(err) != cause.EventLogDiverged {
			t.Errorf("the log goes on: %v", err)
		}
	})
}

// Evidence without its log is refused, also when the guest says it has none.
func TestLesson09_EvidenceWithoutItsLog(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	for what, log := range map[string][]byte{"no log": nil, "an empty log": {}} {
		t.Run(what, func(t *testing.T) {
			client := v.client(t, s.policyBroker(t), func(c *keyrelease.Config) { c.EventLog = func() []byte { return log } })
			refused(t, client, cause.AttestationRefused, appraisal.CheckEventLog+":")
		})
	}
}

// losing is a register whose answers get lost: it extends, and says that it
// failed; or fails before.
type losing struct {
	eventlog.Register
	before, after atomic.Int32 // so many calls to come
}

var errLost = errors.New("the answer is lost")

func (l *losing) Extend(ctx context.Context, digests map[crypto.Hash][]byte) error {
	if l.before.Add(-1) >= 0 {
		return errLost
	}
	if err := l.Register.Extend(ctx, digests); err != nil {
		return err
	}
	if l.after.Add(-1) >= 0 {
		return errLost
	}
	return nil
}

// Whatever is tried again (an extend, a session, the whole daemon), the
// register holds each event once, and the broker still takes the log.
func TestLesson08_NothingIsExtendedTwice(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	ctx := context.Background()
	register := &losing{Register: v.tpm.PCR14()}
	if err := v.log.Close(); err != nil {
		t.Fatal(err)
	}
	v.open(t, register)
	v.replays(t, 2)

	// The daemon repeats what it did before it was restarted.
	v.append(t, v.event(eventlog.KindPolicy, 2), eventlog.Event{Kind: eventlog.KindImage, Workload: "web", Image: imageOne})
	v.replays(t, 2)

	// An upgrade is staged; the first extend fails, its retry's answer is lost.
	staged := []eventlog.Event{v.event(eventlog.KindPolicyStaged, 3), {Kind: eventlog.KindImageStaged, Workload: "web", Image: imageTwo}}
	register.before.Store(1)
	if err := v.log.AppendOnce(ctx, staged[0]); err == nil {
		t.Error("an extend that did not happen counts")
	}
	register.after.Store(1)
	v.append(t, staged[0], staged[0])
	v.replays(t, 3)
	v.append(t, staged[1])
	v.replays(t, 4)

	// The broker fails over while the staged image's key is asked for.
	two := v.rule()
	_, image, _ := strings.Cut(imageTwo, "@")
	two.Images = []string{image}
	s.put(t, two)
	client := v.client(t, s.policyBroker(t), nil)
	back := s.blip(t)
	released(t, client)
	back()
	v.append(t, staged...)
	v.replays(t, 4)

	// A kill before the last extend: what is on storage is extended once.
	committed := v.event(eventlog.KindCommitted, 3)
	register.before.Store(1)
	if err := v.log.AppendOnce(ctx, committed); err == nil {
		t.Error("an extend that did not happen counts")
	}
	if err := v.log.Close(); err != nil {
		t.Fatal(err)
	}
	v.open(t, v.tpm.PCR14())
	v.append(t, committed)
	v.replays(t, 5)
	released(t, v.client(t, s.policyBroker(t), nil))
}

// A broker that restarts between two sessions knows the instance and its rules;
// the session of before is over, and the wait for a new one can be seen.
func TestABrokerRestart(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	ctx := context.Background()
	var waits atomic.Int32
	client := v.client(t, s.policyBroker(t), func(c *keyrelease.Config) { c.OnWait = func(error, time.Duration) { waits.Add(1) } })
	before, err := client.Attest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	if waits.Load() != 0 {
		t.Errorf("%d waits while the broker was there", waits.Load())
	}
	back := s.blip(t)
	after, err := client.Attest(ctx)
	back()
	if err != nil {
		t.Fatal(err)
	}
	defer after.Close()
	if waits.Load() == 0 {
		t.Error("nobody was told of the wait")
	}
	if after.Token().InstanceID != before.Token().InstanceID {
		t.Error("the instance is another one")
	}
	if got, err := after.Resource(ctx, webKey); err != nil || !bytes.Equal(got, kek) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// A graceful restart loses nothing, sessions neither.
	if got, err := before.Resource(ctx, webKey); err != nil || !bytes.Equal(got, kek) {
		t.Errorf("in the session of before the restart: %d bytes, %v", len(got), err)
	}

	s.stop()
	limited, cancel := context.WithTimeout(ctx, 4*time.Second)
	defer cancel()
	if _, err := client.Attest(limited); cause.Of(err) != cause.BrokerUnavailable {
		t.Errorf("a broker that stays away: %v", err)
	}
	v.replays(t, 2)
}

// The image's annotation names a key at another host: the key comes from the
// policy's broker, and nobody connects to that host.
func TestLesson12_TheAnnotationNamesNoBroker(t *testing.T) {
	v := newVM(t, 0)
	s := newShelf(t, v.soft.Roots)
	s.put(t, v.rule())
	elsewhere, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var connections atomic.Int32
	go func() {
		for {
			c, err := elsewhere.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			c.Close()
		}
	}()
	defer elsewhere.Close()
	ctx := context.Background()
	session, err := v.client(t, s.policyBroker(t), nil).Attest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	key := strings.Replace(webKey, "kbs:///", "kbs://"+elsewhere.Addr().String()+"/", 1)
	options, err := keyrelease.UnwrapLayerKey(ctx, session, annotation(t, key))
	if err != nil || !strings.Contains(string(options), `"symkey"`) {
		t.Errorf("%d bytes, %v", len(options), err)
	}
	if n := connections.Load(); n != 0 {
		t.Errorf("%d connections to the host of the annotation", n)
	}
	if !strings.Contains(s.read(t, "audit.ndjson"), `"resource":"`+webKey+`","policy":"shop version 2","outcome":"ok"`) {
		t.Errorf("the policy's broker has not released %s:\n%s", webKey, s.read(t, "audit.ndjson"))
	}
}

// annotation wraps a layer key as the attestation-agent key provider does.
func annotation(t *testing.T, keyID string) string {
	t.Helper()
	block, err := aes.NewCipher(kek)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	options, err := json.Marshal(map[string]any{"symkey": bytes.Repeat([]byte{7}, 32)})
	if err != nil {
		t.Fatal(err)
	}
	iv := bytes.Repeat([]byte{9}, aead.NonceSize())
	packet, err := json.Marshal(map[string]any{"kid": keyID, "wrapped_data": aead.Seal(nil, iv, options, nil), "iv": iv, "wrap_type": "A256GCM"})
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(packet)
}
