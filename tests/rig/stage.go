package rig

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"
)

// Stage is all the parts that one launch needs, running: what the outside of a
// guest looks like, and one guest that is not yet booted.
type Stage struct {
	*Rig
	Registry *Registry
	TPM      *TPM
	Broker   *Broker
	Builder  *Podman // the publisher's
	Podman   *Podman // the guest's
	Signer   *Keys   // signs images and SBOMs
	Owner    *Keys   // signs policies; trusted by the guest
	Guest    *Guest
}

// NewStage starts everything. told (may be nil) hears the name of each part
// before it is started: registry, tpm, broker, podman, keys.
func (r *Rig) NewStage(ctx context.Context, told func(part string)) (*Stage, error) {
	if told == nil {
		told = func(string) {}
	}
	s := &Stage{Rig: r}
	var err error
	for _, part := range []struct {
		name  string
		start func() error
	}{
		{"registry", func() error { s.Registry, err = r.StartRegistry(ctx); return err }},
		{"tpm", func() error { s.TPM, err = r.StartTPM(ctx, ""); return err }},
		{"broker", func() error { s.Broker, err = r.StartBroker(ctx, s.TPM.Roots); return err }},
		{"podman", func() error {
			if s.Builder, err = r.StartPodman(ctx, "builder"); err == nil {
				s.Podman, err = r.StartPodman(ctx, "guest")
			}
			return err
		}},
		{"keys", func() error {
			if s.Signer, err = r.NewKeys(ctx, "signer"); err == nil {
				s.Owner, err = r.NewKeys(ctx, "owner")
			}
			return err
		}},
	} {
		told(part.name)
		if err := part.start(); err != nil {
			return nil, err
		}
	}
	owner, err := s.Owner.Fingerprint()
	if err != nil {
		return nil, err
	}
	s.Guest, err = r.NewGuest(GuestOptions{TPM: s.TPM, Podman: s.Podman, Signers: []string{owner}})
	return s, err
}

//go:embed policy.yaml.tmpl
var policyTemplate string

// PolicyWorkload is one workload of Template. Its image and SBOM are to be
// signed by the stage's Signer.
type PolicyWorkload struct {
	Name       string
	Image      string // repository@sha256:…; may be left to Publish
	Encryption string // "" is forbidden
	Compare    string // "" is strict
	Port       uint16
	Extra      string // further lines under run:, not indented
}

// Template writes a policy named name for this stage's registry and broker,
// complete or for `cvmctl publish --policy-template` to complete, and returns
// its path.
func (s *Stage) Template(name string, workloads ...PolicyWorkload) (string, error) {
	data := map[string]any{
		"Name": name, "Workloads": workloads, "Registry": s.Registry.Host, "BrokerURL": s.Broker.URL,
		"Expires": time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339),
	}
	for field, file := range map[string]string{"BrokerCA": s.Broker.CA, "TokenKey": s.Broker.TokenKey, "SignerKey": s.Signer.Public} {
		pem, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		data[field] = string(pem)
	}
	indent := func(n int, text string) string {
		return strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n"+strings.Repeat(" ", n))
	}
	t, err := template.New("policy").Funcs(template.FuncMap{"indent": indent}).Parse(policyTemplate)
	if err != nil {
		return "", err
	}
	var text strings.Builder
	if err := t.Execute(&text, data); err != nil {
		return "", err
	}
	file := s.Path("policy", name+"-template.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return "", err
	}
	return file, os.WriteFile(file, []byte(text.String()), 0o600)
}

// Publication is what `cvmctl publish --output json` says.
type Publication struct {
	Reference      string   `json:"reference"`
	Digest         string   `json:"digest"` // repository@sha256:…
	ManifestDigest string   `json:"manifestDigest"`
	ConfigDigest   string   `json:"configDigest"` // podman's image ID
	Encrypted      bool     `json:"encrypted"`
	Layers         []string `json:"layers"`
	KeyResource    string   `json:"keyResource"`
	Policy         string   `json:"policy"`
}

