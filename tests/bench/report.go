package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"
)

// Directions of a bar.
const (
	atMost  = "<="
	atLeast = ">="
)

// Row is one number, beside the bar that the design sets for it, if any.
type Row struct {
	Image   string  `json:"image,omitempty"` // none: of the broker
	What    string  `json:"what"`
	Unit    string  `json:"unit"` // "s", "ms", "/s", "MiB" or "x"
	Bar     float64 `json:"bar,omitempty"`
	Compare string  `json:"compare,omitempty"` // of the median to the bar
	Met     *bool   `json:"met,omitempty"`
	Stat
}

// judge compares the median to the bar. Nothing measured meets nothing.
func (r *Row) judge() {
	if r.Compare == "" {
		return
	}
	met := len(r.Samples) > 0 && (r.Compare == atMost && r.Median <= r.Bar || r.Compare == atLeast && r.Median >= r.Bar)
	r.Met = &met
}

// PhaseRow is one phase of the launch, medians over the runs, in seconds.
type PhaseRow struct {
	Image  string  `json:"image"`
	Launch string  `json:"launch"` // first, second, or stock for the chain's steps
	Phase  string  `json:"phase"`
	Begins float64 `json:"begins"`
	Takes  float64 `json:"takes"`
}

// Report is the program's output.
type Report struct {
	Time       time.Time   `json:"time"`
	CPUs       int         `json:"cpus"`
	Kernel     string      `json:"kernel"`
	Go         string      `json:"go"`
	Runs       int         `json:"runs"`
	Storage    string      `json:"storage"`
	LoadBefore string      `json:"loadBefore"`
	LoadAfter  string      `json:"loadAfter"`
	Seconds    float64     `json:"seconds"` // of the whole program
	Images     []source    `json:"images"`
	Rows       []Row       `json:"rows"`
	Phases     []PhaseRow  `json:"phases"`
	Broker     *BrokerPart `json:"broker,omitempty"`
}

func newReport(o options) *Report {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease") // no more than a note
	return &Report{Time: time.Now().UTC(), CPUs: runtime.NumCPU(), Kernel: strings.TrimSpace(string(kernel)), Go: runtime.Version(),
		Runs: o.runs, Storage: o.storage, LoadBefore: loadAverage()}
}

func loadAverage() string {
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(load))[:3], " ")
}

// each lists one number of each run.
func each[T any](runs []T, number func(T) float64) []float64 {
	out := make([]float64, len(runs))
	for i, r := range runs {
		out[i] = number(r)
	}
	return out
}

// row adds a number; bar is nothing, or a direction and a bound.
func (r *Report) row(image, what, unit string, samples []float64, bar ...any) {
	w := Row{Image: image, What: what, Unit: unit, Stat: stat(samples)}
	if len(bar) == 2 {
		w.Compare, w.Bar = bar[0].(string), bar[1].(float64)
	}
	w.judge()
	r.Rows = append(r.Rows, w)
}

// add takes the measurements with one image.
func (r *Report) add(m *measurements) {
	r.Images = append(r.Images, m.source)
	row := func(what, unit string, samples []float64, bar ...any) { r.row(m.Name, what, unit, samples, bar...) }
	seconds := func(t timing) float64 { return t.Seconds }
	cpu := func(t timing) float64 { return t.CPU }
	first := each(m.first, func(l *launch) float64 { return l.Seconds })
	second := each(m.second, func(l *launch) float64 { return l.Seconds })
	plain, chain, stock := each(m.plain, seconds), each(m.chain, seconds), each(m.stock, seconds)
	added := each(m.first, func(l *launch) float64 { return l.Added })
	toPlain := 1.0
	if m.Name == small {
		toPlain = 1.5
	}
	row("verified launch, encrypted image, cvm-agent", "s", first)
	row("plain podman pull and run, unencrypted", "s", plain)
	row("verified launch / plain podman", "x", ratios(first, plain), atMost, toPlain)
	row("chain of stock tools", "s", chain)
	row("chain of stock tools / verified launch", "x", ratios(chain, first), atLeast, 4.0)
	row("second launch, image cached, verified again", "s", second)
	row("second launch / first", "x", ratios(second, first), atMost, 0.3)
	row("SBOM regeneration and comparison, added to the launch", "s", added)
	row("stock syft of the image in the registry", "s", stock)
	row("SBOM added / stock syft", "x", ratios(added, stock), atMost, 0.2)
	row("daemon start to policy accepted", "ms", each(m.first, func(l *launch) float64 { return l.Policy * 1000 }), atMost, 100.0)
	row("peak memory of the launch, agent and children", "MiB", each(m.memory, func(t memory) float64 { return t.Peak }), atMost, 100.0)
	row("  of that, without cvm-sbom", "MiB", each(m.memory, func(t memory) float64 { return t.Agent }))
	row("  cvm-sbom by itself", "MiB", each(m.memory, func(t memory) float64 { return t.Scanner }))
	row("idle memory, agent and children", "MiB", each(m.memory, func(t memory) float64 { return t.Idle }), atMost, 30.0)
	row("CPU of the verified launch, with podman's service", "s", each(m.first, func(l *launch) float64 { return l.CPU }))
	row("CPU of plain podman", "s", each(m.plain, cpu))
	row("CPU of the chain of stock tools", "s", each(m.chain, cpu))
	row("CPU of stock syft", "s", each(m.stock, cpu))
	r.phases(m, "first", m.first)
	r.phases(m, "second", m.second)
	for _, name := range chainOrder {
		r.Phases = append(r.Phases, PhaseRow{Image: m.Name, Launch: "stock", Phase: name,
			Takes: median(each(m.chainSteps, func(s map[string]float64) float64 { return s[name] }))})
	}
}

