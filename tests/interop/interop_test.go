// Package interop puts stock cosign, skopeo and syft on either side of ours:
// what we publish they accept, what they made the agent accepts.
package interop

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// stage is shared: every test publishes under names of its own.
var stage *rig.Stage

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (status int) {
	r, err := rig.New(rig.Options{})
	if err == nil {
		defer func() {
			if err := r.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "interop:", err)
				status = 1
			}
		}()
		stage, err = r.NewStage(context.Background(), nil)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "interop:", err)
		return 1
	}
	return m.Run()
}

func app(t *testing.T, a rig.App) string {
	t.Helper()
	dir, err := stage.BuildApp(t.Context(), a)
	must(t, err)
	return dir
}

func publish(t *testing.T, o rig.PublishOptions) *rig.Publication {
	t.Helper()
	p, err := stage.Publish(t.Context(), o)
	must(t, err)
	return p
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestCosignAcceptsOurs verifies with stock cosign what cvmctl published.
func TestCosignAcceptsOurs(t *testing.T) {
	stranger, err := stage.NewKeys(t.Context(), "other-signer")
	must(t, err)
	for name, o := range map[string]rig.PublishOptions{
		"a plain image":                     {To: "interop/plain:v1"},
		"an encrypted image":                {To: "interop/encrypted:v1", Encrypt: true},
		"an image that has bundles as well": {To: "interop/bundled:v1", Extra: []string{"--bundle"}},
	} {
		t.Run(name, func(t *testing.T) {
			o.Source = []string{app(t, rig.App{Name: strings.NewReplacer("/", "-", ":", "-").Replace(o.To), Version: "v1"})}
			p := publish(t, o)
			must(t, stage.CosignVerify(t.Context(), p.Digest, stage.Signer))
			must(t, stage.CosignVerifySBOM(t.Context(), p.Digest, stage.Signer))
			if stage.CosignVerify(t.Context(), p.Digest, stranger) == nil || stage.CosignVerifySBOM(t.Context(), p.Digest, stranger) == nil {
				t.Error("cosign accepts another key too, so its verdict says nothing")
			}
		})
	}
}

// TestCosignAcceptsOursByReferrer does so against a registry with the
// referrers API, where the bundles are found by it.
func TestCosignAcceptsOursByReferrer(t *testing.T) {
	registry, err := stage.StartReferrersRegistry(t.Context())
	must(t, err)
	withReferrers := *stage
	withReferrers.Registry = registry
	p, err := withReferrers.Publish(t.Context(), rig.PublishOptions{
		Source: []string{app(t, rig.App{Name: "referred", Version: "v1"})}, To: "interop/referred:v1", Extra: []string{"--bundle"}})
	must(t, err)
	must(t, stage.CosignVerify(t.Context(), p.Digest, stage.Signer))
	must(t, stage.CosignVerifySBOM(t.Context(), p.Digest, stage.Signer))
	must(t, stage.CosignVerifyBundles(t.Context(), p.Digest, stage.Signer))
}

// TestSkopeoCopiesOurs copies an image bit for bit and runs it with podman.
func TestSkopeoCopiesOurs(t *testing.T) {
	p := publish(t, rig.PublishOptions{Source: []string{app(t, rig.App{Name: "copied", Version: "v1"})}, To: "interop/copied:v1"})
	to := stage.Path("copied-layout")
	must(t, stage.Copy(t.Context(), p.Digest, "oci:"+to+":v1"))
	if digest := layoutDigest(t, to); digest != p.ManifestDigest {
		t.Errorf("skopeo copied %s, published was %s", digest, p.ManifestDigest)
	}
	port, err := rig.FreePort()
	must(t, err)
	id, err := stage.Builder.Command(t.Context(), "run", "-d", "--tls-verify=false", p.Digest, rig.ListenOn(port))
	must(t, err)
	must(t, rig.WaitHTTP(t.Context(), port, "/", "copied v1"))
	_, err = stage.Builder.Command(t.Context(), "rm", "-f", "-t", "0", strings.TrimSpace(id))
	must(t, err)
}

// TestSkopeoDecryptsOurs opens an image that was encrypted for a private key.
func TestSkopeoDecryptsOurs(t *testing.T) {
	private, public, err := stage.NewRecipient("reader")
	must(t, err)
	p := publish(t, rig.PublishOptions{
		Source: []string{app(t, rig.App{Name: "sealed", Version: "v1"})}, To: "interop/sealed:v1", Extra: []string{"--recipient", "jwe:" + public}})
	types, err := stage.LayerTypes(t.Context(), p.Digest)
	must(t, err)
	for _, kind := range types {
		if !strings.HasSuffix(kind, "+encrypted") {
			t.Errorf("a layer was pushed as %s", kind)
		}
	}
	to := stage.Path("opened-layout")
	must(t, stage.Copy(t.Context(), p.Digest, "oci:"+to+":v1", "--decryption-key", private))
	port, err := rig.FreePort()
	must(t, err)
	id, err := stage.Builder.Command(t.Context(), "run", "-d", "oci:"+to+":v1", rig.ListenOn(port))
	must(t, err)
	must(t, rig.WaitHTTP(t.Context(), port, "/", "sealed v1"))
	_, err = stage.Builder.Command(t.Context(), "rm", "-f", "-t", "0", strings.TrimSpace(id))
	must(t, err)

	other, _, err := stage.NewRecipient("not-the-reader")
	must(t, err)
	if stage.Copy(t.Context(), p.Digest, "oci:"+stage.Path("unopened-layout")+":v1", "--decryption-key", other) == nil {
		t.Error("another private key opens it as well")
	}
}

// TestAgentAcceptsStock launches an image that no program of ours has touched:
// built and pushed by podman, described by syft, signed and attested by cosign.
func TestAgentAcceptsStock(t *testing.T) {
	ctx := t.Context()
	tag := stage.Registry.Reference("interop/stock", ":v1")
	_, err := stage.Builder.Command(ctx, "build", "-q", "-t", tag, app(t, rig.App{Name: "stock", Version: "v1"}))
	must(t, err)
	digestFile := stage.Path("stock.digest")
	_, err = stage.Builder.Command(ctx, "push", "-q", "--tls-verify=false", "--digestfile", digestFile, tag)
	must(t, err)
	digest, err := os.ReadFile(digestFile)
	must(t, err)
	ref := stage.Registry.Reference("interop/stock", "@"+strings.TrimSpace(string(digest)))
	must(t, stage.CosignSign(ctx, ref, stage.Signer))
	sbom := stage.Path("stock.spdx.json")
	must(t, stage.SyftSBOM(ctx, "registry:"+ref, sbom))
	must(t, stage.CosignAttest(ctx, ref, sbom, stage.Signer))

	port, err := rig.FreePort()
	must(t, err)
	// Syft lists packages and what it looked at, not every file.
	policy, err := stage.Template("stock", rig.PolicyWorkload{Name: "stock", Image: ref, Port: port, Compare: "normal"})
	must(t, err)
	signed, err := stage.SignPolicy(ctx, policy)
	must(t, err)
	initdata, err := stage.Pack(ctx, signed)
	must(t, err)
	must(t, stage.Guest.Boot(ctx, initdata))
	must(t, stage.Guest.Launch())
	must(t, stage.Guest.WaitReady(ctx, time.Minute))
	must(t, rig.WaitHTTP(ctx, port, "/", "stock v1"))
	_, err = stage.Guest.Ctl(ctx, "destroy", "--yes")
	must(t, err)
}

// layoutDigest is the digest of the only manifest in an OCI layout.
func layoutDigest(t *testing.T, dir string) string {
	t.Helper()
	data, err := os.ReadFile(dir + "/index.json")
	must(t, err)
	var index struct {
		Manifests []struct {
			Digest string `json:"digest"`
		} `json:"manifests"`
	}
	must(t, json.Unmarshal(data, &index))
	if len(index.Manifests) != 1 {
		t.Fatalf("%s has %d manifests", dir, len(index.Manifests))
	}
	return index.Manifests[0].Digest
}
