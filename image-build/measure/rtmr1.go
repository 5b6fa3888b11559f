package measure

import "crypto/sha512"

// rtmr1 holds what the firmware ran (edk2, OvmfPkg/Library/QemuBootOrderLib and
// OvmfPkg/Tcg/TdTcg2Dxe, OnReadyToBoot and OnExitBootServices): the kernel that
// QEMU gave, before the boot options are looked at, and, of a UKI, the kernel in
// it.
func rtmr1(kernel *image, u *UKI, sep Separator) ([]byte, error) {
	r := newRegister(sha512.New384)
	if err := r.image(kernel); err != nil {
		return nil, err
	}
	r.event([]byte(evCallingApplication))
	if sep == SeparatorRTMR1 {
		r.event(evSeparator)
	}
	if u != nil {
		if err := r.image(u.kernel); err != nil {
			return nil, err
		}
	}
	r.event([]byte(evExitBoot))
	r.event([]byte(evExitBootDone))
	return r.value, nil
}
