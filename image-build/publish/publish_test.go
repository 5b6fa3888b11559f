package publish

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/types"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// Real parts, started once: distribution's registry, podman's service and a
// key by stock cosign.
var parts struct {
	rig      *rig.Rig
	registry *rig.Registry
	podman   *rig.Podman
	keys     *rig.Keys
}

func TestMain(m *testing.M) {
	if Reexec() {
		return
	}
	code, err := withParts(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "the stock tools are needed, run make deps:", err)
		code = 1
	}
	os.Exit(code)
}

func withParts(m *testing.M) (code int, err error) {
	ctx := context.Background()
	if parts.rig, err = rig.New(rig.Options{}); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, parts.rig.Close()) }()
	if parts.registry, err = parts.rig.StartRegistry(ctx); err != nil {
		return 1, err
	}
	if parts.podman, err = parts.rig.StartPodman(ctx, "podman"); err != nil {
		return 1, err
	}
	if parts.keys, err = parts.rig.NewKeys(ctx, "publisher"); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// scanner is a stand-in for cvm-sbom that lists the regular files of the root.
// The real one is a module of its own; the demo and the interop tests run it.
const scanner = `#!/bin/sh
set -eu
root= name=
[ "$1" = scan ]; shift
while [ $# -gt 0 ]; do case $1 in --root) root=$2;; --name) name=$2;; esac; shift 2; done
cd "$root"
printf '{"spdxVersion":"SPDX-2.3","name":"%s","comment":"a<b&c","files":[' "$name"
sep=
find . -type f | sort | while read -r f; do printf '%s{"fileName":"%s","sha":"%s"}' "$sep" "$f" "$(sha256sum "$f" | cut -d' ' -f1)"; sep=,; done
printf ']}\n'
`

