// Command e2e boots the guest image in QEMU, with OVMF and a software TPM, and
// goes with it through the whole life of a guest: measured boot, attestation,
// a decrypted workload that the host can reach, upgrade, rollback, destruction;
// and through the boots and orders that must be refused.
//
// What holds is seen from outside: on the serial console, in the broker's audit
// log, over HTTP, by the machine being off. The agent's own word, over the
// virtio-serial port, is never all there is.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

func main() {
	ctx, stop := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() { stop(fmt.Errorf("stopped by %s", <-signals)) }()
	os.Exit(run(ctx, os.Args[1:], os.Stdout))
}

// run returns the exit status.
func run(ctx context.Context, args []string, out io.Writer) int {
	flags := flag.NewFlagSet("cvm-e2e", flag.ContinueOnError)
	only := flags.String("only", "", "`NAME` of one boot, several with commas between; story, scratch")
	verbose := flags.Bool("v", false, "say what is started")
	debug := flags.Bool("debug", false, "boot the debug variant, whose journal goes to the serial log")
	keep := flags.Bool("keep", false, "leave the work directory")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 {
		return 2
	}
	began := time.Now()
	s := newScene(*debug)
	always, life := func() bool { return true }, &story{scene: s}
	image, tale, other, bad := s.checks(), life.checks(), (&variants{scene: s}).checks(), (&refusals{s}).checks()
	if *only != "" {
		var err error
		image = nil
		if tale, other, bad, err = choose(*only, tale, other, bad); err != nil {
			fmt.Fprintln(os.Stderr, "cvm-e2e:", err)
			return 2
		}
	}
	s.report = newReport(out, *verbose, image, tale, other, bad)
	r, err := rig.New(rig.Options{Out: s.report, Keep: *keep})
	if err == nil && os.Geteuid() != 0 {
		err = errors.New("run as root: it builds an image and runs containers")
	}
	if err != nil {
		s.report.say("%s", err)
		return s.report.end(began)
	}
	s.Stage = &rig.Stage{Rig: r}
	if err := s.prepare(ctx); err != nil {
		s.report.say("preparation failed: %s", err)
	} else {
		s.report.run(ctx, image, always)
		var lanes sync.WaitGroup
		rest := queue(bad)
		for _, lane := range []func(){
			func() { s.report.run(ctx, tale, life.on) },
			func() { s.report.run(ctx, other, always) },
		} {
			lanes.Go(func() {
				lane()
				for c := range rest {
					s.report.run(ctx, []check{c}, always)
				}
			})
		}
		lanes.Wait()
	}
	if s.report.passed != s.report.total {
		s.report.saveLogs(r)
	}
	if err := r.Close(); err != nil {
		s.report.say("cleanup: %s", err)
	}
	if *keep {
		s.report.say("kept: %s", r.Dir)
	}
	return s.report.end(began)
}

// queue holds checks that whichever lane is free may take.
func queue(checks []check) <-chan check {
	rest := make(chan check, len(checks))
	for _, c := range checks {
		rest <- c
	}
	close(rest)
	return rest
}

// choose keeps the named boots. Checks that share a machine go by its name:
// all of the story, and what shared says.
func choose(only string, tale, other, bad []check) (t, o, b []check, err error) {
	names := strings.Split(only, ",")
	for i, name := range names {
		names[i] = cmp.Or(shared[name], name)
	}
	found, there := map[string]bool{}, []string(nil)
	keep := func(lane []check, nameOf func(check) string) (kept []check) {
		for _, c := range lane {
			name := nameOf(c)
			if slices.Contains(names, name) {
				kept, found[name] = append(kept, c), true
			}
			if !slices.Contains(there, name) {
				there = append(there, name)
			}
		}
		return kept
	}
	t = keep(tale, func(check) string { return "story" })
	o = keep(other, func(c check) string { return cmp.Or(shared[c.name], c.name) })
	b = keep(bad, func(c check) string { return c.name })
	for _, name := range names {
		if !found[name] {
			return nil, nil, nil, fmt.Errorf("no boot is called %q; there are %s", name, strings.Join(there, ", "))
		}
	}
	return t, o, b, nil
}

// saveLogs keeps the logs of a failed run, which the work directory takes along
// when it goes.
func (r *report) saveLogs(from *rig.Rig) {
	dir, err := os.MkdirTemp("", "cvm-e2e-log-")
	if err == nil {
		err = os.CopyFS(dir, os.DirFS(from.Path("log")))
	}
	if err != nil {
		r.say("the logs are lost: %s", err)
		return
	}
	files, _ := filepath.Glob(filepath.Join(dir, "vm-*.serial"))
	for _, file := range files {
		r.say("serial log: %s", file)
	}
	r.say("logs: %s", dir)
}

// end prints the last line and returns the exit status.
func (r *report) end(began time.Time) int {
	if len(r.failed) > 0 {
		r.say("failed: %s", strings.Join(r.failed, ", "))
	}
	r.say("took %s", time.Since(began).Round(time.Second))
	r.say("e2e: %d/%d", r.passed, r.total)
	if r.passed == r.total && r.total > 0 {
		return 0
	}
	return 1
}
