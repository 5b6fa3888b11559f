package measure

import "crypto/sha512"

// SNPConfig is an SEV-SNP launch.
type SNPConfig struct {
	Firmware []byte // OVMF; with FirmwareDigest its end alone is enough
	// FirmwareDigest stands for the launch digest after the firmware's pages:
	// Firmware is then read for its metadata only.
	FirmwareDigest *[48]byte
	Direct         *DirectBoot // measured direct boot; nil without
	VCPUs          int
	VCPUSignature  uint32 // of QEMU's vCPUs, see VCPUSignature
	Features       uint64 // SEV_FEATURES of the VMSA; bit 0, SNP active, must be set
	VMM            VMM
}

// DirectBoot is what QEMU is given with -kernel, -initrd and -append. Kernel and
// initrd may be empty files.
type DirectBoot struct {
	Kernel, Initrd []byte
	Cmdline        string
}

const maxVCPUs = 4096

// SNPAssumptions is what a guest with the predicted digest is trusted on beyond
// it, with or without measured direct boot.
func SNPAssumptions(direct bool) []string {
	list := []string{
		"ACPI tables: they are the host's, no digest has them, and their AML runs in the kernel with access to all of the guest's memory before /init does; the digest and HOST_DATA stay right. A kernel that confines AML, or a vTPM inside the guest that measures the tables (SVSM), is not checked for",
	}
	if direct {
		return append(list, "firmware: OVMF's AmdSev package with edk2 pull request 5769; an older one goes on with a kernel, initrd or command line whose hash is wrong, under the same digest")
	}
	return append(list, "no kernel hashes: whatever the firmware boots is not in the digest")
}

// SNP is the launch digest, MEASUREMENT of the report: the firmware's pages, the
// sections in the order of its metadata, then one VMSA for each vCPU (QEMU,
// target/i386/sev.c; SEV-SNP ABI 1.58, sections 8.17 and 8.18). EC2 adds the
// CPUID page after all others, GCE does not measure the firmware's own memory
// (virtee/sev-snp-measure, guest.py).
func SNP(c SNPConfig) (digest [48]byte, err error) {
	if c.VCPUs < 1 || c.VCPUs > maxVCPUs {
		return digest, bad("%d vCPUs, expected 1 to %d", c.VCPUs, maxVCPUs)
	}
	if c.Features&1 == 0 {
		return digest, bad("guest features %#x: bit 0, SNP active, is not set", c.Features)
	}
	fw, err := parseSEV(c.Firmware)
	if err != nil {
		return digest, err
	}
	var g gctx
	if c.FirmwareDigest != nil {
		g.ld = *c.FirmwareDigest
	} else if g.ld, err = SNPFirmware(c.Firmware); err != nil {
		return digest, err
	}
	if err := g.sections(fw, c.Direct, c.VMM); err != nil {
		return digest, err
	}
	for i := range c.VCPUs {
		eip := uint32(bspEIP)
		if i > 0 {
			eip = fw.resetEIP
		}
		p, err := vmsaPage(c.VMM, eip, c.Features, c.VCPUSignature)
		if err != nil {
			return digest, err
		}
		g.vmsa(p)
	}
	return g.ld, nil
}

// SNPFirmware is the launch digest after the firmware's own pages, which end at
// 4 GiB.
func SNPFirmware(fw []byte) ([sha512.Size384]byte, error) {
	if len(fw) == 0 || len(fw)%page != 0 || len(fw) > MaxFirmware {
		return [48]byte{}, bad("firmware: %d bytes, expected whole pages, at most %d bytes", len(fw), MaxFirmware)
	}
	var g gctx
	g.normal(1<<32-uint64(len(fw)), fw)
	return g.ld, nil
}

func (g *gctx) sections(fw *sevFirmware, direct *DirectBoot, vmm VMM) error {
	if direct != nil && (!fw.has(sevKernelHashes) || fw.hashes == 0) {
		return bad("firmware: no place for kernel hashes: an OVMF for measured direct boot (AmdSevX64) has one")
	}
	for _, s := range fw.sections {
		switch s.kind {
		case sevSecMem:
			if vmm == GCE {
				g.empty(pageUnmeasured, s.gpa, s.size)
			} else {
				g.empty(pageZero, s.gpa, s.size)
			}
		case sevSecrets, sevCPUID:
			if s.size != page {
				return bad("firmware: SEV section of type %d has %#x bytes, expected a page", s.kind, s.size)
			}
			if s.kind == sevSecrets {
				g.empty(pageSecrets, s.gpa, page)
			} else if vmm != EC2 {
				g.empty(pageCPUID, s.gpa, page)
			}
		case sevSVSMCAA:
			g.empty(pageZero, s.gpa, s.size)
		case sevKernelHashes:
			if direct == nil {
				g.empty(pageZero, s.gpa, s.size)
				continue
			}
			if s.size != page || uint64(fw.hashes)&^(page-1) != s.gpa {
				return bad("firmware: the SEV hashes table at %#x is not in its section %#x", fw.hashes, s.gpa)
			}
			p, err := hashesPage(fw.hashes, direct.Kernel, direct.Initrd, direct.Cmdline)
			if err != nil {
				return err
			}
			g.normal(s.gpa, p)
		default:
			return bad("firmware: SEV section type %#x is not known", s.kind)
		}
	}
	if vmm == EC2 {
		for _, s := range fw.sections {
			if s.kind == sevCPUID {
				g.empty(pageCPUID, s.gpa, page)
			}
		}
	}
	return nil
}
