// cvm-early is the early stage of a confidential VM: it binds what the host
// handed over to the launch before anything else reads it. As process 1 of the
// initrd it does all that package boot lists and becomes the guest's init; on a
// plain host "measure" does the binding alone.
//
// It links neither podman nor cosign, takes nothing from the environment, and
// every failure is final.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/initrd/binding"
	"github.com/cc-runtime/cvm-agent/initrd/boot"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const usage = `cvm-early binds the initdata to the launch.

Usage:
  cvm-early measure --initdata FILE [--tpm SPEC]
  cvm-early version

  --initdata FILE   Confidential Containers initdata 0.1.0
  --tpm SPEC        device:PATH, or unix:PATH for a TPM behind a socket

As process 1 of the measured initrd it is the whole early stage and takes no
arguments. What follows is measure, the one step for a plain host.

In a SEV-SNP or TDX guest the launch is bound already: HOST_DATA or MRCONFIGID
must be the initdata's digest, and no TPM is touched. Elsewhere, and on Azure,
PCR 8 is extended by the digest (sha256), once: PCR 8, 12, 13 and 14 must be
zero, for nobody has measured anything of their own before, and a second run
fails. Exit status: 0 done, 2 usage, 10 refused, 20 the TPM does not answer,
30 the initdata cannot be decoded.
`

func main() {
	if os.Getpid() == 1 {
		boot.Init(version) // does not return
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, out, errOut io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	err := command(ctx, args, out)
	if errors.Is(err, flag.ErrHelp) {
		return cause.ExitOK
	}
	if err != nil {
		fmt.Fprintf(errOut, "cvm-early: %s\n", err)
	}
	return cause.Exit(err)
}

func command(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 {
		return cause.New(cause.Usage, "expected a command after \"cvm-early\", see cvm-early --help")
	}
	switch args[0] {
	case "measure":
		flags := flag.NewFlagSet("measure", flag.ContinueOnError)
		flags.SetOutput(io.Discard)
		initdata := flags.String("initdata", "", "")
		tpm := flags.String("tpm", "", "")
		if err := flags.Parse(args[1:]); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				fmt.Fprint(out, usage)
				return err
			}
			return cause.New(cause.Usage, "%w, see cvm-early --help", err)
		}
		if *initdata == "" || flags.NArg() > 0 {
			return cause.New(cause.Usage, "measure takes --initdata FILE and --tpm SPEC, and nothing else")
		}
		return measure(ctx, platform.Linux(), *initdata, *tpm, out)
	case "version", "--version":
		fmt.Fprintln(out, version)
		return nil
	case "help", "-h", "--help":
		fmt.Fprint(out, usage)
		return nil
	}
	return cause.New(cause.Usage, "unknown command %q after \"cvm-early\", see cvm-early --help", args[0])
}

// measure checks what a TEE's launch is bound to, or extends PCR 8 by the digest
// of the initdata file.
func measure(ctx context.Context, h platform.Hardware, path, spec string, out io.Writer) error {
	raw, err := bounded.ReadFile(path, policy.MaxInitdata)
	if err != nil {
		return cause.New(cause.InitdataMalformed, "read the initdata: %w", err)
	}
	initdata, err := policy.ParseInitdata(raw)
	if err != nil {
		return err
	}
	launch, err := binding.Open(ctx, h, spec)
	if err != nil {
		return err
	}
	defer func() { _ = launch.Close() }()
	if err := launch.CheckFresh(ctx); err != nil {
		return err
	}
	bound, err := launch.Bind(ctx, initdata)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, bound)
	return nil
}

// version is set by the build.
var version = "devel"
