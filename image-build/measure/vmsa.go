package measure

import "encoding/binary"

// VMM is who makes the initial register state.
type VMM string

// The VMMs that are known.
const (
	QEMU VMM = "qemu"
	EC2  VMM = "ec2"
	GCE  VMM = "gce"
)

// bspEIP is the x86 reset vector, where the first vCPU starts.
const bspEIP = 0xfffffff0

// vmsaPage is the initial save area of a vCPU: AMD APM volume 2, table B-4
// (offsets), with the values that KVM and the VMM set before
// KVM_SEV_SNP_LAUNCH_FINISH (virtee/sev-snp-measure, vmsa.py, documents them for
// QEMU, EC2 and GCE).
func vmsaPage(vmm VMM, eip uint32, features uint64, signature uint32) (*[page]byte, error) {
	type state struct {
		cs, ss, tr uint16
		rdx, pat   uint64
		mxcsr      uint32
		fcw        uint16
	}
	const pat = 0x0007040600070406 // PA0 to PA7 at reset, APM volume 2, 7.8.1
	var s state
	switch vmm {
	case QEMU:
		s = state{0x9b, 0x93, 0x8b, uint64(signature), pat, 0x1f80, 0x37f}
	case EC2:
		s = state{0x9b, 0x92, 0x83, 0, pat, 0, 0}
		if eip == bspEIP {
			s.cs = 0x9a
		}
	case GCE:
		s = state{0x9b, 0x93, 0x8b, 0x600, 0x00070106, 0, 0}
	default:
		return nil, bad("VMM %q is not known, expected qemu, ec2 or gce", vmm)
	}
	p := new([page]byte)
	u16 := func(off int, v uint16) { binary.LittleEndian.PutUint16(p[off:], v) }
	u32 := func(off int, v uint32) { binary.LittleEndian.PutUint32(p[off:], v) }
	u64 := func(off int, v uint64) { binary.LittleEndian.PutUint64(p[off:], v) }
	segment := func(off int, selector, attributes uint16, limit uint32, base uint64) {
		u16(off, selector)
		u16(off+2, attributes)
		u32(off+4, limit)
		u64(off+8, base)
	}
	segment(0x00, 0, 0x93, 0xffff, 0) // ES
	segment(0x10, 0xf000, s.cs, 0xffff, uint64(eip&0xffff0000))
	segment(0x20, 0, s.ss, 0xffff, 0)
	segment(0x30, 0, 0x93, 0xffff, 0) // DS
	segment(0x40, 0, 0x93, 0xffff, 0) // FS
	segment(0x50, 0, 0x93, 0xffff, 0) // GS
	segment(0x60, 0, 0, 0xffff, 0)    // GDTR
	segment(0x70, 0, 0x82, 0xffff, 0) // LDTR
	segment(0x80, 0, 0, 0xffff, 0)    // IDTR
	segment(0x90, 0, s.tr, 0xffff, 0)
	u64(0xd0, 0x1000)      // EFER.SVME, set by KVM
	u64(0x148, 0x40)       // CR4.MCE, set by KVM
	u64(0x158, 0x10)       // CR0.ET
	u64(0x160, 0x400)      // DR7
	u64(0x168, 0xffff0ff0) // DR6
	u64(0x170, 0x2)        // RFLAGS
	u64(0x178, uint64(eip&0xffff))
	u64(0x268, s.pat)
	u64(0x310, s.rdx) // QEMU: the CPU's signature, as after a reset
	u64(0x3b0, features)
	u64(0x3e8, 0x1) // XCR0
	u32(0x408, s.mxcsr)
	u16(0x410, s.fcw)
	return p, nil
}