func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cvm-sbom")
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// buildContext is a two-layer image FROM scratch, its second layer removing a
// file of the first.
func buildContext(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for file, text := range map[string]string{
		"Containerfile": "FROM scratch\nCOPY one /data/one\nCOPY two /data/two\nCMD [\"/data/one\"]\n",
		"one":           "first file, long enough to be seen: " + strings.Repeat("plain text ", 100),
		"two":           "second file",
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func password() ([]byte, error) {
	return []byte(strings.TrimPrefix(parts.keys.Env[0], "COSIGN_PASSWORD=")), nil
}

// testOptions is a plain publication of the built context to repository repo.
func testOptions(t *testing.T, repo string) Options {
	t.Helper()
	return Options{
		Context: buildContext(t), To: parts.registry.Host + "/" + repo + ":1.0",
		PodmanSocket: parts.podman.URL, Registry: RegistryOptions{PlainHTTP: true},
		KeyFile: parts.keys.Private, Password: password,
		SBOMProgram: script(t, scanner), TempDir: t.TempDir(),
		Display: Lines(testWriter{t}),
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// manifestOf reads an image's manifest from the registry.
func manifestOf(t *testing.T, ref string) *ggcr.Manifest {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(r)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// stockCosign runs the stock tool, which must accept.
func stockCosign(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command(parts.rig.Tool("cosign"), args...)
	cmd.Env = append(os.Environ(), parts.keys.Env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("cosign %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

func empty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("left behind: %s", filepath.Join(dir, e.Name()))
	}
}

func TestPublishPlainAcceptedByStockCosign(t *testing.T) {
	o := testOptions(t, "plain")
	o.Policy.Out = filepath.Join(t.TempDir(), "policy.yaml")
	o.Policy.SignKey = parts.keys.Private
	o.SBOMOut = filepath.Join(t.TempDir(), "sbom.json")
	res, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	empty(t, o.TempDir)
	if m := manifestOf(t, res.Reference); m.Config.Digest.String() != res.ConfigDigest || len(m.Layers) != 2 {
		t.Errorf("the tag has configuration %s and %d layers, expected %s and 2", m.Config.Digest, len(m.Layers), res.ConfigDigest)
	}
	out := stockCosign(t, "verify", "--key", parts.keys.Public, "--insecure-ignore-tlog=true", "--allow-http-registry", res.Digest)
	if !strings.Contains(out, `"docker-reference":"`+parts.registry.Host+`/plain"`) {
		t.Errorf("signature does not name the repository: %s", out)
	}
	out = stockCosign(t, "verify-attestation", "--key", parts.keys.Public, "--type", "spdxjson", "--insecure-ignore-tlog=true", "--allow-http-registry", res.Digest)
	var envelope struct{ Payload []byte }
	var st statement
	if err := errors.Join(json.Unmarshal([]byte(out), &envelope)); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(envelope.Payload, &st); err != nil {
		t.Fatal(err)
	}
	sbom, err := os.ReadFile(o.SBOMOut)
	if err != nil {
		t.Fatal(err)
	}
	if digestOf(sbom) != res.SBOMDigest || strings.TrimSpace(string(sbom)) != string(st.Predicate) {
		t.Errorf("the attested predicate is not the SBOM that was scanned:\n%s\n%s", st.Predicate, sbom)
	}
	if !strings.Contains(string(sbom), `"./data/one"`) || !strings.Contains(string(sbom), `"./data/two"`) {
		t.Errorf("the SBOM misses a file of a layer: %s", sbom)
	}
	checkPolicy(t, res, "optional")
}

// checkPolicy opens what was written: YAML and the signed form agree and name
// the published digest.
func checkPolicy(t *testing.T, res *Result, encryption string) *policy.Policy {
	t.Helper()
	text, err := os.ReadFile(res.Policy)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.DecodeYAML(text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	w := p.Workloads[0]
	if w.Image != res.Digest || w.Encryption != encryption || len(w.Signatures.Required) != 1 || !w.SBOM.Required {
		t.Errorf("policy is not filled in:\n%s", text)
	}
	if res.PolicySigned == "" {
		return p
	}
	signed, err := os.ReadFile(res.PolicySigned)
	if err != nil {
		t.Fatal(err)
	}
	e, err := dsse.Parse(signed)
	if err != nil {
		t.Fatal(err)
	}
	public, err := parts.keys.PEM()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := dsse.ParsePublicKeysPEM([]byte(public))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Verify(policy.PayloadType, keys, 1); err != nil {
		t.Error(err)
	}
	if !strings.Contains(string(e.Payload), res.Digest) {
		t.Errorf("signed policy does not name %s", res.Digest)
	}
	return p
}

// memoryBroker is the admin side of a broker, in memory.
type memoryBroker struct {
	mu        sync.Mutex
	resources map[string][]byte
	rules     map[string]adminclient.Rule
}

func newMemoryBroker() *memoryBroker {
	return &memoryBroker{resources: map[string][]byte{}, rules: map[string]adminclient.Rule{}}
}

func (b *memoryBroker) Resources(context.Context) ([]string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []string
	for k := range b.resources {
		list = append(list, k)
	}
	return list, nil
}

func (b *memoryBroker) PutResource(_ context.Context, uri string, data []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.resources[uri] = append([]byte(nil), data...)
	return nil
}

func (b *memoryBroker) DeleteResource(_ context.Context, uri string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.resources, uri)
	delete(b.rules, uri)
	return nil
}

func (b *memoryBroker) PutRule(_ context.Context, uri string, rule adminclient.Rule) error {
	if err := rule.Validate(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rules[uri] = rule
	return nil
}

// certificate is a file with some certificate, for policies that name roots.
func certificate(t *testing.T) string {
	t.Helper()
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	path := filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// brokered makes o's key go to b.
func brokered(t *testing.T, o *Options, b *memoryBroker) {
	o.Encrypt = true
	o.Broker = BrokerOptions{URL: "https://broker.test", CAFile: certificate(t), TokenFile: parts.keys.Public}
	o.openBroker = func() (keyBroker, error) { return b, nil }
}

func TestPublishEncryptedReleasesItsKeyToItsPolicyAlone(t *testing.T) {
	o := testOptions(t, "encrypted")
	b := newMemoryBroker()
	brokered(t, &o, b)
	o.Policy = PolicyOptions{Out: filepath.Join(t.TempDir(), "policy.yaml"), SignKey: parts.keys.Private, Name: "app", Platforms: []string{"tpm"}, TokenKeys: []string{parts.keys.Public}}
	res, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	empty(t, o.TempDir)
	checkPolicy(t, res, "required")
	fp, err := parts.keys.Fingerprint()
	if err != nil {
		t.Fatal(err)
	}
	rule, ok := b.rules[res.KeyResource]
	if !ok || !res.ReleaseRule || rule.AnyPolicy || rule.Policy.Signers[0] != fp || rule.Policy.Names[0] != "app" || rule.Images[0] != res.ManifestDigest {
		t.Errorf("release rule %+v does not name policy and image", rule)
	}
	m := manifestOf(t, res.Reference)
	for i, l := range m.Layers {
		if !strings.HasSuffix(string(l.MediaType), "+encrypted") {
			t.Errorf("layer %d has media type %s", i, l.MediaType)
		}
		decryptLayer(t, res, l, b.resources[res.KeyResource])
	}
	stockCosign(t, "verify", "--key", parts.keys.Public, "--insecure-ignore-tlog=true", "--allow-http-registry", res.Digest)
}

// decryptLayer opens a pushed layer as a guest does: packet, KEK, cipher, HMAC.
func decryptLayer(t *testing.T, res *Result, l ggcr.Descriptor, kek []byte) {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(l.Annotations[providerAnnotation])
	if err != nil {
		t.Fatal(err)
	}
	var p packet
	if err := json.Unmarshal(raw, &p); err != nil {
		t.Fatal(err)
	}
	if p.KID != res.KeyResource || p.WrapType != "A256GCM" || len(p.IV) != 12 {
		t.Fatalf("packet %s", raw)
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	opts, err := gcm.Open(nil, p.IV, p.WrappedData, nil)
	if err != nil {
		t.Fatal(err)
	}
	var private struct{ Digest string }
	if err := json.Unmarshal(opts, &private); err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewDigest(strings.Split(res.Digest, "@")[0]+"@"+l.Digest.String(), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	layer, err := remote.Layer(ref)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := layer.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	ocicrypt.RegisterKeyWrapper(provider, opened{opts: opts})
	defer ocicrypt.RegisterKeyWrapper(provider, wrapper{})
	plain, _, err := ocicrypt.DecryptLayer(&config.DecryptConfig{}, blob, ocispec.Descriptor{Annotations: l.Annotations}, false)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(plain) // the HMAC is checked at the end
	if err != nil {
		t.Fatal(err)
	}
	if digestOf(data) != private.Digest {
		t.Errorf("decrypted layer has digest %s, its packet says %s", digestOf(data), private.Digest)
	}
}

// opened is a key wrapper that has already unwrapped.
type opened struct {
	wrapper
	opts []byte
}

func (o opened) NoPossibleKeys(map[string][][]byte) bool                 { return false }
func (o opened) UnwrapKey(*config.DecryptConfig, []byte) ([]byte, error) { return o.opts, nil }

func TestLesson39_EncryptionSilentlyIgnored(t *testing.T) {
	cases := map[string]copier{
		"a copy that drops the encryption is refused": func(ctx context.Context, pc *signature.PolicyContext, dst, src types.ImageReference, o *copy.Options) ([]byte, error) {
			o.OciEncryptConfig, o.OciEncryptLayers = nil, nil
			return copy.Image(ctx, pc, dst, src, o)
		},
		"a copy that takes an empty list of layers for none is refused": func(ctx context.Context, pc *signature.PolicyContext, dst, src types.ImageReference, o *copy.Options) ([]byte, error) {
			o.OciEncryptLayers = nil
			return copy.Image(ctx, pc, dst, src, o)
		},
		"a copy that encrypts the last layer alone is refused": func(ctx context.Context, pc *signature.PolicyContext, dst, src types.ImageReference, o *copy.Options) ([]byte, error) {
			if o.OciEncryptLayers != nil {
				o.OciEncryptLayers = &[]int{-1}
			}
			return copy.Image(ctx, pc, dst, src, o)
		},
	}
	for sentence, c := range cases {
		t.Run(sentence, func(t *testing.T) {
			o := testOptions(t, "lesson39")
			b := newMemoryBroker()
			brokered(t, &o, b)
			_, err := publish(t.Context(), o, c)
			if cause.Of(err) != cause.PublishCheckFailed {
				t.Fatalf("%v, expected %s", err, cause.PublishCheckFailed)
			}
			if !strings.Contains(err.Error(), "not encrypted") || !strings.Contains(err.Error(), "already done: ") {
				t.Errorf("error does not say what is wrong and what was pushed: %v", err)
			}
			if len(b.resources) != 0 {
				t.Error("the key of the failed run is still with the broker")
			}
			tag, _ := name.NewTag(o.To, name.Insecure)
			if _, err := remote.Head(tag); err == nil {
				t.Error("the tag was set")
			}
			empty(t, o.TempDir)
		})
	}
}
