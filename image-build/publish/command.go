package publish

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const long = `Publish takes an image to everything that a confidential guest needs: an SBOM of
its content, optional encryption with a fresh key that goes to a key broker, the
push, a cosign signature and a signed SBOM attestation over the pushed digest,
and a launch policy with all digests filled in. It reads back and verifies what
it pushed before it sets the tag, and fails otherwise.

The image is built from the Containerfile in CONTEXT by podman's service, or is
an existing one: --image REF in podman's storage, oci:DIR[:TAG],
oci-archive:FILE, docker-archive:FILE or docker://REF.

Passphrases of private keys come from --password-file, COSIGN_PASSWORD or a
prompt. Keys and tokens are read from files, never from the command line.`

const example = `  # sign and publish a plain image, with a fresh policy
  cvmctl publish ./app --to registry.example/app:1.0 --key cosign.key --policy-out policy.yaml

  # encrypt it, the key and its release rule go to the broker, and sign the policy
  cvmctl publish ./app --to registry.example/app:1.0 --key cosign.key --encrypt \
    --broker-url https://broker.example:8443 --broker-ca broker-ca.pem \
    --broker-token-file admin.token --broker-token-key broker-token.pub \
    --policy-out policy.yaml --sign-policy-key policy.key

  # an existing image, for the holder of a private key
  cvmctl publish --image oci:./layout --to registry.example/app --key cosign.key --recipient jwe:reader.pub

  # a new version of an existing policy
  cvmctl publish ./app --to registry.example/app:1.1 --key cosign.key \
    --policy-template policy.yaml --workload app --policy-version 2 --policy-out policy-2.yaml`

