package measurecmd

import (
	"encoding/json"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// entries is what of a reference document is known without its resources.
type entries struct {
	Launch []release.Launch `json:"launch"`
}

// reference prints the entry, or the document of --into with it.
func (o *out) reference(c *cobra.Command, entry release.Launch) error {
	if o.into == "" {
		if err := entry.Validate(); err != nil {
			return cause.New(cause.Usage, "the launch entry: %w", err)
		}
		return o.document(c, entries{[]release.Launch{entry}})
	}
	data, err := read(o.into, release.MaxReferenceSize)
	if err != nil {
		return err
	}
	d, err := release.DecodeReferenceYAML(data)
	if err != nil {
		return named(o.into, err)
	}
	put(d, entry)
	d.Version++
	if err := d.Validate(); err != nil {
		return cause.New(cause.PolicyInvalid, "%s with the launch %s: %w", o.into, entry.Label, err)
	}
	return o.document(c, d)
}

// put replaces the launch of the same label and platform, or adds one.
func put(d *release.Reference, entry release.Launch) {
	for i, l := range d.Launch {
		if l.Label == entry.Label && l.Platform == entry.Platform {
			d.Launch[i] = entry
			return
		}
	}
	d.Launch = append(d.Launch, entry)
}

func (o *out) document(c *cobra.Command, v any) error {
	if o.output == "json" {
		return printJSON(c.OutOrStdout(), v)
	}
	// By way of JSON: the document's field names are JSON's.
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	text, err := yaml.JSONToYAML(data)
	if err != nil {
		return err
	}
	_, err = c.OutOrStdout().Write(text)
	return err
}
