package measure

import (
	"maps"
	"slices"
	"strings"
)

// family, model and stepping of QEMU's built-in CPU models (QEMU,
// target/i386/cpu.c, builtin_x86_defs). Versions of a model share them.
var vcpuTypes = map[string][3]uint32{
	"EPYC": {23, 1, 2}, "EPYC-v1": {23, 1, 2}, "EPYC-v2": {23, 1, 2}, "EPYC-IBPB": {23, 1, 2}, "EPYC-v3": {23, 1, 2}, "EPYC-v4": {23, 1, 2},
	"EPYC-Rome": {23, 49, 0}, "EPYC-Rome-v1": {23, 49, 0}, "EPYC-Rome-v2": {23, 49, 0}, "EPYC-Rome-v3": {23, 49, 0}, "EPYC-Rome-v4": {23, 49, 0},
	"EPYC-Milan": {25, 1, 1}, "EPYC-Milan-v1": {25, 1, 1}, "EPYC-Milan-v2": {25, 1, 1},
	"EPYC-Genoa": {25, 17, 0}, "EPYC-Genoa-v1": {25, 17, 0},
	"EPYC-Turin": {26, 0, 0},
}

// VCPUTypes are the names that VCPUSignature knows, sorted.
func VCPUTypes() []string { return slices.Sorted(maps.Keys(vcpuTypes)) }

// VCPUSignature is CPUID Fn0000_0001_EAX of a QEMU CPU model (AMD CPUID
// Specification 25481).
func VCPUSignature(name string) (uint32, error) {
	t, ok := vcpuTypes[name]
	if !ok {
		return 0, bad("vCPU type %q is not known, expected one of %s", name, strings.Join(VCPUTypes(), ", "))
	}
	family, model, stepping := t[0], t[1], t[2]
	low, high := family, uint32(0)
	if family > 0xf {
		low, high = 0xf, family-0xf
	}
	return high<<20 | model>>4<<16 | low<<8 | model&0xf<<4 | stepping, nil
}
