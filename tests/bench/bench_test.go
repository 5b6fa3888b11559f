package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain is the broker's process, when it is started as that.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == serveMode {
		if err := serve(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	m.Run()
}

// TestQuickBrokerMeasuresEveryRow runs the broker's part, small enough for any
// machine. Every session of it is checked, so that none is refused; how fast is
// not looked at.
func TestQuickBrokerMeasuresEveryRow(t *testing.T) {
	o, err := parse([]string{"-quick", "-only", "broker", "-storage", t.TempDir(), "-profile", t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{options: o, began: time.Now(), err: t.Output()}
	plan := b.brokerPlan()
	plan.latency, plan.sessions, plan.every, plan.limit, plan.agents = time.Second, 400, 100, 100, 5
	measured, err := b.broker(t.Context(), t.TempDir(), plan)
	if err != nil {
		t.Fatal(err)
	}
	report := newReport(o)
	report.addBroker(measured)
	for _, row := range report.Rows {
		if len(row.Samples) == 0 || row.Max == 0 && row.What != "  of that, mapped storage" {
			t.Errorf("%s: %v", row.What, row.Samples)
		}
	}
	if len(report.Broker.PSS) != 4 || report.Broker.AuditPerSession == 0 || report.Broker.StorePerSession == 0 {
		t.Errorf("%+v", report.Broker)
	}
	for _, name := range []string{"broker-speed.cpu.pprof", "broker-speed.heap.pprof", "broker-memory.cpu.pprof", "broker-memory.heap.pprof"} {
		if file, err := os.Stat(filepath.Join(o.profile, name)); err != nil || file.Size() == 0 {
			t.Errorf("profile %s: %v", name, err)
		}
	}
	var text bytes.Buffer
	if err := report.write(&text, "text"); err != nil || !strings.Contains(text.String(), "attest and release") {
		t.Errorf("%v: %s", err, text.String())
	}
}

// TestQuickMeasuresEveryRow runs the whole program on the small image. It looks
// at what was measured, never at how much.
func TestQuickMeasuresEveryRow(t *testing.T) {
	o, err := parse([]string{"-quick", "-only", "launch", "-output", "json"})
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
