package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// guestPort is where the workload listens, in its container and on the guest.
const guestPort = 8080

// secret is a resource that the workload gets as a file.
const secret = "kbs:///e2e/secret/token"

// floor is the image's lowest policy version.
const floor = 2

// scene is what is outside the machines: registry, broker, publisher, keys, the
// image and what it will measure.
type scene struct {
	*rig.Stage
	report   *report
	operator *rig.Keys // signs orders
	accel    string
	debug    bool // the image is the debug variant

	dir        string // of policies, documents and seeds
	brokerTime string // the policy's deadline for the broker

	image    string                      // directory of the sealed image
	versions []version                   // what the guest meets
	apps     map[uint64]*rig.Publication // by policy version
	policies map[uint64]string           // signed: envelopes, by version
	seed     string                      // of the first version
	initdata string                      // what it carries

	launch    []map[string]any // predicted: the reference document's entries
	pcr8      string           // predicted for initdata
	reference uint64           // version of the document that the broker has
}

// newScene is a scene with nothing in it yet.
func newScene(debug bool) *scene {
	return &scene{debug: debug, dir: "policy", brokerTime: "2m", versions: versions}
}

// prepare makes everything that no machine is needed for.
func (s *scene) prepare(ctx context.Context) error {
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"registry, broker, publisher, keys", s.parts},
		{"three encrypted images, their policies", s.publish},
		{"the guest image, for this run's signer", func(ctx context.Context) (err error) {
			s.image, err = s.seal(ctx, "image", s.debug)
			return err
		}},
		{"what it will measure, signed, at the broker", s.predict},
		{"the seed", s.makeSeed},
	} {
		start := time.Now()
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		s.report.say("   made %6.1fs  %s", time.Since(start).Seconds(), step.name)
	}
	return nil
}

func (s *scene) parts(ctx context.Context) (err error) {
	tpm, err := s.NewTPM(ctx, "")
	if err != nil {
		return err
	}
	s.TPM = tpm
	if s.Registry, err = s.StartRegistry(ctx); err != nil {
		return err
	}
	if s.Broker, err = s.StartBroker(ctx, tpm.Roots, rig.HostInGuest); err != nil {
		return err
	}
	if s.Builder, err = s.StartPodman(ctx, "builder"); err != nil {
		return err
	}
	for name, keys := range map[string]**rig.Keys{"signer": &s.Signer, "owner": &s.Owner, "operator": &s.operator} {
		if *keys, err = s.NewKeys(ctx, name); err != nil {
			return err
		}
	}
	s.accel = s.Accelerator(ctx)
	return nil
}

//go:embed policy.yaml.tmpl
var policyTemplate string

func (s *scene) template() (string, error) {
	_, registryPort, err := net.SplitHostPort(s.Registry.Host)
	if err != nil {
		return "", err
	}
	data := map[string]any{
		"Host": rig.HostInGuest, "RegistryPort": registryPort, "Port": guestPort, "BrokerTime": s.brokerTime,
		"BrokerURL": strings.Replace(s.Broker.URL, "127.0.0.1", rig.HostInGuest, 1),
		"Expires":   time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339),
	}
	for field, file := range map[string]string{"BrokerCA": s.Broker.CA, "TokenKey": s.Broker.TokenKey,
		"SignerKey": s.Signer.Public, "OperatorKey": s.operator.Public} {
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
	file := s.Path(s.dir, "template.yaml")
	return file, s.write(file, text.String())
}

func (s *scene) write(file, text string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(text), 0o600)
}

// version is a policy's version, with its own image.
type version struct {
	policy uint64
	app    rig.App
}

// versions are those that the story meets.
var versions = []version{
	{floor, rig.App{Name: "vault", Version: "v1"}},
	{floor + 1, rig.App{Name: "vault", Version: "v2"}},
	{floor + 2, rig.App{Name: "vault", Version: "v3", Sick: true}},
}

