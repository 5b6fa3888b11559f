package fault

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// sabotageWithin bounds one run of the demo: it takes half a minute undisturbed
// on an idle machine.
const sabotageWithin = 5 * time.Minute

// Where the guest's agent (not that of a launch that the demo wants refused)
// starts, and where an order is given to it.
const (
	atLaunch = `run\ --config\ */agent/agent.yaml`
	atOrder  = `ctl\ upgrade\ */`
)

// A sabotage is one thing that is broken from outside, and what the demo must
// say of it in its last line.
type sabotage struct {
	name   string
	points []checkpoint
	step   string   // of the demo
	says   []string // agent phase, cause code
}

var sabotages = []sabotage{
	{
		name:   "the broker trusts the TPMs of another maker",
		points: []checkpoint{{"cvm-broker", `init\ *`, otherRoot}},
		step:   "refuse-key", // the first launch that gets as far as the broker
		says:   []string{`attestation-refused in phase "attest"`, "ek"},
	},
	{
		name:   "a layer is tampered with in the registry's storage",
		points: []checkpoint{{"cvm-agent", atLaunch, tamperLayer}},
		step:   "launch",
		says:   []string{"cvm-agent: fetch/web: layer-digest-mismatch: "},
	},
	{
		name: "the broker has ended before the launch",
		points: []checkpoint{
			deadline("broker: 30s", "broker: 5s"),
			{"cvm-agent", atLaunch, func(_ context.Context, d *sabotagedDemo) error { return d.signal("broker", syscall.SIGKILL) }},
		},
		step: "launch",
		says: []string{"cvm-agent: attest: broker-unavailable: "},
	},
	{
		name: "the broker does not answer any more",
		points: []checkpoint{
			deadline("broker: 30s", "broker: 5s"),
			{"cvm-agent", atLaunch, freezeBroker},
		},
		step: "launch",
		says: []string{"cvm-agent: attest: broker-unavailable: "},
	},
	{
		name: "an upgrade never gets healthy, and the old version is gone",
		points: []checkpoint{
			deadline("deadline: 6s", "deadline: 15s"), // time for the removal on a busy machine
			{"cvm-agent", atOrder + `demo-3.dsse.json\ *`, removeOldVersion},
		},
		step: "rollback",
		says: []string{"cvm-agent: rollback-failed: ", "healthy/web: workload-unhealthy: ", "so did going back (start/web: "},
	},
	{
		name:   "cvm-sbom lies about a file",
		points: []checkpoint{{"cvm-agent", atLaunch, replaceScanner}},
		step:   "launch",
		says:   []string{"cvm-agent: sbom/", ": sbom-differs: ", "/srv/greeting"},
	},
	{
		name: "podman is killed while it starts a container",
		points: []checkpoint{
			deadline("start: 1m", "start: 5s"),
			{"runc", `start\ *|*\ start\ *`, func(_ context.Context, d *sabotagedDemo) error { return d.signal("guest", syscall.SIGKILL) }},
		},
		step: "launch",
		says: []string{"cvm-agent: start/web: podman-unavailable: "},
	},
	{
		name:   "somebody extends PCR 14 before the agent starts",
		points: []checkpoint{{"cvm-agent", atLaunch, foreignExtend}},
		step:   "launch",
		says:   []string{"cvm-agent: policy: eventlog-diverged: "},
	},
	{
		name:   "somebody extends PCR 14 before an upgrade",
		points: []checkpoint{{"cvm-agent", atOrder + `demo-2.dsse.json\ *`, foreignExtend}},
		step:   "upgrade",
		says:   []string{"cvm-agent: eventlog-diverged: policy: "},
	},
}

