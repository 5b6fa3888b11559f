package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

// check is one thing that must hold. Checks of a lane run one after the other;
// lanes run at the same time, each with one machine.
type check struct {
	name, text string
	do         func(context.Context) error
}

// errNotReached is a check that was not reached: it counts as failed.
var errNotReached = errors.New("not reached")

// report prints checks as they end and counts them.
type report struct {
	mu      sync.Mutex
	out     io.Writer
	number  map[string]int
	passed  int
	total   int
	failed  []string
	verbose bool
}

func newReport(out io.Writer, verbose bool, lanes ...[]check) *report {
	r := &report{out: out, verbose: verbose, number: map[string]int{}}
	for _, c := range slices.Concat(lanes...) {
		r.total++
		r.number[c.name] = r.total
	}
	return r
}

// Write lets the rig tell what it starts, with -v.
func (r *report) Write(p []byte) (int, error) {
	if r.verbose {
		r.say("  %s", strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

func (r *report) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.out, format+"\n", args...)
}

func (r *report) ended(c check, took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	word := "ok  "
	if err == nil {
		r.passed++
	} else {
		word = "FAIL"
		r.failed = append(r.failed, c.name)
	}
	fmt.Fprintf(r.out, "%2d %s %6.1fs  %s: %s\n", r.number[c.name], word, took.Seconds(), c.name, c.text)
	if err != nil {
		fmt.Fprintf(r.out, "     %s\n", strings.ReplaceAll(err.Error(), "\n", "\n     "))
	}
}

// run goes through a lane. After a failure it goes on only while there is
// something for the rest to stand on.
func (r *report) run(ctx context.Context, lane []check, goesOn func() bool) {
	var broken error
	for _, c := range lane {
		start := time.Now()
		err := errNotReached
		if broken == nil {
			err = c.do(ctx)
		}
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil && !goesOn() {
			broken = err
		}
		r.ended(c, time.Since(start), err)
	}
}
