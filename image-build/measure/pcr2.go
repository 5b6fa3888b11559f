package measure

import "crypto/sha256"

// pcr2 holds drivers that the firmware did not bring: option ROMs and those of
// Driver#### variables (TCG PC Client Platform Firmware Profile 1.06, section
// 3.3.4.3). Without any it is the separator alone.
func pcr2() []byte {
	r := newRegister(sha256.New)
	r.event(evSeparator)
	return r.value
}
