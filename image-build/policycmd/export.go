package policycmd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release/trustee"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The files of an export.
const (
	fileResourcePolicy    = "resource-policy.rego"
	fileAttestationPolicy = "default_cpu.rego"
	fileReferenceValues   = "reference-values.json"
	fileMessage           = "reference-values.message.json"
)

// exported is what export-trustee says.
type exported struct {
	Name    string   `json:"name"`
	Version uint64   `json:"version"`
	Digest  string   `json:"digest"`
	Files   []string `json:"files"`
	*trustee.Export
}

func exportCommand() *cobra.Command {
	var reference, out string
	var accept, initdata []string
	c := &cobra.Command{
		Use:   "export-trustee --reference FILE --out DIR [--initdata FILE]… [--accept NAME]…",
		Short: "Write a reference document as policies and reference values of an unchanged Trustee",
		Long: "Export-trustee writes four files for confidential-containers/trustee that release what the\n" +
			"document releases:\n\n" +
			"  " + fileResourcePolicy + "           the key broker's resource policy\n" +
			"  " + fileAttestationPolicy + "               the attestation service's policy for CPUs\n" +
			"  " + fileReferenceValues + "          the reference values, a list of {name, expiration, value}\n" +
			"  " + fileMessage + "  the same as a message for POST /kbs/v0/reference-value\n\n" +
			"Trustee sees no event log and keeps no marks or tombstones. Where a rule names a policy, the\n" +
			"given initdata whose policy satisfies it are pinned by their digest. What Trustee cannot express\n" +
			"is refused unless --accept names it: " + strings.Join(trustee.Names, ", ") + ".\n\n" +
			"FILE is YAML, the canonical JSON or an envelope, whose signatures are not verified here.",
		Example: "  cvmctl policy export-trustee --reference reference.yaml --initdata initdata.toml --out trustee \\\n" +
			"    --accept no-tombstone,no-version-mark,no-event-log",
		Args: exactArgs(0, "none"),
	}
	c.Flags().StringVar(&reference, "reference", "", "reference document `file`; - is standard input")
	c.Flags().StringVar(&out, "out", "", "`directory` for the files; made if it is not there")
	c.Flags().StringSliceVar(&accept, "accept", nil, "`name` of a condition that may be left out; may be repeated")
	c.Flags().StringArrayVar(&initdata, "initdata", nil, "initdata `file` to pin where a rule names a policy; may be repeated")
	_ = c.RegisterFlagCompletionFunc("accept", cobra.FixedCompletions(trustee.Names, cobra.ShellCompDirectiveNoFileComp))
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := require(c, "reference", "out"); err != nil {
			return err
		}
		d, err := readDocument(c, reference)
		if err != nil {
			return err
		}
		if d.reference == nil {
			return cause.New(cause.PolicyMalformed, "%s is a launch policy, expected a reference document", reference)
		}
		o := trustee.Options{Digest: release.Digest(d.payload), Accept: accept, Now: time.Now()}
		for _, path := range initdata {
			text, err := readInput(c, path, policy.MaxInitdata, cause.InitdataMalformed)
			if err != nil {
				return err
			}
			o.Initdata = append(o.Initdata, text)
		}
		e, err := trustee.New(d.reference, o)
		if err != nil {
			return named(reference, err)
		}
		return writeExport(c, out, *format, exported{Name: d.reference.Name, Version: d.reference.Version, Digest: o.Digest, Export: e})
	}
	return c
}

func writeExport(c *cobra.Command, dir, format string, x exported) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return cause.Wrap(cause.StorageFailed, err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{fileResourcePolicy, x.ResourcePolicy}, {fileAttestationPolicy, x.AttestationPolicy},
		{fileReferenceValues, x.ReferenceValues}, {fileMessage, x.Message},
	} {
		path := filepath.Join(dir, f.name)
		if err := writeOutput(c, path, f.data); err != nil {
			return err
		}
		x.Files = append(x.Files, path)
	}
	out := c.OutOrStdout()
	if format == "json" {
		return printJSON(out, x)
	}
	fmt.Fprintf(out, "exported %s version %d %s\n", x.Name, x.Version, x.Digest)
	for _, f := range x.Files {
		fmt.Fprintf(out, "file     %s\n", f)
	}
	for _, g := range x.GivenUp {
		fmt.Fprintf(out, "given up %s: %s\n", g.Name, g.Why)
	}
	for _, s := range x.Stricter {
		fmt.Fprintf(out, "stricter %s\n", s)
	}
	return nil
}
