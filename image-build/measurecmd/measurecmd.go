// Package measurecmd is `cvmctl measure`: what a launch will measure, from the
// files of an image alone, as text, as JSON, or as the launch entry of a
// reference document that a broker loads. It reads files and asks nobody.
package measurecmd

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Command returns `measure` for the root command of cvmctl. Errors carry a
// cause code.
func Command() *cobra.Command {
	c := &cobra.Command{
		Use:   "measure",
		Short: "Predict what a launch will measure, from the image's files alone",
		Long: "Measure computes what SEV-SNP, TDX or a TPM will say of a launch, without running it, and makes\n" +
			"SEV-SNP ID blocks. With --format reference-values the result is the launch entry of a reference\n" +
			"document; with --into FILE it is that document, with the entry in it and its version raised.",
	}
	c.AddCommand(snpCommand(), idBlockCommand(), pcrCommand(), tdxCommand())
	return c
}

const (
	formatMeasurement = "measurement"
	formatReference   = "reference-values"
)

// out is how a result is written.
type out struct {
	output, format, label, into string
}

func (o *out) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.output, "output", "text", "`FORMAT` of the output: text or json")
	f.StringVar(&o.format, "format", formatMeasurement, "measurement, or reference-values for a reference document's launch entry")
	f.StringVar(&o.label, "label", "", "label of the launch entry, for reference-values")
	f.StringVar(&o.into, "into", "", "reference document `FILE` (YAML) to print with the entry in it, its version raised by one")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{formatMeasurement, formatReference}, cobra.ShellCompDirectiveNoFileComp))
	c.Args = cobra.NoArgs
	c.PreRunE = func(*cobra.Command, []string) error {
		switch {
		case o.output != "text" && o.output != "json":
			return cause.New(cause.Usage, "--output is %q, expected text or json", o.output)
		case o.format != formatMeasurement && o.format != formatReference:
			return cause.New(cause.Usage, "--format is %q, expected %s or %s", o.format, formatMeasurement, formatReference)
		case o.format == formatReference && o.label == "":
			return cause.New(cause.Usage, "--format %s needs --label", formatReference)
		case o.format != formatReference && (o.label != "" || o.into != ""):
			return cause.New(cause.Usage, "--label and --into need --format %s", formatReference)
		}
		return nil
	}
}

// print writes v as JSON on one line, or text; or the launch entry.
func (o *out) print(c *cobra.Command, v any, text string, entry release.Launch) error {
	if o.format == formatReference {
		entry.Label = o.label
		return o.reference(c, entry)
	}
	if o.output == "json" {
		return printJSON(c.OutOrStdout(), v)
	}
	_, err := fmt.Fprintln(c.OutOrStdout(), strings.TrimSuffix(text, "\n"))
	return err
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// require names the first flag that was not given.
func require(c *cobra.Command, names ...string) error {
	for _, n := range names {
		if !c.Flags().Changed(n) {
			return cause.New(cause.Usage, "%s: --%s is missing", c.CommandPath(), n)
		}
	}
	return nil
}

// read reads a file of at most max bytes. /dev/null is an empty one.
func read(path string, max int64) ([]byte, error) {
	if path == "/dev/null" {
		return nil, nil
	}
	data, err := bounded.ReadNamed(path, max)
	if errors.Is(err, bounded.ErrTooLarge) {
		return nil, cause.Wrap(cause.MeasureInput, err)
	}
	return data, cause.Wrap(cause.Usage, err)
}

// number reads a hexadecimal number, with or without 0x.
func number(name, s string) (uint64, error) {
	v, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s), "0x"), 16, 64)
	if err != nil {
		return 0, cause.New(cause.Usage, "--%s is %q, expected a hexadecimal number of at most 64 bits", name, s)
	}
	return v, nil
}

// bytesOf reads exactly len(to) bytes in hexadecimal.
func bytesOf(name, s string, to []byte) error {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(to) {
		return cause.New(cause.Usage, "--%s is %q, expected %d hexadecimal digits", name, s, 2*len(to))
	}
	copy(to, b)
	return nil
}

// named puts a file's name before the text and keeps the cause.
func named(path string, err error) error {
	var e *cause.Error
	if errors.As(err, &e) {
		return &cause.Error{Code: e.Code, Err: fmt.Errorf("%s: %w", path, e.Err)}
	}
	return err
}
