package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Control is the device mapper's control device.
const Control = "/dev/mapper/control"

// target is one line of a device-mapper table, which covers the whole device.
type target struct {
	sectors uint64
	kind    string
	params  string
	secret  bool // params hold a key: the kernel wipes its copies
	ro      bool
}

// mapper sends commands to the device mapper (Documentation/admin-guide/device-mapper,
// include/uapi/linux/dm-ioctl.h).
type mapper struct{ f *os.File }

func openMapper() (*mapper, error) {
	f, err := os.OpenFile(Control, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &mapper{f}, nil
}

func (m *mapper) Close() error { return m.f.Close() }

const (
	ioctlSize  = int(unsafe.Sizeof(unix.DmIoctl{}))
	specSize   = int(unsafe.Sizeof(unix.DmTargetSpec{}))
	answerSize = 16 << 10
)

// command sends one ioctl with a payload behind its header, and returns the
// header and the payload of the answer. buf is wiped.
func (m *mapper) command(what string, op uintptr, name string, flags uint32, payload []byte) (unix.DmIoctl, []byte, error) {
	if len(name) >= unix.DM_NAME_LEN {
		return unix.DmIoctl{}, nil, errors.New("device mapper: the name is too long")
	}
	buf := make([]byte, ioctlSize+max(len(payload), answerSize))
	h := (*unix.DmIoctl)(unsafe.Pointer(&buf[0]))
	h.Version = [3]uint32{4, 0, 0}
	h.Data_size = uint32(len(buf))
	h.Data_start = uint32(ioctlSize)
	h.Flags = flags
	copy(h.Name[:], name)
	if payload != nil {
		h.Target_count = 1
	}
	copy(buf[ioctlSize:], payload)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, m.f.Fd(), op, uintptr(unsafe.Pointer(&buf[0])))
	header := *h
	answer := bytes.Clone(buf[min(int(h.Data_start), len(buf)):])
	clear(buf)
	if errno != 0 {
		return header, nil, fmt.Errorf("device mapper: %s %s: %w", what, name, errno)
	}
	return header, answer, nil
}

// encode is the payload of a table with one target: the spec, the parameters
// with NUL, padded to eight bytes.
func (t target) encode() []byte {
	n := (specSize + len(t.params) + 1 + 7) &^ 7
	out := make([]byte, n)
	spec := (*unix.DmTargetSpec)(unsafe.Pointer(&out[0]))
	spec.Length = t.sectors
	spec.Next = uint32(n)
	copy(spec.Target_type[:], t.kind)
	copy(out[specSize:], t.params)
	return out
}

// create makes the device name with one target and returns its node.
func (m *mapper) create(name string, t target) (node string, err error) {
	h, _, err := m.command("create", unix.DM_DEV_CREATE, name, 0, nil)
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.remove(name))
		}
	}()
	var flags uint32
	if t.ro {
		flags |= unix.DM_READONLY_FLAG
	}
	if t.secret {
		flags |= unix.DM_SECURE_DATA_FLAG
	}
	payload := t.encode()
	defer clear(payload)
	if _, _, err := m.command("load "+t.kind+" into", unix.DM_TABLE_LOAD, name, flags, payload); err != nil {
		return "", err
	}
	// Without the suspend flag this resumes: the table becomes the live one.
	if _, _, err := m.command("resume", unix.DM_DEV_SUSPEND, name, flags&unix.DM_READONLY_FLAG, nil); err != nil {
		return "", err
	}
	return fmt.Sprintf("/dev/dm-%d", unix.Minor(h.Dev)), nil
}

func (m *mapper) remove(name string) error {
	_, _, err := m.command("remove", unix.DM_DEV_REMOVE, name, 0, nil)
	return err
}

// status returns the words of the live target's status line.
func (m *mapper) status(name string) ([]string, error) {
	h, answer, err := m.command("status of", unix.DM_TABLE_STATUS, name, 0, nil)
	if err != nil {
		return nil, err
	}
	if h.Target_count != 1 || len(answer) < specSize || h.Flags&unix.DM_BUFFER_FULL_FLAG != 0 {
		return nil, fmt.Errorf("device mapper: status of %s: %d targets, expected one", name, h.Target_count)
	}
	line, _, _ := bytes.Cut(answer[specSize:], []byte{0})
	return strings.Fields(string(line)), nil
}

// sectors returns the size of a block device in sectors of 512 bytes.
func sectors(f *os.File) (uint64, error) {
	var size uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); errno != 0 {
		return 0, fmt.Errorf("size of %s: %w", f.Name(), errno)
	}
	return size / 512, nil
}

var le = binary.LittleEndian
