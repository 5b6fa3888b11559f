package release

import (
	"strings"
	"testing"
)

// Lesson 42: PCR 9, 12 and 13 are where the host's additions to a UKI show, PCR
// 2 where its drivers before it do. On every platform with PCRs a launch pins all
// four, 12 and 13 to zero.
func TestLesson42_EveryLaunchPinsWhatTheHostAdds(t *testing.T) {
	checked := 0
	for _, platform := range Platforms {
		if !HasPCRs(platform) {
			continue
		}
		checked++
		with := func(change func(pcrs map[string]string)) error {
			ones := strings.Repeat("1", 64)
			l := Launch{Label: "guest", Platform: platform, PCRs: map[string]string{"2": ones, "4": ones, "9": ones, "11": ones, "12": ZeroPCR, "13": ZeroPCR}}
			if HasSNP(platform) {
				l.SNP = &SNPLaunch{Measurement: strings.Repeat("1", 96)}
			}
			if HasTDX(platform) {
				l.TDX = &TDXLaunch{MRTD: strings.Repeat("1", 96), RTMR0: strings.Repeat("1", 96), RTMR1: strings.Repeat("1", 96), RTMR2: strings.Repeat("1", 96)}
			}
			change(l.PCRs)
			return l.Validate()
		}
		if err := with(func(map[string]string) {}); err != nil {
			t.Fatalf("%s: %v", platform, err)
		}
		for _, pcr := range []string{"2", "9", "12", "13"} {
			if err := with(func(p map[string]string) { delete(p, pcr) }); err == nil || !strings.Contains(err.Error(), "PCR "+pcr+" is not pinned") {
				t.Errorf("%s without PCR %s: %v", platform, pcr, err)
			}
			other := strings.Repeat("2", 64)
			if pcr == "2" || pcr == "9" {
				other = ZeroPCR // as if nothing had been measured
			}
			if err := with(func(p map[string]string) { p[pcr] = other }); err == nil || !strings.Contains(err.Error(), "pcrs."+pcr) {
				t.Errorf("%s with PCR %s as %s: %v", platform, pcr, other, err)
			}
		}
	}
	if checked != 3 {
		t.Errorf("%d platforms with PCRs, expected tpm and the two of Azure", checked)
	}
}
