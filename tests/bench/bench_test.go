package main

import (
	"bytes"
	"encoding/json"
	"testing"
)

// TestQuickMeasuresEveryRow runs the whole program on the small image. It looks
// at what was measured, never at how much.
func TestQuickMeasuresEveryRow(t *testing.T) {
	o, err := parse([]string{"-quick", "-output", "json"})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := run(t.Context(), o, &out, t.Output()); err != nil {
		t.Fatal(err)
	}
	var report Report
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		t.Fatal(err)
	}
	if len(report.Rows) == 0 || len(report.Images) != 1 {
		t.Fatalf("%d rows of %d images", len(report.Rows), len(report.Images))
	}
	for _, row := range report.Rows {
		if len(row.Samples) != o.runs || row.Min < 0 || row.Max == 0 {
			t.Errorf("%s: %v", row.What, row.Samples)
		}
	}
	phases := map[string]bool{}
	for _, p := range report.Phases {
		phases[p.Launch+" "+p.Phase] = true
	}
	for _, want := range []string{"first fetch", "first sbom", "second ready", "stock syft"} {
		if !phases[want] {
			t.Errorf("no phase %q", want)
		}
	}
}
