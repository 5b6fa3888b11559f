// Package brokercmd is `cvmctl broker`: resources, release rules, reference
// documents, version marks, instances and the audit log of a key broker, from
// the outside. The admin token
// comes from a file, never from an argument or the environment.
package brokercmd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/broker/audit"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// maxResource bounds a resource file, in bytes; the broker's own limit.
const maxResource = 1 << 20

// options are the flags that every subcommand shares.
type options struct {
	url, ca, tokenFile, output string
}

// Command returns `broker` with all its subcommands.
func Command() *cobra.Command {
	o := &options{}
	c := &cobra.Command{
		Use:   "broker",
		Short: "Manage a key broker's resources, release rules, reference documents, marks and instances",
		Long: "Manage a key broker's resources, release rules, reference documents, version marks and instances. Every\n" +
			"command but audit and kek needs --url, --ca and --token-file; `cvm-broker init` writes the files for the last two.",
		Example: "  cvmctl broker resource list --url https://broker.example:8443 --ca ca.pem --token-file admin.token\n" +
			"  cvmctl broker rule set kbs:///default/key/app --file rule.yaml --url … --ca … --token-file …\n" +
			"  cvmctl broker reference set --file reference.dsse.json --url … --ca … --token-file …\n" +
			"  cvmctl broker instance tombstone 0123456789abcdef0123456789abcdef --url … --ca … --token-file …\n" +
			"  cvmctl broker mark set payments 7 --url … --ca … --token-file …\n" +
			"  cvmctl broker audit verify audit.ndjson",
		PersistentPreRunE: func(*cobra.Command, []string) error {
			// Before anything is done: a changing command prints only after.
			if o.output != "text" && o.output != "json" {
				return cause.New(cause.Usage, "--output is %q, expected text or json", o.output)
			}
			return nil
		},
	}
	f := c.PersistentFlags()
	f.StringVar(&o.url, "url", "", "`URL` of the broker, https://host[:port]")
	f.StringVar(&o.ca, "ca", "", "PEM `FILE` with the only TLS roots to trust")
	f.StringVar(&o.tokenFile, "token-file", "", "`FILE` with the admin token, readable by its owner alone")
	f.StringVar(&o.output, "output", "text", "`FORMAT` of the output: text or json")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	c.AddCommand(o.resource(), o.rule(), o.reference(), o.mark(), o.instance(), o.audit(), o.kekCommand())
	return c
}

// client reads the flags that reach the broker.
func (o *options) client() (*adminclient.Client, error) {
	var missing []string
	for _, f := range []struct{ name, value string }{{"--url", o.url}, {"--ca", o.ca}, {"--token-file", o.tokenFile}} {
		if f.value == "" {
			missing = append(missing, f.name)
		}
	}
	if len(missing) > 0 {
		return nil, cause.New(cause.Usage, "missing: %s", strings.Join(missing, ", "))
	}
	token, err := bounded.ReadNamedSecret(o.tokenFile, 4<<10)
	if err != nil {
		return nil, cause.Wrap(cause.Usage, err)
	}
	defer clear(token)
	ca, err := bounded.ReadNamed(o.ca, 1<<20)
	if err != nil {
		return nil, cause.Wrap(cause.Usage, err)
	}
	return adminclient.New(o.url, ca, string(token))
}

// print writes v as JSON, or text as it is.
func (o *options) print(cmd *cobra.Command, v any, text string) error {
	if o.output == "json" {
		e := json.NewEncoder(cmd.OutOrStdout())
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout(), strings.TrimRight(text, "\n"))
	return err
}

// group is a command that only has subcommands.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short}
	c.AddCommand(sub...)
	return c
}

// done is what a mutating command prints.
type done struct {
	Done string `json:"done"`
	Name string `json:"name"`
}

// does makes a command that runs f on its first argument and says so.
func (o *options) does(use, short, word string, n int, f func(cmd *cobra.Command, c *adminclient.Client, a []string) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(n), RunE: func(cmd *cobra.Command, a []string) error {
		c, err := o.client()
		if err != nil {
			return err
		}
		if err := f(cmd, c, a); err != nil {
			return err
		}
		return o.print(cmd, done{word, a[0]}, word+" "+a[0])
	}}
}

// lists makes a command that prints names.
func (o *options) lists(short string, f func(cmd *cobra.Command, c *adminclient.Client) ([]string, error)) *cobra.Command {
	return &cobra.Command{Use: "list", Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := o.client()
		if err != nil {
			return err
		}
		names, err := f(cmd, c)
		if err != nil {
			return err
		}
		return o.print(cmd, names, strings.Join(names, "\n"))
	}}
}