func (r *Report) phases(m *measurements, which string, launches []*launch) {
	for _, p := range launches[0].Phases {
		var begins, takes []float64
		for _, l := range launches {
			if q, err := l.phase(p.Name); err == nil {
				begins, takes = append(begins, q.Begins), append(takes, q.Takes)
			}
		}
		r.Phases = append(r.Phases, PhaseRow{Image: m.Name, Launch: which, Phase: p.Name, Begins: median(begins), Takes: median(takes)})
	}
}

func (r *Report) write(out io.Writer, format string) error {
	if format == "json" {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(r)
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "%s, %d CPUs, Linux %s, %s, %d runs of each side, alternating, on %s, load %s before and %s after, took %.0f s\n",
		r.Time.Format(time.RFC3339), r.CPUs, r.Kernel, r.Go, r.Runs, r.Storage, r.LoadBefore, r.LoadAfter, r.Seconds)
	for _, s := range r.Images {
		fmt.Fprintf(t, "\n%s image: %.0f MB unpacked, %.0f MB compressed, %d entries, one layer\n\n", s.Name, mb(s.Unpacked), mb(s.Compressed), s.Entries)
		r.table(t, s.Name)
		fmt.Fprintln(t, "\nphase of the launch (medians)\tfirst: begins\ttakes\tsecond: begins\ttakes\t")
		second := map[string]PhaseRow{}
		for _, p := range r.Phases {
			if p.Image == s.Name && p.Launch == "second" {
				second[p.Phase] = p
			}
		}
		for _, p := range r.Phases {
			if p.Image == s.Name && p.Launch == "first" {
				again := second[p.Phase]
				fmt.Fprintf(t, "%s\t%.0f ms\t%.1f ms\t%.0f ms\t%.1f ms\n", p.Phase, p.Begins*1000, p.Takes*1000, again.Begins*1000, again.Takes*1000)
			}
		}
		fmt.Fprintln(t, "\nstep of the stock tools (medians)\ttakes\t")
		for _, p := range r.Phases {
			if p.Image == s.Name && p.Launch == "stock" {
				fmt.Fprintf(t, "%s\t%.0f ms\n", p.Phase, p.Takes*1000)
			}
		}
	}
	if b := r.Broker; b != nil {
		fmt.Fprintf(t, "\nkey broker: SEV-SNP evidence, certificates known, dialect cvm-agent/1; latency over %.0f s in each round, memory over %d sessions of which %d are held, %d launches of the agent's client\n\n",
			b.SecondsEach, b.Sessions, b.Held, b.Agents)
		r.table(t, "")
		fmt.Fprintf(t, "\non storage for each session: audit log %d bytes, embedded storage %d bytes\n", b.AuditPerSession, b.StorePerSession)
	}
	return t.Flush()
}

// table writes the rows of one image, or of the broker.
func (r *Report) table(out io.Writer, image string) {
	fmt.Fprintln(out, "what\tmedian\tmin\tmax\tn\tbar\t")
	for _, w := range r.Rows {
		if w.Image != image {
			continue
		}
		bar := ""
		if w.Met != nil {
			bar = fmt.Sprintf("%s %s %s\t%s", w.Compare, number(w.Bar, w.Unit), w.Unit, map[bool]string{true: "met", false: "NOT MET"}[*w.Met])
		}
		fmt.Fprintf(out, "%s\t%s %s\t%s\t%s\t%d\t%s\n", w.What, number(w.Median, w.Unit), w.Unit, number(w.Min, w.Unit), number(w.Max, w.Unit), len(w.Samples), bar)
	}
}

// number has the digits that its unit is good for.
func number(v float64, unit string) string {
	switch {
	case unit == "ms" && v < 20:
		return fmt.Sprintf("%.2f", v)
	case unit == "ms" || unit == "MiB" || unit == "/s":
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
