package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// display writes the story. Its lines are a protocol that other programs can
// read; see README.md. Colours only on a terminal.
type display struct {
	mu     sync.Mutex
	out    io.Writer
	colour bool
}

func newDisplay(out io.Writer) *display {
	d := &display{out: out}
	if f, ok := out.(*os.File); ok {
		d.colour = term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == ""
	}
	return d
}

func (d *display) line(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Fprintf(d.out, format+"\n", args...)
}

func (d *display) paint(colour, text string) string {
	if !d.colour {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
)

// step begins a step of the story.
func (d *display) step(id, text string) {
	d.line("%s", d.paint(bold, "step: "+id+": "+text))
}

// saw tells an observation that was made from outside.
func (d *display) saw(format string, args ...any) {
	d.line("  %s %s", d.paint(green, "saw:"), fmt.Sprintf(format, args...))
}

// phase shows an event of the agent.
func (d *display) phase(e rig.Event) {
	if e.Name == "" || e.Outcome == "running" {
		return
	}
	name := e.Name
	if e.Workload != "" {
		name += "/" + e.Workload
	}
	colour := dim
	if e.Outcome == "failed" {
		colour = red
	}
	duration := (time.Duration(e.DurationMS * float64(time.Millisecond))).Round(100 * time.Microsecond)
	text := strings.TrimSpace(e.Cause + " " + e.Text)
	d.line("  %s", d.paint(colour, strings.TrimSpace(fmt.Sprintf("%-8s %-22s %-8s %10s  %s", e.Sequence, name, e.Outcome, duration, text))))
}

// detail is where the rig says what it starts.
func (d *display) detail() io.Writer { return details{d} }

type details struct{ d *display }

func (w details) Write(p []byte) (int, error) {
	w.d.line("  %s", w.d.paint(dim, strings.TrimSpace(string(p))))
	return len(p), nil
}

func (d *display) failed(step string, err error) {
	text := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	d.line("%s", d.paint(red, fmt.Sprintf("demo: failed in step %s: %s", step, text)))
}

// ok is the last line; it is never coloured, and nothing follows it.
func (d *display) ok(took time.Duration) {
	d.line("took %s", took.Round(100*time.Millisecond))
	d.line("demo: ok")
}
