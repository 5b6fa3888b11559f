// Command cvmctl is the tool of publishers, operators and relying parties: it
// publishes images, writes and signs policies, makes seeds and orders, predicts
// launch measurements, administers a key broker, and verifies evidence. See `cvmctl help`; exit statuses are those of package cause.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/brokercmd"
	"github.com/cc-runtime/cvm-agent/image-build/measurecmd"
	"github.com/cc-runtime/cvm-agent/image-build/ordercmd"
	"github.com/cc-runtime/cvm-agent/image-build/policycmd"
	"github.com/cc-runtime/cvm-agent/image-build/publish"
	"github.com/cc-runtime/cvm-agent/image-build/seedcmd"
	"github.com/cc-runtime/cvm-agent/image-build/verifycmd"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/usage"
)

// version is set by the linker.
var version = "unknown"

func main() {
	if publish.Reexec() {
		return
	}
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	root := command()
	root.SetArgs(args)
	err := root.ExecuteContext(context.Background())
	if err == nil {
		return cause.ExitOK
	}
	fmt.Fprintln(os.Stderr, "cvmctl: "+oneLine(err))
	return cause.Exit(err)
}

// command is the whole command tree.
func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "cvmctl",
		Short:         "Publish images for confidential VMs, write their policies, predict, order and verify their launches",
		Long:          "cvmctl publishes images for confidential VMs, writes their policies and seeds, predicts what\ntheir launch measures, administers their key broker, verifies their evidence and orders their\nupgrade and destruction.\n\n" + cause.ExitHelp,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.AddCommand(publish.Command(), brokercmd.Command(), verifycmd.Command(), measurecmd.Command(), seedcmd.Command(), versionCommand())
	root.AddCommand(policycmd.Commands()...)
	root.AddCommand(ordercmd.Commands()...)
	root.SetVersionTemplate("cvmctl {{.Version}}\n")
	usage.Errors(root)
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "cvmctl", version)
			return err
		},
	}
}

// oneLine is err as the one line that a person reads.
func oneLine(err error) string {
	text := err.Error()
	var e *cause.Error
	if !errors.As(err, &e) {
		text = string(cause.Internal) + ": " + text
	}
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}
