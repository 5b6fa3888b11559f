package measure

import "encoding/hex"

// Separator is the register that takes the separator of "ready to boot".
type Separator string

// edk2 puts it into RTMR1 (OvmfPkg/Tcg/TdTcg2Dxe, OnReadyToBoot); older ones,
// as the recorded log shows, into RTMR0.
const (
	SeparatorRTMR0 Separator = "rtmr0"
	SeparatorRTMR1 Separator = "rtmr1"
)

// TDXConfig is a TDX launch of QEMU's q35 with OVMF and direct boot.
type TDXConfig struct {
	Firmware  []byte
	Memory    uint64 // bytes
	ACPI      ACPI
	Direct    DirectBoot // Kernel: a UKI, with neither initrd nor command line, or a Linux kernel with both
	Separator Separator
}

// TDXMeasurements are what a quote would say, lowercase hex of 48 bytes.
type TDXMeasurements struct {
	MRTD  string `json:"mrtd"`
	RTMR0 string `json:"rtmr0"`
	RTMR1 string `json:"rtmr1"`
	RTMR2 string `json:"rtmr2"`
	// UKI says that the kernel is one.
	UKI bool `json:"-"`
}

// TDXAssumptions is what TDX stands on.
var TDXAssumptions = []string{
	"QEMU q35 with TDVF metadata from OVMF given as -bios, memory below 4 GiB as q35 lays it out",
	"ACPI tables are those of exactly this machine: QEMU version, devices, vCPUs and memory all count",
	"QEMU hands the kernel over as it is, which virtee/tdx-measure documents for OVMF 2025.05 and newer; older ones get a header that QEMU wrote into",
	"no Secure Boot variable and no boot option is set: a fresh variable store",
	"RTMR2: a Linux EFI stub that measures command line and initrd, and of a UKI systemd-stub 257",
}

// TDXUnproven is what no recorded launch was compared with.
var TDXUnproven = []string{
	"mrtd: no recorded launch came with its firmware; vendor kernels that extend after all pages of a section are added give another",
	"rtmr0: the TD HOB of 2.75 GiB of memory and more, and the ACPI data",
	"rtmr1 and rtmr2: the kernel, command line and initrd, since the recorded log came without them; a UKI, since there is no recorded launch of one",
}

// TDXProven is what a recorded log agrees with.
var TDXProven = "the recorded log of an OVMF direct boot has, digest by digest: the TD HOB (of 2 GiB), an empty 4 MiB image's variable store, Secure Boot variables, boot options, actions and separators, in this order (an older edk2: last separator in RTMR0)"

// TDX predicts MRTD and RTMR 0 to 2.
func TDX(c TDXConfig) (*TDXMeasurements, error) {
	if c.Separator != SeparatorRTMR0 && c.Separator != SeparatorRTMR1 {
		return nil, bad("separator in %q, expected rtmr0 or rtmr1", c.Separator)
	}
	fw, err := parseTDVF(c.Firmware)
	if err != nil {
		return nil, err
	}
	kernel, err := parsePE(c.Direct.Kernel)
	if err != nil {
		return nil, bad("kernel: %w", err)
	}
	var uki *UKI
	if isUKI(kernel) {
		if len(c.Direct.Initrd) > 0 || c.Direct.Cmdline != "" {
			return nil, bad("the kernel is a UKI: an initrd or a command line beside it would be measured elsewhere, and is not predicted")
		}
		if uki, err = ParseUKI(c.Direct.Kernel); err != nil {
			return nil, err
		}
	} else if len(c.Direct.Initrd) == 0 {
		return nil, bad("the kernel is no UKI: an initrd is needed")
	}
	mrtd := fw.mrtd()
	r0, err := fw.rtmr0(c.Memory, c.ACPI, c.Separator)
	if err != nil {
		return nil, err
	}
	r1, err := rtmr1(kernel, uki, c.Separator)
	if err != nil {
		return nil, err
	}
	r2, err := rtmr2(uki, &c.Direct)
	if err != nil {
		return nil, err
	}
	return &TDXMeasurements{hex.EncodeToString(mrtd[:]), hex.EncodeToString(r0), hex.EncodeToString(r1), hex.EncodeToString(r2), uki != nil}, nil
}

func isUKI(i *image) bool {
	for _, s := range i.sections {
		if s.Name == ".linux" {
			return true
		}
	}
	return false
}
