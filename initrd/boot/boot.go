// Package boot is process 1 of the initrd: from the kernel's first instruction
// in user space to systemd's. Boot is the whole of it, in order.
//
// It promises that nothing of the host's is used before it is checked or
// measured, that the launch is bound to the initdata before the root is opened,
// and that every failure ends in one line on the console and power off, never
// in a shell. It cannot keep the host from refusing to run the guest.
package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/initrd/binding"
	"github.com/cc-runtime/cvm-agent/initrd/disk"
	"github.com/cc-runtime/cvm-agent/initrd/seed"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Where things are in the initrd and in the guest.
const (
	configPath = "/etc/cvm-agent/early.json"
	agentYAML  = "/etc/cvm-agent/agent.yaml"
	moduleDir  = "/usr/lib/modules"
	sysAliases = "/sys"
	smbiosPath = "/sys/firmware/dmi/tables/DMI"
	tpmSpec    = "device:/dev/tpmrm0"
	handover   = "/run/cvm-agent"
	earlyDir   = "/run/cvm-early" // mount points under the root's overlay
	sysroot    = "/sysroot"

	maxSMBIOS = 1 << 20
	maxYAML   = 64 << 10
	deadline  = 2 * time.Minute
	settle    = 20 * time.Second // for disks to show up
)

// stage is the state of one boot.
type stage struct {
	config   *Config
	launch   *binding.Launch
	seed     *seed.Seed
	initdata *policy.Initdata
	bound    string
	loaded   map[int]bool // whose modules are loaded, by index in Devices
}

// step is one step of the boot.
type step struct {
	name string
	do   func(*stage, context.Context) error
}

// steps is the boot. What stands above a line must hold before it: registers
// are looked at before anything is read that they could tell of, and the launch
// is bound before the root is opened and before the seed reaches anybody.
var steps = []step{
	{"mounts", (*stage).mounts},
	{"config", (*stage).readConfig},
	{"cmdline", (*stage).cmdline},
	{"smbios", (*stage).smbios},
	{"modules", (*stage).modules},
	{"registers", (*stage).registers},
	{"seed", (*stage).readSeed},
	{"binding", (*stage).bind},
	{"policy", (*stage).checkPolicy},
	{"root", (*stage).root},
	{"scratch", (*stage).scratch},
	{"handover", (*stage).handOver},
}

// took is how long a step took, for the hand-over and the boot's report.
type took struct {
	Step         string  `json:"step"`
	Milliseconds float64 `json:"milliseconds"`
}

// run goes through the steps and stops at the first error.
func (s *stage) run(ctx context.Context, list []step) ([]took, error) {
	var report []took
	for _, st := range list {
		start := time.Now()
		if err := st.do(s, ctx); err != nil {
			return report, err
		}
		report = append(report, took{st.name, float64(time.Since(start).Microseconds()) / 1000})
	}
	return report, nil
}

// inShort is the report for one line: steps of a millisecond and more.
func inShort(report []took) string {
	var out []string
	for _, t := range report {
		if t.Milliseconds >= 1 {
			out = append(out, fmt.Sprintf("%s %.0f", t.Step, t.Milliseconds))
		}
	}
	return strings.Join(out, ", ")
}

func (s *stage) readConfig(context.Context) error {
	data, err := bounded.ReadFile(configPath, maxConfig)
	if err != nil {
		return cause.New(cause.Config, "%w", err)
	}
	s.config, err = DecodeConfig(data)
	return err
}

func (s *stage) cmdline(context.Context) error {
	got, err := os.ReadFile("/proc/cmdline") // the kernel bounds it
	if err != nil {
		return cause.Wrap(cause.EarlyFailed, err)
	}
	return checkCmdline(s.config.Cmdline, got)
}

// smbios reads the raw table. Where the kernel shows none there is none.
func (s *stage) smbios(context.Context) error {
	f, err := os.Open(smbiosPath)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return cause.Wrap(cause.EarlyFailed, err)
	}
	defer f.Close()
	table, err := bounded.ReadAll(f, maxSMBIOS)
	if err != nil {
		return cause.New(cause.SMBIOSRefused, "read the SMBIOS tables: %w", err)
	}
	return checkSMBIOS(table)
}

func (s *stage) modules(context.Context) error {
	if err := loadModules(moduleDir, s.config.Modules); err != nil {
		return err
	}
	return s.plugged()
}

// plugged loads the modules of devices that have shown up, each once: a
// controller's module may show more. It is asked again while disks are awaited.
func (s *stage) plugged() error {
	var patterns []string
	for i, d := range s.config.Devices {
		if !s.loaded[i] {
			patterns = append(patterns, d.Aliases...)
		}
	}
	shown := modaliases(sysAliases, patterns)
	for i, d := range s.config.Devices {
		if s.loaded[i] || !fits(d.Aliases, shown) {
			continue
		}
		if err := loadModules(moduleDir, d.Modules); err != nil {
			return err
		}
		if s.loaded == nil {
			s.loaded = map[int]bool{}
		}
		s.loaded[i] = true
	}
	return nil
}

func (s *stage) registers(ctx context.Context) (err error) {
	if s.launch, err = binding.Open(ctx, platform.Linux(), tpmSpec); err != nil {
		return err
	}
	return s.launch.CheckFresh(ctx)
}

