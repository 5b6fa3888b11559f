package platform

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/platform/swtpmtest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func start(t *testing.T) (*swtpmtest.TPM, *TPM) {
	t.Helper()
	sw, err := swtpmtest.Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sw.Stop() })
	p, err := OpenTPM(sw.Spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return sw, p
}

func TestEvidenceQuotesAllPCRsOverReportData(t *testing.T) {
	_, p := start(t)
	ctx := context.Background()
	if err := p.ExtendPCR(ctx, PCRLaunch, bytes.Repeat([]byte{1}, 32)); err != nil {
		t.Fatal(err)
	}
	var reportData [48]byte
	copy(reportData[:], bytes.Repeat([]byte{7}, 48))
	raw, err := p.Evidence(ctx, reportData, nil)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := kbs.DecodeTPMEvidence(raw)
	if err != nil {
		t.Fatal(err)
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](ev.Quote.Message)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(attest.ExtraData.Buffer, reportData[:32]) {
		t.Errorf("extraData %x is not the first 32 bytes of report_data", attest.ExtraData.Buffer)
	}
	want := sha256.Sum256(append(make([]byte, 32), bytes.Repeat([]byte{1}, 32)...))
	if ev.Quote.PCRs[PCRLaunch] != hex.EncodeToString(want[:]) {
		t.Errorf("PCR 8 is %s, expected %x", ev.Quote.PCRs[PCRLaunch], want)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(raw, &members); err != nil || len(members) != 2 {
		t.Errorf("evidence has members %v, expected tpm_quote and ak_public", members)
	}
}

func TestActivationProvesTheAK(t *testing.T) {
	_, p := start(t)
	ctx := context.Background()
	auth, err := p.Auth(ctx)
	if err != nil {
		t.Fatal(err)
	}
	challenge, pending, err := (&appraisal.TPM{}).Challenge(auth, randReader{})
	if err != nil {
		t.Fatal(err)
	}
	secret, err := p.Activate(ctx, challenge)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(secret, pending.Secret) {
		t.Error("the activated secret is not the broker's")
	}
	challenge.CredentialBlob[len(challenge.CredentialBlob)-1] ^= 1
	if _, err := p.Activate(ctx, challenge); cause.Of(err) != cause.EvidenceFailed {
		t.Errorf("a changed credential gave %v, expected %s", err, cause.EvidenceFailed)
	}
}

// The AK is found again by the broker after a restart of the daemon.
func TestTheSameTPMMakesTheSameAK(t *testing.T) {
	sw, p := start(t)
	a, err := p.Auth(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := OpenTPM(sw.Spec)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	b, err := again.Auth(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.AKPublic, b.AKPublic) {
		t.Error("another AK after reopening the TPM")
	}
}

func TestLesson07_TheRegisterCannotBeReset(t *testing.T) {
	_, p := start(t)
	ctx := context.Background()
	reg := p.PCR14()
	if reg.Index() != 14 {
		t.Fatalf("events go to PCR %d", reg.Index())
	}
	log, err := eventlog.Open(ctx, t.TempDir(), reg)
	if err != nil {
		t.Fatal(err)
	}
	e := eventlog.Event{Kind: eventlog.KindPolicy, Policy: "demo", PolicyVersion: 1,
		PolicyDigest: "sha256:" + strings.Repeat("ab", 32), Signers: []string{strings.Repeat("cd", 32)}}
	if err := log.Append(ctx, e); err != nil {
		t.Fatal(err)
	}
	before, err := reg.Read(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(before, make([]byte, 32)) {
		t.Fatal("PCR 14 is zero after an event: a reset could not be seen")
	}
	_, err = tpm2.PCRReset{PCRHandle: tpm2.AuthHandle{Handle: 14, Auth: tpm2.PasswordAuth(nil)}}.Execute(p.t)
	if err == nil {
		t.Error("TPM2_PCR_Reset of PCR 14 at locality 0 succeeded")
	}
	after, err := reg.Read(ctx)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("PCR 14 moved by a reset: %x, %x, %v", before, after, err)
	}
}

func TestForeignExtendIsSeen(t *testing.T) {
	_, p := start(t)
	ctx := context.Background()
	dir := t.TempDir()
	if _, err := eventlog.Open(ctx, dir, p.PCR14()); err != nil {
		t.Fatal(err)
	}
	if err := p.ExtendPCR(ctx, PCREvents, bytes.Repeat([]byte{9}, 32)); err != nil {
		t.Fatal(err)
	}
	if _, err := eventlog.Open(ctx, t.TempDir(), p.PCR14()); cause.Of(err) != cause.EventLogDiverged {
		t.Errorf("a foreign extend gave %v", err)
	}
}

// Lesson 35: extend, quote and read from many goroutines at once.
func TestLesson35_ExtendAndQuoteTogether(t *testing.T) {
	_, p := start(t)
	ctx := context.Background()
	var wg sync.WaitGroup
	errs := make(chan error, 30)
	for range 4 {
		wg.Add(3)
		go func() { defer wg.Done(); errs <- p.ExtendPCR(ctx, PCREvents, make([]byte, 32)) }()
		go func() { defer wg.Done(); _, err := p.Evidence(ctx, [48]byte{}, nil); errs <- err }()
		go func() { defer wg.Done(); _, err := p.ReadPCRs(ctx, 8, 14); errs <- err }()
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
}

// randReader is not random: the secret's value does not matter here.
type randReader struct{}

func (randReader) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(i*7 + 1)
	}
	return len(b), nil
}
