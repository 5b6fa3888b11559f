package platform_test

import (
	"context"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/platformtest"
	"github.com/cc-runtime/cvm-agent/agent/platform/swtpmtest"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// softTPM starts a TPM for one test.
func softTPM(t *testing.T) *swtpmtest.TPM {
	t.Helper()
	sw, err := swtpmtest.Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sw.Stop() })
	return sw
}

func open(t *testing.T, h platform.Hardware, o platform.Options) *platform.Guest {
	t.Helper()
	if o.RunDir == "" {
		o.RunDir = t.TempDir()
	}
	g, err := platform.Open(context.Background(), h, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	return g
}

const (
	snp   = policy.PlatformSNP
	tdx   = policy.PlatformTDX
	tpm   = policy.PlatformTPM
	azSNP = policy.PlatformAzSNPvTPM
)

// Devices say what there is, the policy what is allowed; nothing is guessed.
func TestDetectionNeverGuesses(t *testing.T) {
	sw := softTPM(t)
	device := &snptest.Device{Chain: snptest.New(t, snptest.Config{})}
	td := platformtest.NewTD(t, tdxtest.New(t, tdxtest.Config{}), tdxtest.Report{})
	both := platformtest.SNPByDevice(device)
	both.Files = platformtest.NewFiles(platformtest.DeviceSEV, platformtest.DeviceTDX)
	for name, c := range map[string]struct {
		hardware platform.Hardware
		tpm      string
		allowed  []policy.Platform
		is       policy.Platform // "": refused
		why      string
	}{
		"a SEV-SNP device":                      {platformtest.SNPByDevice(device), "", []policy.Platform{snp, tdx, tpm}, snp, ""},
		"a SEV-SNP provider":                    {platformtest.SNPByTSM(device, 0), "", []policy.Platform{snp}, snp, ""},
		"a TDX device":                          {td.ByDevice(), "", []policy.Platform{snp, tdx, tpm}, tdx, ""},
		"a TDX provider":                        {td.ByTSM(), "", []policy.Platform{tdx}, tdx, ""},
		"a TPM alone":                           {platformtest.Bare(nil), sw.Spec, []policy.Platform{snp, tpm}, tpm, ""},
		"a TPM beside SEV-SNP, snp allowed":     {platformtest.SNPByDevice(device), sw.Spec, []policy.Platform{snp}, snp, ""},
		"a TPM beside SEV-SNP, both allowed":    {platformtest.SNPByDevice(device), sw.Spec, []policy.Platform{tpm, snp}, "", "can be platform snp (/dev/sev-guest) and tpm"},
		"a TPM beside TDX, both allowed":        {td.ByTSM(), sw.Spec, []policy.Platform{tpm, tdx}, "", "can be platform tdx (/dev/tdx_guest) and tpm"},
		"SEV-SNP and TDX, one allowed":          {both, "", []policy.Platform{snp}, snp, ""},
		"SEV-SNP and TDX, both allowed":         {both, "", []policy.Platform{snp, tdx}, "", "snp (/dev/sev-guest) and tdx (/dev/tdx_guest)"},
		"a platform that the policy leaves out": {td.ByDevice(), "", []policy.Platform{snp, azSNP}, "", "this is platform tdx (/dev/tdx_guest), the policy allows [snp az-snp-vtpm]"},
		"a TPM that the policy leaves out":      {platformtest.Bare(nil), sw.Spec, []policy.Platform{snp}, "", "this is platform tpm"},
		"a policy that allows nothing":          {platformtest.Bare(nil), sw.Spec, nil, "", "the policy allows []"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := open(t, c.hardware, platform.Options{TPM: c.tpm}).Choose(c.allowed, 0)
			if c.is == "" {
				if cause.Of(err) != cause.PlatformNotAllowed || !strings.Contains(err.Error(), c.why) {
					t.Fatalf("got %v, expected %s with %q", err, cause.PlatformNotAllowed, c.why)
				}
				return
			}
			if err != nil || a.TEE() != string(c.is) {
				t.Fatalf("got %v, %v, expected %s", a, err, c.is)
			}
		})
	}
}

func TestAnUnknownProviderIsRefused(t *testing.T) {
	h := platformtest.Bare(nil)
	h.TSM = platformtest.TSM("arm_cca_guest", 0, nil)
	if _, err := platform.Open(context.Background(), h, platform.Options{}); cause.Of(err) != cause.PlatformNotAllowed || !strings.Contains(err.Error(), "arm_cca_guest") {
		t.Errorf("got %v", err)
	}
}

func TestLesson03_NoDeviceFailsClosed(t *testing.T) {
	all := []policy.Platform{snp, tdx, tpm, azSNP, policy.PlatformAzTDXvTPM}
	for name, c := range map[string]struct {
		tpm  string
		code cause.Code
	}{
		"no TPM configured":         {"", cause.PlatformNotAllowed},
		"a TPM that is not there":   {"device:/nonexistent/tpm", cause.TPMUnavailable},
		"a socket that nobody owns": {"unix:/nonexistent/tpm.sock", cause.TPMUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			g := open(t, platformtest.Bare(nil), platform.Options{TPM: c.tpm})
			if _, err := g.Choose(all, 0); cause.Of(err) != c.code || !strings.Contains(err.Error(), "no SEV-SNP") {
				t.Errorf("Choose gave %v, expected %s", err, c.code)
			}
			if checked, err := g.CheckLaunch(context.Background(), initdata(t)); checked || cause.Of(err) != c.code {
				t.Errorf("CheckLaunch gave %v, %v, expected %s", checked, err, c.code)
			}
		})
	}
	// The machine that runs this test is no TEE: what programs use finds none.
	if _, err := platform.OpenTPM("device:/nonexistent/tpm"); cause.Of(err) != cause.TPMUnavailable {
		t.Errorf("a missing device gave %v", err)
	}
}

