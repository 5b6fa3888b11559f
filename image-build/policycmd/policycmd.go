// Package policycmd is the part of cvmctl that writes, signs and shows launch
// policies and reference documents, and packs policies into initdata: `cvmctl
// policy …` and `cvmctl initdata …`. It reads and writes files and talks to nobody.
package policycmd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Commands returns `policy` and `initdata` for the root command of cvmctl.
// Errors carry a cause code; cause.Exit gives the exit status.
func Commands() []*cobra.Command {
	return []*cobra.Command{policyCommand(), initdataCommand()}
}

// group makes a command that only holds others.
func group(use, short, long string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Long: long}
	c.AddCommand(subs...)
	return c
}

// exactArgs is cobra.ExactArgs with a cause.
func exactArgs(n int, what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return cause.New(cause.Usage, "%s: %d arguments, expected %s", c.CommandPath(), len(args), what)
		}
		return nil
	}
}

// outputFlag adds --output and returns where its value goes.
func outputFlag(c *cobra.Command) *string {
	format := c.Flags().String("output", "text", "`FORMAT` of the output: text or json")
	c.PreRunE = func(*cobra.Command, []string) error {
		if *format != "text" && *format != "json" {
			return cause.New(cause.Usage, "--output is %q, expected text or json", *format)
		}
		return nil
	}
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return format
}

func require(c *cobra.Command, names ...string) error {
	for _, n := range names {
		if !c.Flags().Changed(n) {
			return cause.New(cause.Usage, "%s: --%s is missing", c.CommandPath(), n)
		}
	}
	return nil
}

// readInput reads a file, or standard input for "-", of at most max bytes.
func readInput(c *cobra.Command, path string, max int64, tooLarge cause.Code) ([]byte, error) {
	var data []byte
	var err error
	if path == "-" {
		data, err = bounded.ReadAll(c.InOrStdin(), max)
	} else {
		data, err = bounded.ReadNamed(path, max)
	}
	switch {
	case errors.Is(err, bounded.ErrTooLarge):
		return nil, cause.Wrap(tooLarge, err)
	case err != nil:
		return nil, cause.Wrap(cause.Usage, err)
	}
	return data, nil
}

// writeOutput writes a file whole or not at all, or to standard output for "-".
func writeOutput(c *cobra.Command, path string, data []byte) error {
	if path == "-" {
		_, err := c.OutOrStdout().Write(data)
		return err
	}
	if err := renameio.WriteFile(path, data, 0o644, renameio.WithTempDir(dirOf(path))); err != nil {
		return cause.Wrap(cause.StorageFailed, err)
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// named puts the file's name before the text and keeps the cause.
func named(path string, err error) error {
	var e *cause.Error
	if errors.As(err, &e) {
		return &cause.Error{Code: e.Code, Err: fmt.Errorf("%s: %w", path, e.Err)}
	}
	return err
}

func dirOf(path string) string {
	for i := len(path) - 1; i >= 0; i-- {
		if os.IsPathSeparator(path[i]) {
			return path[:i+1]
		}
	}
	return "."
}

func looksLikeJSON(data []byte) bool {
	for _, b := range data {
		switch b {
		case ' ', '\t', '\r', '\n':
		default:
			return b == '{'
		}
	}
	return false
}
