// Command cvm-sbom writes the SPDX 2.3 SBOM of one unpacked image root.
//
// It is run by two parties on the same bytes: by the publisher, whose result is
// signed, and by the guest's agent in a sandbox, whose result is compared with
// the signed one. It therefore takes nothing from its environment but
// SOURCE_DATE_EPOCH, opens no socket, and gives the same output for the same
// root. Its contract is this command line and the SPDX document on stdout; it
// imports nothing of the agent.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/cmd/cvm-sbom/scan"
)

// Exit statuses: the caller turns them into its own cause codes.
const (
	exitOK     = 0
	exitFailed = 1 // the root cannot be scanned
	exitUsage  = 2 // bad flags
	exitLimit  = 3 // a limit given by flag is exceeded
)

const usage = `usage:
  cvm-sbom scan --root DIR [flags]   write the SPDX 2.3 JSON document of DIR
  cvm-sbom version                   print the versions of this program and of the scanner

The flags of scan: cvm-sbom scan --help. Exit status: 0 done, 1 the root cannot
be scanned, 2 usage, 3 a limit given by flag is exceeded.
`

// version is set by the linker (-X main.version=…).
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	switch args[0] {
	case "scan":
		err := runScan(ctx, args[1:], stdout, stderr)
		var limit *scan.LimitError
		switch {
		case err == nil, errors.Is(err, flag.ErrHelp):
			return exitOK
		case errors.As(err, &limit):
			fmt.Fprintf(stderr, "cvm-sbom: limit: %v\n", err)
			return exitLimit
		case errors.Is(err, errUsage):
			fmt.Fprintf(stderr, "cvm-sbom: %v\n", err)
			return exitUsage
		default:
			fmt.Fprintf(stderr, "cvm-sbom: %v\n", err)
			return exitFailed
		}
	case "version", "--version":
		fmt.Fprintf(stdout, "cvm-sbom %s (syft %s)\n", version, scan.ScannerVersion())
		return exitOK
	case "help", "-h", "--help":
		fmt.Fprint(stdout, usage)
		return exitOK
	default:
		fmt.Fprintf(stderr, "cvm-sbom: usage: unknown command %q, see cvm-sbom help\n", args[0])
		return exitUsage
	}
}

var errUsage = errors.New("usage")

func runScan(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	fs := flag.NewFlagSet("cvm-sbom scan", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var opts scan.Options
	var output string
	fs.StringVar(&opts.Root, "root", "", "`directory` that holds the image's root")
	fs.StringVar(&opts.Name, "name", "", "name of the document and of its root package")
	fs.StringVar(&opts.Version, "version", "", "version of the root package")
	fs.StringVar(&output, "output", "-", "`file` to write, - for stdout")
	fs.StringVar(&opts.FileDigests, "file-digests", "", "NDJSON `file` of digests that are known already (- for stdin)")
	fs.Int64Var(&opts.MaxFiles, "max-files", 2_000_000, "most files, directories and links in the root")
	fs.Int64Var(&opts.MaxBytes, "max-bytes", 64<<30, "most bytes in the root's regular files")
	fs.BoolVar(&opts.SHA1, "sha1", true, "record SHA-1 beside SHA-256, as SPDX 2.3 asks for; the comparison uses SHA-256 alone")
	memory := fs.Int64("memory-target", 0, "`bytes` that the runtime tries to stay below, 0 for none")
	gcPercent := fs.Int("gc-percent", 100, "heap growth in `percent` between collections")
	profile := fs.String("profile", "", "write a CPU profile to this `file`")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fs.SetOutput(stdout)
			fs.Usage()
			return err
		}
		return fmt.Errorf("%w: %w, see cvm-sbom scan --help", errUsage, err)
	}
	if fs.NArg() != 0 || opts.Root == "" || opts.MaxFiles <= 0 || opts.MaxBytes <= 0 {
		return fmt.Errorf("%w: scan needs --root, positive limits and no arguments", errUsage)
	}
	if opts.Created, err = created(os.Getenv("SOURCE_DATE_EPOCH")); err != nil {
		return err
	}
	if *profile != "" {
		stop, err := startProfile(*profile)
		if err != nil {
			return err
		}
		defer stop()
	}
	// The scanner's memory is the price of its speed: without a target it is
	// collected seldom, with one it is held to it as far as the runtime can.
	debug.SetGCPercent(*gcPercent)
	if *memory > 0 {
		debug.SetMemoryLimit(*memory)
	}

	out := stdout
	if output != "-" {
		f, err := os.OpenFile(output, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		out = f
	}
	return scan.Run(ctx, opts, out)
}

// created reads SOURCE_DATE_EPOCH (decimal seconds since 1970). Without it the
// document says 1970: a time of the scan would make equal scans differ.
func created(epoch string) (time.Time, error) {
	if epoch == "" {
		return time.Unix(0, 0).UTC(), nil
	}
	s, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil || s < 0 || s > 253402300799 {
		return time.Time{}, fmt.Errorf("%w: SOURCE_DATE_EPOCH %q is not a number of seconds", errUsage, epoch)
	}
	return time.Unix(s, 0).UTC(), nil
}
