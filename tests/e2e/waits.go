package main

import (
	"context"
	"fmt"
	"strconv"
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