// TestSabotage runs the demo once with all checkpoints in place and nothing
// broken, then once for each sabotage.
func TestSabotage(t *testing.T) {
	demo := buildDemo(t)
	t.Run("nothing is broken", func(t *testing.T) {
		idle := func(context.Context, *sabotagedDemo) error { return nil }
		status, d := runSabotaged(t, demo, []checkpoint{{"cvm-broker", `init\ *`, idle}, {"cvm-agent", atLaunch, idle}, {"cvmctl", `publish\ *`, idle}, {"runc", `start\ *|*\ start\ *`, idle}})
		if status != 0 || !strings.HasSuffix(d.output(), "\ndemo: ok\n") {
			t.Errorf("exit status %d:\n%s", status, d.output())
		}
	})
	for _, s := range sabotages {
		t.Run(s.name, func(t *testing.T) {
			status, d := runSabotaged(t, demo, s.points)
			lines := strings.Split(strings.TrimSpace(d.output()), "\n")
			last := lines[len(lines)-1]
			if status == 0 || !strings.HasPrefix(last, "demo: failed in step "+s.step+": ") || !sabotageHolds(last, s.says) {
				t.Errorf("exit status %d, expected a failure in step %s that says %q:\n%s", status, s.step, s.says, d.output())
			}
			t.Log(last)
		})
	}
}

func buildDemo(t *testing.T) string {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	demo := filepath.Join(t.TempDir(), "cvm-demo")
	if out, err := exec.Command("go", "-C", root, "build", "-o", demo, "./tests/demo").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return demo
}

// runSabotaged runs the demo and checks that the saboteur acted and that
// nothing is left.
func runSabotaged(t *testing.T, demo string, points []checkpoint) (status int, d *sabotagedDemo) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), sabotageWithin)
	defer cancel()
	d = newSabotagedDemo(t, demo)
	acted := make([]atomic.Bool, len(points))
	counted := make([]checkpoint, len(points))
	for i, p := range points {
		counted[i] = checkpoint{p.program, p.pattern, func(ctx context.Context, d *sabotagedDemo) error {
			if acted[i].Swap(true) {
				return nil
			}
			return p.do(ctx, d)
		}}
	}
	d.install(ctx, t, counted)
	status, err := d.run(ctx)
	if err != nil {
		t.Error(err)
	}
	d.mu.Lock()
	for i, p := range points {
		if !acted[i].Load() {
			d.errs = append(d.errs, fmt.Errorf("%s %s was never called", p.program, p.pattern))
		}
	}
	if err := errors.Join(d.errs...); err != nil {
		t.Errorf("the sabotage itself failed: %v", err)
	}
	d.mu.Unlock()
	left, err := d.residue()
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q %v", left, err)
	}
	return status, d
}

// deadline changes one deadline of the policy before it is published.
func deadline(from, to string) checkpoint {
	return checkpoint{"cvmctl", `publish\ *demo-template.yaml*`, func(_ context.Context, d *sabotagedDemo) error {
		return rig.Edit(filepath.Join(d.work, "policy", "demo-template.yaml"), filepath.Join(d.work, "policy", "demo-template.yaml"), map[string]string{from: to})
	}}
}

// freezeBroker stops the broker in its tracks: connections are taken, and
// nothing answers. Once the agent has ended it goes on, for the demo to end it
// the usual way.
func freezeBroker(ctx context.Context, d *sabotagedDemo) error {
	go func() {
		err := d.waitFor(ctx, "step: launch: ", "agent: started, pid ")
		for err == nil && d.signal("agent", 0) == nil && ctx.Err() == nil {
			time.Sleep(50 * time.Millisecond)
		}
		if err = errors.Join(err, d.signal("broker", syscall.SIGCONT)); err != nil {
			d.failed(err)
		}
	}()
	return d.signal("broker", syscall.SIGSTOP)
}

// otherRoot puts another authority's root where the broker reads the roots of
// endorsement keys from.
func otherRoot(_ context.Context, d *sabotagedDemo) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "another maker"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.work, "tpm-ca", "roots.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
}

var publishedWeb = regexp.MustCompile(`cvmctl published \S+/demo/web@sha256:([0-9a-f]{64}) `)

// tamperLayer flips one bit in the middle of the plain image's layer.
func tamperLayer(_ context.Context, d *sabotagedDemo) error {
	published := publishedWeb.FindStringSubmatch(d.output())
	if published == nil {
		return errors.New("the demo has not said what it published")
	}
	blob := func(digest string) string {
		return filepath.Join(d.work, "registry", "data", "docker", "registry", "v2", "blobs", "sha256", digest[:2], digest, "data")
	}
	data, err := os.ReadFile(blob(published[1]))
	if err != nil {
		return err
	}
	var manifest struct {
		Layers []struct {
			Digest string `json:"digest"`
		} `json:"layers"`
	}
	if err := json.Unmarshal(data, &manifest); err != nil {
		return err
	}
	if len(manifest.Layers) == 0 {
		return errors.New("the manifest has no layers")
	}
	file := blob(strings.TrimPrefix(manifest.Layers[0].Digest, "sha256:"))
	if data, err = os.ReadFile(file); err != nil {
		return err
	}
	data[len(data)/2] ^= 1
	return os.WriteFile(file, data, 0o600)
}

