package measurecmd

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/measure"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// predictedTDX is what tdx says.
type predictedTDX struct {
	*measure.TDXMeasurements
	Assumptions []string `json:"assumptions"`
	Proven      string   `json:"proven"`
	Unproven    []string `json:"unproven"`
}

func tdxCommand() *cobra.Command {
	var o out
	var ovmf, kernel, initrd, cmdline, memory, tables, rsdp, loader, separator string
	c := &cobra.Command{
		Use:   "tdx --ovmf FILE --kernel FILE --memory SIZE --acpi-tables FILE --acpi-rsdp FILE --acpi-loader FILE",
		Short: "Predict MRTD and RTMR 0 to 2 of a TDX launch by QEMU and OVMF with direct boot",
		Long: "Tdx prints what a TDX quote says of a launch of QEMU's q35 machine with -kernel. RTMR0 holds QEMU's\n" +
			"ACPI data, which depend on the whole machine: they are read from files that a guest of the same\n" +
			"machine copied from /sys/firmware/qemu_fw_cfg/by_name/etc/acpi/tables/raw, …/acpi/rsdp/raw and\n" +
			"…/table-loader/raw. The output says what it assumes, and what no recorded launch was compared with:\n" +
			"compare with the first quote of a machine that you trust before you release anything by it.",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := require(c, "ovmf", "kernel", "memory", "acpi-tables", "acpi-rsdp", "acpi-loader"); err != nil {
				return err
			}
			config := measure.TDXConfig{Separator: measure.Separator(separator)}
			var err error
			if config.Memory, err = size(memory); err != nil {
				return err
			}
			direct, err := directBoot(c, kernel, initrd, cmdline)
			if err != nil {
				return err
			}
			config.Direct = *direct
			for _, f := range []struct {
				path string
				max  int64
				to   *[]byte
			}{
				{ovmf, measure.MaxFirmware, &config.Firmware},
				{tables, measure.MaxACPI, &config.ACPI.Tables},
				{rsdp, measure.MaxACPI, &config.ACPI.RSDP},
				{loader, measure.MaxACPI, &config.ACPI.Loader},
			} {
				if *f.to, err = read(f.path, f.max); err != nil {
					return err
				}
			}
			m, err := measure.TDX(config)
			if err != nil {
				return err
			}
			return o.print(c, predictedTDX{m, measure.TDXAssumptions, measure.TDXProven, measure.TDXUnproven}, tdxText(m), release.Launch{
				Platform: release.PlatformTDX, TDX: &release.TDXLaunch{MRTD: m.MRTD, RTMR0: m.RTMR0, RTMR1: m.RTMR1, RTMR2: m.RTMR2},
			})
		},
	}
	f := c.Flags()
	f.StringVar(&ovmf, "ovmf", "", "firmware `FILE` with TDX metadata")
	f.StringVar(&kernel, "kernel", "", "UKI, or Linux kernel, `FILE`")
	f.StringVar(&initrd, "initrd", "", "initrd `FILE`, with a Linux kernel")
	f.StringVar(&cmdline, "append", "", "kernel command line, with a Linux kernel")
	f.StringVar(&memory, "memory", "", "memory of the machine, `SIZE` as 4G or 2048M")
	f.StringVar(&tables, "acpi-tables", "", "ACPI tables `FILE`")
	f.StringVar(&rsdp, "acpi-rsdp", "", "ACPI root pointer `FILE`")
	f.StringVar(&loader, "acpi-loader", "", "ACPI table loader `FILE`")
	f.StringVar(&separator, "separator", string(measure.SeparatorRTMR1), "register of the last separator: rtmr1, or rtmr0 with older edk2")
	o.flags(c)
	return c
}

func tdxText(m *measure.TDXMeasurements) string {
	var b strings.Builder
	fmt.Fprintf(&b, "MRTD  %s\nRTMR0 %s\nRTMR1 %s\nRTMR2 %s\n", m.MRTD, m.RTMR0, m.RTMR1, m.RTMR2)
	for _, a := range measure.TDXAssumptions {
		fmt.Fprintf(&b, "assumes %s\n", a)
	}
	fmt.Fprintf(&b, "proven %s\n", measure.TDXProven)
	for _, u := range measure.TDXUnproven {
		fmt.Fprintf(&b, "unproven %s\n", u)
	}
	return b.String()
}

// size reads QEMU's form of a size: a number and M or G.
func size(s string) (uint64, error) {
	units := map[string]uint64{"M": 1 << 20, "G": 1 << 30}
	if s != "" {
		unit, ok := units[s[len(s)-1:]]
		n, err := strconv.ParseUint(s[:len(s)-1], 10, 24)
		if ok && err == nil && n > 0 {
			return n * unit, nil
		}
	}
	return 0, cause.New(cause.Usage, "--memory is %q, expected a number and M or G", s)
}
