package measure

import "crypto/sha512"

// rtmr2 holds what PCR 8 to 15 would (UEFI 2.10, section 38.4.1): of a UKI its
// sections, as systemd-stub measures them, then the kernel's command line and
// initrd. Of a kernel that QEMU loads with an initrd, the firmware puts
// initrd=initrd behind the command line (edk2, OvmfPkg/Library/
// X86QemuLoadImageLib or GenericQemuLoadImageLib). Phases are not measured
// there: systemd-pcrphase knows a TPM alone.
func rtmr2(u *UKI, direct *DirectBoot) ([]byte, error) {
	r := newRegister(sha512.New384)
	if u != nil {
		cmdline, err := u.Cmdline()
		if err != nil {
			return nil, err
		}
		u.measureSections(r)
		r.event(loadOptions(cmdline))
		r.event(u.initrd())
		return r.value, nil
	}
	r.event(loadOptions(direct.Cmdline + " initrd=initrd"))
	r.event(direct.Initrd)
	return r.value, nil
}
