package verifycmd

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// report is what is printed.
type report struct {
	verdict *appraisal.Verdict
	facts   *appraisal.Facts // nil unless the evidence itself was accepted
	err     error            // nil: accepted
}

// print writes the report.
func (r *report) print(w io.Writer, format string) error {
	if format == "json" {
		return r.json(w)
	}
	return r.text(w)
}

// document is the JSON output.
type document struct {
	Accepted bool               `json:"accepted"`
	Cause    *why               `json:"cause"` // null when accepted
	Verdict  *appraisal.Verdict `json:"verdict"`
	Facts    *appraisal.Facts   `json:"facts"` // null when the evidence proves nothing
}

type why struct {
	Code cause.Code `json:"code"`
	Text string     `json:"text"`
}

func (r *report) json(w io.Writer) error {
	d := document{Accepted: r.err == nil, Verdict: r.verdict, Facts: r.facts}
	if r.err != nil {
		d.Cause = &why{cause.Of(r.err), reason(r.err)}
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(d)
}

// text prints a row a line. What was found may hold the evidence's own bytes,
// so it is made printable.
func (r *report) text(w io.Writer) error {
	width := 0
	for _, c := range r.verdict.Checks {
		width = max(width, len(c.Name))
	}
	for _, c := range r.verdict.Checks {
		what := "expected " + c.Expected + ", found " + c.Found
		switch {
		case c.Outcome == appraisal.NotChecked && c.Expected == "":
			what = c.Found
		case c.Outcome == appraisal.NotChecked:
			what = "expected " + c.Expected + ": " + c.Found
		}
		if _, err := fmt.Fprintf(w, "%-*s  %-11s  %s\n", width, bounded.OneLine(c.Name), c.Outcome, bounded.OneLine(what)); err != nil {
			return err
		}
	}
	last := "accepted"
	if r.err != nil {
		last = "refused: " + bounded.OneLine(reason(r.err))
	}
	_, err := fmt.Fprintln(w, last)
	return err
}
