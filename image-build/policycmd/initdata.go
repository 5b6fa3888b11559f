package policycmd

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func initdataCommand() *cobra.Command {
	return group("initdata", "Pack signed policies into initdata, and show what a launch binds",
		"Initdata (Confidential Containers, version 0.1.0) is the TOML document that carries the\n"+
			"signed policy to the guest. The digest of its exact bytes is what the launch is bound to.",
		packCommand(), initdataShowCommand(), digestCommand())
}

// binding is what digest and show say of a document.
type binding struct {
	Algorithm  string `json:"algorithm"`
	Digest     string `json:"digest"`
	PCR8       string `json:"pcr8,omitempty"` // sha256 only
	HostData   string `json:"hostData"`
	MRConfigID string `json:"mrConfigID"`
}

func bindingOf(i *policy.Initdata) binding {
	b := binding{Algorithm: i.Algorithm, Digest: fmt.Sprintf("%x", i.Digest()),
		HostData: fmt.Sprintf("%x", i.HostData()), MRConfigID: fmt.Sprintf("%x", i.MRConfigID())}
	if pcr, err := i.PCR8(); err == nil {
		b.PCR8 = fmt.Sprintf("%x", pcr)
	}
	return b
}

func (b binding) print(c *cobra.Command) {
	out := c.OutOrStdout()
	fmt.Fprintf(out, "%-10s %s\n", b.Algorithm, b.Digest)
	if b.PCR8 != "" {
		fmt.Fprintf(out, "PCR8       %s\n", b.PCR8)
	}
	fmt.Fprintf(out, "HOST_DATA  %s\nMRCONFIGID %s\n", b.HostData, b.MRConfigID)
}

func packCommand() *cobra.Command {
	var envelope, algorithm, out string
	var keys, rotation []string
	var zip bool
	c := &cobra.Command{
		Use:   "pack --policy ENVELOPE --key PUB --out FILE",
		Short: "Pack a signed policy into initdata",
		Long: "Pack writes the initdata document: the envelope, the public keys of its signers (which the\n" +
			"guest trusts only if the measured image lists their fingerprints) and, after a rotation of\n" +
			"signers, the older policies that named the next ones. The envelope's signatures are verified\n" +
			"by the given keys first. Above 256 KiB, where common transports end, it says so: see --gzip.",
		Example: "  cvmctl initdata pack --policy policy.dsse.json --key cosign.pub --out initdata.toml",
		Args:    exactArgs(0, "none"),
	}
	c.Flags().StringVar(&envelope, "policy", "", "signed policy `file`")
	c.Flags().StringArrayVar(&keys, "key", nil, "public key `file` of a signer; may be repeated")
	c.Flags().StringArrayVar(&rotation, "rotation", nil, "older signed policy `file` that names the next signers, oldest first; may be repeated")
	c.Flags().StringVar(&algorithm, "algorithm", "sha256", "`sha256`, sha384 or sha512; a vTPM takes sha256 only")
	c.Flags().BoolVar(&zip, "gzip", false, "compress the policy")
	c.Flags().StringVar(&out, "out", "-", "`file` for the initdata; - is standard output")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := require(c, "policy", "key"); err != nil {
			return err
		}
		signed, err := readInput(c, envelope, policy.MaxSize, cause.PolicyTooLarge)
		if err != nil {
			return err
		}
		data := map[string]string{}
		var links []json.RawMessage
		for _, r := range rotation {
			link, err := readInput(c, r, policy.MaxSize, cause.PolicyTooLarge)
			if err != nil {
				return err
			}
			if !json.Valid(link) {
				return cause.New(cause.PolicyMalformed, "%s is not an envelope", r)
			}
			links = append(links, link)
		}
		if links != nil {
			text, err := json.Marshal(links)
			if err != nil {
				return err
			}
			data[policy.KeyRotation] = string(text)
		}
		public, fingerprints, pem, err := loadPublicKeys(c, keys)
		if err != nil {
			return err
		}
		if links == nil {
			// With a chain the trusted keys are the first link's: the guest judges.
			e, err := parseEnvelope(signed)
			if err != nil {
				return named(envelope, cause.Wrap(cause.PolicyMalformed, err))
			}
			if _, err := e.Verify(policy.PayloadType, public, len(fingerprints)); err != nil {
				return cause.New(cause.PolicySignature, "%s is not signed by every key given: %w", envelope, err)
			}
		}
		data[policy.KeySigners] = string(pem)
		if zip {
			if data[policy.KeyPolicyGzip], err = policy.GzipText(signed); err != nil {
				return err
			}
		} else {
			data[policy.KeyPolicy] = string(signed)
		}
		packed, err := policy.PackInitdata(algorithm, data)
		if err != nil {
			return err
		}
		if len(packed) > policy.TransportLimit {
			fmt.Fprintf(c.ErrOrStderr(), "note: the initdata has %d bytes; common transports carry %d\n", len(packed), policy.TransportLimit)
		}
		return writeOutput(c, out, packed)
	}
	return c
}

func initdataShowCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "show FILE",
		Short:   "Print what initdata holds; verifies no signature",
		Example: "  cvmctl initdata show initdata.toml",
		Args:    exactArgs(1, "one file"),
	}
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		i, err := readInitdata(c, args[0])
		if err != nil {
			return err
		}
		signed, err := i.Envelope()
		if err != nil {
			return named(args[0], err)
		}
		e, err := parseEnvelope(signed)
		if err != nil {
			return named(args[0], cause.Wrap(cause.PolicyMalformed, err))
		}
		p, err := policy.DecodeJSON(e.Payload)
		if err != nil {
			return named(args[0], err)
		}
		s, b := summarize(p, e.Payload), bindingOf(i)
		if *format == "json" {
			return printJSON(c.OutOrStdout(), struct {
				Bytes   int     `json:"bytes"`
				Policy  summary `json:"policy"`
				Binding binding `json:"binding"`
			}{len(i.Raw), s, b})
		}
		fmt.Fprintf(c.OutOrStdout(), "signatures are not verified here: see cvmctl policy verify\nbytes    %d\n", len(i.Raw))
		if err := s.print(c, "text", ""); err != nil {
			return err
		}
		b.print(c)
		return nil
	}
	return c
}

func digestCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "digest FILE",
		Short: "Print the digest of initdata and the registers that it must be bound to",
		Long: "Digest prints the digest over the exact bytes of the document, what PCR 8 of a vTPM holds\n" +
			"after one extension with it, and what SNP's HOST_DATA and TDX's MRCONFIGID must be.",
		Example: "  cvmctl initdata digest initdata.toml\n  cvmctl initdata digest --output json initdata.toml | jq -r .pcr8",
		Args:    exactArgs(1, "one file"),
	}
	format := outputFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		i, err := readInitdata(c, args[0])
		if err != nil {
			return err
		}
		b := bindingOf(i)
		if *format == "json" {
			return printJSON(c.OutOrStdout(), b)
		}
		b.print(c)
		return nil
	}
	return c
}

func readInitdata(c *cobra.Command, path string) (*policy.Initdata, error) {
	raw, err := readInput(c, path, policy.MaxInitdata, cause.InitdataMalformed)
	if err != nil {
		return nil, err
	}
	i, err := policy.ParseInitdata(raw)
	return i, named(path, err)
}
