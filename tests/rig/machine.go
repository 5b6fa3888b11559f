package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// HostInGuest is where a machine's user network has this machine's loopback.
const HostInGuest = "10.0.2.2"

// ControlPort is the name of the agent's virtio-serial port.
const ControlPort = "org.cvm-agent.control"

// firmware is Debian's build of OVMF for 4 MiB of flash, without SMM.
const (
	firmwareCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	firmwareVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// MachineOptions is what a host gives a guest.
type MachineOptions struct {
	Name    string
	Disk    string   // GPT disk image, read only
	Broken  []int64  // its sectors of 512 bytes that cannot be read
	Seeds   []string // seed images, read only
	Scratch string   // a disk that the guest may write to
	TPM     *TPM     // powered on and off with the machine
	Forward uint16   // TCP port of the guest that is reachable on Machine.Port; zero is none
	Kernel  string   // UKI for a direct boot, in place of the disk's
	Append  string   // with Kernel: the load options
	SMBIOS  []string // strings of type 11
	Accel   string   // tcg or kvm, see Accelerator
	Memory  int      // MiB, default 2048
	CPUs    int      // default 2
}

// Machine is a QEMU machine with OVMF, a TPM, virtio disks and network, and the
// control port. It writes nothing to its disks but to the scratch disk.
type Machine struct {
	*Process
	Control string // unix socket: the host's end of the control port
	Serial  string // file: what the guest wrote to its first serial port
	Port    uint16 // on the loopback, forwarded to MachineOptions.Forward
	Started time.Time
}

// StartMachine powers a machine on. Close, or its own end, powers it off.
func (r *Rig) StartMachine(ctx context.Context, o MachineOptions) (*Machine, error) {
	name := "vm-" + o.Name
	dir := r.Path(r.name(name))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	vars, err := os.ReadFile(firmwareVars)
	if err != nil {
		return nil, fmt.Errorf("%w (run `sh tests/deps.sh vm`)", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "vars.fd"), vars, 0o600); err != nil {
		return nil, err
	}
	m := &Machine{Control: filepath.Join(dir, "control.sock"), Serial: r.Path("log", name+".serial")}
	argv := []string{"qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,smm=off", "-smp", fmt.Sprint(or(o.CPUs, 2)), "-m", fmt.Sprint(or(o.Memory, 2048)),
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + firmwareCode,
		"-drive", "if=pflash,unit=1,format=raw,file=" + filepath.Join(dir, "vars.fd"),
		"-serial", "file:" + m.Serial,
		"-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=control,server=on,wait=off,path=" + m.Control,
		"-device", "virtserialport,chardev=control,name=" + ControlPort}
	argv = append(argv, accelFlags(o.Accel)...)
	for i, file := range append([]string{o.Disk}, o.Seeds...) {
		source := "file=" + file
		if i == 0 && len(o.Broken) > 0 {
			source = "file.driver=blkdebug,file.image.driver=file,file.image.filename=" + file
			for n, sector := range o.Broken {
				source += fmt.Sprintf(",file.inject-error.%d.event=read_aio,file.inject-error.%d.errno=5,file.inject-error.%d.sector=%d", n, n, n, sector)
			}
		}
		argv = append(argv, "-drive", fmt.Sprintf("if=none,id=disk%d,format=raw,readonly=on,%s", i, source),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,bootindex=%d", i, i+1))
	}
	if o.Scratch != "" {
		argv = append(argv, "-drive", "if=none,id=scratch,format=raw,cache=unsafe,file="+o.Scratch, "-device", "virtio-blk-pci,drive=scratch")
	}
	if o.TPM != nil {
		control, err := o.TPM.PlugIn(ctx)
		if err != nil {
			return nil, err
		}
		argv = append(argv, "-chardev", "socket,id=tpm,path="+control, "-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm")
	}
	network := "user,id=net"
	if o.Forward != 0 {
		if m.Port, err = FreePort(); err != nil {
			return nil, err
		}
		network += fmt.Sprintf(",hostfwd=tcp:127.0.0.1:%d-:%d", m.Port, o.Forward)
	}
	argv = append(argv, "-netdev", network, "-device", "virtio-net-pci,netdev=net,romfile=")
	if o.Kernel != "" {
		argv = append(argv, "-kernel", o.Kernel)
		if o.Append != "" {
			argv = append(argv, "-append", o.Append)
		}
	}
	for _, s := range o.SMBIOS {
		argv = append(argv, "-smbios", "type=11,value="+strings.ReplaceAll(s, ",", ",,"))
	}
	m.Started = time.Now()
	m.Process, err = r.Start(name, nil, argv...)
	return m, err
}

func or(value, otherwise int) int {
	if value == 0 {
		return otherwise
	}
	return value
}

func accelFlags(accel string) []string {
	if accel == "kvm" {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	return []string{"-accel", "tcg,thread=multi", "-cpu", "max"}
}

// Accelerator is "kvm" if a machine boots with it here as far as its firmware,
// and "tcg" otherwise: that the device is there says nothing in a nested guest.
func (r *Rig) Accelerator(ctx context.Context) string {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return "tcg"
	}
	serial := r.Path("log", "vm-probe.serial")
	argv := append([]string{"qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,smm=off", "-m", "256",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + firmwareCode, "-serial", "file:" + serial}, accelFlags("kvm")...)
	probe, err := r.Start("vm-probe", nil, argv...)
	if err != nil {
		return "tcg"
	}
	defer probe.Kill()
	err = probe.ready(ctx, 20*time.Second, func() error {
		text, err := os.ReadFile(serial)
		if err == nil && !strings.Contains(string(text), "BdsDxe") {
			err = errors.New("the firmware says nothing")
		}
		return err
	})
	if err != nil {
		return "tcg"
	}
	return "kvm"
}

// escapes are what firmware does to a terminal.
var escapes = regexp.MustCompile(`\x1b\[[0-9;?=]*[a-zA-Z]|\r`)

// Console is what the guest has written to its serial port so far.
func (m *Machine) Console() string {
	data, _ := os.ReadFile(m.Serial) // not there before the first byte
	return escapes.ReplaceAllString(string(data), "")
}

// WaitConsole waits until the console holds a match of want, and returns it. It
// fails at once when the machine goes off without.
func (m *Machine) WaitConsole(ctx context.Context, within time.Duration, want *regexp.Regexp) (string, error) {
	var found string
	var off error
	err := Eventually(ctx, within, func() error {
		running := m.Running()
		if found = want.FindString(m.Console()); found != "" {
			return nil
		}
		err := fmt.Errorf("%s: the console has nothing like %q: %s", m.Name, want, tail(m.Console(), 3))
		if !running {
			off = fmt.Errorf("the machine is off, and %w: %s", err, tail(m.Output(), 2))
			return nil
		}
		return err
	})
	return found, errors.Join(off, err)
}

// WaitOff waits until the machine has powered itself off.
func (m *Machine) WaitOff(ctx context.Context, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	status, err := m.Wait(ctx)
	if err == nil && status != 0 {
		err = fmt.Errorf("%s ended with status %d: %s", m.Name, status, tail(m.Output(), 3))
	}
	return err
}
