package fault

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// inputCommands make what the agent is given.
var inputCommands = map[string]command{
	"edit":  {"FILE OLD NEW [OLD NEW...]", 3, edit},
	"forge": {"POLICY.yaml ENVELOPE.dsse.json OLD NEW [OLD NEW...]", 2, forge},
	"tamper": {"ENVELOPE.dsse.json OLD NEW", 3, func(_ context.Context, _ *world, ts *testscript.TestScript, a []string) error {
		return rig.ChangePayload(ts.MkAbs(a[0]), ts.MkAbs(a[0]), a[1], a[2])
	}},
	"unsign": {"ENVELOPE.dsse.json", 1, unsign},
	"copy":   {"IMAGE REPOSITORY VARIABLE", 3, copyImage},
	"build":  {"DIRECTORY REPOSITORY VARIABLE", 3, build},
	"sign": {"IMAGE KEY", 2, func(ctx context.Context, w *world, _ *testscript.TestScript, a []string) error {
		return w.rig.CosignSign(ctx, a[0], w.keys()[a[1]])
	}},
	"attest": {"IMAGE SBOM KEY", 3, func(ctx context.Context, w *world, ts *testscript.TestScript, a []string) error {
		return w.rig.CosignAttest(ctx, a[0], ts.MkAbs(a[1]), w.keys()[a[2]])
	}},
	"attach": {"sig|att OF-IMAGE TO-IMAGE", 3, attach},
}

// signPolicy signs a policy as the keys' holders would.
func (w *world) signPolicy(file, envelope string, keys []string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	p, err := policy.DecodeYAML(data)
	if err != nil {
		return err
	}
	var signers []dsse.Signer
	for _, k := range keys {
		signers = append(signers, w.signers[k])
	}
	signed, err := policy.Sign(p, signers...)
	if err != nil {
		return err
	}
	return os.WriteFile(envelope, signed, 0o600)
}

// pack makes the initdata document of an envelope, with these public keys.
func (w *world) pack(envelope, initdata string, keys []string) error {
	data, err := os.ReadFile(envelope)
	if err != nil {
		return err
	}
	var pems strings.Builder
	for _, k := range keys {
		pem, err := w.keys()[k].PEM()
		if err != nil {
			return err
		}
		pems.WriteString(pem)
	}
	packed, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(data), policy.KeySigners: pems.String()})
	if err != nil {
		return err
	}
	return os.WriteFile(initdata, packed, 0o600)
}

func edit(_ context.Context, _ *world, ts *testscript.TestScript, args []string) error {
	file := ts.MkAbs(args[0])
	for i := 1; i+1 < len(args); i += 2 {
		if err := rig.Edit(file, file, map[string]string{args[i]: args[i+1]}); err != nil {
			return err
		}
	}
	return nil
}

// forge signs with the owner's key what `cvmctl policy sign` would refuse to:
// the canonical policy after replacements in its bytes.
func forge(_ context.Context, w *world, ts *testscript.TestScript, args []string) error {
	data, err := os.ReadFile(ts.MkAbs(args[0]))
	if err != nil {
		return err
	}
	p, err := policy.DecodeYAML(data)
	if err != nil {
		return err
	}
	payload, err := p.Canonical()
	if err != nil {
		return err
	}
	for i := 2; i+1 < len(args); i += 2 {
		now := args[i+1]
		// N*TEXT is TEXT, N times.
		if times, text, ok := strings.Cut(now, "*"); ok {
			if n, err := strconv.Atoi(times); err == nil {
				now = strings.Repeat(text, n)
			}
		}
		if !bytes.Contains(payload, []byte(args[i])) {
			return fmt.Errorf("the policy has no %q: %s", args[i], payload)
		}
		payload = bytes.Replace(payload, []byte(args[i]), []byte(now), 1)
	}
	// By hand, since package dsse writes no envelope that it would not read.
	sig, err := w.signers["owner"].Sign(dsse.PAE(policy.PayloadType, payload))
	if err != nil {
		return err
	}
	signed, err := json.Marshal(map[string]any{"payloadType": policy.PayloadType, "payload": payload, "signatures": []any{map[string]any{"sig": sig}}})
	if err != nil {
		return err
	}
	return os.WriteFile(ts.MkAbs(args[1]), signed, 0o600)
}

// unsign takes the signatures out of an envelope.
func unsign(_ context.Context, _ *world, ts *testscript.TestScript, args []string) error {
	file := ts.MkAbs(args[0])
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	envelope, err := dsse.Parse(data)
	if err != nil {
		return err
	}
	envelope.Signatures = []dsse.Signature{}
	if data, err = envelope.Marshal(); err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o600)
}

// copyImage copies an image alone, without what is signed about it, and sets
// VARIABLE to REPOSITORY@DIGEST.
func copyImage(ctx context.Context, w *world, ts *testscript.TestScript, args []string) error {
	_, digest, _ := strings.Cut(args[0], "@")
	ts.Setenv(args[2], args[1]+"@"+digest)
	return w.rig.Copy(ctx, args[0], args[1]+":copied")
}

