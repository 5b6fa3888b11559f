package control

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// Print writes the status as a table that a person reads.
func (st *Status) Print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "state\t%s\n", st.State)
	if st.Cause != "" {
		label := "cause"
		if st.State == StateReady {
			label = "last order" // it failed, and what ran before still runs
		}
		fmt.Fprintf(w, "%s\t%s: %s\n", label, st.Cause, st.Text)
	}
	if p := st.Policy; p != nil {
		fmt.Fprintf(w, "policy\t%s version %d, expires %s\n", p.Name, p.Version, p.Expires)
		fmt.Fprintf(w, "digest\t%s\n", p.Digest)
	}
	if st.Platform != "" {
		fmt.Fprintf(w, "platform\t%s\n", st.Platform)
	}
	if b := st.Broker; b != nil {
		fmt.Fprintf(w, "broker\t%s\n", b.URL)
	}
	if l := st.EventLog; l != nil {
		fmt.Fprintf(w, "event log\t%d events in %s\n", l.Events, l.Register)
	}
	if len(st.Workloads) > 0 {
		fmt.Fprint(w, "\nWORKLOAD\tHEALTHY\tIMAGE\n")
		for _, l := range st.Workloads {
			healthy := "yes"
			if !l.Healthy {
				healthy = strings.TrimSuffix("no: "+l.Text, ": ")
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", l.Name, healthy, l.Image)
		}
	}
	if len(st.Phases) > 0 {
		fmt.Fprint(w, "\nSEQUENCE\tPHASE\tWORKLOAD\tOUTCOME\tDURATION\tDETAIL\n")
		for _, p := range st.Phases {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Sequence, p.Name, dash(p.Workload), p.Outcome, duration(p.DurationMS), p.detail())
		}
	}
	return w.Flush()
}

// Print writes the event as one line that a person reads.
func (e *Event) Print(out io.Writer) error {
	at := e.Name
	if e.Workload != "" {
		at += "/" + e.Workload
	}
	line := fmt.Sprintf("%s  %-8s  %-24s  %-7s", e.Time.Local().Format("15:04:05.000"), e.Sequence, at, e.Outcome)
	if e.Outcome != Running && e.Outcome != Waiting {
		line += fmt.Sprintf("  %8s", duration(e.DurationMS))
	}
	if d := e.detail(); d != "" {
		line += "  " + d
	}
	_, err := fmt.Fprintln(out, line)
	return err
}

// PrintJSON writes v as one line of JSON.
func PrintJSON(out io.Writer, v any) error { return json.NewEncoder(out).Encode(v) }

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (p *Phase) detail() string {
	text := p.Text
	if p.Cause != "" {
		text = p.Cause + ": " + text
	}
	if p.Log != "" {
		text += "; its last lines: " + p.Log
	}
	return text
}

func duration(ms float64) string {
	d := time.Duration(ms * float64(time.Millisecond))
	switch {
	case d >= 10*time.Second:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}
