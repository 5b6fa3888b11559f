// Package ordercmd is the part of cvmctl that an operator uses: `cvmctl order`
// makes signed orders and talks to nobody, `cvmctl control` talks to a guest's
// agent over the host's end of its serial port.
package ordercmd

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/policycmd"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/order"
)

// maxChallenge bounds what an agent answers to GET /v1/challenge, in bytes.
const maxChallenge = 4 << 10

// Commands returns `order` and `control` for the root command of cvmctl. Errors
// carry a cause code; cause.Exit gives the exit status.
func Commands() []*cobra.Command { return []*cobra.Command{orderCommand(), controlCommand()} }

func orderCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "order",
		Short: "Make signed orders to upgrade or destroy an instance",
		Long: "Make signed orders: to one boot of one instance, good once and for minutes. An order is signed by a key\n" +
			"of the running policy's control.orderKeys and answers a challenge of the agent's, from `cvmctl control\n" +
			"challenge`, from `cvm-agent ctl challenge` in the guest, or from GET /v1/challenge. The challenge comes by way\n" +
			"of the host, which may pass on another guest's: whom the order is for is said by --policy-name and\n" +
			"--instance, and a challenge that names anyone else is not signed.",
		Example: "  cvmctl control --serial cvm.sock challenge |\n" +
			"    cvmctl order destroy --key operator.key --policy-name shop --instance ID --out order.json\n" +
			"  cvmctl control --serial cvm.sock order order.json",
	}
	c.AddCommand(makeCommand(order.Upgrade), makeCommand(order.Destroy), showCommand())
	return c
}

func makeCommand(operation string) *cobra.Command {
	var keys []string
	var challenge, carried, out, passwordFile, policyName, instance string
	ttl := order.DefaultTTL
	c := &cobra.Command{
		Use:   operation + " --key KEY --policy-name NAME --instance ID [--challenge FILE] --out FILE",
		Short: "Make a signed order to " + operation,
		Long: "Make a signed order to " + operation + ". Keys are those of `cosign generate-key-pair`, or PKCS #8 in PEM. The\n" +
			"passphrase of an encrypted key is taken from --password-file, from COSIGN_PASSWORD or asked for on the\n" +
			"terminal. The agent takes an expiry of at most " + order.MaxAhead.String() + " ahead of its own clock.\n\n" +
			"The instance's id is the broker's, from its audit log or `cvmctl broker instance list`, and not from the\n" +
			"host; --instance '' is for a guest without a broker, which has none.",
		Example: "  cvmctl order " + operation + " --key operator.key --policy-name shop --instance ID --challenge challenge.json --out order.json",
		Args:    cobra.NoArgs,
	}
	c.Flags().StringArrayVar(&keys, "key", nil, "private key `FILE` that the policy names for this order; may be repeated")
	c.Flags().StringVar(&challenge, "challenge", "-", "the agent's challenge, a `FILE` of JSON; - is standard input")
	c.Flags().StringVar(&policyName, "policy-name", "", "`NAME` of the running policy that the challenge has to be of")
	c.Flags().StringVar(&instance, "instance", "", "the broker's `ID` of the instance that the challenge has to be of; empty where there is no broker")
	c.Flags().DurationVar(&ttl, "expires-in", ttl, "`DURATION` until the order ends")
	c.Flags().StringVar(&out, "out", "-", "`FILE` for the order; - is standard output")
	c.Flags().StringVar(&passwordFile, "password-file", "", "`FILE` whose first line is the passphrase of encrypted keys")
	for _, name := range []string{"policy-name", "instance", "expires-in"} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	required := []string{"key", "policy-name", "instance"}
	if operation == order.Upgrade {
		c.Use = operation + " --key KEY --policy-name NAME --instance ID --policy FILE [--challenge FILE] --out FILE"
		c.Example = "  cvmctl order upgrade --key operator.key --policy-name shop --instance ID --policy v2.dsse.json \\\n" +
			"    --challenge challenge.json --out order.json"
		c.Flags().StringVar(&carried, "policy", "", "signed policy `FILE`, an envelope or initdata")
		required = append(required, "policy")
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		for _, name := range required {
			if !c.Flags().Changed(name) {
				return cause.New(cause.Usage, "%s: --%s is missing", c.CommandPath(), name)
			}
		}
		if ttl < time.Second || ttl > order.MaxAhead {
			return cause.New(cause.Usage, "--expires-in is %s, expected 1s to %s", ttl, order.MaxAhead)
		}
		var upgrade []byte
		var err error
		if operation == order.Upgrade {
			if upgrade, err = read(c, carried, order.MaxCarried, cause.PolicyTooLarge); err != nil {
				return err
			}
			if len(upgrade) == 0 {
				return cause.New(cause.PolicyMissing, "%s is empty, expected a signed policy", carried)
			}
		}
		ch, err := readChallenge(c, challenge)
		if err != nil {
			return err
		}
		// Before a key is touched.
		if err := meant(ch, policyName, instance); err != nil {
			return err
		}
		if operation == order.Upgrade {
			if err := signedPolicy(upgrade); err != nil {
				return fmt.Errorf("%s: %w", carried, err)
			}
		}
		signers, err := policycmd.LoadSigners(c, keys, passwordFile)
		if err != nil {
			return err
		}
		document, err := order.Sign(order.Order{Operation: operation, Policy: ch.Policy, InstanceID: ch.InstanceID, BootID: ch.BootID,
			Challenge: ch.Challenge, Expires: time.Now().Add(ttl).UTC().Format(time.RFC3339)}, upgrade, signers...)
		if err != nil {
			return err
		}
		return write(c, out, append(document, '\n'))
	}
	return c
}

