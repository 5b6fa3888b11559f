package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// offline keeps stock syft from asking the network for its own updates.
const offline = "SYFT_CHECK_FOR_APP_UPDATE=false"

// plain pulls and runs the unencrypted image with stock podman, verifying
// nothing, and ends where the agent's launch ends: when the workload answers.
func (b *bench) plain(ctx context.Context, p *published) (t timing, err error) {
	podman, err := b.podman(ctx)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, b.discard(ctx, podman)) }()
	return timed(func() error {
		if _, err := podman.Command(ctx, "pull", "--quiet", "--tls-verify=false", p.plain); err != nil {
			return err
		}
		return start(ctx, podman, p.plain, p.port)
	})
}

// podman starts one over empty storage.
func (b *bench) podman(ctx context.Context) (*rig.Podman, error) {
	b.serial++
	return b.stage.StartPodman(ctx, "p"+strconv.Itoa(b.serial))
}

// start runs an image that is in storage and waits until it answers.
func start(ctx context.Context, podman *rig.Podman, image string, port uint16) error {
	if _, err := podman.Command(ctx, "run", "--detach", "--pull=never", "--read-only", image, rig.ListenOn(port)); err != nil {
		return err
	}
	for deadline := time.Now().Add(20 * time.Second); !rig.Answers(ctx, port); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("nothing answers on port %d", port)
		}
	}
	return ctx.Err()
}

// step is one command of the chain, in sh.
type step struct{ name, script string }

// chain is what people do by hand today, on the same encrypted image: verify
// signature and attestation, decrypt, regenerate the SBOM, compare, run. The
// comparison is textual, sorted by jq, so it reports differences; that it runs
// is what is measured.
func (b *bench) chain(ctx context.Context, p *published) (t timing, steps map[string]float64, err error) {
	podman, err := b.podman(ctx)
	if err != nil {
		return t, nil, err
	}
	dir := podman.Dir + "/chain"
	defer func() { err = errors.Join(err, b.discard(ctx, podman, dir)) }()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return t, nil, err
	}
	const verify = ` --key "$KEY" --insecure-ignore-tlog=true --allow-insecure-registry --allow-http-registry "$IMAGE" `
	const normal = `del(.creationInfo, .documentNamespace)`
	env := []string{offline, "TMPDIR=" + dir, "DIR=" + dir, "KEY=" + b.stage.Signer.Public, "JWE=" + b.jwe, "IMAGE=" + p.encrypted,
		"COSIGN=" + b.stage.Tool("cosign"), "SYFT=" + b.stage.Tool("syft")}
	steps = map[string]float64{}
	t, err = timed(func() error {
		for _, st := range []step{
			{"cosign verify", `"$COSIGN" verify` + verify + `>/dev/null`},
			{"cosign verify-attestation", `"$COSIGN" verify-attestation --type spdxjson` + verify + `>"$DIR/att.json"`},
			{"jq of the signed SBOM", `jq -r .payload "$DIR/att.json" | base64 -d | jq -S '.predicate | ` + normal + `' >"$DIR/signed.json"`},
			{"skopeo copy, decrypting", `skopeo copy --quiet --src-tls-verify=false --decryption-key "$JWE" "docker://$IMAGE" "oci:$DIR/image:latest"`},
			{"syft", `"$SYFT" scan --quiet "oci-dir:$DIR/image" --output "spdx-json=$DIR/found.json"`},
			{"jq of the found SBOM", `jq -S '` + normal + `' "$DIR/found.json" >"$DIR/found.sorted.json"`},
			{"diff", `diff "$DIR/signed.json" "$DIR/found.sorted.json" >"$DIR/differences" || test $? = 1`},
		} {
			one, err := timed(func() error {
				_, err := b.stage.Run(ctx, env, "sh", "-euc", st.script)
				return err
			})
			if err != nil {
				return fmt.Errorf("%s: %w", st.name, err)
			}
			steps[st.name] = one.Seconds
		}
		one, err := timed(func() error {
			id, err := podman.Command(ctx, "pull", "--quiet", "oci:"+dir+"/image:latest")
			if err != nil {
				return err
			}
			return start(ctx, podman, lastLines(id, 1), p.port)
		})
		steps["podman pull and run"] = one.Seconds
		return err
	})
	return t, steps, err
}

// chainOrder is how the steps are shown.
var chainOrder = []string{"cosign verify", "cosign verify-attestation", "jq of the signed SBOM", "skopeo copy, decrypting",
	"syft", "jq of the found SBOM", "diff", "podman pull and run"}

// syft scans the plain image in the registry, with its own defaults.
func (b *bench) syft(ctx context.Context, p *published) (timing, error) {
	dir, err := os.MkdirTemp(b.stage.Dir, "syft-")
	if err != nil {
		return timing{}, err
	}
	defer os.RemoveAll(dir)
	return timed(func() error {
		_, err := b.stage.Run(ctx, []string{offline, "TMPDIR=" + dir, "SYFT_REGISTRY_INSECURE_USE_HTTP=true"},
			b.stage.Tool("syft"), "scan", "--quiet", "registry:"+p.plain, "--output", "spdx-json="+filepath.Join(dir, "found.json"))
		return err
	})
}

// timed runs f, whose commands are this process's children, one after another.
func timed(f func() error) (t timing, err error) {
	syscall.Sync()
	before, err := childrenCPU()
	if err != nil {
		return t, err
	}
	began := time.Now()
	if err := f(); err != nil {
		return t, err
	}
	t.Seconds = time.Since(began).Seconds()
	after, err := childrenCPU()
	t.CPU = after - before
	return t, err
}

// childrenCPU is the processor time of the children that have been waited for.
func childrenCPU() (float64, error) {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &usage); err != nil {
		return 0, err
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds(), nil
}
