package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// signer is a stock cosign with a key pair.
type signer struct {
	t        *testing.T
	bin, dir string
	pub      string
}

func newSigner(t *testing.T) *signer {
	t.Helper()
	s := &signer{t: t, bin: tool(t, "cosign"), dir: t.TempDir()}
	s.run("generate-key-pair")
	b, err := os.ReadFile(s.dir + "/cosign.pub")
	if err != nil {
		t.Fatal(err)
	}
	s.pub = string(b)
	return s
}

func (s *signer) run(args ...string) {
	s.t.Helper()
	cmd := exec.Command(s.bin, args...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "COSIGN_PASSWORD=x")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("cosign %v: %v\n%s", args, err, out)
	}
}

// sign signs in one of cosign's storage forms.
func (s *signer) sign(bundle bool, ref string) {
	s.t.Helper()
	args := []string{"sign", "--yes", "--tlog-upload=false", "--allow-http-registry", "--key", "cosign.key"}
	if bundle {
		args = append(args, "--new-bundle-format")
	}
	s.run(append(args, ref)...)
}

func (s *signer) attest(bundle bool, ref, kind, predicate string) {
	s.t.Helper()
	if err := os.WriteFile(s.dir+"/predicate.json", []byte(predicate), 0o600); err != nil {
		s.t.Fatal(err)
	}
	args := []string{"attest", "--yes", "--tlog-upload=false", "--allow-http-registry", "--key", "cosign.key", "--type", kind, "--predicate", "predicate.json"}
	if bundle {
		args = append(args, "--new-bundle-format")
	}
	s.run(append(args, ref)...)
}

func (s *signer) rule() policy.Signatures {
	return policy.Signatures{Required: []policy.Signer{{Key: s.pub}}}
}

const spdx = `{"spdxVersion":"SPDX-2.3","SPDXID":"SPDXRef-DOCUMENT","name":"x","packages":[]}`

func TestLesson15_TheClaimsOfASignatureAreChecked(t *testing.T) {
	reg := startRegistry(t)
	alice, mallory := newSigner(t), newSigner(t)
	c := client(t, t.TempDir(), plain(reg))
	crane := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(tool(t, "crane"), append(args, "--insecure")...).CombinedOutput(); err != nil {
			t.Fatalf("crane %v: %v\n%s", args, err, out)
		}
	}
	tag := func(ref, suffix string) string { return strings.Replace(ref, "@sha256:", ":sha256-", 1) + suffix }
	n := 0
	image := func(repo string) string {
		n++
		return push(t, reg+"/"+repo, false, tarOf(t, map[string]string{"hello": strings.Repeat("x", n)})).ref
	}
	for form, bundle := range map[string]bool{"legacy": false, "bundle": true} {
		t.Run(form, func(t *testing.T) {
			check := func(ref string, rule policy.Signatures, want cause.Code) {
				t.Helper()
				i, err := c.Resolve(ctx(t, time.Minute), ref)
				if err == nil {
					err = i.VerifySignatures(ctx(t, time.Minute), rule, nil)
				}
				if got := cause.Of(err); got != want {
					t.Errorf("got %q (%v), want %q", got, err, want)
				}
			}
			good := image("good" + form)
			check(good, alice.rule(), cause.ImageUnsigned)
			check(good, policy.Signatures{}, cause.PolicyInvalid)
			alice.sign(bundle, good)
			check(good, alice.rule(), "")
			check(good, mallory.rule(), cause.SignatureInvalid)
			both := policy.Signatures{Required: append(alice.rule().Required, mallory.rule().Required...)}
			check(good, both, cause.SignatureInvalid)
			mallory.sign(bundle, good)
			check(good, both, "")
			check(good, alice.rule(), "")
			if bundle {
				return
			}
			another := image("good" + form)
			crane("copy", tag(good, ".sig"), tag(another, ".sig"))
			check(another, alice.rule(), cause.SignatureOtherImage)
			crane("copy", good, reg+"/stolen:x")
			crane("copy", tag(good, ".sig"), strings.Replace(tag(good, ".sig"), "/good"+form, "/stolen", 1))
			check(strings.Replace(good, "/good"+form, "/stolen", 1), alice.rule(), cause.SignatureOtherImage)
			tagged := image("tagged")
			alice.run("sign", "--yes", "--tlog-upload=false", "--allow-http-registry", "--key", "cosign.key",
				"--sign-container-identity", reg+"/tagged:other", tagged)
			check(tagged, alice.rule(), cause.SignatureOtherImage)
		})
	}
	t.Run("a key held by the broker", func(t *testing.T) {
		ref := image("resource")
		alice.sign(false, ref)
		i, err := c.Resolve(ctx(t, time.Minute), ref)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode([]byte(alice.pub))
		sum := sha256.Sum256(block.Bytes)
		rule := policy.Signatures{Required: []policy.Signer{{KeyResource: "kbs:///a/b/c", KeyDigest: "sha256:" + hex.EncodeToString(sum[:])}}}
		answer := func(pub string) KeyResource {
			return func(context.Context, string) ([]byte, error) { return []byte(pub), nil }
		}
		if err := i.VerifySignatures(t.Context(), rule, answer(alice.pub)); err != nil {
			t.Error(err)
		}
		if err := i.VerifySignatures(t.Context(), rule, answer(mallory.pub)); cause.Of(err) != cause.SignatureInvalid {
			t.Errorf("another key than the pinned one: %v", err)
		}
		if err := i.VerifySignatures(t.Context(), rule, nil); cause.Of(err) != cause.PolicyInvalid {
			t.Errorf("no broker: %v", err)
		}
	})
}

