package publish

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// Display shows the steps. It is used by several goroutines.
type Display interface {
	Step(name string) Step
	Close()
}

// Step is one step under way. Exactly one of Done and Fail ends it.
type Step interface {
	Size(total int64) // bytes expected, when known
	Add(n int64)      // bytes done
	Done(detail string)
	Fail(err error)
}

// Lines is a display of one line per finished step.
func Lines(w io.Writer) Display { return &lines{w: w} }

type lines struct {
	mu sync.Mutex
	w  io.Writer
}

type lineStep struct {
	d     *lines
	name  string
	start time.Time
}

func (d *lines) Step(name string) Step { return &lineStep{d, name, time.Now()} }
func (d *lines) Close()                {}
func (s *lineStep) Size(int64)         {}
func (s *lineStep) Add(int64)          {}
func (s *lineStep) Done(detail string) { s.print("ok", detail) }
func (s *lineStep) Fail(err error)     { s.print("failed", err.Error()) }

func (s *lineStep) print(outcome, detail string) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	fmt.Fprintf(s.d.w, "%-11s %-6s %7s  %s\n", s.name, outcome, took(s.start), detail)
}

// Bars is a live display for a terminal: a line per step, running ones with a
// spinner, elapsed time and bytes.
func Bars(w io.Writer) Display {
	return &bars{p: mpb.New(mpb.WithOutput(w), mpb.WithWidth(12), mpb.WithRefreshRate(120*time.Millisecond))}
}

type bars struct{ p *mpb.Progress }

type barStep struct {
	mu     sync.Mutex
	bar    *mpb.Bar
	start  time.Time
	end    string // outcome and detail, once ended
	n, all int64
}

func (d *bars) Close() { d.p.Wait() }

func (d *bars) Step(name string) Step {
	s := &barStep{start: time.Now()}
	s.bar = d.p.AddSpinner(1,
		mpb.PrependDecorators(decor.Name(fmt.Sprintf("%-11s", name))),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return s.text() })),
		mpb.BarFillerClearOnComplete(), mpb.BarFillerClearOnAbort())
	return s
}

func (s *barStep) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.end != "":
		return s.end
	case s.all > 0:
		return fmt.Sprintf("%7s  %s of %s", took(s.start), bytesText(s.n), bytesText(s.all))
	case s.n > 0:
		return fmt.Sprintf("%7s  %s", took(s.start), bytesText(s.n))
	}
	return fmt.Sprintf("%7s", took(s.start))
}

func (s *barStep) Size(total int64) { s.mu.Lock(); s.all = total; s.mu.Unlock() }
func (s *barStep) Add(n int64)      { s.mu.Lock(); s.n += n; s.mu.Unlock() }

func (s *barStep) Done(detail string) {
	s.finish("ok", detail)
	s.bar.SetTotal(1, true)
}

func (s *barStep) Fail(err error) {
	s.finish("failed", err.Error())
	s.bar.Abort(false)
}

func (s *barStep) finish(outcome, detail string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end = fmt.Sprintf("%-6s %7s  %s", outcome, took(s.start), detail)
}

func took(start time.Time) string {
	return fmt.Sprintf("%.1fs", time.Since(start).Seconds())
}

func bytesText(n int64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%d B", n)
}