func (o *options) resource() *cobra.Command {
	var file string
	put := o.does("put URI --file FILE", "Store a resource; nobody gets it before a rule is set", "stored", 1,
		func(cmd *cobra.Command, c *adminclient.Client, a []string) error {
			data, err := input(cmd, file, maxResource)
			if err != nil {
				return err
			}
			defer clear(data)
			return c.PutResource(cmd.Context(), a[0], data)
		})
	put.Flags().StringVar(&file, "file", "", "`FILE` with the resource's bytes, or - for standard input")
	return group("resource", "Resources: keys and secrets",
		put,
		o.does("delete URI", "Delete a resource and its rule", "deleted", 1,
			func(cmd *cobra.Command, c *adminclient.Client, a []string) error {
				return c.DeleteResource(cmd.Context(), a[0])
			}),
		o.lists("List resources", func(cmd *cobra.Command, c *adminclient.Client) ([]string, error) {
			return c.Resources(cmd.Context())
		}),
	)
}

func (o *options) rule() *cobra.Command {
	var file string
	set := o.does("set URI --file FILE", "Set a resource's release rule (YAML or JSON)", "set", 1,
		func(cmd *cobra.Command, c *adminclient.Client, a []string) error {
			data, err := input(cmd, file, release.MaxRuleSize)
			if err != nil {
				return err
			}
			r, err := release.DecodeRule(data)
			if err != nil && bytes.Contains(data, []byte(release.ReferenceAPIVersion)) {
				return cause.New(cause.Config, "%s is a reference document: see cvmctl policy sign and cvmctl broker reference set", file)
			}
			if err != nil {
				return err
			}
			return c.PutRule(cmd.Context(), a[0], *r)
		})
	set.Flags().StringVar(&file, "file", "", "`FILE` with the rule, or - for standard input")
	show := &cobra.Command{Use: "show URI", Short: "Print a resource's release rule", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, a []string) error {
		c, err := o.client()
		if err != nil {
			return err
		}
		r, err := c.Rule(cmd.Context(), a[0])
		if err != nil {
			return err
		}
		text, err := yaml.MarshalWithOptions(r, yaml.UseJSONMarshaler())
		if err != nil {
			return cause.Wrap(cause.Internal, err)
		}
		return o.print(cmd, r, string(text))
	}}
	rule := group("rule", "Release rules: who gets a resource",
		set, show,
		o.does("delete URI", "Delete a rule: nobody gets the resource from then on", "deleted", 1,
			func(cmd *cobra.Command, c *adminclient.Client, a []string) error {
				return c.DeleteRule(cmd.Context(), a[0])
			}),
		o.lists("List the resources that have a rule", func(cmd *cobra.Command, c *adminclient.Client) ([]string, error) {
			return c.Rules(cmd.Context())
		}),
	)
	rule.Aliases = []string{"rules"}
	return rule
}

func (o *options) mark() *cobra.Command {
	var signers []string
	set := o.does("set NAME VERSION", "Raise the lowest version of a policy that may run", "set", 2,
		func(cmd *cobra.Command, c *adminclient.Client, a []string) error {
			version, err := strconv.ParseUint(a[1], 10, 64)
			if err != nil || version == 0 {
				return cause.New(cause.Usage, "version %q is not a number of at least 1", a[1])
			}
			return c.SetMark(cmd.Context(), a[0], adminclient.Mark{Version: version, Signers: signers})
		})
	set.Flags().StringSliceVar(&signers, "signer", nil, "`SHA256` of a current signer's SPKI (repeatable)")
	show := &cobra.Command{Use: "show NAME", Short: "Print the version mark of a policy name", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, a []string) error {
		c, err := o.client()
		if err != nil {
			return err
		}
		m, err := c.Mark(cmd.Context(), a[0])
		if err != nil {
			return err
		}
		signers := "none set"
		if len(m.Signers) > 0 {
			signers = strings.Join(m.Signers, ", ")
		}
		return o.print(cmd, m, fmt.Sprintf("%s: version %d, signers: %s", a[0], m.Version, signers))
	}}
	return group("mark", "Version marks: the lowest version of a policy that may run", set, show,
		o.lists("List the policy names that have a mark", func(cmd *cobra.Command, c *adminclient.Client) ([]string, error) {
			return c.Marks(cmd.Context())
		}))
}

func (o *options) audit() *cobra.Command {
	return group("audit", "The broker's audit log", &cobra.Command{
		Use: "verify FILE", Short: "Verify the hash chain of an audit log and print its head", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			f, err := os.Open(a[0])
			if err != nil {
				return cause.Wrap(cause.Usage, err)
			}
			defer f.Close()
			head, err := audit.Verify(f)
			if err != nil {
				return err
			}
			return o.print(cmd, head, fmt.Sprintf("whole: %d records, head %s", head.Records, head.Hash))
		},
	})
}

// input reads the file of a flag, bounded; "-" is standard input.
func input(cmd *cobra.Command, path string, max int64) ([]byte, error) {
	switch path {
	case "":
		return nil, cause.New(cause.Usage, "--file is missing")
	case "-":
		b, err := bounded.ReadAll(io.LimitReader(cmd.InOrStdin(), max+1), max)
		return b, cause.Wrap(cause.Usage, err)
	}
	b, err := bounded.ReadNamed(path, max)
	return b, cause.Wrap(cause.Usage, err)
}
