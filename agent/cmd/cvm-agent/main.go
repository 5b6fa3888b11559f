// Command cvm-agent is the guest's daemon (`run`) and its local control client
// (`ctl`). See agent/README.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/agent/image"
	"github.com/cc-runtime/cvm-agent/agent/sbom"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/usage"
)

// version is set by the linker.
var version = ""

func main() {
	// The confined children are this program again; they must not get further.
	image.Reexec()
	sbom.Reexec()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	cmd := command()
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return cause.ExitOK
	}
	fmt.Fprintln(os.Stderr, "cvm-agent: "+oneLine(err))
	return cause.Exit(err)
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "cvm-agent",
		Short: "Launch, upgrade and destroy verified containers in a confidential VM",
		Long: "cvm-agent runs inside a confidential VM. It verifies a signed launch policy, attests the VM to a key\n" +
			"broker, verifies, decrypts and runs the policy's containers, and takes upgrade and destroy orders.\n\n" +
			cause.ExitHelp,
		Version:       programVersion(),
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("{{.Version}}\n")
	root.AddCommand(runCommand(), ctlCommand(), &cobra.Command{
		Use: "version", Short: "Print the program's version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), programVersion()) },
	})
	usage.Errors(root)
	return root
}

func programVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

func isCode(err error) bool {
	var e *cause.Error
	return errors.As(err, &e)
}