func (s *scene) publish(ctx context.Context) error {
	file, err := s.template()
	if err != nil {
		return err
	}
	s.apps, s.policies = map[uint64]*rig.Publication{}, map[uint64]string{}
	for _, v := range s.versions {
		dir, err := s.BuildApp(ctx, v.app)
		if err != nil {
			return err
		}
		out := s.policy(v.policy)
		if s.apps[v.policy], err = s.Publish(ctx, rig.PublishOptions{Source: []string{dir}, To: "e2e/" + v.app.Name + ":" + v.app.Version,
			Encrypt: true, Workload: "vault", Template: file, Out: out, Version: v.policy}); err != nil {
			return err
		}
		if s.policies[v.policy], err = s.SignPolicy(ctx, out); err != nil {
			return err
		}
	}
	return s.PutSecret(ctx, secret, strings.Repeat("s", 32), s.apps[floor].KeyResource)
}

// policy is the file of an unsigned policy.
func (s *scene) policy(version uint64) string {
	return s.Path(s.dir, fmt.Sprintf("e2e-%d.yaml", version))
}

// seal makes an image that trusts this run's owner and returns its directory.
// Its root comes from the cache when recipe and programs are the same.
func (s *scene) seal(ctx context.Context, name string, debug bool, more ...string) (string, error) {
	root, err := rig.Root()
	if err != nil {
		return "", err
	}
	owner, err := s.Owner.Fingerprint()
	if err != nil {
		return "", err
	}
	dir := s.Path(name)
	argv := append([]string{filepath.Join(root, "image-build", "guest", "build.sh"), "seal",
		"--out", dir, "--signers", owner, "--threshold", "1", "--version-floor", strconv.Itoa(floor)}, more...)
	if debug {
		argv = append(argv, "--debug")
	}
	out, err := s.Run(ctx, []string{"CVM_BIN=" + s.Bin}, argv...)
	if s.report.verbose {
		s.report.say("%s", out)
	}
	return dir, err
}

// checks are those of the image that take no machine.
func (s *scene) checks() []check {
	return []check{{"image", "nothing in the image can log in, nothing listens or is enabled that is not listed", s.listed}}
}

func (s *scene) listed(ctx context.Context) error {
	root, err := rig.Root()
	if err != nil {
		return err
	}
	out, err := s.Run(ctx, nil, filepath.Join(root, "image-build", "guest", "check.sh"), s.image)
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return err
}

func (s *scene) disk() string { return filepath.Join(s.image, "disk.raw") }
func (s *scene) uki() string  { return filepath.Join(s.image, "uki.efi") }

// measure computes the reference document's launch entry from the image file.
func (s *scene) measure(ctx context.Context, image, label string) (map[string]any, error) {
	data, err := os.ReadFile(filepath.Join(image, "image.json"))
	if err != nil {
		return nil, err
	}
	var built struct {
		Phases []string `json:"pcr11Phases"`
	}
	if err := json.Unmarshal(data, &built); err != nil {
		return nil, fmt.Errorf("image.json: %w", err)
	}
	out, err := s.Run(ctx, nil, s.Program("cvmctl"), "measure", "pcr", "--image", filepath.Join(image, "disk.raw"),
		"--phases", strings.Join(built.Phases, ":"), "--format", "reference-values", "--label", label, "--output", "json")
	if err != nil {
		return nil, err
	}
	var entries struct {
		Launch []map[string]any `json:"launch"`
	}
	if err := json.Unmarshal([]byte(out), &entries); err != nil || len(entries.Launch) != 1 {
		return nil, fmt.Errorf("cvmctl measure pcr: %d launch entries, %w", len(entries.Launch), err)
	}
	for _, pcr := range []string{"2", "4", "9", "11", "12", "13"} {
		if pcrs, _ := entries.Launch[0]["pcrs"].(map[string]any); pcrs[pcr] == nil {
			return nil, fmt.Errorf("cvmctl measure pcr predicts no PCR %s", pcr)
		}
	}
	return entries.Launch[0], nil
}