func TestLesson04_ATPMNeverStandsInForATEE(t *testing.T) {
	sw := softTPM(t)
	device := &snptest.Device{Chain: snptest.New(t, snptest.Config{})}
	td := platformtest.NewTD(t, tdxtest.New(t, tdxtest.Config{}), tdxtest.Report{})
	for name, h := range map[string]platform.Hardware{"SEV-SNP": platformtest.SNPByDevice(device), "TDX": td.ByDevice(), "TDX by configfs": td.ByTSM()} {
		_, err := open(t, h, platform.Options{TPM: sw.Spec}).Choose([]policy.Platform{tpm}, 0)
		if cause.Of(err) != cause.PlatformNotAllowed || !strings.Contains(err.Error(), "does not stand in") {
			t.Errorf("a TPM beside %s gave %v", name, err)
		}
	}
	if _, err := open(t, platformtest.Bare(nil), platform.Options{TPM: sw.Spec}).Choose([]policy.Platform{snp}, 0); cause.Of(err) != cause.PlatformNotAllowed {
		t.Errorf("a TPM where the policy allows snp alone gave %v", err)
	}
}

// initdata is a document that launches are bound to.
func initdata(t *testing.T) *policy.Initdata {
	t.Helper()
	raw, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: "{}"})
	if err != nil {
		t.Fatal(err)
	}
	in, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// Whatever a launch is bound to is the hardware's word, and zero is no "unset".
func TestLesson05_ALaunchThatIsNotBoundIsRefused(t *testing.T) {
	ctx := context.Background()
	in := initdata(t)
	sw := softTPM(t)
	p, err := platform.OpenTPM(sw.Spec)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	chain, host := snptest.New(t, snptest.Config{}), tdxtest.New(t, tdxtest.Config{})
	snpBy := func(h []byte) *snptest.Device {
		return &snptest.Device{Chain: chain, Options: snptest.Options{HostData: h}}
	}
	tdBy := func(h []byte) *platformtest.TD {
		return platformtest.NewTD(t, host, tdxtest.Report{MRConfigID: [48]byte(h)})
	}
	other := make([]byte, 48)
	other[0] = 1
	zero := make([]byte, 48)
	for name, c := range map[string]struct {
		h    platform.Hardware
		code cause.Code
	}{
		"HOST_DATA":                      {platformtest.SNPByTSM(snpBy(in.HostData()), 0), ""},
		"HOST_DATA at VMPL 2":            {platformtest.SNPByTSM(snpBy(in.HostData()), 2), ""},
		"HOST_DATA by the device":        {platformtest.SNPByDevice(snpBy(in.HostData())), ""},
		"HOST_DATA zero":                 {platformtest.SNPByTSM(snpBy(zero[:32]), 0), cause.LaunchUnbound},
		"HOST_DATA zero by the device":   {platformtest.SNPByDevice(snpBy(zero[:32])), cause.LaunchUnbound},
		"HOST_DATA of another document":  {platformtest.SNPByDevice(snpBy(other[:32])), cause.LaunchBinding},
		"MRCONFIGID":                     {tdBy(in.MRConfigID()).ByTSM(), ""},
		"MRCONFIGID zero":                {tdBy(zero).ByTSM(), cause.LaunchUnbound},
		"MRCONFIGID of another document": {tdBy(other).ByDevice(), cause.LaunchBinding},
	} {
		t.Run(name, func(t *testing.T) {
			checked, err := open(t, c.h, platform.Options{}).CheckLaunch(ctx, in)
			if !checked || cause.Of(err) != c.code {
				t.Errorf("checked %t, %v, expected %q", checked, err, c.code)
			}
		})
	}
	// A TPM beside a TEE does not make up for an unbound TEE.
	digest := in.Digest()
	if err := p.ExtendPCR(ctx, platform.PCRLaunch, digest); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, platformtest.SNPByTSM(snpBy(zero[:32]), 0), platform.Options{TPM: sw.Spec}).CheckLaunch(ctx, in); cause.Of(err) != cause.LaunchUnbound {
		t.Errorf("a measured TPM beside an unbound TEE gave %v", err)
	}
	if checked, err := open(t, platformtest.Bare(nil), platform.Options{TPM: sw.Spec}).CheckLaunch(ctx, in); !checked || err != nil {
		t.Errorf("PCR 8: %t, %v", checked, err)
	}
	if err := sw.Reboot(); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, platformtest.Bare(nil), platform.Options{TPM: sw.Spec}).CheckLaunch(ctx, in); cause.Of(err) != cause.LaunchUnbound {
		t.Errorf("PCR 8 zero: %v", err)
	}
	// A TDX kernel without the device that gives TDREPORTs: a quote is the host's word.
	td := tdBy(in.MRConfigID())
	td.Files.Remove(platformtest.DeviceTDX)
	if _, err := open(t, td.ByTSM(), platform.Options{}).CheckLaunch(ctx, in); cause.Of(err) != cause.EvidenceFailed {
		t.Errorf("without a TDREPORT: %v", err)
	}
}
