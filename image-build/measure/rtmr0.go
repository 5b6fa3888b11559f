package measure

import (
	"crypto/sha512"
	"encoding/binary"
)

// ACPI are the tables that QEMU makes, as a guest of the same machine reads them
// from /sys/firmware/qemu_fw_cfg/by_name/etc/{acpi/tables,acpi/rsdp,table-loader}/raw.
type ACPI struct{ Tables, RSDP, Loader []byte }

var (
	guidGlobalVariable = guid("8be4df61-93ca-11d2-aa0d-00e098032b8c")
	guidImageSecurity  = guid("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
	guidUiAppFile      = guid("462caa21-7614-4503-836e-8ab6f4662331")
	guidOvmfDXEFV      = guid("7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1")
)

// rtmr0 holds the firmware's configuration (edk2, OvmfPkg/Tcg/TdTcg2Dxe and
// OvmfPkg/Library/PeilessStartupLib): hand-off blocks and variable store,
// Secure Boot's variables, which are not there, the separator, QEMU's ACPI data
// in the order of the loader's commands, and the boot options of a firmware that
// has none but its own menu.
func (t *tdvf) rtmr0(memory uint64, acpi ACPI, sep Separator) ([]byte, error) {
	for name, b := range map[string][]byte{"tables": acpi.Tables, "RSDP": acpi.RSDP, "table loader": acpi.Loader} {
		if len(b) == 0 || len(b) > MaxACPI {
			return nil, bad("ACPI %s of %d bytes, expected 1 to %d", name, len(b), MaxACPI)
		}
	}
	hob, err := t.tdHOB(memory)
	if err != nil {
		return nil, err
	}
	cfv, err := t.one(tdvfCFV, "configuration volume")
	if err != nil {
		return nil, err
	}
	r := newRegister(sha512.New384)
	r.event(hob)
	r.event(cfv.data)
	for _, e := range secureBootVariables() {
		r.event(e)
	}
	r.event(evSeparator)
	r.event(acpi.Loader)
	r.event(acpi.RSDP)
	r.event(acpi.Tables)
	r.event(bootOrder)
	r.event(bootMenu())
	if sep == SeparatorRTMR0 {
		r.event(evSeparator)
	}
	return r.value, nil
}

// secureBootVariables are the events of variables that are not set: the whole
// UEFI_VARIABLE_DATA is hashed (TCG PC Client Platform Firmware Profile 1.06,
// section 10.2.6).
func secureBootVariables() [][]byte {
	var out [][]byte
	for _, v := range []struct {
		vendor [16]byte
		name   string
	}{
		{guidGlobalVariable, "SecureBoot"}, {guidGlobalVariable, "PK"}, {guidGlobalVariable, "KEK"},
		{guidImageSecurity, "db"}, {guidImageSecurity, "dbx"},
	} {
		e := binary.LittleEndian.AppendUint64(v.vendor[:], uint64(len(v.name)))
		e = binary.LittleEndian.AppendUint64(e, 0)
		out = append(out, append(e, utf16le(v.name)...))
	}
	return out
}

// bootOrder is the variable: option 0 alone.
var bootOrder = []byte{0, 0}

// bootMenu is Boot0000, an EFI_LOAD_OPTION (UEFI 2.10, section 3.1.3): hidden,
// active, category "application", the firmware's own UiApp, by volume and file.
func bootMenu() []byte {
	const name = "UiApp"
	node := func(subtype byte, id [16]byte) []byte { return append([]byte{4, subtype, 20, 0}, id[:]...) }
	path := append(node(7, guidOvmfDXEFV), node(6, guidUiAppFile)...)
	path = append(path, 0x7f, 0xff, 4, 0)
	out := binary.LittleEndian.AppendUint32(nil, 0x109)
	out = binary.LittleEndian.AppendUint16(out, uint16(len(path)))
	out = append(out, utf16le(name)...)
	return append(append(out, 0, 0), path...)
}
