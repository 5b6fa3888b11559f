package measure

import (
	"encoding/binary"
	"slices"
)

// Memory of QEMU's q35 machine: below 4 GiB there are 2 GiB at most, or all of
// it when it is less than 2.75 GiB (QEMU, hw/i386/pc_q35.c).
const (
	q35LowAll = 0xb0000000
	q35Low    = 0x80000000
	high      = 1 << 32

	maxMemory = 1 << 46
)

// tdHOB is the hand-off block list that QEMU gives the firmware, as it measures
// it (QEMU, hw/i386/tdvf-hob.c; Platform Initialization 1.8, volume 3): the
// handoff table, then one resource descriptor for each range of memory, accepted
// or not, in the order of addresses. The list's last entry is not measured
// (edk2, OvmfPkg/Library/SecTpmMeasurementLib or PeilessStartupLib).
func (t *tdvf) tdHOB(memory uint64) ([]byte, error) {
	if memory < 64<<20 || memory%page != 0 || memory > maxMemory {
		return nil, bad("memory of %d bytes, expected whole pages, 64 MiB to 64 TiB", memory)
	}
	hob, err := t.one(tdvfHOB, "TD HOB")
	if err != nil {
		return nil, err
	}
	var accepted []tdvfSection
	for _, s := range t.sections {
		if s.kind == tdvfHOB || s.kind == tdvfTempMem {
			accepted = append(accepted, s)
		}
	}
	slices.SortFunc(accepted, func(a, b tdvfSection) int { return int(int64(a.address) - int64(b.address)) })

	const ( // EFI_RESOURCE_SYSTEM_MEMORY, EFI_RESOURCE_MEMORY_UNACCEPTED
		systemMemory = 0
		unaccepted   = 7
		attributes   = 7 // present, initialized, tested
	)
	le := binary.LittleEndian
	list := make([]byte, 56)
	resource := func(kind uint32, from, to uint64) {
		var d [48]byte
		le.PutUint16(d[0:], 3)
		le.PutUint16(d[2:], uint16(len(d)))
		le.PutUint32(d[24:], kind)
		le.PutUint32(d[28:], attributes)
		le.PutUint64(d[32:], from)
		le.PutUint64(d[40:], to-from)
		list = append(list, d[:]...)
	}
	low := memory
	if memory >= q35LowAll {
		low = q35Low
	}
	at := uint64(0)
	for _, s := range accepted {
		if s.address < at || s.address+s.size > low {
			return nil, bad("firmware: TDX section %#x overlaps another, or lies above the memory", s.address)
		}
		if s.address > at {
			resource(unaccepted, at, s.address)
		}
		resource(systemMemory, s.address, s.address+s.size)
		at = s.address + s.size
	}
	if at < low {
		resource(unaccepted, at, low)
	}
	if memory > low {
		resource(unaccepted, high, high+memory-low)
	}
	le.PutUint16(list[0:], 1) // EFI_HOB_TYPE_HANDOFF
	le.PutUint16(list[2:], 56)
	le.PutUint32(list[8:], 9) // version
	le.PutUint64(list[48:], hob.address+uint64(len(list))+8)
	return list, nil
}
