package brokercmd

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// shows makes a command that prints one named thing.
func (o *options) shows(use, short string, f func(cmd *cobra.Command, c *adminclient.Client, name string) (v any, text string, err error)) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, a []string) error {
		c, err := o.client()
		if err != nil {
			return err
		}
		v, text, err := f(cmd, c, a[0])
		if err != nil {
			return err
		}
		return o.print(cmd, v, text)
	}}
}

func (o *options) reference() *cobra.Command {
	var file string
	set := &cobra.Command{
		Use:   "set --file FILE",
		Short: "Store a signed reference document; it takes the place of a lower version of its name",
		Long: "Set sends the envelope that `cvmctl policy sign` made. The broker verifies it by the ruleSigners of its own\n" +
			"configuration, and never takes a lower version of the document's name again.",
		Example: "  cvmctl broker reference set --file reference.dsse.json --url … --ca … --token-file …",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			data, err := input(cmd, file, dsse.MaxSize)
			if err != nil {
				return err
			}
			e, err := dsse.Parse(data)
			if err != nil {
				return cause.New(cause.PolicyMalformed, "%s is no signed document, see cvmctl policy sign: %w", file, err)
			}
			if e.PayloadType != release.ReferencePayloadType {
				return cause.New(cause.PolicyMalformed, "%s: payload type is %q, expected %q", file, e.PayloadType, release.ReferencePayloadType)
			}
			d, err := release.DecodeReferenceJSON(e.Payload)
			if err != nil {
				return err
			}
			if err := c.PutReference(cmd.Context(), d.Name, data); err != nil {
				return err
			}
			return o.print(cmd, done{"set", d.Name}, fmt.Sprintf("set %s version %d", d.Name, d.Version))
		},
	}
	set.Flags().StringVar(&file, "file", "", "`FILE` with the signed reference document, or - for standard input")
	return group("reference", "Reference documents: signed reference values and release rules",
		set,
		o.shows("show NAME", "Print a reference document, verified by the broker", func(cmd *cobra.Command, c *adminclient.Client, name string) (any, string, error) {
			r, err := c.Reference(cmd.Context(), name)
			if err != nil {
				return nil, "", err
			}
			var b strings.Builder
			fmt.Fprintf(&b, "name     %s\nversion  %d\ndigest   %s\n", r.Name, r.Version, r.Digest)
			if r.Expires != "" {
				fmt.Fprintf(&b, "expires  %s\n", r.Expires)
			}
			for _, s := range r.Signers {
				fmt.Fprintf(&b, "signer   %s\n", s)
			}
			for _, u := range r.Resources {
				fmt.Fprintf(&b, "resource %s\n", u)
			}
			return r, b.String(), nil
		}),
		o.lists("List the names of reference documents", func(cmd *cobra.Command, c *adminclient.Client) ([]string, error) {
			return c.References(cmd.Context())
		}),
		o.does("delete NAME", "Delete a reference document: nobody gets its resources from then on; its version mark stays", "deleted", 1,
			func(cmd *cobra.Command, c *adminclient.Client, a []string) error {
				return c.DeleteReference(cmd.Context(), a[0])
			}),
	)
}

// row is an instance on one line.
func row(i adminclient.Instance) string {
	state := "alive"
	if i.Tombstone {
		state = "destroyed"
	}
	return fmt.Sprintf("%s %s %s %s", i.ID, state, i.FirstSeen.Format(time.RFC3339), i.Identity)
}

func (o *options) instance() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List the instances that have attested", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c, err := o.client()
		if err != nil {
			return err
		}
		all, err := c.Instances(cmd.Context())
		if err != nil {
			return err
		}
		var lines []string
		for _, i := range all {
			lines = append(lines, row(i))
		}
		return o.print(cmd, all, strings.Join(lines, "\n"))
	}}
	return group("instance", "Instances: guests that have attested",
		list,
		o.shows("show ID", "Print an instance", func(cmd *cobra.Command, c *adminclient.Client, id string) (any, string, error) {
			i, err := c.Instance(cmd.Context(), id)
			if err != nil {
				return nil, "", err
			}
			return i, row(*i), nil
		}),
		o.does("tombstone ID", "Mark an instance as destroyed, for good: nothing is released to it any more", "tombstone set for", 1,
			func(cmd *cobra.Command, c *adminclient.Client, a []string) error {
				return c.SetTombstone(cmd.Context(), a[0])
			}),
	)
}
