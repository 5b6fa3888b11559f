package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/kdomanski/iso9660"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// refusals are boots with one thing wrong each. All must end in power off, with
// the cause on the console, before anything is asked of the broker.
type refusals struct{ *scene }

// refused is a line of the early stage.
func refused(code, text string) *regexp.Regexp {
	return regexp.MustCompile(`cvm-early: refused: ` + code + `: [^\n]*` + text + `[^\n]*\n`)
}

func (r *refusals) checks() []check {
	boot := func(name, text string, want *regexp.Regexp, prepare func(context.Context, *rig.MachineOptions) error) check {
		return check{name, text, func(ctx context.Context) error { return r.boot(ctx, name, want, prepare) }}
	}
	return []check{
		boot("cmdline", "load options in place of the UKI's command line", refused("cmdline-changed", ""),
			func(ctx context.Context, o *rig.MachineOptions) error {
				line, err := os.ReadFile(filepath.Join(r.image, "cmdline"))
				o.Kernel, o.Append = r.uki(), string(line)+" init=/bin/sh"
				return err
			}),
		boot("smbios-cmdline", "an SMBIOS string that adds to the command line", refused("cmdline-changed", ""),
			func(_ context.Context, o *rig.MachineOptions) error {
				o.SMBIOS = []string{"io.systemd.stub.kernel-cmdline-extra=systemd.unit=rescue.target"}
				return nil
			}),
		boot("smbios-credential", "an SMBIOS string that is a credential", refused("smbios-refused", "io.systemd.credential"),
			func(_ context.Context, o *rig.MachineOptions) error {
				o.SMBIOS = []string{"io.systemd.credential:tmpfiles.extra=f /run/owned 0644 root root - host"}
				return nil
			}),
		boot("runcmd", "a seed that runs code", refused("seed-refused", "runcmd"),
			func(ctx context.Context, o *rig.MachineOptions) error {
				return r.editedSeed(o, func(userData string) string { return userData + "\nruncmd: [\"touch /run/owned\"]\n" })
			}),
		boot("second-seed", "two seeds", refused("seed-ambiguous", ""),
			func(_ context.Context, o *rig.MachineOptions) error {
				o.Seeds = append(o.Seeds, r.seed)
				return nil
			}),
		boot("no-seed", "no seed", refused("seed-missing", ""),
			func(_ context.Context, o *rig.MachineOptions) error {
				o.Seeds = nil
				return nil
			}),
		boot("other-signer", "a policy that somebody else signed", refused("policy-signature-invalid", ""), r.otherSigner),
		boot("below-floor", "a policy of a version below the image's floor", refused("policy-version-below-floor", ""), r.belowFloor),
		boot("root-bit", "one flipped bit in the root", regexp.MustCompile(`refused: verity-failed: .*|Kernel panic - not syncing: dm-verity.*`), r.flippedBit),
		boot("root-error", "a disk that reads no more, here and there, once the root is mounted", regexp.MustCompile(`Kernel panic - not syncing: dm-verity device has I/O error`), r.brokenSectors),
	}
}

func (r *refusals) boot(ctx context.Context, name string, want *regexp.Regexp, prepare func(context.Context, *rig.MachineOptions) error) error {
	tpm, err := r.NewTPM(ctx, "")
	if err != nil {
		return err
	}
	o := rig.MachineOptions{Name: name, Disk: r.disk(), Seeds: []string{r.seed}, TPM: tpm, Accel: r.accel, CPUs: 1, Memory: 1024}
	if err := prepare(ctx, &o); err != nil {
		return err
	}
	vm, err := r.StartMachine(ctx, o)
	if err != nil {
		return err
	}
	line, err := vm.WaitConsole(ctx, bootWithin, want)
	if err == nil {
		r.report.say("     %s", strings.TrimSpace(line))
		err = vm.WaitOff(ctx, offWithin)
	}
	vm.Kill()
	return err
}

