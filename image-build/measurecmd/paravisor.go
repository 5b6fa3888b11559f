package measurecmd

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// where says whose PCRs a launch entry of pcr is about.
type where struct {
	platform, paravisor string
	rtmr                [3]string
}

var (
	pcrPlatforms = []string{release.PlatformTPM, release.PlatformAzSNPvTPM, release.PlatformAzTDXvTPM}
	rtmrFlags    = [3]string{"paravisor-rtmr0", "paravisor-rtmr1", "paravisor-rtmr2"}
)

func (w *where) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&w.platform, "platform", release.PlatformTPM, "platform of the launch entry: "+strings.Join(pcrPlatforms, ", "))
	f.StringVar(&w.paravisor, "paravisor", "", "what the TEE measured of Azure's paravisor, `HEX`: MEASUREMENT for az-snp-vtpm, MRTD for az-tdx-vtpm")
	for i, name := range rtmrFlags {
		f.StringVar(&w.rtmr[i], name, "", "for az-tdx-vtpm: the paravisor's RTMR"+name[len(name)-1:]+", `HEX`")
	}
	_ = c.RegisterFlagCompletionFunc("platform", cobra.FixedCompletions(pcrPlatforms, cobra.ShellCompDirectiveNoFileComp))
}

// entry is the launch entry but for its label and PCRs. Each part that the
// platform's evidence is compared in has to be given, and no other: a flag that
// is silently ignored looks like one that is pinned.
func (w *where) entry(c *cobra.Command) (release.Launch, error) {
	l := release.Launch{Platform: w.platform, PCRs: map[string]string{}}
	if !slices.Contains(pcrPlatforms, w.platform) {
		return l, cause.New(cause.Usage, "--platform is %q, expected %s", w.platform, strings.Join(pcrPlatforms, ", "))
	}
	tdx := w.platform == release.PlatformAzTDXvTPM
	for _, f := range []struct {
		name, value string
		needed      bool
	}{
		{"paravisor", w.paravisor, w.platform != release.PlatformTPM},
		{rtmrFlags[0], w.rtmr[0], tdx}, {rtmrFlags[1], w.rtmr[1], tdx}, {rtmrFlags[2], w.rtmr[2], tdx},
	} {
		switch {
		case f.needed && f.value == "":
			return l, cause.New(cause.Usage, "%s: --%s is missing: --platform %s needs it, since its PCRs are worth what the paravisor is that keeps them, and the entry pins both", c.CommandPath(), f.name, w.platform)
		case f.needed:
			if err := bytesOf(f.name, f.value, make([]byte, 48)); err != nil {
				return l, err
			}
		case c.Flags().Changed(f.name):
			return l, cause.New(cause.Usage, "--%s means nothing for --platform %s", f.name, w.platform)
		}
	}
	measured := strings.ToLower(w.paravisor)
	switch w.platform {
	case release.PlatformAzSNPvTPM:
		l.SNP = &release.SNPLaunch{Measurement: measured}
	case release.PlatformAzTDXvTPM:
		l.TDX = &release.TDXLaunch{MRTD: measured, RTMR0: strings.ToLower(w.rtmr[0]), RTMR1: strings.ToLower(w.rtmr[1]), RTMR2: strings.ToLower(w.rtmr[2])}
	}
	return l, nil
}
