package launch

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/platformtest"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The daemon's platform by what the hardware shows and the policy allows: its
// register, its log over a restart, and what a later policy may change.
func TestThePlatformOfADaemon(t *testing.T) {
	ctx := context.Background()
	raw, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: "{}"})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	chain, host := snptest.New(t, snptest.Config{}), tdxtest.New(t, tdxtest.Config{})
	td := platformtest.NewTD(t, host, tdxtest.Report{MRConfigID: [48]byte(doc.MRConfigID())})
	device := &snptest.Device{Chain: chain, Options: snptest.Options{HostData: doc.HostData()}}
	both := platformtest.SNPByDevice(device)
	both.Files, both.TDX = td.Files, td.ByDevice().TDX
	td.Files.Set(platformtest.DeviceSEV, nil)
	alone := platformtest.NewTD(t, host, tdxtest.Report{MRConfigID: [48]byte(doc.MRConfigID())})
	first := eventlog.Event{Kind: eventlog.KindPolicy, Policy: "demo", PolicyVersion: 1, PolicyDigest: "sha256:" + strings.Repeat("ab", 32), Signers: []string{strings.Repeat("cd", 32)}}
	for name, c := range map[string]struct {
		h        platform.Hardware
		is       policy.Platform
		register string
	}{
		"SEV-SNP":                           {platformtest.SNPByTSM(device, 0), policy.PlatformSNP, "none"},
		"TDX":                               {alone.ByTSM(), policy.PlatformTDX, "rtmr3"},
		"both, of which the policy has one": {both, policy.PlatformSNP, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			r := real{config: DefaultConfig(), logger: slog.New(slog.DiscardHandler), hardware: c.h}
			r.config.TPM, r.config.RunDir = "", t.TempDir()
			allows := &policy.Policy{Platforms: []policy.Platform{c.is}}
			var log []byte
			for range 2 { // the second is the daemon after a restart
				p, err := r.Platform(ctx, raw)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := p.Allow(ctx, allows); err != nil || got != c.is || p.Register() != c.register {
					t.Fatalf("%s, %v, expected %s", got, err, c.is)
				}
				l, err := p.Log(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if err := l.AppendOnce(ctx, first); err != nil {
					t.Fatal(err)
				}
				if log != nil && !bytes.Equal(log, l.Bytes()) {
					t.Error("the log changed over a restart")
				}
				log = l.Bytes()
				// A later policy may not turn the guest into another platform.
				if _, err := p.Allow(ctx, &policy.Policy{Platforms: []policy.Platform{policy.PlatformTPM}}); cause.Of(err) != cause.PlatformNotAllowed {
					t.Errorf("another platform: %v", err)
				}
				if _, err := p.Allow(ctx, allows); err != nil {
					t.Error(err)
				}
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if err := p.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	other, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: "{ }"})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		h       platform.Hardware
		in      []byte
		allowed policy.Platform
		code    cause.Code
	}{
		"other initdata":                       {platformtest.SNPByTSM(device, 0), other, policy.PlatformSNP, cause.LaunchBinding},
		"other initdata, found after a choice": {both, other, policy.PlatformTDX, cause.LaunchBinding},
		"no device":                            {platformtest.Bare(nil), raw, policy.PlatformTPM, cause.PlatformNotAllowed},
		"a platform that is not allowed":       {alone.ByTSM(), raw, policy.PlatformSNP, cause.PlatformNotAllowed},
	} {
		r := real{config: DefaultConfig(), logger: slog.New(slog.DiscardHandler), hardware: c.h}
		r.config.TPM, r.config.RunDir = "", t.TempDir()
		p, err := r.Platform(ctx, c.in)
		if err == nil {
			_, err = p.Allow(ctx, &policy.Policy{Platforms: []policy.Platform{c.allowed}})
		}
		if cause.Of(err) != c.code {
			t.Errorf("%s gave %v, expected %s", name, err, c.code)
		}
	}
}

func TestPlatformConfiguration(t *testing.T) {
	const head = "trust: {signers: [\"" + "abababababababababababababababababababababababababababababababab" + "\"]}\n"
	good := head + "tpm: \"\"\nattestationKey: {algorithm: ecc, certificate: \"nv:0x01c10000\"}\nazure: {vcek: /etc/cvm-agent/vcek.pem, thim: \"http://169.254.169.254\"}\n"
	c, err := DecodeConfig([]byte(good))
	if err != nil || c.TPM != "" || c.AttestationKey.Algorithm != "ecc" || c.Azure.THIM == "" {
		t.Fatalf("%+v, %v", c, err)
	}
	for name, text := range map[string]string{
		"a TPM of no kind":       "tpm: /dev/tpm0\n",
		"an unknown algorithm":   "attestationKey: {algorithm: dsa}\n",
		"a certificate nowhere":  "attestationKey: {certificate: here}\n",
		"an unknown member":      "attestationKey: {key: x}\n",
		"a relative certificate": "azure: {vcek: vcek.pem}\n",
		"a service with a path":  "azure: {thim: \"http://h/metadata\"}\n",
	} {
		if _, err := DecodeConfig([]byte(head + text)); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}