// editedSeed is the good seed with other user-data.
func (r *refusals) editedSeed(o *rig.MachineOptions, edit func(string) string) error {
	f, err := os.Open(r.seed)
	if err != nil {
		return err
	}
	defer f.Close()
	volume, err := iso9660.OpenImage(f)
	if err != nil {
		return err
	}
	root, err := volume.RootDir()
	if err != nil {
		return err
	}
	files, err := root.GetChildren()
	if err != nil {
		return err
	}
	w, err := iso9660.NewWriter()
	if err != nil {
		return err
	}
	defer func() { _ = w.Cleanup() }()
	edited := false
	for _, file := range files {
		data, err := io.ReadAll(file.Reader())
		if err != nil {
			return err
		}
		if file.Name() == "user-data" {
			data, edited = []byte(edit(string(data))), true
		}
		if err := w.AddFile(bytes.NewReader(data), file.Name()); err != nil {
			return err
		}
	}
	if !edited {
		return errors.New("the seed has no user-data")
	}
	path := r.Path("edited.iso")
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	o.Seeds = []string{path}
	return errors.Join(w.WriteTo(out, "CIDATA"), out.Close())
}

// seedOf makes a seed of a signed policy by the product's own means.
func (r *refusals) seedOf(ctx context.Context, o *rig.MachineOptions, envelope string, keys ...*rig.Keys) error {
	initdata, err := r.Pack(ctx, envelope, keys...)
	if err != nil {
		return err
	}
	path := initdata + ".iso"
	o.Seeds = []string{path}
	return r.cvmctlSeed(ctx, initdata, path)
}

func (r *refusals) otherSigner(ctx context.Context, o *rig.MachineOptions) error {
	host, err := r.NewKeys(ctx, "host")
	if err != nil {
		return err
	}
	file := r.Path("policy", "hosts.yaml")
	if err := rig.Edit(r.policy(floor), file, nil); err != nil {
		return err
	}
	signed, err := r.SignPolicy(ctx, file, host)
	if err != nil {
		return err
	}
	return r.seedOf(ctx, o, signed, host)
}

func (r *refusals) belowFloor(ctx context.Context, o *rig.MachineOptions) error {
	file := r.Path("policy", "older.yaml")
	if err := rig.Edit(r.policy(floor), file,
		map[string]string{fmt.Sprintf("version: %d\n", floor): fmt.Sprintf("version: %d\n", floor-1)}); err != nil {
		return err
	}
	signed, err := r.SignPolicy(ctx, file)
	if err != nil {
		return err
	}
	return r.seedOf(ctx, o, signed)
}

// rootStart is how many bytes the root's super block has.
const rootStart = 96

// rootAt finds the root in the disk.
func (r *refusals) rootAt() (at, size int64, err error) {
	root, err := os.Open(filepath.Join(r.image, "root.squashfs"))
	if err != nil {
		return 0, 0, err
	}
	defer root.Close()
	info, err := root.Stat()
	if err != nil {
		return 0, 0, err
	}
	start := make([]byte, rootStart)
	if _, err := io.ReadFull(root, start); err != nil {
		return 0, 0, err
	}
	disk, err := os.Open(r.disk())
	if err != nil {
		return 0, 0, err
	}
	defer disk.Close()
	for there := make([]byte, len(start)); ; at += 4096 {
		if _, err := disk.ReadAt(there, at); err != nil {
			return 0, 0, fmt.Errorf("the disk does not hold the root: %w", err)
		}
		if bytes.Equal(there, start) {
			return at, info.Size(), nil
		}
	}
}

// flippedBit changes the super block of the root, which every mount reads.
func (r *refusals) flippedBit(ctx context.Context, o *rig.MachineOptions) error {
	at, _, err := r.rootAt()
	if err != nil {
		return err
	}
	path := r.Path("flipped.raw")
	if _, err := r.Run(ctx, nil, "cp", "--sparse=always", r.disk(), path); err != nil {
		return err
	}
	disk, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer disk.Close()
	const inode = 32 // of the root directory: its reference's first byte
	there := make([]byte, 1)
	if _, err := disk.ReadAt(there, at+inode); err != nil {
		return err
	}
	_, err = disk.WriteAt([]byte{there[0] ^ 1}, at+inode)
	o.Disk = path
	return err
}

// brokenSectors are some of the programs' and libraries'. The mount is left
// alone: it reads the super block and the tables at the end.
func (r *refusals) brokenSectors(_ context.Context, o *rig.MachineOptions) error {
	const step, tables = 4 << 20, 8 << 20
	at, size, err := r.rootAt()
	for offset := int64(2 * step); err == nil && offset < size-tables; offset += step {
		o.Broken = append(o.Broken, (at+offset)/512)
	}
	return err
}
