package measure

import (
	"crypto/sha512"
	"encoding/binary"
)

// The page types of SNP_LAUNCH_UPDATE (SEV-SNP ABI 1.58, table 67).
const (
	pageNormal     = 1
	pageVMSA       = 2
	pageZero       = 3
	pageUnmeasured = 4
	pageSecrets    = 5
	pageCPUID      = 6
)

// vmsaGPA is where a VMSA counts as being: KVM gives it address -1, of which 48
// bits, page-aligned, are left (virtee/sev-snp-measure, gctx.py).
const vmsaGPA = 0xfffffffff000

// gctx is the launch digest of SEV-SNP while pages are added: LD of the guest
// context (SEV-SNP ABI 1.58, section 8.17.2).
type gctx struct{ ld [48]byte }

// update hashes one PAGE_INFO structure (table 67): the digest so far, the
// page's, length, type, IMI, permissions of VMPL 3 to 1, and the address. QEMU,
// EC2 and GCE give the lower VMPLs no permission and import no initial image.
func (g *gctx) update(kind byte, gpa uint64, contents [48]byte) {
	var info [0x70]byte
	copy(info[0:], g.ld[:])
	copy(info[48:], contents[:])
	binary.LittleEndian.PutUint16(info[96:], uint16(len(info)))
	info[98] = kind
	binary.LittleEndian.PutUint64(info[104:], gpa)
	g.ld = sha512.Sum384(info[:])
}

// normal adds data, whole pages, from an address on.
func (g *gctx) normal(gpa uint64, data []byte) {
	for ; len(data) >= page; gpa, data = gpa+page, data[page:] {
		g.update(pageNormal, gpa, sha512.Sum384(data[:page]))
	}
}

// empty adds pages whose contents do not count: all but normal and VMSA.
func (g *gctx) empty(kind byte, gpa, size uint64) {
	for end := gpa + size; gpa < end; gpa += page {
		g.update(kind, gpa, [48]byte{})
	}
}

func (g *gctx) vmsa(p *[page]byte) { g.update(pageVMSA, vmsaGPA, sha512.Sum384(p[:])) }
