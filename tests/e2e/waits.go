package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// noScratch boots the image of scratchDisk with no disk to write to.
func (v *variants) noScratch(ctx context.Context) error {
	image, err := v.forScratch(ctx)
	if err != nil {
		return err
	}
	return (&refusals{v.scene}).boot(ctx, "no-scratch", refused("scratch-failed", "cvm-scratch"),
		func(_ context.Context, o *rig.MachineOptions) error {
			sealed := scene{image: image}
			o.Disk = sealed.disk()
			return nil
		})
}

// waiting is the directory of the image that waits.
func (v *variants) waiting(ctx context.Context) (string, error) {
	return v.sealedWith(ctx, "image-wait", "--on-failure", "wait", "--wait", strconv.Itoa(waitSeconds))
}

// stays checks how long the machine was on after its refusal was seen.
func stays(from time.Time, least, most time.Duration) error {
	if took := time.Since(from); took < least || took > most {
		return fmt.Errorf("was on for %s after the refusal, expected %s to %s", took.Round(time.Millisecond), least, most)
	}
	return nil
}

func (v *variants) earlyWait(ctx context.Context) error {
	if err := v.prepare(ctx); err != nil {
		return err
	}
	image, err := v.waiting(ctx)
	if err != nil {
		return err
	}
	vm, err := v.start(ctx, "early-wait", image, func(o *rig.MachineOptions) {
		o.SMBIOS = []string{"io.systemd.credential:tmpfiles.extra=f /run/owned 0644 root root - host"}
	})
	if err != nil {
		return err
	}
	defer vm.Kill()
	if _, err := vm.WaitConsole(ctx, bootWithin, refused("smbios-refused", "")); err != nil {
		return err
	}
	seen := time.Now()
	if err := vm.WaitOff(ctx, offWithin); err != nil {
		return err
	}
	return stays(seen, (waitSeconds-1)*time.Second, 3*waitSeconds*time.Second)
}

// agentWait is a refusal that is final: systemd starts nothing again, and the
// machine goes off by the unit's own rules.
func (v *variants) agentWait(ctx context.Context) error {
	if err := v.prepare(ctx); err != nil {
		return err
	}
	image, err := v.waiting(ctx)
	if err != nil {
		return err
	}
	seed, err := v.strangersImage(ctx)
	if err != nil {
		return err
	}
	vm, err := v.start(ctx, "agent-wait", image, func(o *rig.MachineOptions) { o.Seeds = []string{seed} })
	if err != nil {
		return err
	}
	defer vm.Kill()
	const code = "image-signature-invalid"
	agent := newSerial(vm)
	if err := rig.Eventually(ctx, bootWithin, func() error {
		if !vm.Running() {
			return nil // the next step says so
		}
		var status rig.Status
		err := agent.get(ctx, askWithin, "/v1/status", &status)
		if err == nil && status.Cause != code {
			err = fmt.Errorf("the agent is %s, cause %q", status.State, status.Cause)
		}
		return err
	}); err != nil {
		return err
	}
	seen := time.Now()
	line, err := vm.WaitConsole(ctx, offWithin, agentLine(code))
	if err != nil {
		return err
	}
	v.report.say("     %.160s", strings.TrimSpace(line))
	if err := stays(seen, waitSeconds/2*time.Second, 3*waitSeconds*time.Second); err != nil {
		return err
	}
	return vm.WaitOff(ctx, offWithin)
}

// strangersImage publishes an image by another key than the policy's, and
// returns the seed of a policy, signed as it must be, that runs it.
func (v *variants) strangersImage(ctx context.Context) (string, error) {
	stranger, err := v.NewKeys(ctx, "publisher")
	if err != nil {
		return "", err
	}
	dir, err := v.BuildApp(ctx, rig.App{Name: "stranger", Version: "v1"})
	if err != nil {
		return "", err
	}
	published, file := v.Path(v.own.dir, "published.yaml"), v.Path(v.own.dir, "stranger.yaml")
	if _, err := v.own.Publish(ctx, rig.PublishOptions{Source: []string{dir}, To: "e2e/stranger:v1", Key: stranger, Encrypt: true,
		Workload: "vault", Template: v.Path(v.own.dir, "template.yaml"), Out: published, Version: floor}); err != nil {
		return "", err
	}
	// The registry by its address in the guest: a mirror alone is not believed
	// when it knows no signature, and the publisher's address is not there.
	repository := v.Registry.Reference("e2e/stranger", "")
	if err := rig.Edit(published, file, map[string]string{
		repository + "@": strings.Replace(repository, "127.0.0.1", rig.HostInGuest, 1) + "@"}); err != nil {
		return "", err
	}
	signed, err := v.SignPolicy(ctx, file)
	if err != nil {
		return "", err
	}
	initdata, err := v.Pack(ctx, signed)
	if err != nil {
		return "", err
	}
	return initdata + ".iso", v.cvmctlSeed(ctx, initdata, initdata+".iso")
}
