package publish

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/renameio/v2"
	"github.com/gowebpki/jcs"
	"github.com/sigstore/sigstore/pkg/cryptoutils"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
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
		return r.freshPolicy()
	}
	data, err := bounded.ReadFile(o.Template, policy.MaxSize)
	if err != nil {
		return nil, cause.New(cause.Usage, "--policy-template: %w", err)
	}
	var p policy.Policy
	if err := release.DecodeYAML(data, &p, policy.MaxSize); err != nil {
		return nil, cause.New(cause.Usage, "--policy-template %s: %w", o.Template, err)
	}
	w := workload(&p, r.o.Workload)
	if w == nil {
		return nil, cause.New(cause.Usage, "--policy-template %s has no workload %q", o.Template, r.o.Workload)
	}
	encrypt := r.o.Encrypt || len(r.o.Recipients) > 0
	if w.Encryption == "required" && !encrypt {
		return nil, cause.New(cause.Usage, "the template requires encryption of workload %q: give --encrypt or --recipient", w.Name)
	}
	if w.Encryption == "forbidden" && encrypt {
		return nil, cause.New(cause.Usage, "the template forbids encryption of workload %q", w.Name)
	}
	if o.Version != 0 {
		p.Version = o.Version
	}
	return &p, nil
}

func (r *run) loadPolicySigner() error {
	pem, err := bounded.ReadFile(r.o.Policy.SignKey, 64<<10)
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
		data, err := bounded.ReadFile(f, 1<<20)
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

// writePolicy fills in what was published and writes the file, and its signed
// form where a key was given.
func (r *run) writePolicy(p *policy.Policy, res *Result) error {
	pub, err := r.signer.PublicKey()
	if err != nil {
		return err
	}
	pem, err := cryptoutils.MarshalPublicKeyToPEM(pub)
	if err != nil {
		return err
	}
	w := workload(p, r.o.Workload)
	w.Image = res.Digest
	if !hasKey(w.Signatures.Required, string(pem)) {
		w.Signatures.Required = append(w.Signatures.Required, policy.Signer{Key: string(pem)})
	}
	if res.Encrypted {
		w.Encryption = "required"
	}
	if r.o.Policy.Template == "" {
		w.SBOM = policy.SBOM{Required: true, Compare: "normal"}
	}
	text, canonical, err := render(p)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(r.o.Policy.Out, text, 0o644); err != nil {
		return failed(cause.StorageFailed, "--policy-out", err)
	}
	res.Policy = r.o.Policy.Out
	if r.policySigner == nil {
		return nil
	}
	envelope, err := dsse.Sign(policy.PayloadType, canonical, r.policySigner)
	if err != nil {
		return cause.New(cause.PublishFailed, "sign policy: %w", err)
	}
	res.PolicySigned = r.o.Policy.SignedOut
	if res.PolicySigned == "" {
		res.PolicySigned = strings.TrimSuffix(r.o.Policy.Out, filepath.Ext(r.o.Policy.Out)) + ".dsse.json"
	}
	return failedIf(cause.StorageFailed, "signed policy", renameio.WriteFile(res.PolicySigned, envelope, 0o644))
}

// render gives a policy as YAML in document order and as RFC 8785 JSON.
func render(p *policy.Policy) (text, canonical []byte, err error) {
	raw, err := encode(p)
	if err != nil {
		return nil, nil, err
	}
	var ordered yaml.MapSlice
	if err := yaml.UnmarshalWithOptions(raw, &ordered, yaml.UseOrderedMap()); err != nil {
		return nil, nil, err
	}
	if text, err = yaml.MarshalWithOptions(ordered, yaml.UseLiteralStyleIfMultiline(true), yaml.IndentSequence(true)); err != nil {
		return nil, nil, err
	}
	// What a person reviews must be what is signed.
	var again policy.Policy
	if err := release.DecodeYAML(text, &again, policy.MaxSize); err != nil {
		return nil, nil, cause.New(cause.Internal, "policy does not survive YAML: %w", err)
	}
	if raw, err = json.Marshal(&again); err != nil {
		return nil, nil, err
	}
	canonical, err = jcs.Transform(raw)
	return text, canonical, err
}

func hasKey(signers []policy.Signer, pem string) bool {
	for _, s := range signers {
		if strings.TrimSpace(s.Key) == strings.TrimSpace(pem) {
			return true
		}
	}
	return false
}
