// Command bench measures the numbers that the design promises: what a verified
// launch costs beside plain podman and beside the chain of stock tools, what it
// takes in memory, and where its time goes; and how many guests a key broker
// serves, how fast. Every part is real, see tests/rig, but for the broker's
// guests: their SEV-SNP chip is made.
//
// It judges nothing: a bar that is not met is printed as such, and the exit
// status says only whether everything could be measured.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

const (
	large = "500MB"
	small = "20MB"
)

// options are the command line.
type options struct {
	runs    int
	output  string
	images  []string
	idle    time.Duration
	storage string // "tmpfs" or a directory
	verbose bool
	cache   string
	only    string // "", "launch" or "broker"
	quick   bool
	profile string // directory for the broker's profiles, or ""
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == serveMode {
		if err := serve(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	o, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	if err := run(ctx, o, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (o options, err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.IntVar(&o.runs, "runs", 5, "runs of each side, alternating")
	flags.BoolVar(&o.quick, "quick", false, "2 runs of the small image alone, a tenth of the broker's sessions: does everything work?")
	flags.StringVar(&o.only, "only", "", "launch or broker; both when empty")
	flags.StringVar(&o.profile, "profile", "", "existing directory for CPU and heap profiles of the broker")
	images := flags.String("images", small+","+large, "images to measure with")
	flags.DurationVar(&o.idle, "idle", 5*time.Second, "how long after ready the idle memory is taken")
	flags.StringVar(&o.output, "output", "text", "text or json")
	flags.StringVar(&o.storage, "storage", "tmpfs", "where everything works: tmpfs, or an existing directory")
	flags.BoolVar(&o.verbose, "v", false, "say what the rig starts")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	o.images = strings.Split(*images, ",")
	if o.quick {
		o.runs, o.images, o.idle = 2, []string{small}, 2*time.Second
	}
	if flags.NArg() > 0 || o.runs < 1 || o.output != "text" && o.output != "json" || o.only != "" && o.only != "launch" && o.only != "broker" {
		return o, errors.New("usage: bench [-only launch|broker] [-runs N] [-quick] [-images 20MB,500MB] [-idle 5s] [-output text|json] [-storage tmpfs|DIR] [-profile DIR] [-v]")
	}
	for _, name := range o.images {
		if name != large && name != small {
			return o, fmt.Errorf("no image %q, there are %s and %s", name, small, large)
		}
	}
	o.cache, err = cacheDir()
	return o, err
}

// bench is one run of the program.
type bench struct {
	options
	stage *rig.Stage
	owner string // fingerprint of the policies' signer
	jwe   string // private key that stock skopeo decrypts with
	began time.Time
	err   io.Writer

	serial int // of what is made afresh for each run
}

// run measures and writes the report to out, its progress to errs.
func run(ctx context.Context, o options, out, errs io.Writer) error {
	if os.Geteuid() != 0 {
		return errors.New("run as root: it mounts file systems and runs containers")
	}
	b := &bench{options: o, began: time.Now(), err: errs}
	report := newReport(o)
	if o.only != "launch" {
		if err := b.inWorkDir(func(dir string) error {
			measured, err := b.broker(ctx, dir, o.brokerPlan())
			if err == nil {
				report.addBroker(measured)
			}
			return err
		}); err != nil {
			return fmt.Errorf("broker: %w", err)
		}
	}
	if o.only != "broker" {
		if err := b.launches(ctx, report); err != nil {
			return err
		}
	}
	report.LoadAfter, report.Seconds = loadAverage(), time.Since(b.began).Seconds()
	return report.write(out, o.output)
}

// launches measures launches, with each image.
func (b *bench) launches(ctx context.Context, report *Report) (err error) {
	details := io.Discard
	if b.verbose {
		details = b.err
	}
	dir, err := workDir(b.storage)
	if err != nil {
		return err
	}
	r, err := rig.New(rig.Options{Dir: dir, Out: details})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	b.say("starting registry, TPM, broker, podman (load %s)", loadAverage())
	if b.stage, err = r.NewStage(ctx, nil); err != nil {
		return err
	}
	if b.owner, err = b.stage.Owner.Fingerprint(); err != nil {
		return err
	}
	sources, err := b.sources(ctx, b.images)
	if err != nil {
		return err
	}
	for _, s := range sources {
		measured, err := b.measure(ctx, s)
		if err != nil {
			return fmt.Errorf("%s image: %w", s.Name, err)
		}
		report.add(measured)
	}
	return nil
}

// inWorkDir makes a work directory, and removes it afterwards.
func (b *bench) inWorkDir(do func(dir string) error) (err error) {
	dir, err := workDir(b.storage)
	if err != nil {
		return err
	}
	defer func() {
		if b.storage == "tmpfs" {
			err = errors.Join(err, syscall.Unmount(dir, 0))
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	return do(dir)
}

// workDir makes the work directory; the rig unmounts and removes it. On tmpfs,
// which is what the design asks podman's storage to be, nothing but the
// programs under test takes time: a disk has its own load and its own history.
// An ext4 without a journal, for one, looks at every inode that was deleted in
// the last minutes before it makes a new one, so that runs which clean up after
// each other measure that.
func workDir(storage string) (string, error) {
	if storage != "tmpfs" {
		return os.MkdirTemp(storage, "cvm-bench-")
	}
	dir, err := os.MkdirTemp("", "cvm-bench-")
	if err != nil {
		return "", err
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_NOSUID, "mode=0700"); err != nil {
		return "", errors.Join(fmt.Errorf("mounting a tmpfs on %s: %w", dir, err), os.Remove(dir))
	}
	return dir, nil
}

// measurements are those with one image. Times are seconds, memory is MiB; the
// n-th of each list is of the n-th round.
type measurements struct {
	source
	first, second       []*launch
	plain, chain, stock []timing
	chainSteps          []map[string]float64
	memory              []memory
}

// measure alternates the sides, each on empty storage, and takes the memory in
// launches of its own, since looking at it takes time from the launch.
func (b *bench) measure(ctx context.Context, s source) (*measurements, error) {
	p, err := b.publish(ctx, s)
	if err != nil {
		return nil, err
	}
	m := &measurements{source: s}
	for n := range b.runs {
		b.say("%s image, round %d of %d", s.Name, n+1, b.runs)
		first, second, err := b.agent(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("launch by the agent: %w", err)
		}
		b.say("  agent %.2f s, again with a cache %.2f s", first.Seconds, second.Seconds)
		plain, err := b.plain(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("plain podman: %w", err)
		}
		b.say("  plain podman %.2f s", plain.Seconds)
		chain, steps, err := b.chain(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("chain of stock tools: %w", err)
		}
		b.say("  stock tools %.2f s", chain.Seconds)
		stock, err := b.syft(ctx, p)
		if err != nil {
			return nil, err
		}
		b.say("  syft %.2f s", stock.Seconds)
		m.first, m.second = append(m.first, first), append(m.second, second)
		m.plain, m.chain, m.stock = append(m.plain, plain), append(m.chain, chain), append(m.stock, stock)
		m.chainSteps = append(m.chainSteps, steps)
	}
	for n := range min(b.runs, memoryRuns) {
		b.say("%s image, memory, launch %d of %d", s.Name, n+1, min(b.runs, memoryRuns))
		taken, err := b.memory(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("memory: %w", err)
		}
		b.say("  peak %.0f MiB, of which cvm-sbom at most %.0f; idle %.0f", taken.Peak, taken.Scanner, taken.Idle)
		m.memory = append(m.memory, taken)
	}
	return m, nil
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.err, "%7.1fs  %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}
