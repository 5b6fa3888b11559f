package binding

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"testing"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/platformtest"
	"github.com/cc-runtime/cvm-agent/agent/platform/swtpmtest"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func initdata(t *testing.T, algorithm string) *policy.Initdata {
	t.Helper()
	raw, err := policy.PackInitdata(algorithm, map[string]string{policy.KeyPolicy: "{}"})
	if err != nil {
		t.Fatal(err)
	}
	in, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// Lesson 5: a launch field of zeros is not "unset", and no TPM stands in.
func TestLesson05_AnUnboundTEEIsRefused(t *testing.T) {
	ctx, in := context.Background(), initdata(t, "sha384")
	for name, h := range map[string]platform.Hardware{
		"HOST_DATA":  platformtest.SNPByDevice(&snptest.Device{Chain: snptest.New(t, snptest.Config{})}),
		"MRCONFIGID": platformtest.NewTD(t, tdxtest.New(t, tdxtest.Config{}), tdxtest.Report{}).ByDevice(),
	} {
		l, err := Open(ctx, h, "unix:/nonexistent")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := l.CheckFresh(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := l.Bind(ctx, in); cause.Of(err) != cause.LaunchUnbound {
			t.Errorf("%s of zeros: %v", name, err)
		}
	}
}

// Lesson 7: PCR 8 takes the digest, which no software can reset; the resettable
// registers are left alone, and a second binding is seen.
func TestLesson07_TheDigestGoesIntoPCR8Once(t *testing.T) {
	dir, err := os.MkdirTemp("", "binding")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	tpm, err := swtpmtest.Start(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tpm.Stop() }()
	ctx, in := context.Background(), initdata(t, "sha256")
	p, err := platform.OpenTPM(tpm.Spec)
	if err != nil {
		t.Fatal(err)
	}
	before, err := p.ReadPCRs(ctx, 16, 23, 14)
	if err != nil {
		t.Fatal(err)
	}
	_ = p.Close()

	l, err := Open(ctx, platformtest.Bare(nil), tpm.Spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.CheckFresh(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Bind(ctx, initdata(t, "sha512")); cause.Of(err) != cause.InitdataMalformed {
		t.Errorf("sha512: %v", err)
	}
	if _, err := l.Bind(ctx, in); err != nil {
		t.Fatal(err)
	}
	if err := l.CheckFresh(ctx); cause.Of(err) != cause.RegisterNotZero {
		t.Errorf("once more: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if p, err = platform.OpenTPM(tpm.Spec); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	after, err := p.ReadPCRs(ctx, 8, 16, 23, 14)
	if err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(append(make([]byte, 32), in.Digest()...))
	if !bytes.Equal(after[8], want[:]) {
		t.Errorf("PCR 8 %x, expected %x", after[8], want)
	}
	for _, i := range []int{14, 16, 23} {
		if !bytes.Equal(after[i], before[i]) {
			t.Errorf("PCR %d was extended", i)
		}
	}
}