func TestTheSBOMIsOfThisImageAndByTheRightKey(t *testing.T) {
	reg := startRegistry(t)
	alice, mallory := newSigner(t), newSigner(t)
	c := client(t, t.TempDir(), plain(reg))
	n := 100
	for form, bundle := range map[string]bool{"legacy": false, "bundle": true} {
		t.Run(form, func(t *testing.T) {
			sbom := func(ref string, s *signer) (string, error) {
				i, err := c.Resolve(ctx(t, time.Minute), ref)
				if err != nil {
					return "", err
				}
				b, err := i.SBOM(ctx(t, time.Minute), policy.SBOM{Required: true}, s.rule(), nil)
				return string(b), err
			}
			n++
			ref := push(t, reg+"/sbom"+form, false, tarOf(t, map[string]string{"hello": strings.Repeat("x", n)})).ref
			alice.sign(bundle, ref) // a signature is no SBOM
			if _, err := sbom(ref, alice); cause.Of(err) != cause.SBOMMissing {
				t.Errorf("none attached: %v", err)
			}
			alice.attest(bundle, ref, "spdxjson", spdx)
			got, err := sbom(ref, alice)
			if err != nil || !strings.Contains(got, "SPDX-2.3") {
				t.Errorf("got %q, %v", got, err)
			}
			if _, err := sbom(ref, mallory); cause.Of(err) != cause.SBOMSignature {
				t.Errorf("by another key: %v", err)
			}
			if bundle {
				return
			}
			n++
			other := push(t, reg+"/sbom"+form, false, tarOf(t, map[string]string{"hello": strings.Repeat("x", n)})).ref
			tag := func(ref string) string { return strings.Replace(ref, "@sha256:", ":sha256-", 1) + ".att" }
			if out, err := exec.Command(tool(t, "crane"), "copy", "--insecure", tag(ref), tag(other)).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if _, err := sbom(other, alice); cause.Of(err) != cause.SBOMOtherImage {
				t.Errorf("of another image: %v", err)
			}
		})
	}
	t.Run("not required", func(t *testing.T) {
		var i Image
		if b, err := i.SBOM(t.Context(), policy.SBOM{}, policy.Signatures{}, nil); b != nil || err != nil {
			t.Errorf("%q, %v", b, err)
		}
	})
}

// TestLesson24_VerificationTouchesNothingButTheRegistry runs the two tests
// above again where there is no network but the loopback interface: a
// verification that asked a log, a certificate authority or a root of trust
// for something would fail.
func TestLesson24_VerificationTouchesNothingButTheRegistry(t *testing.T) {
	if os.Getenv("CVM_TEST_OFFLINE") != "" {
		return // inside
	}
	cmd := exec.Command("unshare", "-n", "sh", "-c", `ip link set lo up && exec "$0" -test.run 'TestLesson15_|TestTheSBOM' -test.v`, "/proc/self/exe")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[len(cmd.Args)-1] = exe
	cmd.Env = append(os.Environ(), "CVM_TEST_OFFLINE=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestLesson15_") {
		t.Errorf("%v\n%s", err, out)
	}
}
