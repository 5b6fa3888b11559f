package measure

import (
	"crypto/sha512"
	"encoding/binary"
)

// mrtd is the measurement of the TD's first memory (Intel TDX Module 1.5 Base
// Architecture Specification, section 12.2.1): for each page of each section
// TDH.MEM.PAGE.ADD's record, then, where the section says so, TDH.MR.EXTEND's
// record and 256 bytes, sixteen times. QEMU adds and extends page by page, in the
// order of the metadata (QEMU, target/i386/kvm/tdx.c; KVM_TDX_INIT_MEM_REGION).
func (t *tdvf) mrtd() [sha512.Size384]byte {
	const chunk = 256
	h := sha512.New384()
	record := func(name string, gpa uint64) {
		var r [128]byte
		copy(r[:], name)
		binary.LittleEndian.PutUint64(r[16:], gpa)
		h.Write(r[:])
	}
	for _, s := range t.sections {
		if s.attributes&tdvfPageAug != 0 {
			continue
		}
		for off := uint64(0); off < s.size; off += page {
			record("MEM.PAGE.ADD", s.address+off)
			if s.attributes&tdvfMRExtend == 0 {
				continue
			}
			for c := off; c < off+page; c += chunk {
				record("MR.EXTEND", s.address+c)
				h.Write(s.data[c : c+chunk])
			}
		}
	}
	return [sha512.Size384]byte(h.Sum(nil))
}
