// Package seedcmd is `cvmctl seed`: it makes the seed disk of a guest, and says
// of one what the guest's early stage would say. It reads and writes files and
// talks to nobody.
package seedcmd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/initrd/seed"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// maxImage bounds what `check` reads: the files and their frame.
const maxImage = 8 << 20

// Command returns `seed` for the root command of cvmctl. Errors carry a cause
// code.
func Command() *cobra.Command {
	var initdata, hostname, network, extra, out string
	var mirrors []string
	c := &cobra.Command{
		Use:   "seed --initdata FILE --out FILE",
		Short: "Make the seed disk of a guest, and check one",
		Long: "Seed writes an ISO 9660 image, labelled CIDATA, that carries the initdata and what cloud-init may\n" +
			"be told. It is checked as the guest's early stage will check it; the same input gives the same bytes.",
		Example: "  cvmctl seed --initdata initdata.toml --hostname guest-1 --out seed.iso\n  cvmctl seed check seed.iso",
		Args:    cobra.NoArgs,
	}
	f := c.Flags()
	f.StringVar(&initdata, "initdata", "", "initdata `FILE`, see cvmctl initdata pack")
	f.StringVar(&hostname, "hostname", "", "host `NAME` of the guest, one DNS label")
	f.StringVar(&network, "network-config", "", "network configuration `FILE`, cloud-init's version 2")
	f.StringVar(&extra, "user-data-extra", "", "`FILE` with more keys of user-data: fqdn, timezone, locale, ntp")
	f.StringArrayVar(&mirrors, "mirror", nil, "`REGISTRY=MIRROR`, one of the policy's mirrors that is to be tried; may be repeated, the first is tried first")
	f.StringVar(&out, "out", "", "`FILE` for the image; - is standard output")
	c.RunE = func(c *cobra.Command, _ []string) error {
		for name, value := range map[string]string{"initdata": initdata, "out": out} {
			if value == "" {
				return cause.New(cause.Usage, "%s: --%s is missing", c.CommandPath(), name)
			}
		}
		image, err := compose(initdata, hostname, network, extra, mirrors)
		if err != nil {
			return err
		}
		if out == "-" {
			_, err := c.OutOrStdout().Write(image)
			return err
		}
		return cause.Wrap(cause.StorageFailed, renameio.WriteFile(out, image, 0o644, renameio.WithTempDir(filepath.Dir(out))))
	}
	c.AddCommand(checkCommand(), schemaCommand())
	return c
}

// compose makes the image from the files that the flags name.
func compose(initdata, hostname, network, extra string, mirrors []string) ([]byte, error) {
	chosen := map[string][]string{}
	for _, m := range mirrors {
		registry, mirror, ok := strings.Cut(m, "=")
		if !ok {
			return nil, cause.New(cause.Usage, "--mirror is %q, expected REGISTRY=MIRROR", m)
		}
		chosen[registry] = append(chosen[registry], mirror)
	}
	raw, err := bounded.ReadNamed(initdata, policy.MaxInitdata)
	if err != nil {
		return nil, cause.Wrap(cause.Usage, err)
	}
	doc, err := policy.ParseInitdata(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", initdata, err)
	}
	var more []byte
	if extra != "" {
		if more, err = bounded.ReadNamed(extra, seed.Limits[seed.UserDataFile]); err != nil {
			return nil, cause.Wrap(cause.Usage, err)
		}
	}
	files := seed.Files{seed.MetaDataFile: []byte("instance-id: " + instance(hostname) + "\n")}
	if network != "" {
		if files[seed.NetworkConfigFile], err = bounded.ReadNamed(network, seed.Limits[seed.NetworkConfigFile]); err != nil {
			return nil, cause.Wrap(cause.Usage, err)
		}
	}
	if files[seed.UserDataFile], err = userData(raw, hostname, more, chosen); err != nil {
		return nil, err
	}
	s, err := seed.Parse(files)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(s.Initdata, raw) {
		return nil, cause.New(cause.InitdataMalformed, "%s does not survive YAML", initdata)
	}
	if err := allowed(doc, s.UserData.CVMAgent.Mirrors); err != nil {
		return nil, err
	}
	return WriteISO(files)
}

// allowed holds the mirrors that a seed chooses against its policy, as the early
// stage does, but for the policy's signatures.
func allowed(initdata *policy.Initdata, chosen map[string][]string) error {
	if len(chosen) == 0 {
		return nil
	}
	envelope, err := initdata.Envelope()
	if err != nil {
		return err
	}
	e, err := dsse.Parse(envelope)
	if err != nil {
		return cause.Wrap(cause.PolicyMalformed, err)
	}
	p, err := policy.DecodeJSON(e.Payload)
	if err != nil {
		return err
	}
	if _, refused := policy.ChooseMirrors(p.Registries, chosen); len(refused) > 0 {
		return cause.New(cause.SeedRefused, "cvm_agent.mirrors: %s: the policy does not allow it", strings.Join(refused, ", "))
	}
	return nil
}

// instance is the instance's name for cloud-init, which starts over with every
// boot: the agent's own instance id is the broker's.
func instance(hostname string) string {
	if hostname == "" {
		return "cvm"
	}
	return hostname
}