// Command is `cvmctl publish`.
func Command() *cobra.Command {
	var (
		o                          Options
		passwordFile, policyPwFile string
		output, progress           string
		buildArgs                  []string
		expires                    = defaultExpiry
		buildLog                   bool
	)
	cmd := &cobra.Command{
		Use:     "publish [CONTEXT|--image REF] --to REPOSITORY[:TAG] --key FILE",
		Short:   "Build, describe, encrypt, push, sign, attest and check an image",
		Long:    long,
		Example: example,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				o.Context = args[0]
			}
			if output != "text" && output != "json" {
				return cause.New(cause.Usage, "--output %q: expected text or json", output)
			}
			var err error
			if o.Build.Args, err = parseArgs(buildArgs); err != nil {
				return err
			}
			if o.Display, err = display(progress, cmd.ErrOrStderr()); err != nil {
				return err
			}
			if buildLog {
				o.Build.Output = cmd.ErrOrStderr()
			}
			o.Policy.Expires = expires
			o.Password = passphrase(passwordFile, o.KeyFile)
			if policyPwFile != "" || o.Policy.SignKey != o.KeyFile {
				o.Policy.Password = passphrase(firstOf(policyPwFile, passwordFile), o.Policy.SignKey)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			res, err := Run(ctx, o)
			o.Display.Close()
			if err != nil {
				return err
			}
			return res.print(cmd.OutOrStdout(), output)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&o.Image, "image", "", "existing image instead of CONTEXT")
	f.StringVar(&o.To, "to", "", "REPOSITORY[:TAG] to publish as")
	f.StringVar(&o.KeyFile, "key", "", "cosign private key that signs image and SBOM")
	f.StringVar(&passwordFile, "password-file", "", "file with the key's passphrase (default: COSIGN_PASSWORD or a prompt)")
	f.BoolVar(&o.Bundle, "bundle", false, "also store Sigstore bundles as OCI 1.1 referrers")

	f.StringVarP(&o.Build.File, "file", "f", "", "Containerfile (default: Containerfile or Dockerfile in CONTEXT)")
	f.StringArrayVar(&buildArgs, "build-arg", nil, "build argument NAME=VALUE, repeatable")
	f.StringVar(&o.Build.Target, "target", "", "build stage to publish")
	f.StringVar(&o.Build.Network, "build-network", "", "network of RUN steps: host or none (default: podman's)")
	f.BoolVar(&o.Build.NoCache, "no-cache", false, "build without podman's cache")
	f.BoolVar(&buildLog, "build-log", false, "show the build's own output")
	f.StringVar(&o.PodmanSocket, "podman-socket", DefaultPodmanSocket(), "podman's service")
	f.StringVar(&o.Arch, "arch", "", "architecture of an image with several (default: this machine's)")
	f.StringVar(&o.Compression, "compression", "gzip", "of layers that are not compressed yet: gzip or zstd")

	f.BoolVar(&o.Encrypt, "encrypt", false, "encrypt every layer with a fresh key for provider attestation-agent")
	f.StringVar(&o.Resource, "resource", "", "kbs:///repository/type/tag of that key (default: kbs:///default/key/WORKLOAD-random)")
	f.StringVar(&o.KEKOut, "kek-out", "", "write that key to FILE (0600) instead of a broker")
	f.StringArrayVar(&o.Recipients, "recipient", nil, "encrypt also or only for jwe:FILE, a public key in PEM, repeatable")

	f.StringVar(&o.Broker.URL, "broker-url", "", "key broker, https://host[:port]")
	f.StringVar(&o.Broker.CAFile, "broker-ca", "", "PEM roots of the broker's certificate")
	f.StringVar(&o.Broker.TokenFile, "broker-token-file", "", "file with the broker's admin token")
	f.StringVar(&o.Broker.Launch, "rule-launch", "", "FILE with the known launches that the release rule is limited to, as cvmctl measure prints them (for SEV-SNP with tcb.snp.minimum), or reference values; without it no rule is set for a TEE")
	f.StringArrayVar(&o.Broker.EKRoots, "rule-ek-roots", nil, "root set of the broker that the release rule is limited to, repeatable")
	f.StringArrayVar(&o.Broker.Signers, "rule-signer", nil, "SHA-256 of a policy signer's SPKI for the release rule, repeatable (default: --sign-policy-key's)")

	f.BoolVar(&o.Registry.PlainHTTP, "plain-http", false, "the registry speaks plain HTTP")
	f.StringVar(&o.Registry.CAFile, "registry-ca", "", "PEM roots of the registry, beside the system's")
	f.StringVar(&o.Registry.AuthFile, "authfile", "", "registry credentials (default: containers' and docker's own files)")

	f.StringVar(&o.SBOMProgram, "sbom-program", "", "cvm-sbom (default: beside cvmctl, /usr/lib/cvm-agent, PATH)")
	f.StringVar(&o.SBOMOut, "sbom-out", "", "also write the SBOM to FILE")

	f.StringVar(&o.Workload, "workload", "", "the image's name in the policy (default: last element of the repository)")
	f.StringVar(&o.Policy.Out, "policy-out", "", "write the launch policy (YAML) to FILE")
	f.StringVar(&o.Policy.Template, "policy-template", "", "policy to fill in (default: a fresh one)")
	f.StringVar(&o.Policy.Name, "policy-name", "", "name of a fresh policy (default: the workload's)")
	f.Uint64Var(&o.Policy.Version, "policy-version", 0, "version (default: the template's, or 1)")
	f.DurationVar(&expires, "policy-expires", defaultExpiry, "life of a fresh policy")
	f.StringSliceVar(&o.Policy.Platforms, "allow-platform", nil, "platforms of a fresh policy (default: snp,tdx,az-snp-vtpm,az-tdx-vtpm; tpm must be named)")
	f.StringVar(&o.Policy.BrokerURL, "policy-broker-url", "", "broker as the guest reaches it (default: --broker-url)")
	f.StringArrayVar(&o.Policy.TokenKeys, "broker-token-key", nil, "PEM public key that verifies the broker's tokens, for a fresh policy, repeatable")
	f.StringVar(&o.Policy.SignKey, "sign-policy-key", "", "private key that signs the policy")
	f.StringVar(&policyPwFile, "policy-password-file", "", "file with that key's passphrase (default: as --password-file)")
	f.StringVar(&o.Policy.SignedOut, "policy-signed-out", "", "signed policy (default: --policy-out with extension .dsse.json)")

	f.StringVar(&o.TempDir, "tmpdir", "", "where the plain image is worked on, in a 0700 directory (default: TMPDIR)")
	f.StringVar(&progress, "progress", "auto", "auto, bars, lines or none")
	f.StringVar(&output, "output", "text", "`FORMAT` of the output: text or json")
	for name, values := range map[string][]string{
		"output": {"text", "json"}, "progress": {"auto", "bars", "lines", "none"}, "compression": {"gzip", "zstd"}, "build-network": {"host", "none"},
		"allow-platform": {"snp", "tdx", "az-snp-vtpm", "az-tdx-vtpm", "tpm"},
	} {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return cmd
}

func display(kind string, w io.Writer) (Display, error) {
	tty := false
	if f, ok := w.(*os.File); ok {
		tty = term.IsTerminal(int(f.Fd()))
	}
	switch {
	case kind == "bars", kind == "auto" && tty:
		return Bars(w), nil
	case kind == "lines", kind == "auto":
		return Lines(w), nil
	case kind == "none":
		return Lines(io.Discard), nil
	}
	return nil, cause.New(cause.Usage, "--progress %q: expected auto, bars, lines or none", kind)
}

func parseArgs(list []string) (map[string]string, error) {
	m := map[string]string{}
	for _, a := range list {
		k, v, ok := strings.Cut(a, "=")
		if !ok || k == "" {
			return nil, cause.New(cause.Usage, "--build-arg %q: expected NAME=VALUE", a)
		}
		m[k] = v
	}
	return m, nil
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// passphrase finds a key's passphrase like cosign does, and asks at most once.
func passphrase(file, key string) func() ([]byte, error) {
	return func() ([]byte, error) {
		if file != "" {
			data, err := bounded.ReadNamed(file, 4096)
			if err != nil {
				return nil, cause.New(cause.Usage, "passphrase: %w", err)
			}
			return []byte(strings.TrimRight(string(data), "\r\n")), nil
		}
		if v, ok := os.LookupEnv("COSIGN_PASSWORD"); ok {
			return []byte(v), nil
		}
		fd := int(os.Stdin.Fd())
		if !term.IsTerminal(fd) {
			return nil, cause.New(cause.Usage, "no passphrase for %s: give --password-file or set COSIGN_PASSWORD", key)
		}
		fmt.Fprintf(os.Stderr, "Passphrase for %s: ", key)
		pass, err := term.ReadPassword(fd)
		fmt.Fprintln(os.Stderr)
		if err != nil {
			return nil, cause.New(cause.Usage, "passphrase: %w", err)
		}
		return pass, nil
	}
}

func (r *Result) print(w io.Writer, output string) error {
	if output == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	rows := [][2]string{
		{"published", r.Reference}, {"digest", r.Digest}, {"config", r.ConfigDigest}, {"sbom", r.SBOMDigest},
		{"signature", r.Signature}, {"attestation", r.Attestation}, {"key", r.KeyResource},
		{"policy", r.Policy}, {"incomplete", r.PolicyIncomplete}, {"signed", r.PolicySigned},
	}
	var err error
	for _, row := range rows {
		if row[1] != "" {
			_, e := fmt.Fprintf(w, "%-12s %s\n", row[0], row[1])
			err = errors.Join(err, e)
		}
	}
	return err
}
