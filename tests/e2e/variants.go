package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/cc-runtime/cvm-agent/policy/order"
	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// waitSeconds is how long the image that waits shows a refusal.
const waitSeconds = 20

// variants are boots of images that are sealed otherwise than the story's. They
// have a broker of their own: it is away while one of them boots, and what it
// releases and refuses is theirs alone.
type variants struct {
	*scene
	own *scene // made by the first check

	life    *story // of the machine with the scratch disk
	scratch string
	early   string            // the early stage's line
	empty   int64             // bytes allocated for the disk before anything was fetched
	sealed  map[string]string // directories of images, by the options that they were sealed with
}

// shared names the checks that share a machine.
var shared = map[string]string{"scratch-disk": "scratch", "agent-restart": "scratch", "scratch-sealed": "scratch"}

func (v *variants) checks() []check {
	list := []check{
		{"debug", "the debug variant says so and gets no key under the production image's reference document", v.debugVariant},
		{"scratch-disk", "a scratch disk with a forged LUKS header is not believed: it is made anew", v.scratchDisk},
		{"agent-restart", "while the broker is away the agent is started again, not the machine; then it gets ready", v.agentRestart},
		{"scratch-sealed", "what the guest keeps on the scratch disk cannot be read from it", v.scratchSealed},
		{"no-scratch", "an image for a scratch disk, without one", v.noScratch},
		{"early-wait", "an image that waits: the early stage's refusal stays on for its time, then power off", v.earlyWait},
		{"agent-wait", "so does the agent's, of an image that a stranger signed, and it answers reads meanwhile", v.agentWait},
	}
	if v.debug { // nothing would be compared with anything
		list = list[1:]
	}
	return list
}

// prepare makes the broker, a policy whose launch gives up on it soon, and the
// document with the production image's values.
func (v *variants) prepare(ctx context.Context) error {
	if v.own != nil {
		return nil
	}
	stage := *v.Stage
	own := &scene{Stage: &stage, report: v.report, operator: v.operator, accel: v.accel, image: v.image,
		dir: "variants", brokerTime: "20s", versions: []version{{floor, rig.App{Name: "variant", Version: "v1"}}}}
	var err error
	if own.Broker, err = v.StartBroker(ctx, v.TPM.Roots, rig.HostInGuest); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{own.publish, own.predict, own.makeSeed} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	v.own = own
	return nil
}

// sealedWith seals an image, once for all who want it.
func (v *variants) sealedWith(ctx context.Context, name string, options ...string) (string, error) {
	key := strings.Join(options, " ")
	if dir, done := v.sealed[key]; done {
		return dir, nil
	}
	dir, err := v.seal(ctx, name, v.debug, options...)
	if err != nil {
		return "", err
	}
	if v.sealed == nil {
		v.sealed = map[string]string{}
	}
	v.sealed[key] = dir
	return dir, nil
}

func (v *variants) forScratch(ctx context.Context) (string, error) {
	return v.sealedWith(ctx, "image-scratch", "--scratch", "disk")
}

// start boots a sealed image.
func (v *variants) start(ctx context.Context, name, image string, prepare func(*rig.MachineOptions)) (*rig.Machine, error) {
	tpm, err := v.NewTPM(ctx, "")
	if err != nil {
		return nil, err
	}
	sealed := scene{image: image}
	o := rig.MachineOptions{Name: name, Disk: sealed.disk(), Seeds: []string{v.own.seed}, TPM: tpm, Accel: v.accel, CPUs: 1}
	if prepare != nil {
		prepare(&o)
	}
	return v.StartMachine(ctx, o)
}

// earlyLine is the early stage's one line, whatever it says.
var earlyLine = regexp.MustCompile(`cvm-early: [^\n]*\n`)

// agentLine is the agent's last one, with the cause.
func agentLine(code string) *regexp.Regexp {
	return regexp.MustCompile(`cvm-agent: [a-z/]+: ` + code + `: [^\n]*\n`)
}

