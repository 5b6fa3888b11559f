package seed

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// What an ISO 9660 image (ECMA-119) can make us read.
const (
	isoSector      = 2048
	isoFirst       = 16       // the sector of the first volume descriptor, 6.2.1
	isoDescriptors = 32       // most volume descriptors
	isoMaxRoot     = 64 << 10 // bytes of the root directory

	flagDirectory   = 1 << 1 // file flags, 9.1.6
	flagAssociated  = 1 << 2
	flagMultiExtent = 1 << 7
)

// Labels are the volume labels by which NoCloud knows a seed.
var Labels = []string{"CIDATA", "cidata"}

// IsSeed says whether disk holds an ISO 9660 volume with one of the Labels.
// What cannot be read is no seed.
func IsSeed(disk io.ReaderAt) bool {
	d, err := primary(disk)
	if err != nil {
		return false
	}
	label := strings.TrimRight(string(d[40:72]), " \x00")
	return label == Labels[0] || label == Labels[1]
}

// ReadISO returns the files in the root directory of the seed on disk, by name.
// Each must be one of the seed's files and no longer than its limit. Nothing
// else of the format is followed: no directories, links, extents in several
// parts, Joliet names, nor continuations of Rock Ridge records.
func ReadISO(disk io.ReaderAt) (Files, error) {
	bad := func(format string, args ...any) (Files, error) {
		return nil, cause.New(cause.SeedMalformed, "seed disk: "+format, args...)
	}
	d, err := primary(disk)
	if err != nil {
		return bad("%w", err)
	}
	root, err := parseRecord(d[156:190])
	if err != nil {
		return bad("root directory: %w", err)
	}
	if root.flags&flagDirectory == 0 || root.size == 0 || root.size > isoMaxRoot || root.size%isoSector != 0 {
		return bad("a root directory of %d bytes, expected whole sectors, %d at most", root.size, isoMaxRoot)
	}
	dir := make([]byte, root.size)
	if err := readAt(disk, dir, root.extent); err != nil {
		return bad("root directory: %w", err)
	}
	files := Files{}
	for len(dir) > 0 {
		n := int(dir[0])
		if n == 0 { // the rest of this sector is padding, 6.8.1.1
			dir = dir[(len(dir)-1)%isoSector+1:]
			continue
		}
		if n > len(dir) {
			return bad("a directory record of %d bytes in %d", n, len(dir))
		}
		r, err := parseRecord(dir[:n])
		if err != nil {
			return bad("%w", err)
		}
		dir = dir[n:]
		if r.name == "\x00" || r.name == "\x01" { // itself and its parent, 7.6.2
			continue
		}
		max, known := Limits[r.name]
		switch {
		case !known:
			return nil, cause.New(cause.SeedRefused, "the file %s: a seed has %s, %s and %s, and nothing else", bounded.OneLine(r.name), UserDataFile, MetaDataFile, NetworkConfigFile)
		case files[r.name] != nil:
			return nil, cause.New(cause.SeedRefused, "the file %s is there twice", r.name)
		case r.flags&(flagDirectory|flagAssociated|flagMultiExtent) != 0 || r.interleaved || r.irregular:
			return nil, cause.New(cause.SeedRefused, "%s is no plain file", r.name)
		case int64(r.size) > max:
			return nil, cause.New(cause.SeedRefused, "%s has %d bytes, at most %d are accepted", r.name, r.size, max)
		}
		data := make([]byte, r.size)
		if err := readAt(disk, data, r.extent); err != nil {
			return bad("%s: %w", r.name, err)
		}
		files[r.name] = data
	}
	return files, nil
}

// primary returns the primary volume descriptor (8.4), the first there is.
func primary(disk io.ReaderAt) ([]byte, error) {
	d := make([]byte, isoSector)
	for i := range uint32(isoDescriptors) {
		if err := readAt(disk, d, isoFirst+i); err != nil {
			return nil, err
		}
		if !bytes.Equal(d[1:7], []byte("CD001\x01")) {
			return nil, errors.New("no ISO 9660 volume")
		}
		switch d[0] {
		case 1:
			if size := binary.LittleEndian.Uint16(d[128:]); size != isoSector {
				return nil, fmt.Errorf("logical blocks of %d bytes, expected %d", size, isoSector)
			}
			return d, nil
		case 255:
			return nil, errors.New("no primary volume descriptor")
		}
	}
	return nil, fmt.Errorf("more than %d volume descriptors", isoDescriptors)
}

// record is a directory record, 9.1.
type record struct {
	extent, size           uint32 // first sector, bytes
	flags                  byte
	interleaved, irregular bool
	name                   string
}

func parseRecord(b []byte) (record, error) {
	if len(b) < 34 || int(b[0]) != len(b) || 33+int(b[32]) > len(b) || b[32] == 0 {
		return record{}, fmt.Errorf("a directory record of %d bytes that does not hold its name", len(b))
	}
	r := record{
		extent: binary.LittleEndian.Uint32(b[2:]), size: binary.LittleEndian.Uint32(b[10:]),
		flags: b[25], interleaved: b[1] != 0 || b[26] != 0 || b[27] != 0,
		name: string(b[33 : 33+b[32]]),
	}
	// Every number is there in both byte orders (7.3.3): one reading, or none.
	if r.extent != binary.BigEndian.Uint32(b[6:]) || r.size != binary.BigEndian.Uint32(b[14:]) {
		return record{}, errors.New("a directory record with two extents")
	}
	if r.name == "\x00" || r.name == "\x01" {
		return r, nil
	}
	// user-data;1 is as the Linux kernel shows it: user-data.
	r.name = strings.ToLower(strings.TrimSuffix(strings.TrimSuffix(r.name, ";1"), "."))
	use := b[33+int(b[32]):]
	if b[32]%2 == 0 && len(use) > 0 { // padded to an even offset
		use = use[1:]
	}
	return r, r.rockRidge(use)
}

// rockRidge takes the name (NM) and the file type (PX) from the entries of a
// system use field (SUSP 1.12, Rock Ridge 1.12), where there are any.
func (r *record) rockRidge(use []byte) error {
	name := ""
	for len(use) >= 4 {
		n := int(use[2])
		if n < 4 || n > len(use) {
			return errors.New("a system use field that is not Rock Ridge's")
		}
		e := use[:n]
		use = use[n:]
		switch string(e[:2]) {
		case "NM":
			if n < 6 || e[4] != 0 || name != "" {
				return errors.New("a Rock Ridge name in several parts")
			}
			name = string(e[5:])
		case "PX":
			if n >= 12 && binary.LittleEndian.Uint32(e[4:])&0o170000 != 0o100000 {
				r.irregular = true
			}
		case "SL", "CL", "PL", "RE", "SF":
			r.irregular = true
		}
	}
	if name != "" {
		r.name = name
	}
	return nil
}

// readAt fills b from a sector on.
func readAt(disk io.ReaderAt, b []byte, sector uint32) error {
	if n, err := disk.ReadAt(b, int64(sector)*isoSector); n < len(b) {
		return fmt.Errorf("sector %d: %w", sector, err)
	}
	return nil
}
