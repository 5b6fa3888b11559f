package publish

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/renameio/v2"
	"github.com/sigstore/sigstore/pkg/cryptoutils"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/signkey"
)

// defaultExpiry of a fresh policy.
const defaultExpiry = 90 * 24 * time.Hour

// preparePolicy reads the template, or starts a fresh policy, and loads the
// key that signs it: all that can be wrong with them is found before any work.
// It returns nil when no policy is wanted.
func (r *run) preparePolicy() (*policy.Policy, error) {
	o := r.o.Policy
	if o.Out == "" {
		return nil, nil
	}
	if o.SignKey != "" {
		if err := r.loadPolicySigner(); err != nil {
			return nil, err
		}
	}
	if o.Template == "" {
		p, err := r.freshPolicy()
		if err != nil {
			return nil, err
		}
		return p, r.tryPolicy(p)
	}
	data, err := bounded.ReadNamed(o.Template, policy.MaxSize)
	if err != nil {
		return nil, cause.New(cause.Usage, "--policy-template: %w", err)
	}
	var p policy.Policy
	if _, err := bounded.DecodeYAML(data, &p, bounded.Limits{Bytes: policy.MaxSize}); err != nil {
		return nil, cause.New(cause.Usage, "--policy-template %s: %w", o.Template, err)
	}
	w := workload(&p, r.o.Workload)
	if w == nil {
		return nil, cause.New(cause.Usage, "--policy-template %s has no workload %q", o.Template, r.o.Workload)
	}
	if w.Encryption == "required" && !r.encrypts() {
		return nil, cause.New(cause.Usage, "the template requires encryption of workload %q: give --encrypt or --recipient", w.Name)
	}
	if w.Encryption == "forbidden" && r.encrypts() {
		return nil, cause.New(cause.Usage, "the template forbids encryption of workload %q", w.Name)
	}
	if o.Version != 0 {
		p.Version = o.Version
	}
	return &p, r.tryPolicy(&p)
}

func (r *run) encrypts() bool { return r.o.Encrypt || len(r.o.Recipients) > 0 }

func (r *run) loadPolicySigner() error {
	pem, err := bounded.ReadNamed(r.o.Policy.SignKey, 64<<10)
	if err != nil {
		return cause.New(cause.Usage, "--sign-policy-key: %w", err)
	}
	defer clear(pem)
	var pass []byte
	if signkey.Encrypted(pem) {
		if pass, err = r.o.Policy.Password(); err != nil {
			return cause.Wrap(cause.Usage, err)
		}
		defer clear(pass)
	}
	if r.policySigner, err = signkey.Load(pem, pass); err != nil {
		return cause.New(cause.Usage, "--sign-policy-key %s: %w", r.o.Policy.SignKey, err)
	}
	return nil
}

// freshPolicy is a complete policy for one workload with the safe defaults.
func (r *run) freshPolicy() (*policy.Policy, error) {
	o := r.o.Policy
	p := &policy.Policy{
		APIVersion: policy.APIVersion,
		Name:       o.Name,
		Version:    max(o.Version, 1),
		Platforms:  o.platforms(),
		Workloads:  []policy.Workload{{Name: r.o.Workload, Encryption: "optional"}},
	}
	if p.Name == "" {
		p.Name = r.o.Workload
	}
	expiry := o.Expires
	if expiry == 0 {
		expiry = defaultExpiry
	}
	p.Expires = r.o.Now().Add(expiry).UTC().Format(time.RFC3339)
	url := o.BrokerURL
	if url == "" {
		url = r.o.Broker.URL
	}
	if url != "" {
		b := &policy.Broker{URL: url}
		var err error
		if b.TLSRoots, err = pemFiles("--broker-ca", r.o.Broker.CAFile); err != nil {
			return nil, err
		}
		if b.TokenKeys, err = pemFiles("--broker-token-key", o.TokenKeys...); err != nil {
			return nil, err
		}
		if len(b.TLSRoots) == 0 || len(b.TokenKeys) == 0 {
			return nil, cause.New(cause.Usage, "a policy with a broker needs --broker-ca and --broker-token-key")
		}
		p.Broker = b
	}
	if r.o.Registry.PlainHTTP || r.o.Registry.CAFile != "" {
		roots, err := pemFiles("--registry-ca", r.o.Registry.CAFile)
		if err != nil {
			return nil, err
		}
		p.Registries = []policy.Registry{{Host: r.target.repo.RegistryStr(), PlainHTTP: r.o.Registry.PlainHTTP, TLSRoots: roots}}
	}
	return p, nil
}

// pemFiles reads PEM files, leaving out empty names.
func pemFiles(flag string, files ...string) ([]string, error) {
	var out []string
	for _, f := range files {
		if f == "" {
			continue
		}
		data, err := bounded.ReadNamed(f, 1<<20)
		if err != nil {
			return nil, cause.New(cause.Usage, "%s: %w", flag, err)
		}
		out = append(out, strings.TrimSpace(string(data))+"\n")
	}
	return out, nil
}

