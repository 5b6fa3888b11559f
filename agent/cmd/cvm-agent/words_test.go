package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/agent/launch"
)

// Where there is no journal, a workload's words are in no log.
func TestTextHandlerLeavesWorkloadsWordsOut(t *testing.T) {
	var out bytes.Buffer
	slog.New(textHandler(&out)).Error("failed", "phase", "healthy", launch.LogKey, "hunter2")
	if got := out.String(); strings.Contains(got, "hunter2") || !strings.Contains(got, "phase=healthy") {
		t.Errorf("%s", got)
	}
}
