package publish

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// layoutOf publishes once and copies the image into an OCI layout by stock
// crane, for tests that need an image outside podman.
func layoutOf(t *testing.T) string {
	t.Helper()
	o := testOptions(t, "layout")
	res, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	out, err := exec.Command(parts.rig.Tool("crane"), "pull", "--insecure", "--format", "oci", res.Reference, dir).CombinedOutput()
	if err != nil {
		t.Fatalf("crane: %v\n%s", err, out)
	}
	return dir
}

func TestPublishBundles(t *testing.T) {
	referrers, err := parts.rig.StartReferrersRegistry(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	trustedRoot := filepath.Join(t.TempDir(), "trusted_root.json")
	if err := os.WriteFile(trustedRoot, []byte(`{"mediaType":"application/vnd.dev.sigstore.trustedroot+json;version=0.1"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	for sentence, host := range map[string]string{
		"a registry with the referrers API":     referrers.Host,
		"a registry that has only its fallback": parts.registry.Host,
	} {
		t.Run(sentence, func(t *testing.T) {
			o := testOptions(t, "bundles")
			o.To, o.Bundle = host+"/bundles:1.0", true
			res, err := Run(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			common := []string{"--key", parts.keys.Public, "--insecure-ignore-tlog=true", "--allow-http-registry"}
			// Stock cosign wants a trusted root for bundles even with a key; an
			// empty one keeps it off the network.
			common = append(common, "--trusted-root", trustedRoot)
			stockCosign(t, append([]string{"verify", res.Digest}, common...)...)
			stockCosign(t, append([]string{"verify-attestation", "--new-bundle-format", "--type", "spdxjson", res.Digest}, common...)...)
			stockCosign(t, append([]string{"verify-attestation", "--new-bundle-format", "--type", "https://sigstore.dev/cosign/sign/v1", res.Digest}, common...)...)
		})
	}
}

func TestPublishSources(t *testing.T) {
	dir := layoutOf(t)
	archive := filepath.Join(t.TempDir(), "image.tar")
	if out, err := exec.Command(parts.rig.Tool("crane"), "pull", "--insecure", parts.registry.Host+"/layout:1.0", archive).CombinedOutput(); err != nil {
		t.Fatalf("crane: %v\n%s", err, out)
	}
	for sentence, source := range map[string]string{
		"an OCI layout":              "oci:" + dir,
		"a docker archive":           "docker-archive:" + archive,
		"an image in a registry":     "docker://" + parts.registry.Host + "/layout:1.0",
		"an image in podman storage": "localhost/cvmctl-publish/layout:latest",
	} {
		t.Run(sentence, func(t *testing.T) {
			o := testOptions(t, "sources")
			o.Context, o.Image = "", source
			res, err := Run(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if len(res.Layers) != 2 {
				t.Errorf("%d layers, expected 2", len(res.Layers))
			}
			empty(t, o.TempDir)
		})
	}
}

func TestPublishToAJWERecipientOpensWithStockSkopeo(t *testing.T) {
	private, public, err := parts.rig.NewRecipient("reader")
	if err != nil {
		t.Fatal(err)
	}
	o := testOptions(t, "jwe")
	o.Recipients = []string{"jwe:" + public}
	res, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !res.Encrypted || res.KeyResource != "" {
		t.Errorf("%+v, expected encryption without a broker's key", res)
	}
	out, err := exec.Command("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", private,
		"docker://"+res.Reference, "oci:"+filepath.Join(t.TempDir(), "plain")+":x").CombinedOutput()
	if err != nil {
		t.Fatalf("skopeo: %v\n%s", err, out)
	}
}

func TestPublishFromTemplate(t *testing.T) {
	dir := "oci:" + layoutOf(t)
	first := testOptions(t, "template")
	first.Context, first.Image = "", dir
	first.Broker = BrokerOptions{URL: "https://broker.test", CAFile: certificate(t)}
	first.Policy = PolicyOptions{Out: filepath.Join(t.TempDir(), "policy.yaml"), TokenKeys: []string{parts.keys.Public}}
	if _, err := Run(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	next := testOptions(t, "template")
	next.Context, next.Image = "", dir
	next.Encrypt, next.KEKOut = true, filepath.Join(t.TempDir(), "kek")
	next.Policy = PolicyOptions{Template: first.Policy.Out, Out: filepath.Join(t.TempDir(), "policy-2.yaml"), Version: 2}
	res, err := Run(t.Context(), next)
	if err != nil {
		t.Fatal(err)
	}
	if p := checkPolicy(t, res, "required"); p.Version != 2 {
		t.Errorf("version %d, expected 2", p.Version)
	}
	info, err := os.Stat(next.KEKOut)
	if err != nil || info.Mode().Perm() != 0o600 || info.Size() != kekSize {
		t.Errorf("key file %v %v, expected 32 bytes with mode 0600", info, err)
	}
	plain := testOptions(t, "template")
	plain.Context, plain.Image = "", dir
	plain.Policy = PolicyOptions{Template: res.Policy, Out: filepath.Join(t.TempDir(), "policy-3.yaml")}
	if _, err := Run(t.Context(), plain); cause.Of(err) != cause.Usage {
		t.Errorf("a plain image for a template that requires encryption: %v", err)
	}
}

func TestPublishFailuresLeaveNothingFindable(t *testing.T) {
	dir := "oci:" + layoutOf(t)
	cases := map[string]struct {
		change func(*testing.T, *Options)
		code   cause.Code
	}{
		"a scanner that fails": {func(t *testing.T, o *Options) {
			o.SBOMProgram = script(t, "#!/bin/sh\necho broken >&2\nexit 1\n")
		}, cause.SBOMScanFailed},
		"a scanner whose output is no SPDX": {func(t *testing.T, o *Options) { o.SBOMProgram = script(t, "#!/bin/sh\necho '{}'\n") }, cause.SBOMMalformed},
		"a registry that is not there":      {func(t *testing.T, o *Options) { o.To = "127.0.0.1:1/failures:1.0" }, cause.RegistryUnavailable},
		"a wrong passphrase": {func(t *testing.T, o *Options) {
			o.Password = func() ([]byte, error) { return []byte("wrong"), nil }
		}, cause.Usage},
		"podman not there": {func(t *testing.T, o *Options) {
			o.Image, o.PodmanSocket = "localhost/x", "unix:///nonexistent.sock"
		}, cause.PodmanUnavailable},
		"a key name that is taken": {func(t *testing.T, o *Options) {
			b := newMemoryBroker()
			b.resources["kbs:///default/key/taken"] = []byte("old")
			brokered(t, o, b)
			o.Resource = "kbs:///default/key/taken"
		}, cause.Usage},
	}
	for sentence, c := range cases {
		t.Run(sentence, func(t *testing.T) {
			o := testOptions(t, "failures")
			o.Context, o.Image = "", dir
			c.change(t, &o)
			_, err := Run(t.Context(), o)
			if cause.Of(err) != c.code {
				t.Errorf("%v, expected %s", err, c.code)
			}
			empty(t, o.TempDir)
			tag, _ := name.NewTag(o.To, name.Insecure)
			if _, err := remote.Head(tag); err == nil {
				t.Error("the tag was set")
			}
		})
	}
}

func TestCancelledPublishCleansUp(t *testing.T) {
	o := testOptions(t, "cancelled")
	o.Context, o.Image = "", "oci:"+layoutOf(t)
	started := filepath.Join(t.TempDir(), "started")
	o.SBOMProgram = script(t, "#!/bin/sh\ntouch "+started+"\nexec sleep 60\n")
	b := newMemoryBroker()
	brokered(t, &o, b)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(started); err == nil {
				cancel()
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	begin := time.Now()
	_, err := Run(ctx, o)
	if cause.Of(err) != cause.Cancelled {
		t.Errorf("%v, expected %s", err, cause.Cancelled)
	}
	if time.Since(begin) > 20*time.Second {
		t.Error("cancelling waited for the scanner")
	}
	if len(b.resources) != 0 {
		t.Error("the key is still with the broker")
	}
	empty(t, o.TempDir)
}

// While a publication runs, its scanner looks around the machine as any other
// user's process could, and more.
func TestLesson29_NoKeyInArgvEnvironmentOrFiles(t *testing.T) {
	o := testOptions(t, "lesson29")
	dump := t.TempDir()
	o.SBOMProgram = script(t, strings.Replace(scanner, "set -eu\n", `set -eu
cat /proc/[0-9]*/cmdline >`+dump+`/cmdline 2>/dev/null || true
cat /proc/self/environ >`+dump+`/environ
find `+o.TempDir+` -mindepth 1 -maxdepth 1 ! -perm 0700 >`+dump+`/modes
cp -r `+o.TempDir+` `+dump+`/tmp
`, 1))
	t.Setenv("COSIGN_PASSWORD", string(must(password())))
	b := newMemoryBroker()
	brokered(t, &o, b)
	var out strings.Builder
	o.Display = Lines(&out)
	res, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	kek := b.resources[res.KeyResource]
	if len(kek) != kekSize {
		t.Fatalf("the broker has a key of %d bytes", len(kek))
	}
	if modes, err := os.ReadFile(filepath.Join(dump, "modes")); err != nil || len(modes) != 0 {
		t.Errorf("work directories without mode 0700: %s %v", modes, err)
	}
	printed, err := json.Marshal(res)
	if err != nil {
		t.Fatal(err)
	}
	for what, secret := range map[string][]byte{"the layer key": kek, "the passphrase": must(password())} {
		for where, text := range map[string]string{"the display": out.String(), "the result": string(printed)} {
			if strings.Contains(text, string(secret)) {
				t.Errorf("%s is in %s", what, where)
			}
		}
		err := filepath.WalkDir(dump, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if strings.Contains(string(data), string(secret)) {
				t.Errorf("%s is in %s", what, strings.TrimPrefix(path, dump))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	empty(t, o.TempDir)
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestPlainContentUnderEncryptedMediaTypeIsRefused(t *testing.T) {
	o := testOptions(t, "disguised")
	o.Encrypt, o.KEKOut = true, filepath.Join(t.TempDir(), "kek")
	o.Resource = "kbs:///default/key/disguised"
	// A "keywrapper only" implementation: annotations are right, bytes plain.
	r := &run{o: &o}
	var err error
	if r.target, err = o.check(); err != nil {
		t.Fatal(err)
	}
	plain := testOptions(t, "disguised")
	res, err := Run(t.Context(), plain)
	if err != nil {
		t.Fatal(err)
	}
	m := manifestOf(t, res.Reference)
	r.work, r.transport = t.TempDir(), remote.DefaultTransport
	if err := r.prepareRegistry(); err != nil {
		t.Fatal(err)
	}
	l := m.Layers[0]
	l.MediaType += encryptedSuffix
	packetJSON, err := json.Marshal(packet{o.Resource, []byte("x"), make([]byte, 12), "A256GCM"})
	if err != nil {
		t.Fatal(err)
	}
	l.Annotations = map[string]string{providerAnnotation: base64.StdEncoding.EncodeToString(packetJSON)}
	enc := &encryption{resource: o.Resource}
	other := &ggcr.Manifest{Layers: m.Layers[1:]}
	if err := r.checkLayer(t.Context(), r.target.repo, 0, l, other, enc); cause.Of(err) != cause.PublishCheckFailed || !strings.Contains(err.Error(), "plain content") {
		t.Errorf("recompressed plain content: %v", err)
	}
	if err := r.checkLayer(t.Context(), r.target.repo, 0, l, m, enc); cause.Of(err) != cause.PublishCheckFailed || !strings.Contains(err.Error(), "plain content") {
		t.Errorf("the plain layer itself: %v", err)
	}
}