func workload(p *policy.Policy, name string) *policy.Workload {
	for i := range p.Workloads {
		if p.Workloads[i].Name == name {
			return &p.Workloads[i]
		}
	}
	return nil
}

// fill names what was published in the policy.
func (r *run) fill(p *policy.Policy, digest string, encrypted bool) error {
	pub, err := r.signer.PublicKey()
	if err != nil {
		return err
	}
	pem, err := cryptoutils.MarshalPublicKeyToPEM(pub)
	if err != nil {
		return err
	}
	w := workload(p, r.o.Workload)
	w.Image = digest
	if !hasKey(w.Signatures.Required, string(pem)) {
		w.Signatures.Required = append(w.Signatures.Required, policy.Signer{Key: string(pem)})
	}
	if encrypted {
		w.Encryption = "required"
	}
	if r.o.Policy.Template == "" {
		w.SBOM = policy.SBOM{Required: true, Compare: "normal"}
	}
	return nil
}

// tryPolicy fills in a digest of zeros, so that a policy that can never become
// valid is refused before anything is built. A template may be incomplete
// where other workloads wait for their own publication, unless it is signed.
func (r *run) tryPolicy(p *policy.Policy) error {
	if err := r.fill(p, r.target.repo.Name()+"@sha256:"+strings.Repeat("0", 64), r.encrypts()); err != nil {
		return err
	}
	if r.o.Policy.Template != "" && r.policySigner == nil {
		return nil
	}
	if err := p.Validate(); err != nil {
		return cause.New(cause.Usage, "the policy would not be valid: %w", err)
	}
	return nil
}

// writePolicy writes the filled-in policy, and its signed form where a key was
// given.
func (r *run) writePolicy(p *policy.Policy, res *Result) error {
	if err := r.fill(p, res.Digest, res.Encrypted); err != nil {
		return err
	}
	text, err := render(p)
	if err != nil {
		return err
	}
	// What a person reviews must be what is signed, so that is read back.
	again, err := policy.DecodeYAML(text)
	switch {
	case err == nil:
	case r.o.Policy.Template != "" && r.policySigner == nil:
		res.PolicyIncomplete = err.Error()
	default:
		return err
	}
	if err := renameio.WriteFile(r.o.Policy.Out, text, 0o644); err != nil {
		return failed(cause.StorageFailed, "--policy-out", err)
	}
	res.Policy = r.o.Policy.Out
	if r.policySigner == nil {
		return nil
	}
	envelope, err := policy.Sign(again, r.policySigner)
	if err != nil {
		return cause.Wrap(cause.PublishFailed, err)
	}
	res.PolicySigned = r.o.Policy.SignedOut
	if res.PolicySigned == "" {
		res.PolicySigned = strings.TrimSuffix(r.o.Policy.Out, filepath.Ext(r.o.Policy.Out)) + ".dsse.json"
	}
	return failedIf(cause.StorageFailed, "signed policy", renameio.WriteFile(res.PolicySigned, envelope, 0o644))
}

// render gives a policy as YAML, its fields in the order of the document type.
func render(p *policy.Policy) ([]byte, error) {
	raw, err := encode(p)
	if err != nil {
		return nil, err
	}
	var ordered yaml.MapSlice
	if err := yaml.UnmarshalWithOptions(raw, &ordered, yaml.UseOrderedMap()); err != nil {
		return nil, err
	}
	return yaml.MarshalWithOptions(safe(ordered), yaml.IndentSequence(true), yaml.UseLiteralStyleIfMultiline(true))
}

// Strings that no YAML reader takes for anything else, and blocks of text such
// as keys, are left to the library; all others are written in quotes.
var (
	plainScalar = regexp.MustCompile(`^[A-Za-z/][A-Za-z0-9._/@-]*(:[A-Za-z0-9./@-]+)*$`)
	block       = regexp.MustCompile(`^([!-~]([ -~]*[!-~])?\n)+$`)
	notText     = []string{"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}
)

type quoted string

func (q quoted) MarshalYAML() ([]byte, error) { return encode(string(q)) }

// safe marks the strings of a decoded document that need quotes.
func safe(v any) any {
	switch v := v.(type) {
	case yaml.MapSlice:
		for i := range v {
			v[i].Value = safe(v[i].Value)
		}
	case []any:
		for i := range v {
			v[i] = safe(v[i])
		}
	case string:
		if !block.MatchString(v) && (!plainScalar.MatchString(v) || slices.Contains(notText, strings.ToLower(v))) {
			return quoted(v)
		}
	}
	return v
}

func hasKey(signers []policy.Signer, pem string) bool {
	for _, s := range signers {
		if strings.TrimSpace(s.Key) == strings.TrimSpace(pem) {
			return true
		}
	}
	return false
}