// predict gives the broker the signed document with what the image will
// measure: from then on no other rule counts there.
func (s *scene) predict(ctx context.Context) error {
	entry, err := s.measure(ctx, s.image, "guest")
	if err != nil {
		return err
	}
	s.launch = []map[string]any{entry}
	config, err := os.ReadFile(s.Broker.Config)
	if err != nil {
		return err
	}
	if err := s.write(s.Broker.Config, string(config)+"ruleSigners: {keys: ["+s.Owner.Public+"], threshold: 1}\n"); err != nil {
		return err
	}
	if err := s.Broker.Restart(ctx); err != nil {
		return err
	}
	return s.setReference(ctx, "", "")
}

// setReference gives the broker the next version of the document; with a PCR's
// index, its value is another than the predicted one.
func (s *scene) setReference(ctx context.Context, index, value string) error {
	owner, err := s.Owner.Fingerprint()
	if err != nil {
		return err
	}
	var launch, labels []any
	for _, predicted := range s.launch {
		entry := maps.Clone(predicted)
		if index != "" {
			pcrs := maps.Clone(predicted["pcrs"].(map[string]any))
			pcrs[index] = value
			entry["pcrs"] = pcrs
		}
		launch, labels = append(launch, entry), append(labels, entry["label"])
	}
	keys, images := []string{secret}, []string(nil)
	for _, v := range s.versions {
		keys = append(keys, s.apps[v.policy].KeyResource)
		images = append(images, s.apps[v.policy].ManifestDigest)
	}
	s.reference++
	document, err := json.MarshalIndent(map[string]any{
		"apiVersion": "cvm-agent.reference-values/v1", "name": "e2e", "version": s.reference,
		"launch": launch,
		"resources": []any{map[string]any{
			"resource": keys, "platforms": []string{"tpm"}, "launch": labels, "ekRoots": []string{rig.EKRootName},
			"policy": map[string]any{"names": []string{"e2e"}, "signers": []string{owner}, "threshold": 1, "minimumVersion": floor},
			"images": images,
		}},
	}, "", "  ")
	if err != nil {
		return err
	}
	file := s.Path(s.dir, fmt.Sprintf("reference-%d.yaml", s.reference))
	// JSON is YAML, but by itself it would have to be canonical.
	if err := s.write(file, "# "+file+"\n"+string(document)+"\n"); err != nil {
		return err
	}
	signed, err := s.SignPolicy(ctx, file)
	if err != nil {
		return err
	}
	_, err = s.Run(ctx, nil, s.Program("cvmctl"), "broker", "reference", "set", "--file", signed,
		"--url", s.Broker.URL, "--ca", s.Broker.CA, "--token-file", s.Broker.AdminToken)
	return err
}

// makeSeed makes the seed of the first version with cvmctl, and predicts PCR 8.
func (s *scene) makeSeed(ctx context.Context) (err error) {
	if s.initdata, err = s.Pack(ctx, s.policies[floor]); err != nil {
		return err
	}
	s.seed = s.Path(s.dir, "seed.iso")
	if err := s.cvmctlSeed(ctx, s.initdata, s.seed); err != nil {
		return err
	}
	out, err := s.Run(ctx, nil, s.Program("cvmctl"), "measure", "pcr", "--uki", s.uki(), "--initdata", s.initdata, "--output", "json")
	if err != nil {
		return err
	}
	var predicted struct {
		PCRs map[string]string `json:"pcrs"`
	}
	if err := json.Unmarshal([]byte(out), &predicted); err != nil {
		return err
	}
	if s.pcr8 = predicted.PCRs["8"]; len(s.pcr8) != 64 {
		return fmt.Errorf("cvmctl measure pcr --initdata predicts PCR 8 as %q", s.pcr8)
	}
	return nil
}

func (s *scene) cvmctlSeed(ctx context.Context, initdata, out string) error {
	_, err := s.Run(ctx, nil, s.Program("cvmctl"), "seed", "--initdata", initdata, "--hostname", "e2e", "--out", out)
	return err
}
