package measure

import (
	"crypto/sha256"
	"regexp"
)

var phaseRE = regexp.MustCompile(`^[a-z][-a-z0-9]{0,63}$`)

const maxPhases = 16

// pcr11 holds the UKI's sections and the phases of the boot (systemd,
// docs/TPM2_PCR_MEASUREMENTS.md and src/boot/stub.c, measure_sections;
// src/pcrextend): of each section its name with NUL, then its content; of each
// phase its word.
func pcr11(u *UKI, phases []string) ([]byte, error) {
	if len(phases) > maxPhases {
		return nil, bad("%d phases, at most %d are accepted", len(phases), maxPhases)
	}
	r := newRegister(sha256.New)
	u.measureSections(r)
	for _, p := range phases {
		if !phaseRE.MatchString(p) {
			return nil, bad("phase %q is no word of lowercase letters", p)
		}
		r.event([]byte(p))
	}
	return r.value, nil
}

func (u *UKI) measureSections(r *register) {
	for _, name := range ukiSections {
		if content, ok := u.sections[name]; ok {
			r.event([]byte(name + "\x00"))
			r.event(content)
		}
	}
}