// userData writes the file. Initdata is a block where that keeps each byte, for
// people to read, and quoted else.
func userData(initdata []byte, hostname string, extra []byte, mirrors map[string][]string) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("#cloud-config\n")
	if hostname != "" {
		quoted, err := json.Marshal(hostname)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "hostname: %s\n", quoted)
	}
	if len(extra) > 0 {
		b.Write(bytes.TrimRight(extra, "\n"))
		b.WriteByte('\n')
	}
	b.WriteString("cvm_agent:\n")
	if len(mirrors) > 0 {
		quoted, err := json.Marshal(mirrors)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "  mirrors: %s\n", quoted)
	}
	block := append(bytes.Clone(b.Bytes()), "  initdata: |\n"...)
	for line := range strings.Lines(string(initdata)) {
		if line != "\n" {
			block = append(block, "    "...)
		}
		block = append(block, line...)
	}
	if s, err := seed.Parse(seed.Files{seed.UserDataFile: block}); err == nil && bytes.Equal(s.Initdata, initdata) {
		return block, nil
	}
	b.WriteString("  initdata: ")
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(string(initdata))
	return b.Bytes(), err
}

// Verdict is what `check` prints.
type Verdict struct {
	Accepted bool           `json:"accepted"`
	Cause    *Cause         `json:"cause"`
	Files    map[string]int `json:"files"` // sizes in bytes
	Initdata *Digest        `json:"initdata,omitempty"`
	// Sanitized is what cloud-init would get.
	Sanitized map[string]string `json:"sanitized,omitempty"`
}

// Cause is why a seed is refused.
type Cause struct {
	Code cause.Code `json:"code"`
	Text string     `json:"text"`
}

// Digest is what the launch has to be bound to.
type Digest struct {
	Algorithm string `json:"algorithm"`
	Digest    string `json:"digest"`
}

func checkCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "check FILE",
		Short: "Say of a seed disk, or of a user-data file, what a guest would say",
		Long: "Check reads an ISO 9660 image, or the text of user-data, as the early stage of a guest does, and\n" +
			"prints its verdict and what cloud-init would get. No signature is verified: see cvmctl policy verify.",
		Example: "  cvmctl seed check seed.iso\n  cvmctl seed check --output json user-data | jq .cause",
		Args:    cobra.ExactArgs(1),
	}
	format := c.Flags().String("output", "text", "`FORMAT` of the output: text or json")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	c.RunE = func(c *cobra.Command, args []string) error {
		if *format != "text" && *format != "json" {
			return cause.New(cause.Usage, "--output is %q, expected text or json", *format)
		}
		data, err := bounded.ReadNamed(args[0], maxImage)
		switch {
		case errors.Is(err, bounded.ErrTooLarge):
			return cause.Wrap(cause.SeedMalformed, err)
		case err != nil:
			return cause.Wrap(cause.Usage, err)
		}
		v, err := Judge(data)
		return errors.Join(v.print(c.OutOrStdout(), *format), err)
	}
	return c
}

// Judge says what the early stage says of a seed; the error is that of a
// refusal.
func Judge(data []byte) (v Verdict, err error) {
	v.Files = map[string]int{}
	defer func() {
		if v.Accepted = err == nil; !v.Accepted {
			text := err.Error()
			var e *cause.Error
			if errors.As(err, &e) {
				text = e.Err.Error()
			}
			v.Cause = &Cause{cause.Of(err), bounded.OneLine(text)}
			v.Initdata, v.Sanitized = nil, nil
		}
	}()
	files := seed.Files{seed.UserDataFile: data}
	if seed.IsSeed(bytes.NewReader(data)) {
		if files, err = seed.ReadISO(bytes.NewReader(data)); err != nil {
			return v, err
		}
	}
	for name, text := range files {
		v.Files[name] = len(text)
	}
	s, err := seed.Parse(files)
	if err != nil {
		return v, err
	}
	initdata, err := policy.ParseInitdata(s.Initdata)
	if err != nil {
		return v, err
	}
	v.Initdata = &Digest{initdata.Algorithm, fmt.Sprintf("%x", initdata.Digest())}
	if err := allowed(initdata, s.UserData.CVMAgent.Mirrors); err != nil {
		return v, err
	}
	clean, err := s.Sanitized()
	if err != nil {
		return v, err
	}
	v.Sanitized = map[string]string{}
	for name, text := range clean {
		v.Sanitized[name] = string(text)
	}
	return v, nil
}

func (v Verdict) print(w io.Writer, format string) error {
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		return e.Encode(v)
	}
	var names []string
	for name := range v.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(w, "%-14s %d bytes\n", name, v.Files[name])
	}
	if !v.Accepted {
		_, err := fmt.Fprintf(w, "refused: %s: %s\n", v.Cause.Code, v.Cause.Text)
		return err
	}
	for _, name := range []string{seed.UserDataFile, seed.MetaDataFile, seed.NetworkConfigFile} {
		if text, there := v.Sanitized[name]; there {
			fmt.Fprintf(w, "\n%s for cloud-init:\n%s", name, text)
		}
	}
	_, err := fmt.Fprintf(w, "\ninitdata %s %s\naccepted\n", v.Initdata.Algorithm, v.Initdata.Digest)
	return err
}

func schemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of a seed: one member for each of its files",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			schema, err := seed.Schema()
			if err != nil {
				return err
			}
			_, err = c.OutOrStdout().Write(schema)
			return err
		},
	}
}
