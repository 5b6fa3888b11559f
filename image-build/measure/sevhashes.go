package measure

import (
	"crypto/sha256"
	"encoding/binary"
)

// The SEV hashes table that QEMU writes with kernel-hashes=on (QEMU,
// target/i386/sev.c, sev_add_kernel_loader_hashes): a header and three entries,
// each a GUID, its own length and a SHA-256, padded to 16 bytes.
var (
	guidHashesHeader = guid("9438d606-4f22-4cc9-b479-a793d411fd21")
	guidHashCmdline  = guid("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
	guidHashInitrd   = guid("44baf731-3a2f-4bd7-9af1-41e29169781d")
	guidHashKernel   = guid("4de79437-abd2-427f-b835-d5b172d2045b")
)

// hashesPage is the page that holds the table at its address. The command line
// counts with its NUL; an initrd that is not given counts as an empty one.
func hashesPage(address uint32, kernel, initrd []byte, cmdline string) ([]byte, error) {
	const entry = 16 + 2 + 32
	const size = 16 + 2 + 3*entry
	const padded = (size + 15) &^ 15
	offset := int(address % page)
	if offset+padded > page {
		return nil, bad("firmware: the SEV hashes table at %#x crosses its page", address)
	}
	out := make([]byte, page)
	t := out[offset:]
	copy(t, guidHashesHeader[:])
	binary.LittleEndian.PutUint16(t[16:], size)
	for i, e := range []struct {
		id     [16]byte
		digest [32]byte
	}{
		{guidHashCmdline, sha256.Sum256([]byte(cmdline + "\x00"))},
		{guidHashInitrd, sha256.Sum256(initrd)},
		{guidHashKernel, sha256.Sum256(kernel)},
	} {
		at := t[18+i*entry:]
		copy(at, e.id[:])
		binary.LittleEndian.PutUint16(at[16:], entry)
		copy(at[18:], e.digest[:])
	}
	return out, nil
}
