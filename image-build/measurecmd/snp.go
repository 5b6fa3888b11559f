package measurecmd

import (
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/measure"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func snpCommand() *cobra.Command {
	var o out
	var ovmf, ovmfHash, kernel, initrd, cmdline, vcpuType, features, vmm string
	var vcpus int
	c := &cobra.Command{
		Use:   "snp --ovmf FILE [--kernel FILE [--initrd FILE] [--append STRING]] --vcpus N --vcpu-type TYPE",
		Short: "Predict the SEV-SNP launch digest",
		Long: "Snp prints MEASUREMENT of the attestation report of a launch. With --kernel it is that of measured\n" +
			"direct boot (QEMU's kernel-hashes=on): kernel, initrd and command line count through their hashes.\n" +
			"With --ovmf-hash the digest after the firmware's pages is given, and the file's end is read for its\n" +
			"metadata alone. What the digest does not show goes to standard error, as lines \"assumes …\".",
		Example: "  cvmctl measure snp --ovmf OVMF.amdsev.fd --kernel uki.efi --vcpus 4 --vcpu-type EPYC-v4 \\\n" +
			"    --guest-features 0x1 --output json",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := require(c, "ovmf", "vcpus"); err != nil {
				return err
			}
			config := measure.SNPConfig{VCPUs: vcpus, VMM: measure.VMM(vmm)}
			var err error
			if config.Features, err = number("guest-features", features); err != nil {
				return err
			}
			if config.VMM == measure.QEMU || vcpuType != "" {
				if err := require(c, "vcpu-type"); err != nil {
					return err
				}
				if config.VCPUSignature, err = measure.VCPUSignature(vcpuType); err != nil {
					return cause.New(cause.Usage, "--vcpu-type: %q, expected one of %s", vcpuType, strings.Join(measure.VCPUTypes(), ", "))
				}
			}
			if ovmfHash != "" {
				config.FirmwareDigest = new([48]byte)
				if err := bytesOf("ovmf-hash", ovmfHash, config.FirmwareDigest[:]); err != nil {
					return err
				}
			}
			if config.Firmware, err = read(ovmf, measure.MaxFirmware); err != nil {
				return err
			}
			if config.Direct, err = directBoot(c, kernel, initrd, cmdline); err != nil {
				return err
			}
			digest, err := measure.SNP(config)
			if err != nil {
				return err
			}
			text := hex.EncodeToString(digest[:])
			for _, a := range measure.SNPAssumptions(config.Direct != nil) {
				fmt.Fprintf(c.ErrOrStderr(), "assumes %s\n", a)
			}
			return o.print(c, predictedSNP{text}, text+"\n", release.Launch{Platform: release.PlatformSNP, SNP: &release.SNPLaunch{Measurement: text}})
		},
	}
	f := c.Flags()
	f.StringVar(&ovmf, "ovmf", "", "firmware `FILE`")
	f.StringVar(&ovmfHash, "ovmf-hash", "", "launch digest after the firmware's pages, `HEX`, in place of measuring the file")
	f.StringVar(&kernel, "kernel", "", "kernel or UKI `FILE`")
	f.StringVar(&initrd, "initrd", "", "initrd `FILE`")
	f.StringVar(&cmdline, "append", "", "kernel command line")
	f.IntVar(&vcpus, "vcpus", 0, "number of vCPUs")
	f.StringVar(&vcpuType, "vcpu-type", "", "QEMU's CPU model, as EPYC-v4; not needed for ec2 and gce")
	f.StringVar(&features, "guest-features", "0x1", "SEV_FEATURES of the vCPUs, `HEX`")
	f.StringVar(&vmm, "vmm", string(measure.QEMU), "who launches: qemu, ec2 or gce")
	_ = c.RegisterFlagCompletionFunc("vcpu-type", cobra.FixedCompletions(measure.VCPUTypes(), cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("vmm", cobra.FixedCompletions([]string{"qemu", "ec2", "gce"}, cobra.ShellCompDirectiveNoFileComp))
	o.flags(c)
	return c
}

// predictedSNP is what snp prints as JSON.
type predictedSNP struct {
	LaunchDigest string `json:"launchDigest"`
}

// directBoot reads what QEMU is given; nil without a kernel.
func directBoot(c *cobra.Command, kernel, initrd, cmdline string) (*measure.DirectBoot, error) {
	if kernel == "" {
		if c.Flags().Changed("initrd") || c.Flags().Changed("append") {
			return nil, cause.New(cause.Usage, "--initrd and --append need --kernel")
		}
		return nil, nil
	}
	if len(cmdline) > measure.MaxCmdline || strings.ContainsRune(cmdline, 0) {
		return nil, cause.New(cause.Usage, "--append has %d bytes, at most %d without NUL are accepted", len(cmdline), measure.MaxCmdline)
	}
	d := &measure.DirectBoot{Cmdline: cmdline}
	var err error
	if d.Kernel, err = read(kernel, measure.MaxKernel); err != nil {
		return nil, err
	}
	if initrd != "" {
		if d.Initrd, err = read(initrd, measure.MaxInitrd); err != nil {
			return nil, err
		}
	}
	return d, nil
}