// PublishOptions is one run of cvmctl publish.
type PublishOptions struct {
	Source   []string // a context directory, or --image REF
	To       string   // repository:tag, without the registry's host
	Key      *Keys    // nil: the stage's Signer
	Encrypt  bool     // the key and its release rule go to the stage's broker
	Workload string   // of the policy
	Template string   // "" writes no policy
	Version  uint64   // of the policy; zero keeps the template's
	Out      string   // file of the completed policy
	Extra    []string // further flags
}

// Publish runs cvmctl publish with the stage's registry, podman and keys.
func (s *Stage) Publish(ctx context.Context, o PublishOptions) (*Publication, error) {
	key := o.Key
	if key == nil {
		key = s.Signer
	}
	argv := []string{s.Program("cvmctl"), "publish", "--to", s.Registry.Reference(o.To, ""), "--plain-http",
		"--key", key.Private, "--podman-socket", s.Builder.URL, "--sbom-program", s.Program("cvm-sbom"),
		"--output", "json", "--progress", "none", "--tmpdir", s.Dir}
	if o.Workload != "" {
		argv = append(argv, "--workload", o.Workload)
	}
	if o.Encrypt {
		owner, err := s.Owner.Fingerprint()
		if err != nil {
			return nil, err
		}
		argv = append(argv, "--encrypt", "--rule-ek-roots", EKRootName, "--rule-signer", owner)
		argv = append(argv, s.Broker.Flags()...)
	}
	if o.Template != "" {
		argv = append(argv, "--policy-template", o.Template, "--policy-out", o.Out)
		if o.Version != 0 {
			argv = append(argv, "--policy-version", fmt.Sprint(o.Version))
		}
	}
	out, err := s.Run(ctx, append(append([]string{}, key.Env...), s.Builder.Env...), append(append(argv, o.Extra...), o.Source...)...)
	if err != nil {
		return nil, err
	}
	var p Publication
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		return nil, fmt.Errorf("cvmctl publish --output json: %w", err)
	}
	return &p, nil
}

// SignPolicy signs a policy document with `cvmctl policy sign` and returns the
// file of the envelope. No keys means the stage's Owner.
func (s *Stage) SignPolicy(ctx context.Context, file string, keys ...*Keys) (string, error) {
	if len(keys) == 0 {
		keys = []*Keys{s.Owner}
	}
	envelope := strings.TrimSuffix(file, filepath.Ext(file)) + ".dsse.json"
	argv := []string{s.Program("cvmctl"), "policy", "sign", "--in", file, "--out", envelope}
	var env []string
	for _, k := range keys {
		argv = append(argv, "--key", k.Private)
		env = append(env, k.Env...)
	}
	_, err := s.Run(ctx, env, argv...)
	return envelope, err
}

// Pack puts a signed policy and its signers' public keys into an initdata
// document and returns its file.
func (s *Stage) Pack(ctx context.Context, envelope string, keys ...*Keys) (string, error) {
	if len(keys) == 0 {
		keys = []*Keys{s.Owner}
	}
	initdata := strings.TrimSuffix(envelope, ".dsse.json") + ".toml"
	argv := []string{s.Program("cvmctl"), "initdata", "pack", "--policy", envelope, "--out", initdata}
	for _, k := range keys {
		argv = append(argv, "--key", k.Public)
	}
	_, err := s.Run(ctx, nil, argv...)
	return initdata, err
}

// PutSecret gives the broker a resource under the release rule of another one.
func (s *Stage) PutSecret(ctx context.Context, uri, value, ruleOf string) error {
	rule, err := s.broker(ctx, "rule", "show", ruleOf, "--output", "json")
	if err != nil {
		return err
	}
	file := s.Path("policy", "secret")
	if err := os.WriteFile(file, []byte(value), 0o600); err != nil {
		return err
	}
	defer os.Remove(file)
	if _, err := s.broker(ctx, "resource", "put", uri, "--file", file); err != nil {
		return err
	}
	if err := os.WriteFile(file, []byte(rule), 0o600); err != nil {
		return err
	}
	_, err = s.broker(ctx, "rule", "set", uri, "--file", file)
	return err
}

func (s *Stage) broker(ctx context.Context, args ...string) (string, error) {
	argv := append([]string{s.Program("cvmctl"), "broker"}, args...)
	return s.Run(ctx, nil, append(argv, "--url", s.Broker.URL, "--ca", s.Broker.CA, "--token-file", s.Broker.AdminToken)...)
}
