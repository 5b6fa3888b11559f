package publish

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// The command line with nothing replaced: podman, registry, cvm-broker and
// cvm-sbom, and stock cosign as the judge.
func TestCommandWithRealBrokerAndScanner(t *testing.T) {
	b, err := parts.rig.StartBroker(t.Context(), certificate(t))
	if err != nil {
		t.Fatal("make build builds cvm-broker:", err)
	}
	t.Setenv("COSIGN_PASSWORD", string(must(password())))
	dir, tmp := t.TempDir(), t.TempDir()
	var stdout, stderr bytes.Buffer
	cmd := Command()
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SetArgs(append([]string{
		buildContext(t), "--to", parts.registry.Host + "/command:1.0", "--plain-http", "--podman-socket", parts.podman.URL,
		"--key", parts.keys.Private, "--sbom-program", parts.rig.Program("cvm-sbom"), "--tmpdir", tmp,
		"--encrypt", "--rule-ek-roots", rig.EKRootName, "--allow-platform", "tpm", "--broker-token-key", b.TokenKey,
		"--policy-out", filepath.Join(dir, "policy.yaml"), "--sign-policy-key", parts.keys.Private,
		"--sbom-out", filepath.Join(dir, "sbom.json"), "--compression", "zstd", "--output", "json",
	}, b.Flags()...))
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	var res Result
	if err := json.Unmarshal(stdout.Bytes(), &res); err != nil {
		t.Fatalf("%v\n%s", err, stdout.String())
	}
	for _, step := range []string{"build", "prepare", "sbom", "key", "push", "check", "sign", "attest", "verify", "policy", "rule", "tag"} {
		if !strings.Contains(stderr.String(), "\n"+step) && !strings.HasPrefix(stderr.String(), step) {
			t.Errorf("no line for step %s:\n%s", step, stderr.String())
		}
	}
	empty(t, tmp)
	checkPolicy(t, &res, "required")
	stockCosign(t, "verify-attestation", "--key", parts.keys.Public, "--type", "spdxjson", "--insecure-ignore-tlog=true", "--allow-http-registry", res.Digest)

	ca, err := bounded.ReadFile(b.CA, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	token, err := bounded.ReadFile(b.AdminToken, 4096)
	if err != nil {
		t.Fatal(err)
	}
	admin, err := adminclient.New(b.URL, ca, string(token))
	if err != nil {
		t.Fatal(err)
	}
	rule, err := admin.Rule(t.Context(), res.KeyResource)
	if err != nil {
		t.Fatal(err)
	}
	if !res.ReleaseRule || rule.Images[0] != res.ManifestDigest || rule.EKRoots[0] != rig.EKRootName {
		t.Errorf("rule %+v does not name the image", rule)
	}
	if _, err := kbs.ParseResourceURI(res.KeyResource); err != nil {
		t.Error(err)
	}
}