// build builds the Containerfile in DIRECTORY on top of the good image, with
// podman, pushes the result and sets VARIABLE to REPOSITORY@DIGEST.
func build(ctx context.Context, w *world, ts *testscript.TestScript, args []string) error {
	tag, digests := args[1]+":built", ts.MkAbs("digest")
	if _, err := w.stage.Builder.Command(ctx, "build", "--quiet", "--build-arg", "BASE="+w.app.Digest, "--tls-verify=false", "--tag", tag, ts.MkAbs(args[0])); err != nil {
		return err
	}
	if _, err := w.stage.Builder.Command(ctx, "push", "--quiet", "--tls-verify=false", "--digestfile", digests, tag); err != nil {
		return err
	}
	digest, err := os.ReadFile(digests)
	ts.Setenv(args[2], args[1]+"@"+strings.TrimSpace(string(digest)))
	return err
}

// attach gives an image the signatures (sig) or attestations (att) of another
// one, as whoever holds the registry can.
func attach(ctx context.Context, w *world, _ *testscript.TestScript, args []string) error {
	tag := func(image string) string { return strings.Replace(image, "@sha256:", ":sha256-", 1) + "." + args[0] }
	return w.rig.Copy(ctx, tag(args[1]), tag(args[2]))
}

// outsideCommands are about what surrounds the guest.
var outsideCommands = map[string]command{
	"registry": {"up|down|lie manifest|layer other|truncated|endless|redirect", 1, registry},
	"broker": {"up|down", 1, func(_ context.Context, w *world, _ *testscript.TestScript, a []string) error {
		return upOrDown(a[0], &w.gate.outlet)
	}},
	"service": {"down", 1, func(_ context.Context, w *world, _ *testscript.TestScript, _ []string) error {
		w.podman.Stop()
		return nil
	}},
	"disk":      {"SIZE", 1, disk},
	"elsewhere": {"", 0, elsewhere},
	"untouched": {"", 0, untouched},
	"audited":   {"OPERATION OUTCOME RESOURCE", 3, audited},
	"podman":    {"[ARGUMENT...]", 1, podman},
	"answers":   {"PATH TEXT [PORT]", 2, answers},
}

func upOrDown(what string, o *outlet) error {
	switch what {
	case "up":
		return o.up()
	case "down":
		return o.down()
	}
	return errors.New("up or down, not " + what)
}

func registry(_ context.Context, w *world, ts *testscript.TestScript, args []string) error {
	if args[0] != "lie" || len(args) != 3 {
		return upOrDown(args[0], &w.front.outlet)
	}
	return w.front.lies(args[1], args[2], ts.Getenv("ELSEWHERE"))
}

// disk mounts a file system of SIZE where podman's storage is.
func disk(ctx context.Context, w *world, _ *testscript.TestScript, args []string) error {
	w.podman.Stop()
	for _, dir := range []string{filepath.Join(w.podman.GraphRoot, "overlay"), w.podman.GraphRoot} {
		// Podman's private mount of its own directory would hide ours.
		_ = syscall.Unmount(dir, syscall.MNT_DETACH) // not mounted is fine
	}
	if err := syscall.Mount("tmpfs", w.podman.GraphRoot, "tmpfs", 0, "mode=0700,size="+args[0]); err != nil {
		return err
	}
	w.mounts = append(w.mounts, w.podman.GraphRoot)
	return w.podman.Restart(ctx)
}

func (w *world) unmount(ctx context.Context) error {
	w.podman.Stop()
	_, err := w.podman.Command(ctx, "rm", "--all", "--force", "--time", "0")
	points, mountErr := rig.MountsUnder(w.podman.GraphRoot)
	err = errors.Join(err, mountErr)
	for i := len(points) - 1; i >= 0; i-- {
		err = errors.Join(err, syscall.Unmount(points[i], syscall.MNT_DETACH))
	}
	return err
}

// elsewhere starts a server that counts its visitors and sets $ELSEWHERE.
func elsewhere(_ context.Context, w *world, ts *testscript.TestScript, _ []string) error {
	w.visitors = new(atomic.Int64)
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			w.visitors.Add(1)
		}
	}
	s.Start()
	ts.Defer(s.Close)
	ts.Setenv("ELSEWHERE", s.Listener.Addr().String())
	return nil
}

// untouched says that the lie was told and that nobody followed it.
func untouched(_ context.Context, w *world, _ *testscript.TestScript, _ []string) error {
	w.front.mu.Lock()
	asked := w.front.asked
	w.front.mu.Unlock()
	if n := w.visitors.Load(); n > 0 || asked == 0 {
		return fmt.Errorf("%d redirects were answered, %d connections came", asked, n)
	}
	return nil
}

func audited(_ context.Context, w *world, _ *testscript.TestScript, args []string) error {
	found, err := w.stage.Broker.Since(0, args[0], args[1], args[2])
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("the broker's audit log has no %s", strings.Join(args, " "))
	}
	return err
}

func podman(ctx context.Context, w *world, ts *testscript.TestScript, args []string) error {
	out, err := w.podman.Command(ctx, args...)
	fmt.Fprint(ts.Stdout(), out)
	return err
}

func answers(ctx context.Context, w *world, _ *testscript.TestScript, args []string) error {
	port := w.port
	if len(args) > 2 {
		n, err := strconv.ParseUint(args[2], 10, 16)
		if err != nil {
			return err
		}
		port = uint16(n)
	}
	return rig.WaitHTTP(ctx, port, args[0], args[1])
}
