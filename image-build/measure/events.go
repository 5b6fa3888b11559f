package measure

import (
	"encoding/binary"
	"hash"
	"unicode/utf16"
)

// register is a measurement register while it is extended: new is H(old ||
// H(event)).
type register struct {
	new   func() hash.Hash
	value []byte
}

func newRegister(new func() hash.Hash) *register {
	return &register{new, make([]byte, new().Size())}
}

// event extends by the digest of data.
func (r *register) event(data []byte) {
	h := r.new()
	h.Write(data)
	r.digest(h.Sum(nil))
}

// digest extends by a digest.
func (r *register) digest(d []byte) {
	h := r.new()
	h.Write(r.value)
	h.Write(d)
	r.value = h.Sum(nil)
}

// image extends by an image's Authenticode hash.
func (r *register) image(i *image) error {
	d, err := i.authenticode(r.new())
	if err == nil {
		r.digest(d)
	}
	return err
}

// The event data that firmware and stub write out in words (TCG PC Client
// Platform Firmware Profile 1.06, section 10.4.4; 3.3.4.2 for the separator).
const (
	evCallingApplication = "Calling EFI Application from Boot Option"
	evExitBoot           = "Exit Boot Services Invocation"
	evExitBootDone       = "Exit Boot Services Returned with Success"
)

var evSeparator = make([]byte, 4)

// loadOptions is a command line as the kernel's EFI stub measures it: UTF-16LE
// with its NUL (Linux, drivers/firmware/efi/libstub/efi-stub-helper.c,
// efi_convert_cmdline and efi_measure_tagged_event).
func loadOptions(cmdline string) []byte { return append(utf16le(cmdline), 0, 0) }

func utf16le(s string) []byte {
	var out []byte
	for _, u := range utf16.Encode([]rune(s)) {
		out = binary.LittleEndian.AppendUint16(out, u)
	}
	return out
}
