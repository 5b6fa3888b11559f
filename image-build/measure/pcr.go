package measure

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
)

// PCRConfig says what a UKI is booted with.
type PCRConfig struct {
	// Phases are the words that systemd-pcrphase has measured by the time of the
	// quote; nil for DefaultPhases.
	Phases []string
	// Initdata gives PCR 8; nil leaves it out.
	Initdata *policy.Initdata
	// PCR2 is what the machine's firmware leaves in PCR 2 where it measures
	// drivers of its own there, 32 bytes; nil for none.
	PCR2 []byte
}

// DefaultPhases are those of this project's image: none, since it has no
// systemd-pcrphase and a quote is the same at any time after the start. An image
// that has it and whose /init is no systemd measures sysinit, ready.
var DefaultPhases = []string{}

// PCRAssumptions is what PCRs stands on.
var PCRAssumptions = []string{
	"SHA-256 bank",
	"PCR 2: no option ROM and no driver but the firmware's own runs before the UKI; other firmware has another value, which --pcr2 gives",
	"PCR 0, 1, 3, 5, 7 are not pinned: firmware code and settings, boot variables, partition table, Secure Boot's keys are left to the host",
	"platform tpm: the TPM is the host's, and so is every PCR that it reports",
	"platform az-snp-vtpm, az-tdx-vtpm: the firmware is part of the paravisor's measurement, which the launch pins, and measures truly; its variables are the host's",
	"PCR 4, 9: firmware starts the UKI as its first boot option from the ESP, no boot loader before it",
	"PCR 9, 11: systemd-stub 257 and a Linux EFI stub that measures command line and initrd (6.12 does)",
	"PCR 9: load options, SMBIOS and the ESP add nothing to command line and initrd; PCR 12 and 13 are zero then",
	"PCR 11: systemd-pcrphase has measured the phases named here, and no other",
}

// PCRs predicts the PCRs of a booted UKI, by index, in lowercase hex.
func PCRs(u *UKI, c PCRConfig) (map[string]string, error) {
	if c.Phases == nil {
		c.Phases = DefaultPhases
	}
	if c.PCR2 == nil {
		c.PCR2 = pcr2()
	}
	if len(c.PCR2) != sha256.Size {
		return nil, fmt.Errorf("PCR 2 of %d bytes, expected %d", len(c.PCR2), sha256.Size)
	}
	pcr4, err := pcr4(u)
	if err != nil {
		return nil, err
	}
	pcr9, err := pcr9(u)
	if err != nil {
		return nil, err
	}
	pcr11, err := pcr11(u, c.Phases)
	if err != nil {
		return nil, err
	}
	out := map[string]string{
		"2": hex.EncodeToString(c.PCR2),
		"4": hex.EncodeToString(pcr4), "9": hex.EncodeToString(pcr9), "11": hex.EncodeToString(pcr11),
		"12": release.ZeroPCR, // what the stub is given beside the UKI: command lines, credentials, add-ons
		"13": release.ZeroPCR, // system extensions
	}
	if c.Initdata != nil {
		v, err := c.Initdata.PCR8()
		if err != nil {
			return nil, err
		}
		out["8"] = hex.EncodeToString(v)
	}
	return out, nil
}
