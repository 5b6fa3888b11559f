package measure

import "crypto/sha256"

// pcr4 holds the boot manager's code (TCG PC Client Platform Firmware Profile
// 1.06, section 3.3.4.5): the attempt, the separator, the UKI as the firmware
// loads it and the kernel as the stub has it loaded (systemd 257,
// src/boot/linux.c, linux_exec).
func pcr4(u *UKI) ([]byte, error) {
	r := newRegister(sha256.New)
	r.event([]byte(evCallingApplication))
	r.event(evSeparator)
	if err := r.image(u.image); err != nil {
		return nil, err
	}
	if err := r.image(u.kernel); err != nil {
		return nil, err
	}
	return r.value, nil
}