// debugVariant is a counter-check of what tells the variants apart: the same
// seed, broker and TPM authority, another image.
func (v *variants) debugVariant(ctx context.Context) error {
	if err := v.prepare(ctx); err != nil {
		return err
	}
	image, err := v.seal(ctx, "image-debug", true)
	if err != nil {
		return err
	}
	if err := v.differs(ctx, image, "9", "11"); err != nil {
		return err
	}
	records, err := v.own.Broker.Records()
	if err != nil {
		return err
	}
	vm, err := v.start(ctx, "debug", image, nil)
	if err != nil {
		return err
	}
	defer vm.Kill()
	line, err := vm.WaitConsole(ctx, bootWithin, earlyLine)
	if err != nil {
		return err
	}
	if !strings.Contains(line, " DEBUG VARIANT") {
		return fmt.Errorf("the early stage says %q, not that this is the debug variant", line)
	}
	if err := v.noKey(ctx, vm, len(records)); err != nil {
		return err
	}
	if line, err = vm.WaitConsole(ctx, offWithin, agentLine("key-refused")); err != nil {
		return err
	}
	v.report.say("     %.160s", strings.TrimSpace(line))
	if !strings.Contains(vm.Console(), "DEBUG IMAGE: not for keys that matter") {
		return errors.New("systemd's part of the boot does not say that this is a debug image")
	}
	return vm.WaitOff(ctx, offWithin)
}

// differs checks that the image measures other values than the production one.
func (v *variants) differs(ctx context.Context, image string, indices ...string) error {
	entry, err := v.measure(ctx, image, "other")
	if err != nil {
		return err
	}
	for _, index := range indices {
		mine, _ := entry["pcrs"].(map[string]any)
		others, _ := v.own.launch[0]["pcrs"].(map[string]any)
		if mine[index] == others[index] {
			return fmt.Errorf("PCR %s is the production image's: %v", index, mine[index])
		}
	}
	return nil
}

var register = regexp.MustCompile(`pcr-([0-9]+): expected `)

// moved says whether the broker's reason is the UKI, the command line, the UKI's
// sections, and no other register.
func moved(reason string) bool {
	var found []string
	for _, m := range register.FindAllStringSubmatch(reason, -1) {
		found = append(found, m[1])
	}
	return slices.Equal(found, []string{"4", "9", "11"})
}

// noKey waits for the broker's word on a key, which must be no, and why.
func (v *variants) noKey(ctx context.Context, vm *rig.Machine, since int) error {
	var final error
	err := rig.Eventually(ctx, bootWithin, func() error {
		running := vm.Running()
		released, err := v.own.Broker.Since(since, "release", "ok", "")
		if err != nil {
			return err
		}
		refused, err := v.own.Broker.Since(since, "release", "refused", "")
		switch {
		case err != nil:
		case len(released) > 0:
			final = fmt.Errorf("the broker released %s", released[0].Resource)
		case len(refused) > 0 && !moved(refused[0].Reason):
			final = fmt.Errorf("refused for another reason than its registers: %s", refused[0])
		case len(refused) == 0 && !running:
			final = errors.New("the machine is off before it asked for a key")
		case len(refused) == 0:
			err = errors.New("nobody asks for a key")
		}
		return err
	})
	return errors.Join(final, err)
}

// Where the scratch partition is, and what the kernel writes at its start.
const (
	scratchSize   = 384 << 20
	scratchStart  = 1 << 20
	integrityMark = "integrt\x00"
)

// forgedHeader begins a LUKS 1 header whose cipher is none (lesson 28).
var forgedHeader = []byte("LUKS\xba\xbe\x00\x01cipher_null\x00")

// makeScratch makes a disk whose one partition begins with the header, and then
// anything.
func (v *variants) makeScratch(ctx context.Context) error {
	v.scratch = v.Path("scratch.raw")
	disk, err := os.Create(v.scratch)
	if err != nil {
		return err
	}
	defer disk.Close()
	if err := disk.Truncate(scratchSize); err != nil {
		return err
	}
	if _, err := v.RunInput(ctx, strings.NewReader("label: gpt\nstart="+strconv.Itoa(scratchStart/512)+", name=cvm-scratch\n"), nil, "sfdisk", "--quiet", v.scratch); err != nil {
		return err
	}
	start := bytes.Repeat([]byte("of the host's\n"), 64<<10/14)
	copy(start, forgedHeader)
	_, err = disk.WriteAt(start, scratchStart)
	return err
}

