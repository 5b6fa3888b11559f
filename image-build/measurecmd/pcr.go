package measurecmd

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/measure"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// predicted is what pcr says.
type predicted struct {
	PCRs        map[string]string `json:"pcrs"` // SHA-256 bank, by index
	Phases      []string          `json:"phases"`
	Assumptions []string          `json:"assumptions"`
}

func pcrCommand() *cobra.Command {
	var o out
	var image, uki, initdata, phases, pcr2 string
	var in where
	c := &cobra.Command{
		Use:   "pcr --image DISK | --uki FILE [--initdata FILE] [--phases WORD:WORD…] [--pcr2 HEX] [--platform NAME [--paravisor HEX]]",
		Short: "Predict PCRs 2, 4, 9, 11, 12 and 13 of a booted image, and 8 for an initdata",
		Long: "Pcr prints what a TPM's PCRs (SHA-256) hold once the image has booted from its disk. With --image the\n" +
			"UKI is /EFI/BOOT/BOOTX64.EFI of the disk's EFI system partition. PCR 11 depends on how far the boot\n" +
			"has come where systemd-pcrphase is: sysinit:ready if /init is not systemd. This project's image has none.\n" +
			"PCR 2 is that of firmware to which nobody added a driver. Where the machine's own firmware measures drivers\n" +
			"there, give what it leaves with --pcr2, from a boot of a machine that you trust.\n" +
			"A launch entry never names PCR 8: the launch policy, which release rules name, is what it holds.\n" +
			"An entry of an Azure platform also pins the paravisor, which keeps the PCRs: what SEV-SNP or TDX measured\n" +
			"of it is given with --paravisor, and no file predicts it. Take it from the evidence of a guest that you\n" +
			"trust: `cvmctl verify evidence --output json` has it among the facts.",
		Example: "  cvmctl measure pcr --image disk.raw --initdata initdata.toml\n" +
			"  cvmctl measure pcr --uki uki.efi --format reference-values --label guest-1.4 --into reference.yaml",
		RunE: func(c *cobra.Command, _ []string) error {
			if (image == "") == (uki == "") {
				return cause.New(cause.Usage, "give exactly one of --image and --uki")
			}
			entry, err := in.entry(c)
			if err != nil {
				return err
			}
			u, err := readUKI(image, uki)
			if err != nil {
				return err
			}
			config := measure.PCRConfig{Phases: []string{}}
			if phases != "" {
				config.Phases = strings.Split(phases, ":")
			}
			if initdata != "" {
				data, err := read(initdata, policy.MaxInitdata)
				if err != nil {
					return err
				}
				if config.Initdata, err = policy.ParseInitdata(data); err != nil {
					return named(initdata, err)
				}
			}
			if pcr2 != "" {
				config.PCR2 = make([]byte, 32)
				if err := bytesOf("pcr2", pcr2, config.PCR2); err != nil {
					return err
				}
				if bytes.Equal(config.PCR2, make([]byte, 32)) {
					return cause.New(cause.Usage, "--pcr2 is zero: such firmware measures nothing")
				}
			}
			pcrs, err := measure.PCRs(u, config)
			if err != nil {
				return err
			}
			for _, i := range release.PinnedPCRs {
				entry.PCRs[i] = pcrs[i]
			}
			return o.print(c, predicted{pcrs, config.Phases, measure.PCRAssumptions}, pcrText(pcrs), entry)
		},
	}
	f := c.Flags()
	f.StringVar(&image, "image", "", "GPT disk image `FILE`")
	f.StringVar(&uki, "uki", "", "unified kernel image `FILE`")
	f.StringVar(&initdata, "initdata", "", "initdata `FILE`, for PCR 8")
	f.StringVar(&phases, "phases", strings.Join(measure.DefaultPhases, ":"), "boot phases measured into PCR 11, `WORD:WORD…`; empty for none")
	f.StringVar(&pcr2, "pcr2", "", "PCR 2 that the machine's firmware leaves, `HEX`; default: no driver was measured there")
	in.flags(c)
	o.flags(c)
	return c
}

func pcrText(pcrs map[string]string) string {
	var b strings.Builder
	for _, i := range []string{"2", "4", "8", "9", "11", "12", "13"} {
		if v, ok := pcrs[i]; ok {
			fmt.Fprintf(&b, "PCR %-2s %s\n", i, v)
		}
	}
	for _, a := range measure.PCRAssumptions {
		fmt.Fprintf(&b, "assumes %s\n", a)
	}
	return b.String()
}

func readUKI(image, uki string) (*measure.UKI, error) {
	if uki != "" {
		data, err := read(uki, measure.MaxKernel)
		if err != nil {
			return nil, err
		}
		u, err := measure.ParseUKI(data)
		return u, named(uki, err)
	}
	f, s, err := bounded.OpenNamed(image)
	if err != nil {
		return nil, cause.Wrap(cause.Usage, err)
	}
	defer f.Close()
	data, err := measure.UKIFromDisk(f, s.Size())
	if err != nil {
		return nil, named(image, err)
	}
	u, err := measure.ParseUKI(data)
	return u, named(image, err)
}
