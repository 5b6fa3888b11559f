package measure

import "io"

// The one file that firmware starts from a disk without boot entries (UEFI 2.10,
// section 3.5.1.1), by the short names of its path.
const (
	shortEFI  = "EFI        "
	shortBoot = "BOOT       "
	shortUKI  = "BOOTX64 EFI"
	shortLdr  = "LOADER     "
)

// UKIFromDisk reads /EFI/BOOT/BOOTX64.EFI from the EFI system partition of a
// disk image. What lies where systemd-stub looks for more (beside the UKI, or in
// /loader: credentials, extensions, add-ons) would be measured into PCR 12 and
// 13: it is refused.
func UKIFromDisk(disk io.ReaderAt, size int64) ([]byte, error) {
	esp, err := findESP(disk, size)
	if err != nil {
		return nil, err
	}
	f, err := openFAT(esp)
	if err != nil {
		return nil, err
	}
	at := uint32(0)
	for _, name := range []string{shortEFI, shortBoot} {
		list, err := f.list(at)
		if err != nil {
			return nil, err
		}
		var next *file
		for _, e := range list {
			switch {
			case e.name == shortLdr && at == 0:
				return nil, bad("ESP: /loader, from which the stub takes what the image does not name")
			case e.name == name && e.directory && e.first != 0:
				next = &e
			}
		}
		if next == nil {
			return nil, bad("ESP: no directory %q", name)
		}
		at = next.first
	}
	list, err := f.list(at)
	if err != nil {
		return nil, err
	}
	if len(list) != 1 || list[0].name != shortUKI || list[0].directory {
		return nil, bad("ESP: /EFI/BOOT holds %d entries, expected BOOTX64.EFI alone", len(list))
	}
	return f.read(list[0], MaxKernel)
}