// scratchDisk boots with the broker away: nothing is fetched yet when the disk
// is looked at.
func (v *variants) scratchDisk(ctx context.Context) error {
	if err := errors.Join(v.prepare(ctx), v.makeScratch(ctx)); err != nil {
		return err
	}
	image, err := v.forScratch(ctx)
	if err != nil {
		return err
	}
	entry, err := v.measure(ctx, image, "scratch")
	if err != nil {
		return err
	}
	v.own.launch = append(v.own.launch, entry)
	if err := v.own.setReference(ctx, "", ""); err != nil {
		return err
	}
	v.own.Broker.Stop()
	vm, err := v.start(ctx, "scratch", image, func(o *rig.MachineOptions) { o.Scratch, o.Forward = v.scratch, guestPort })
	if err != nil {
		return err
	}
	v.life = &story{scene: v.own, vm: vm, agent: newSerial(vm)}
	if v.early, err = vm.WaitConsole(ctx, bootWithin, earlyLine); err != nil {
		return err
	}
	if !strings.Contains(v.early, "PCR 8 "+v.own.pcr8) {
		return fmt.Errorf("the console says %q", v.early)
	}
	start := make([]byte, len(integrityMark))
	disk, err := os.Open(v.scratch)
	if err != nil {
		return err
	}
	defer disk.Close()
	if _, err := disk.ReadAt(start, scratchStart); err != nil || string(start) != integrityMark {
		return errors.Join(fmt.Errorf("the partition begins with %q, expected dm-integrity's superblock", start), err)
	}
	v.empty, err = allocated(disk)
	return err
}

func allocated(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512, nil
}

// agentRestart sees from the outside that the agent ended and came back: its
// last line, then an answer of the same boot.
func (v *variants) agentRestart(ctx context.Context) error {
	if v.life == nil || !v.life.on() {
		return errNotReached
	}
	var before, after order.Challenge
	vm, agent := v.life.vm, v.life.agent
	if err := rig.Eventually(ctx, bootWithin, func() error {
		if !vm.Running() {
			return nil // the next step says so
		}
		return agent.get(ctx, askWithin, "/v1/challenge", &before)
	}); err != nil {
		return err
	}
	line, err := vm.WaitConsole(ctx, bootWithin, agentLine("broker-unavailable"))
	if err != nil {
		return err
	}
	v.report.say("     %.160s", strings.TrimSpace(line))
	if err := v.own.Broker.Restart(ctx); err != nil {
		return err
	}
	if err := v.life.waitState(ctx, "ready"); err != nil {
		return err
	}
	if err := errors.Join(v.life.running(ctx, floor), agent.get(ctx, askWithin, "/v1/challenge", &after)); err != nil {
		return err
	}
	if before.BootID == "" || before.BootID != after.BootID {
		return fmt.Errorf("the boot was %q, and is %q", before.BootID, after.BootID)
	}
	if n := len(earlyLine.FindAllString(vm.Console(), -1)); n != 1 {
		return fmt.Errorf("the early stage has run %d times", n)
	}
	return nil
}

// scratchSealed looks for the workload on the disk. That it is there at all,
// encrypted, is seen by what the disk has grown.
func (v *variants) scratchSealed(ctx context.Context) error {
	if v.life == nil || !v.life.on() {
		return errNotReached
	}
	defer v.life.vm.Kill()
	if err := v.life.answers("variant v1")(ctx); err != nil {
		return err
	}
	server, err := os.ReadFile(v.Path("app", "server"))
	if err != nil {
		return err
	}
	disk, err := os.Open(v.scratch)
	if err != nil {
		return err
	}
	defer disk.Close()
	if err := rig.Eventually(ctx, offWithin, func() error {
		now, err := allocated(disk)
		if err == nil && now-v.empty < int64(len(server)) {
			err = fmt.Errorf("the disk has %d bytes more than before, and the workload %d", now-v.empty, len(server))
		}
		return err
	}); err != nil {
		return err
	}
	const block = 4096
	middle := len(server) / 2 / block * block
	for _, text := range [][]byte{server[middle : middle+block], forgedHeader, []byte("/srv/greeting")} {
		if at, err := find(disk, text); err != nil || at >= 0 {
			return errors.Join(fmt.Errorf("%.16q… is on the disk, at byte %d", text, at), err)
		}
	}
	return nil
}

// find returns where the file holds text, or -1.
func find(f *os.File, text []byte) (int64, error) {
	buf := make([]byte, 4<<20)
	for at := int64(0); ; at += int64(len(buf) - len(text)) {
		n, err := f.ReadAt(buf, at)
		if i := bytes.Index(buf[:n], text); i >= 0 {
			return at + int64(i), nil
		}
		if errors.Is(err, io.EOF) {
			return -1, nil
		}
		if err != nil {
			return -1, err
		}
	}
}
