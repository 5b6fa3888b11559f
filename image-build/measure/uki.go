package measure

import (
	"slices"
	"strings"
)

// ukiSections are the sections of a UKI that systemd-stub measures into PCR 11,
// in its order (systemd 257, src/fundamental/uki.c, unified_sections; UAPI.5
// "Unified Kernel Image"). .pcrsig is passed on and not measured.
var ukiSections = []string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey"}

const ukiPCRSig = ".pcrsig"

// What the stub chooses at boot, so that no prediction holds.
var ukiChosen = []string{".profile", ".dtbauto", ".hwids", ".efifw"}

// UKI is a unified kernel image, read and checked.
type UKI struct {
	image    *image
	kernel   *image
	sections map[string][]byte
}

// ParseUKI reads a UKI of at most MaxKernel bytes.
func ParseUKI(data []byte) (*UKI, error) {
	img, err := parsePE(data)
	if err != nil {
		return nil, err
	}
	u := &UKI{image: img, sections: map[string][]byte{}}
	for _, s := range img.sections {
		if slices.Contains(ukiChosen, s.Name) {
			return nil, bad("UKI: a section %s, of which the stub chooses at boot", s.Name)
		}
		if s.Name != ukiPCRSig && !slices.Contains(ukiSections, s.Name) || s.VirtualSize == 0 {
			continue
		}
		if _, twice := u.sections[s.Name]; twice {
			return nil, bad("UKI: section %s is there twice", s.Name)
		}
		if u.sections[s.Name], err = img.section(s); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{".linux", ".cmdline", ".initrd"} {
		if len(u.sections[name]) == 0 {
			return nil, bad("UKI: no section %s", name)
		}
	}
	if u.kernel, err = parsePE(u.sections[".linux"]); err != nil {
		return nil, bad("UKI: .linux: %w", err)
	}
	return u, nil
}

// Cmdline is the command line that the kernel is given: the section up to its
// NUL, control characters as spaces, without those at both ends (systemd 257,
// src/boot/util.c, mangle_stub_cmdline).
func (u *UKI) Cmdline() (string, error) {
	text, _, _ := strings.Cut(string(u.sections[".cmdline"]), "\x00")
	if len(text) > MaxCmdline {
		return "", bad("UKI: a command line of %d bytes, at most %d are accepted", len(text), MaxCmdline)
	}
	for _, r := range text {
		if r > 0x7e {
			return "", bad("UKI: the command line is not ASCII")
		}
	}
	text = strings.Map(func(r rune) rune {
		if r <= 0x20 {
			return ' '
		}
		return r
	}, text)
	text = strings.Trim(text, " ")
	if text == "" {
		return "", bad("UKI: the command line is empty")
	}
	return text, nil
}

// initrd is what the kernel gets: microcode, the initrd, then the archives that
// the stub makes, each padded to four bytes (systemd 257, src/boot/stub.c,
// generate_embedded_initrds; src/boot/initrd.c, combine_initrds).
func (u *UKI) initrd() []byte {
	var parts [][]byte
	for _, name := range []string{".ucode", ".initrd"} {
		if s, ok := u.sections[name]; ok {
			parts = append(parts, s)
		}
	}
	for _, e := range []struct{ section, file string }{
		{ukiPCRSig, "tpm2-pcr-signature.json"},
		{".pcrpkey", "tpm2-pcr-public-key.pem"},
		{".osrel", "os-release"},
	} {
		if s, ok := u.sections[e.section]; ok {
			parts = append(parts, stubCPIO(e.file, s))
		}
	}
	if len(parts) == 1 {
		return parts[0] // passed on as it is, without padding
	}
	var out []byte
	for _, p := range parts {
		out = append(out, p...)
		out = append(out, make([]byte, -len(out)&3)...)
	}
	return out
}
