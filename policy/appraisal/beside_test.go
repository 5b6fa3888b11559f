package appraisal

import (
	"bytes"
	"encoding/hex"
	"strconv"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/tpmtest"
)

// Lesson 42: what the host adds beside the UKI (a command line by SMBIOS, an
// initrd, credentials, extensions) is measured into PCR 9, 12 or 13, and PCR 11
// stays the same; a UEFI driver (Driver####, option ROM), which can patch the
// kernel after it was measured, goes into PCR 2 alone. A guest in which any one
// of the four moved gets nothing.
func TestLesson42_WhatTheHostAddsGetsNoKey(t *testing.T) {
	digest := bytes.Repeat([]byte{7}, 32)
	a := newAttest(t, tpmtest.ECC, nil, nil, func(p *tpmtest.TPM) {
		for _, measured := range []int{2, 4, 9, 11} {
			p.Extend(measured, digest)
		}
	})
	launch := release.Launch{Label: "guest", Platform: release.PlatformTPM, PCRs: map[string]string{}}
	for _, i := range []int{2, 4, 9, 11, 12, 13} {
		launch.PCRs[strconv.Itoa(i)] = hex.EncodeToString(a.tpm.Read(i))
	}
	rule := release.Rule{APIVersion: release.RuleAPIVersion, Platforms: []string{release.PlatformTPM}, AnyPolicy: true, Launch: []release.Launch{launch}}
	if err := rule.Validate(); err != nil {
		t.Fatal(err)
	}
	judge := func() *Verdict {
		t.Helper()
		appraisal, err := a.appraise(t)
		if err != nil || appraisal.Facts.PCRs == nil {
			t.Fatalf("the quote shows no PCRs: %v", err)
		}
		return Judge(appraisal.Facts, rule, noMarks, time.Now())
	}
	if err := judge().Refusal(); err != nil {
		t.Fatalf("the guest as it was measured: %v", err)
	}
	for _, pcr := range []int{2, 9, 12, 13} {
		// Each on its own: what moved before is taken for known.
		a.tpm.Extend(pcr, digest)
		a.quote(t, allPCRs...)
		name := "pcr-" + strconv.Itoa(pcr)
		v := judge()
		if v.Refusal() == nil || v.Outcome(name) != Failed {
			t.Errorf("PCR %d moved, and %s is %s: %v", pcr, name, v.Outcome(name), v.Refusal())
		}
		for _, c := range v.Checks {
			if c.Outcome == Failed && c.Name != name && c.Name != CheckMeasurement {
				t.Errorf("PCR %d moved: %s failed too", pcr, c.Name)
			}
		}
		launch.PCRs[strconv.Itoa(pcr)] = hex.EncodeToString(a.tpm.Read(pcr))
	}
}
