package policycmd

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

func policyCommand() *cobra.Command {
	return group("policy", "Write, sign and verify launch policies and reference documents",
		"A launch policy says what may run in a confidential VM and who may get keys. It is\n"+
			"written as YAML, signed as canonical JSON in a DSSE envelope, and carried to the guest\n"+
			"in initdata (see cvmctl initdata).\n\n"+
			"A reference document holds reference values and release rules. It is written and signed\n"+
			"in the same way, and given to a broker (see cvmctl broker reference). Every command here\n"+
			"tells the two apart by apiVersion or payload type.",
		checkCommand(), signCommand(), verifyCommand(), showCommand(), schemaCommand(), exportCommand())
}

// summary is what check, sign, verify and show say of a policy.
type summary struct {
	Name      string   `json:"name"`
	Version   uint64   `json:"version"`
	Expires   string   `json:"expires"`
	Digest    string   `json:"digest"` // of the signed bytes
	Form      string   `json:"form,omitempty"`
	Workloads []string `json:"workloads"`
	Signers   []string `json:"signers,omitempty"`
	GivenUp   []string `json:"givenUp,omitempty"`
}

func summarize(p *policy.Policy, payload []byte) summary {
	s := summary{Name: p.Name, Version: p.Version, Expires: p.Expires, Digest: policy.Digest(payload), GivenUp: p.GivenUp()}
	for _, w := range p.Workloads {
		s.Workloads = append(s.Workloads, w.Name+" "+w.Image)
	}
	return s
}

func (s summary) print(c *cobra.Command, format, verdict string) error {
	out := c.OutOrStdout()
	if format == "json" {
		return printJSON(out, s)
	}
	if verdict != "" {
		fmt.Fprintln(out, verdict)
	}
	fmt.Fprintf(out, "name     %s\nversion  %d\nexpires  %s\ndigest   %s\n", s.Name, s.Version, s.Expires, s.Digest)
	for _, w := range s.Workloads {
		fmt.Fprintf(out, "workload %s\n", w)
	}
	for _, k := range s.Signers {
		fmt.Fprintf(out, "signer   %s\n", k)
	}
	for _, g := range s.GivenUp {
		fmt.Fprintf(out, "given up %s\n", g)
	}
	return nil
}

func checkCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "check FILE",
		Short:   "Check a policy or a reference document against every rule, without signatures",
		Long:    "Check decodes a policy strictly and applies every rule that the guest applies. FILE is\nYAML, the canonical JSON or an envelope; - reads standard input.",
		Example: "  cvmctl policy check policy.yaml",
		Args:    exactArgs(1, "one file"),
	}
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		d, err := readDocument(c, args[0])
		if err != nil {
			return err
		}
		if d.reference != nil {
			s := summarizeReference(d.reference, d.payload)
			s.Form = d.form
			return s.print(c, *format, "ok: "+args[0]+" is a valid reference document")
		}
		s := summarize(d.policy, d.payload)
		s.Form = d.form
		return s.print(c, *format, "ok: "+args[0]+" is a valid policy")
	}
	return c
}

func signCommand() *cobra.Command {
	var keys []string
	var in, out, passwordFile string
	c := &cobra.Command{
		Use:   "sign --key KEY [--key KEY2] --in FILE --out FILE",
		Short: "Sign a policy or a reference document",
		Long: "Sign writes a DSSE envelope over the document's canonical JSON, with one signature per\n" +
			"key. Keys are those of `cosign generate-key-pair`, or PKCS #8 in PEM: ECDSA P-256, Ed25519\n" +
			"or RSA. When --in is an envelope already, the signatures are added to it.\n\n" +
			"The passphrase of an encrypted key is taken from --password-file, from COSIGN_PASSWORD\n" +
			"or asked for on the terminal.",
		Example: "  cosign generate-key-pair\n  cvmctl policy sign --key cosign.key --in policy.yaml --out policy.dsse.json",
		Args:    exactArgs(0, "none"),
	}
	c.Flags().StringArrayVar(&keys, "key", nil, "private key `file`; may be repeated")
	c.Flags().StringVar(&in, "in", "", "document `file`: YAML, JSON or an envelope; - is standard input")
	c.Flags().StringVar(&out, "out", "-", "`file` for the envelope; - is standard output")
	c.Flags().StringVar(&passwordFile, "password-file", "", "`file` whose first line is the passphrase of encrypted keys")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := require(c, "key", "in"); err != nil {
			return err
		}
		d, err := readDocument(c, in)
		if err != nil {
			return err
		}
		envelope := d.envelope
		if envelope == nil {
			envelope = &dsse.Envelope{PayloadType: d.payloadType, Payload: d.payload}
		}
		signers, err := LoadSigners(c, keys, passwordFile)
		if err != nil {
			return err
		}
		if err := envelope.Add(signers...); err != nil {
			return cause.Wrap(cause.KeyMalformed, err)
		}
		signed, err := envelope.Marshal()
		if err != nil {
			return cause.Wrap(cause.PolicyTooLarge, err)
		}
		return writeOutput(c, out, append(signed, '\n'))
	}
	return c
}