// readSeed waits for the seed disk, and for the root's as a sign that the disks
// are all there: a second seed must not escape by being slow.
func (s *stage) readSeed(ctx context.Context) error {
	var seeds []string
	err := poll(ctx, settle, func() (bool, error) {
		err := s.plugged()
		if err != nil {
			return false, err
		}
		if seeds, err = findSeeds(disk.Linux); err != nil {
			return false, err
		}
		data, hashes, err := disk.Linux.VerityPartitions(s.config.rootHash())
		return len(seeds) > 0 && data != "" && hashes != "", err
	})
	if err != nil {
		return err
	}
	switch len(seeds) {
	case 0:
		return cause.New(cause.SeedMissing, "no disk holds an ISO 9660 volume called %s", strings.Join(seed.Labels, " or "))
	case 1:
	default:
		return cause.New(cause.SeedAmbiguous, "%s are each a seed: which one is meant cannot be told", strings.Join(seeds, ", "))
	}
	f, err := os.Open(seeds[0])
	if err != nil {
		return cause.New(cause.SeedMalformed, "%w", err)
	}
	defer f.Close()
	files, err := seed.ReadISO(f)
	if err != nil {
		return err
	}
	if s.seed, err = seed.Parse(files); err != nil {
		return err
	}
	s.initdata, err = policy.ParseInitdata(s.seed.Initdata)
	return err
}

func (s *stage) bind(ctx context.Context) (err error) {
	if s.bound, err = s.launch.Bind(ctx, s.initdata); err != nil {
		return err
	}
	return s.launch.Close()
}

// checkPolicy opens the policy under the signers and the floor of this image,
// and holds the seed's choice of mirrors against it.
// The agent does it again: it takes no word from the early stage.
func (s *stage) checkPolicy(context.Context) error {
	v, err := policy.OpenInitdata(s.initdata, s.config.trust(), time.Now())
	if err != nil {
		return err
	}
	if _, refused := policy.ChooseMirrors(v.Policy.Registries, s.seed.UserData.CVMAgent.Mirrors); len(refused) > 0 {
		return cause.New(cause.SeedRefused, "cvm_agent.mirrors: %s: the policy does not allow it", strings.Join(refused, ", "))
	}
	return nil
}

// handOver writes what the agent and cloud-init read: nothing else of the
// seed gets past here.
func (s *stage) handOver(context.Context) error {
	clean, err := s.seed.Sanitized()
	if err != nil {
		return cause.Wrap(cause.EarlyFailed, err)
	}
	yaml, err := bounded.ReadFile(agentYAML, maxYAML)
	if err != nil {
		return cause.New(cause.Config, "%w", err)
	}
	if yaml, err = withMirrors(yaml, s.seed.UserData.CVMAgent.Mirrors); err != nil {
		return cause.Wrap(cause.EarlyFailed, err)
	}
	return cause.Wrap(cause.EarlyFailed, writeHandover(handover, s.seed.Initdata, yaml, clean))
}

// withMirrors adds the seed's choice to the agent's configuration, which must
// not have one of its own. JSON is YAML of one reading.
func withMirrors(yaml []byte, mirrors map[string][]string) ([]byte, error) {
	if len(mirrors) == 0 {
		return yaml, nil
	}
	text, err := json.Marshal(mirrors)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(bytes.TrimRight(yaml, "\n"), "\nmirrors: %s\n", text), nil
}

func writeHandover(dir string, initdata, agent []byte, clean seed.Files) error {
	files := map[string][]byte{"initdata.toml": initdata, "agent.yaml": agent}
	for name, data := range clean {
		files[filepath.Join("seed", name)] = data
	}
	if err := os.MkdirAll(filepath.Join(dir, "seed"), 0o755); err != nil {
		return err
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// findSeeds returns the disks that are a seed, sorted.
func findSeeds(s disk.System) ([]string, error) {
	disks, err := s.Disks()
	if err != nil {
		return nil, cause.Wrap(cause.EarlyFailed, err)
	}
	var out []string
	for _, node := range disks {
		f, err := os.Open(node)
		if err != nil {
			continue // no medium
		}
		if seed.IsSeed(f) {
			out = append(out, node)
		}
		_ = f.Close()
	}
	return out, nil
}

// poll asks until there is an answer or the time is up; that it is up is for
// the caller to see.
func poll(ctx context.Context, most time.Duration, done func() (bool, error)) error {
	until := time.Now().Add(most)
	for {
		ok, err := done()
		if ok || err != nil || time.Now().After(until) {
			return err
		}
		select {
		case <-ctx.Done():
			return cause.Wrap(cause.EarlyFailed, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Init is process 1. It does not return.
func Init(version string) {
	start := time.Now()
	s := &stage{}
	var report []took
	err := func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = cause.New(cause.Internal, "panic: %v", p)
			}
		}()
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		if report, err = s.run(ctx, steps); err != nil {
			return err
		}
		variant := ""
		if s.config.Debug {
			variant = " DEBUG VARIANT"
		}
		say(fmt.Sprintf("%s: %s, %s, early stage %d ms (%s)%s", version, s.launch.Platform(), s.bound, time.Since(start).Milliseconds(), inShort(report), variant))
		if text, err := json.Marshal(report); err == nil {
			_ = os.WriteFile(filepath.Join(handover, "early-times.json"), append(text, '\n'), 0o644)
		}
		return cause.Wrap(cause.EarlyFailed, switchRoot())
	}()
	refuse(s.config, err)
}

// refuse ends the boot.
func refuse(c *Config, err error) {
	say("refused: " + err.Error())
	time.Sleep(c.wait())
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_HALT)
	select {} // a machine that can do neither stays as it is
}

// say writes one line to the console. Standard output need not be open: the
// kernel found no /dev/console in the initrd.
func say(text string) {
	line := "cvm-early: " + bounded.OneLine(text) + "\n"
	f, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		fmt.Print(line)
		return
	}
	defer f.Close()
	_, _ = f.WriteString(line)
	_ = unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1) // until it is out
}
