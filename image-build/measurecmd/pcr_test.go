package measurecmd_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/cc-runtime/cvm-agent/image-build/measurecmd"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
)

// separatorOnly is SHA-256 of 32 zero bytes and the SHA-256 of 4 zero bytes.
const separatorOnly = "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969"

// Lesson 42: whatever way `cvmctl measure pcr` prints a launch, it pins PCR 2,
// 9, 12 and 13, where the host's additions to the UKI would show; the numbers are
// written down here, not taken from the program's own list.
func TestLesson42_ThePrintedDocumentPinsWhatTheHostAdds(t *testing.T) {
	for name, argv := range map[string][]string{
		"tpm":   {},
		"azure": {"--platform", "az-snp-vtpm", "--paravisor", strings.Repeat("1", 96)},
		"azure, TDX": {"--platform", "az-tdx-vtpm", "--paravisor", strings.Repeat("1", 96), "--paravisor-rtmr0", strings.Repeat("2", 96),
			"--paravisor-rtmr1", strings.Repeat("3", 96), "--paravisor-rtmr2", strings.Repeat("4", 96)},
		"as JSON":        {"--output", "json"},
		"into a file":    {"--into", "../../policy/examples/reference/reference.yaml"},
		"with phases":    {"--phases", "sysinit:ready"},
		"other firmware": {"--pcr2", strings.Repeat("2", 64)},
	} {
		c := measurecmd.Command()
		var out bytes.Buffer
		c.SetOut(&out)
		c.SetArgs(append([]string{"pcr", "--uki", "../measure/testdata/uki.efi", "--format", "reference-values", "--label", "lesson-42"}, argv...))
		if err := c.Execute(); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		text, err := yaml.YAMLToJSON(out.Bytes()) // JSON is YAML
		if err != nil {
			t.Fatal(err)
		}
		var document struct{ Launch []release.Launch }
		if err := json.Unmarshal(text, &document); err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, l := range document.Launch {
			if l.Label != "lesson-42" {
				continue
			}
			seen++
			want := map[string]string{"2": separatorOnly, "9": "a38141a24546640991eb07ae9e87d38921780c5d687c37039283687705aa7ed4", "12": strings.Repeat("0", 64), "13": strings.Repeat("0", 64)}
			if name == "other firmware" {
				want["2"] = strings.Repeat("2", 64)
			}
			for pcr, value := range want {
				if l.PCRs[pcr] != value {
					t.Errorf("%s: PCR %s is %q, expected %s", name, pcr, l.PCRs[pcr], value)
				}
			}
		}
		if seen != 1 {
			t.Errorf("%s: %d launches in\n%s", name, seen, out.String())
		}
	}
}