func readChallenge(c *cobra.Command, path string) (*order.Challenge, error) {
	data, err := read(c, path, maxChallenge, cause.OrderMalformed)
	if err != nil {
		return nil, err
	}
	var ch order.Challenge
	if err := bounded.DecodeJSON(data, &ch, bounded.Limits{Bytes: maxChallenge, Depth: 2, Nodes: 32}); err != nil {
		return nil, cause.New(cause.OrderMalformed, "the challenge: %w", err)
	}
	if err := ch.Validate(); err != nil {
		return nil, err
	}
	if !ch.Expires.IsZero() && time.Now().After(ch.Expires) { // by another clock than ours
		fmt.Fprintf(c.ErrOrStderr(), "the challenge ended at %s by the guest's clock: the order may come too late\n", ch.Expires.UTC().Format(time.RFC3339))
	}
	return &ch, nil
}

// meant refuses a challenge of another guest than the operator named: whoever
// carries challenges chooses whose he brings.
func meant(ch *order.Challenge, policyName, instance string) error {
	if ch.Policy != policyName {
		return cause.New(cause.OrderOtherPolicy, "the challenge is of policy %q, --policy-name is %q: nothing is signed", ch.Policy, policyName)
	}
	if ch.InstanceID != instance {
		return cause.New(cause.OrderOtherInstance, "the challenge is of instance %q, --instance is %q: nothing is signed", ch.InstanceID, instance)
	}
	return nil
}

// signedPolicy checks that an upgrade carries what the agent can open at all:
// an envelope, alone or in initdata. Who signed it is the agent's to judge.
func signedPolicy(carried []byte) error {
	envelope, err := policy.CarriedEnvelope(carried)
	if err != nil {
		return err
	}
	e, err := dsse.Parse(envelope)
	if err != nil {
		return cause.Wrap(cause.PolicyMalformed, err)
	}
	if e.PayloadType != policy.PayloadType || len(e.Signatures) == 0 {
		return cause.New(cause.PolicyMalformed, "%d signatures over a payload of type %q, expected a signed policy, %s", len(e.Signatures), e.PayloadType, policy.PayloadType)
	}
	return nil
}

// shown is what show prints.
type shown struct {
	*order.Order
	Bytes int `json:"carriedBytes"` // of what is carried
}

func showCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "show FILE",
		Short:   "Print what an order says; verifies no signature",
		Example: "  cvmctl order show order.json",
		Args:    cobra.ExactArgs(1),
	}
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		data, err := read(c, args[0], order.MaxDocument, cause.OrderMalformed)
		if err != nil {
			return err
		}
		d, err := order.Parse(data)
		if err != nil {
			return err
		}
		o, err := d.Peek()
		if err != nil {
			return err
		}
		if o.Carries != order.Digest(d.Carries) {
			return cause.New(cause.OrderCarries, "the order names %q, it carries %q", o.Carries, order.Digest(d.Carries))
		}
		out := c.OutOrStdout()
		if *format == "json" {
			e := json.NewEncoder(out)
			e.SetIndent("", "  ")
			return e.Encode(shown{o, len(d.Carries)})
		}
		fmt.Fprintf(out, "the signature is not verified here: the agent does\noperation  %s\npolicy     %s\ninstance   %s\nboot       %s\nchallenge  %s\nexpires    %s\n",
			o.Operation, o.Policy, o.InstanceID, o.BootID, o.Challenge, o.Expires)
		if o.Carries != "" {
			fmt.Fprintf(out, "carries    %s, %d bytes\n", o.Carries, len(d.Carries))
		}
		return nil
	}
	return c
}

// outputFlag adds --output and returns where its value goes.
func outputFlag(c *cobra.Command) *string {
	format := c.Flags().StringP("output", "o", "text", "`FORMAT` of the output: text or json")
	c.PreRunE = func(*cobra.Command, []string) error { return checkFormat(*format) }
	_ = c.RegisterFlagCompletionFunc("output", formats)
	return format
}

var formats = cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp)

func checkFormat(format string) error {
	if format != "text" && format != "json" {
		return cause.New(cause.Usage, "--output is %q, expected text or json", format)
	}
	return nil
}

func read(c *cobra.Command, path string, max int64, tooLarge cause.Code) (data []byte, err error) {
	if path == "-" {
		data, err = bounded.ReadAll(c.InOrStdin(), max)
	} else {
		data, err = bounded.ReadNamed(path, max)
	}
	if errors.Is(err, bounded.ErrTooLarge) {
		return nil, cause.New(tooLarge, "%s: %w", path, err)
	}
	return data, cause.Wrap(cause.Usage, err)
}

// write writes a file whole or not at all, or to standard output for "-".
func write(c *cobra.Command, path string, data []byte) error {
	if path == "-" {
		_, err := c.OutOrStdout().Write(data)
		return err
	}
	return cause.Wrap(cause.StorageFailed, renameio.WriteFile(path, data, 0o600))
}