// removeOldVersion has the stopped containers of the old version, and the image
// that only it uses, removed as soon as the new version is started. The order
// goes on meanwhile: the sick one has a while to get healthy.
func removeOldVersion(ctx context.Context, d *sabotagedDemo) error {
	old, err := d.podman(ctx, "ps", "--no-trunc", "--format", "{{.ImageID}} {{.Names}}")
	if err != nil {
		return err
	}
	image := ""
	for i := 0; i+1 < len(old); i += 2 {
		if strings.Contains(old[i+1], "web") {
			image = old[i]
		}
	}
	if image == "" {
		return fmt.Errorf("no container of web runs: %q", old)
	}
	go func() {
		err := d.waitFor(ctx, "step: rollback: ", "upgrade ", " start/vault ", " ok ")
		var stopped []string
		if err == nil {
			stopped, err = d.podman(ctx, "ps", "--all", "--quiet", "--filter", "status=exited")
		}
		if err == nil {
			_, err = d.podman(ctx, append([]string{"rm"}, stopped...)...)
		}
		if err == nil {
			_, err = d.podman(ctx, "rmi", image)
		}
		if err != nil {
			d.failed(err)
		}
	}()
	return nil
}

// replaceScanner replaces cvm-sbom by a program that tells the truth about the
// plain image but for one file.
func replaceScanner(ctx context.Context, d *sabotagedDemo) error {
	truth, err := exec.CommandContext(ctx, filepath.Join(d.real, "cvm-sbom"), "scan", "--root", filepath.Join(d.work, "app", "web-v1", "root"), "--name", "image").Output()
	if err != nil {
		return err
	}
	lie, err := withoutFile(truth, "srv/greeting")
	if err != nil {
		return err
	}
	source, err := os.ReadFile("testdata/sabotage/liar/main.go")
	if err != nil {
		return err
	}
	dir := filepath.Join(d.path, "liar")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for name, data := range map[string][]byte{"main.go": source, "lie.json": lie, "go.mod": []byte("module liar\n\ngo 1.24\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, "go", "-C", dir, "build", "-o", filepath.Join(dir, "liar"), ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // there are no libraries in the sandbox
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return os.Rename(filepath.Join(dir, "liar"), filepath.Join(d.bin, "cvm-sbom"))
}

// withoutFile removes a file, and all that is said of it, from an SPDX document.
func withoutFile(document []byte, name string) ([]byte, error) {
	var spdx map[string]any
	if err := json.Unmarshal(document, &spdx); err != nil {
		return nil, err
	}
	files, _ := spdx["files"].([]any)
	var id any
	spdx["files"] = keepIf(files, func(file map[string]any) bool {
		if strings.TrimPrefix(fmt.Sprint(file["fileName"]), "/") != name {
			return true
		}
		id = file["SPDXID"]
		return false
	})
	if id == nil {
		return nil, fmt.Errorf("the SBOM has no file %s", name)
	}
	relationships, _ := spdx["relationships"].([]any)
	spdx["relationships"] = keepIf(relationships, func(r map[string]any) bool { return r["spdxElementId"] != id && r["relatedSpdxElement"] != id })
	return json.Marshal(spdx)
}

func keepIf(all []any, keep func(map[string]any) bool) []any {
	kept := []any{}
	for _, v := range all {
		if m, ok := v.(map[string]any); !ok || keep(m) {
			kept = append(kept, v)
		}
	}
	return kept
}

// foreignExtend extends PCR 14 by what is in nobody's log.
func foreignExtend(_ context.Context, d *sabotagedDemo) error {
	tpm, err := linuxudstpm.Open(filepath.Join(d.work, "tpm", "tpm.sock"))
	if err != nil {
		return err
	}
	defer tpm.Close()
	digest := sha256.Sum256([]byte("nobody's event"))
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(14), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]}}},
	}.Execute(tpm)
	return err
}