func verifyCommand() *cobra.Command {
	var keys, rotation []string
	var threshold int
	var floor uint64
	c := &cobra.Command{
		Use:     "verify --key PUB [--key PUB2] [--threshold N] FILE",
		Short:   "Verify a signed policy as the guest would, or a reference document as a broker would",
		Long:    "Verify requires signatures by N distinct keys of those given, applies every rule, and\nchecks the expiry against this machine's clock.",
		Example: "  cvmctl policy verify --key cosign.pub policy.dsse.json",
		Args:    exactArgs(1, "one file"),
	}
	c.Flags().StringArrayVar(&keys, "key", nil, "public key `file` (PEM); may be repeated")
	c.Flags().IntVar(&threshold, "threshold", 1, "`number` of distinct keys that must have signed")
	c.Flags().Uint64Var(&floor, "floor", 0, "lowest acceptable `version`")
	c.Flags().StringArrayVar(&rotation, "rotation", nil, "older signed policy `file` that names the next signers, oldest first; may be repeated")
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := require(c, "key"); err != nil {
			return err
		}
		public, fingerprints, pem, err := loadPublicKeys(c, keys)
		if err != nil {
			return err
		}
		if threshold < 1 || threshold > len(fingerprints) {
			return cause.New(cause.Usage, "--threshold is %d, expected 1 to %d, the number of keys", threshold, len(fingerprints))
		}
		envelope, err := readInput(c, args[0], policy.MaxSize, cause.PolicyTooLarge)
		if err != nil {
			return err
		}
		if kindOf(envelope) == kindReference {
			if len(rotation) > 0 {
				return cause.New(cause.Usage, "--rotation is for policies: a broker's configuration names who signs reference documents")
			}
			return verifyReference(c, args[0], *format, envelope, public, threshold, floor)
		}
		var links [][]byte
		for _, r := range rotation {
			link, err := readInput(c, r, policy.MaxSize, cause.PolicyTooLarge)
			if err != nil {
				return err
			}
			links = append(links, link)
		}
		v, err := policy.Open(envelope, pem, links, policy.Trust{Fingerprints: fingerprints, Threshold: threshold, VersionFloor: floor}, time.Now())
		if err != nil {
			return named(args[0], err)
		}
		s := summarize(v.Policy, v.Payload)
		s.Signers = v.Signers
		return s.print(c, *format, "ok: "+args[0]+" is signed and valid")
	}
	return c
}

func showCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "show FILE",
		Short:   "Print a policy, in whatever form it comes; verifies no signature",
		Example: "  cvmctl policy show policy.dsse.json\n  cvmctl policy show --output json policy.yaml",
		Args:    exactArgs(1, "one file"),
	}
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		d, err := readDocument(c, args[0])
		if err != nil {
			return err
		}
		if *format == "json" {
			return printJSON(c.OutOrStdout(), json.RawMessage(d.payload))
		}
		if d.form == "envelope" {
			fmt.Fprintln(c.OutOrStdout(), "signatures are not verified here: see cvmctl policy verify")
		}
		if d.reference != nil {
			return summarizeReference(d.reference, d.payload).print(c, "text", "")
		}
		p := d.policy
		if err := summarize(p, d.payload).print(c, "text", ""); err != nil {
			return err
		}
		var names []string
		for _, pl := range p.Platforms {
			names = append(names, string(pl))
		}
		fmt.Fprintf(c.OutOrStdout(), "platform %s\n", strings.Join(names, " "))
		if p.Broker != nil {
			fmt.Fprintf(c.OutOrStdout(), "broker   %s\n", p.Broker.URL)
		}
		return nil
	}
	return c
}

func schemaCommand() *cobra.Command {
	var kind string
	c := &cobra.Command{
		Use:     "schema [--kind policy|reference]",
		Short:   "Print the JSON Schema of the policy or the reference document, for editors",
		Long:    "Schema prints a JSON Schema (2020-12). An editor with the YAML language server uses it when\nthe document's first line is\n\n  # yaml-language-server: $schema=policy.schema.json",
		Example: "  cvmctl policy schema > policy.schema.json\n  cvmctl policy schema --kind reference > reference.schema.json",
		Args:    exactArgs(0, "none"),
		RunE: func(c *cobra.Command, _ []string) error {
			write, ok := map[string]func() ([]byte, error){kindPolicy: policy.Schema, kindReference: release.ReferenceSchema}[kind]
			if !ok {
				return cause.New(cause.Usage, "--kind is %q, expected %s or %s", kind, kindPolicy, kindReference)
			}
			s, err := write()
			if err != nil {
				return err
			}
			_, err = c.OutOrStdout().Write(s)
			return err
		},
	}
	c.Flags().StringVar(&kind, "kind", kindPolicy, "`KIND` of document: policy or reference")
	_ = c.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions([]string{kindPolicy, kindReference}, cobra.ShellCompDirectiveNoFileComp))
	return c
}
