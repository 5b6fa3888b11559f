// Package publish takes a container image from a Containerfile, podman's
// storage, an OCI layout, an archive or a registry to everything that a
// confidential guest needs: SBOM, optional encryption with a fresh key that
// goes to a key broker, push, cosign signature, signed SBOM attestation and a
// launch policy with all digests filled in.
//
// It promises: what it reports was read back from the registry and verified;
// the tag appears only after that; plain content, keys and tokens stay out of
// argv, environments, logs and files that outlive the run. It does not upload
// to a transparency log and talks to nobody but the registry, the broker and
// podman's socket. Programs that use it call Reexec first in main.
package publish

import (
	"io"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Options is one publication.
type Options struct {
	// Exactly one of Context (a directory with a Containerfile) and Image.
	Context string
	Image   string // REF in podman's storage, oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE or docker://REF
	Build   BuildOptions
	Arch    string // of an image with several; default: this machine's

	To           string // REPOSITORY[:TAG]; without a tag the image is published by digest alone
	PodmanSocket string // unix:///path, or a path
	Registry     RegistryOptions
	Compression  string // of layers that are not compressed yet: "gzip" (default) or "zstd"

	KeyFile  string // cosign private key
	Password func() ([]byte, error)
	Bundle   bool // also Sigstore bundles as OCI 1.1 referrers

	SBOMProgram string // cvm-sbom; default: beside this program, /usr/lib/cvm-agent, PATH
	SBOMOut     string // file for a copy of the SBOM

	Encrypt    bool     // with a fresh key for provider attestation-agent
	Resource   string   // kbs:///repository/type/tag of that key; default: derived from Workload, unique
	KEKOut     string   // file for the key when no broker takes it
	Recipients []string // jwe:FILE, a public key in PEM
	Broker     BrokerOptions

	Workload string // name in the policy; default: last element of the repository
	Policy   PolicyOptions

	TempDir string // default: the system's
	Display Display
	Now     func() time.Time

	openBroker func() (keyBroker, error) // tests hold the broker; nil: adminclient
	launches   *launches                 // of Broker.Launch, once checked
}

// BuildOptions is how podman builds the Containerfile.
type BuildOptions struct {
	File    string // default: Containerfile or Dockerfile in the context
	Args    map[string]string
	Target  string
	Network string // "", "host" or "none"
	NoCache bool
	Output  io.Writer // the build's own output; nil discards it unless the build fails
}

// RegistryOptions is how the destination's registry is reached.
type RegistryOptions struct {
	PlainHTTP bool
	CAFile    string // PEM roots beside the system's
	AuthFile  string // default: containers' and docker's own
}

// BrokerOptions is where the key goes. TokenFile holds the admin token.
type BrokerOptions struct {
	URL       string
	CAFile    string
	TokenFile string
	EKRoots   []string // names of the broker's root sets that the release rule is limited to
	Signers   []string // SHA-256 of SPKI of the policy's signers; default: Policy.SignKey's
	Launch    string   // file with the launches that the rule is limited to, as `cvmctl measure` prints them, and tcb
}

func (b BrokerOptions) used() bool { return b.URL != "" && b.TokenFile != "" }

// PolicyOptions is the policy file that is written.
type PolicyOptions struct {
	Out       string
	Template  string
	Name      string // fresh policies only, like all that follow up to Platforms
	Version   uint64 // zero: 1, or the template's
	Expires   time.Duration
	Platforms []string
	BrokerURL string // as the guest reaches it; default: Broker.URL
	TokenKeys []string
	SignKey   string // cosign private key; writes Out + ".dsse.json" (the extension of Out replaced)
	SignedOut string
	Password  func() ([]byte, error) // of SignKey; default: Options.Password
}

// Result is what was published. Digests are "sha256:…".
type Result struct {
	Reference      string   `json:"reference"` // REPOSITORY[:TAG]
	Digest         string   `json:"digest"`    // REPOSITORY@sha256:…
	ManifestDigest string   `json:"manifestDigest"`
	ConfigDigest   string   `json:"configDigest"` // podman's image ID
	SBOMDigest     string   `json:"sbomDigest"`   // of the predicate's bytes
	Encrypted      bool     `json:"encrypted"`
	Layers         []string `json:"layers"`      // as pushed
	Signature      string   `json:"signature"`   // REPOSITORY:sha256-….sig
	Attestation    string   `json:"attestation"` // REPOSITORY:sha256-….att
	Bundles        bool     `json:"bundles"`
	KeyResource    string   `json:"keyResource,omitempty"`
	ReleaseRule    bool     `json:"releaseRule"` // false with a KeyResource: released to nobody until a rule is set
	Policy         string   `json:"policy,omitempty"`
	// PolicyIncomplete says what a template's other workloads still miss.
	PolicyIncomplete string `json:"policyIncomplete,omitempty"`
	PolicySigned     string `json:"policySigned,omitempty"`
}

// target is the parsed destination.
type target struct {
	repo name.Repository
	tag  string
}

func (t target) String() string {
	if t.tag == "" {
		return t.repo.Name()
	}
	return t.repo.Name() + ":" + t.tag
}

// check refuses what can be refused before any work, fills defaults, and
// returns the destination.
func (o *Options) check() (target, error) {
	usage := func(format string, args ...any) (target, error) {
		return target{}, cause.New(cause.Usage, format, args...)
	}
	if (o.Context == "") == (o.Image == "") {
		return usage("expected a context directory or --image, exactly one of them")
	}
	if o.To == "" {
		return usage("--to is required: REPOSITORY[:TAG]")
	}
	if o.KeyFile == "" {
		return usage("--key is required: a private key made by cosign generate-key-pair")
	}
	if strings.Contains(o.To, "@") {
		return usage("--to %q: a digest cannot be chosen, expected REPOSITORY[:TAG]", o.To)
	}
	opts := []name.Option{name.StrictValidation, name.WithDefaultTag("")}
	if o.Registry.PlainHTTP {
		opts = append(opts, name.Insecure)
	}
	var t target
	if i := strings.LastIndex(o.To, ":"); i > strings.LastIndex(o.To, "/") {
		tag, err := name.NewTag(o.To, opts...)
		if err != nil {
			return usage("--to: %w", err)
		}
		t = target{tag.Repository, tag.TagStr()}
	} else {
		repo, err := name.NewRepository(o.To, opts...)
		if err != nil {
			return usage("--to: %w", err)
		}
		t = target{repo: repo}
	}
	if o.Workload == "" {
		o.Workload = t.repo.RepositoryStr()[strings.LastIndex(t.repo.RepositoryStr(), "/")+1:]
	}
	switch o.Compression {
	case "":
		o.Compression = "gzip"
	case "gzip", "zstd":
	default:
		return usage("--compression %q: expected gzip or zstd", o.Compression)
	}
	for _, r := range o.Recipients {
		if !strings.HasPrefix(r, "jwe:") {
			return usage("--recipient %q: expected jwe:FILE", r)
		}
	}
	if err := o.checkKey(); err != nil {
		return target{}, err
	}
	var err error
	if o.launches, err = readLaunches(o.Broker.Launch); err != nil {
		return target{}, err
	}
	if o.Policy.SignKey != "" && o.Policy.Out == "" {
		return usage("--sign-policy-key needs --policy-out")
	}
	if o.Policy.Template != "" && o.Policy.Out == "" {
		return usage("--policy-template needs --policy-out")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Display == nil {
		o.Display = Lines(io.Discard)
	}
	if o.Password == nil {
		o.Password = func() ([]byte, error) { return nil, nil }
	}
	if o.Policy.Password == nil {
		o.Policy.Password = o.Password
	}
	return t, nil
}

func (o *Options) checkKey() error {
	if !o.Encrypt {
		if o.Resource != "" || o.KEKOut != "" {
			return cause.New(cause.Usage, "--resource and --kek-out need --encrypt")
		}
		return nil
	}
	if o.Broker.used() == (o.KEKOut != "") {
		return cause.New(cause.Usage, "--encrypt needs --broker-url and --broker-token-file, or --kek-out, exactly one of the two")
	}
	if o.Broker.used() && o.Broker.CAFile == "" {
		return cause.New(cause.Usage, "--broker-url needs --broker-ca: nothing but its roots is trusted with the key")
	}
	if o.Resource == "" {
		return nil
	}
	if _, err := kbs.ParseResourceURI(o.Resource); err != nil {
		return cause.New(cause.Usage, "--resource: %w", err)
	}
	return nil
}

// platforms lists what a fresh policy allows: every TEE, but not a bare TPM,
// which is weaker and has to be named.
func (p PolicyOptions) platforms() []policy.Platform {
	if len(p.Platforms) == 0 {
		return []policy.Platform{policy.PlatformSNP, policy.PlatformTDX, policy.PlatformAzSNPvTPM, policy.PlatformAzTDXvTPM}
	}
	var out []policy.Platform
	for _, s := range p.Platforms {
		out = append(out, policy.Platform(s))
	}
	return out
}
