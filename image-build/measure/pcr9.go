package measure

import "crypto/sha256"

// pcr9 holds what the kernel's EFI stub was given: its command line, then the
// initrd with all that systemd-stub put behind it (Linux, drivers/firmware/efi/
// libstub/efi-stub-helper.c, efi_convert_cmdline and efi_load_initrd; systemd,
// docs/TPM2_PCR_MEASUREMENTS.md).
func pcr9(u *UKI) ([]byte, error) {
	cmdline, err := u.Cmdline()
	if err != nil {
		return nil, err
	}
	r := newRegister(sha256.New)
	r.event(loadOptions(cmdline))
	r.event(u.initrd())
	return r.value, nil
}
