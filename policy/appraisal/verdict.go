package appraisal

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Outcome is what became of one check.
type Outcome string

// The three outcomes. There is no fourth and no default.
const (
	Passed     Outcome = "passed"
	Failed     Outcome = "failed"
	NotChecked Outcome = "not-checked"
)

// Check is one row of a verdict.
type Check struct {
	Name     string  `json:"name"`
	Outcome  Outcome `json:"outcome"`
	Expected string  `json:"expected,omitempty"`
	Found    string  `json:"found,omitempty"`
}

// Verdict is the table of all checks, and the names of those without which it
// is a refusal whatever else it holds.
type Verdict struct {
	Checks   []Check  `json:"checks"`
	Required []string `json:"required"`
}

// NewVerdict starts a table in which every required name must come to pass.
func NewVerdict(required ...string) *Verdict { return &Verdict{Required: required} }

// Require adds names without which the verdict is a refusal.
func (v *Verdict) Require(names ...string) { v.Required = append(v.Required, names...) }

// Pass records that found is as expected.
func (v *Verdict) Pass(name, expected, found string) {
	v.Checks = append(v.Checks, Check{name, Passed, expected, found})
}

// Fail records that found is not as expected.
func (v *Verdict) Fail(name, expected, found string) {
	v.Checks = append(v.Checks, Check{name, Failed, expected, found})
}

// Skip records that the check was not made, and why.
func (v *Verdict) Skip(name, expected, why string) {
	v.Checks = append(v.Checks, Check{name, NotChecked, expected, why})
}

// Check records ok as a row and returns it.
func (v *Verdict) Check(ok bool, name, expected, found string) bool {
	if ok {
		v.Pass(name, expected, found)
	} else {
		v.Fail(name, expected, found)
	}
	return ok
}

// Outcome returns what became of the named check: failed if any row of that
// name failed, not checked if there is none.
func (v *Verdict) Outcome(name string) Outcome {
	out := NotChecked
	for _, c := range v.Checks {
		if c.Name != name {
			continue
		}
		if c.Outcome == Failed {
			return Failed
		}
		if c.Outcome == Passed {
			out = Passed
		}
	}
	return out
}

// Refusal is nil when at least one check is required, every required check
// passed and no check failed. Otherwise it names the checks in the way.
func (v *Verdict) Refusal() error {
	if v == nil || len(v.Required) == 0 {
		return cause.New(cause.AttestationRefused, "a verdict without required checks accepts nothing")
	}
	var why []string
	for _, c := range v.Checks {
		if c.Outcome == Failed {
			why = append(why, fmt.Sprintf("%s: expected %s, found %s", c.Name, c.Expected, c.Found))
		}
	}
	for _, name := range v.Required {
		if v.Outcome(name) != NotChecked {
			continue
		}
		i := slices.IndexFunc(v.Checks, func(c Check) bool { return c.Name == name })
		if i < 0 {
			why = append(why, name+": not checked")
			continue
		}
		why = append(why, fmt.Sprintf("%s: not checked: %s", name, v.Checks[i].Found))
	}
	if len(why) == 0 {
		return nil
	}
	return cause.New(cause.AttestationRefused, "%s", strings.Join(why, "; "))
}

// Summary is the table in one short line for logs: names by outcome.
func (v *Verdict) Summary() string {
	by := map[Outcome][]string{}
	for _, c := range v.Checks {
		by[c.Outcome] = append(by[c.Outcome], c.Name)
	}
	var parts []string
	for _, o := range []Outcome{Passed, Failed, NotChecked} {
		if names := by[o]; len(names) > 0 {
			parts = append(parts, string(o)+" "+strings.Join(names, ","))
		}
	}
	return strings.Join(parts, "; ")
}
