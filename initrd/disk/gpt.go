// Package disk finds the partitions of the image, opens the root under
// dm-verity and makes the encrypted scratch device.
//
// It promises that a root device yields nothing but what the root hash says
// (a block that differs stops the kernel), and that a scratch device is always
// new: its key is random, lives in the kernel alone, and nothing on the disk is
// believed. It reads partition tables only to find things. It mounts nothing.
package disk

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// What is looked at, whatever the host attaches.
const (
	maxDisks      = 64
	maxPartitions = 128
	gptEntry      = 128 // bytes, UEFI 2.10 table 5-6
	gptSector     = 512
)

// Partition is an entry of a GPT. Nobody vouches for any of it.
type Partition struct {
	Number int
	UUID   string // 32 lowercase hex digits
	Label  string
}

// ReadGPT reads the primary GPT of a disk with sectors of 512 bytes (UEFI 2.10,
// 5.3). Its checksums are not looked at: verity judges what is found by it.
func ReadGPT(disk io.ReaderAt) ([]Partition, error) {
	header := make([]byte, gptSector)
	if n, err := disk.ReadAt(header, gptSector); n < len(header) {
		return nil, err
	}
	if !bytes.Equal(header[:8], []byte("EFI PART")) {
		return nil, errors.New("no GPT")
	}
	start, count, size := le.Uint64(header[72:]), le.Uint32(header[80:]), le.Uint32(header[84:])
	if size != gptEntry || count > maxPartitions || start < 2 || start > 1<<32 {
		return nil, fmt.Errorf("a GPT of %d entries of %d bytes at sector %d", count, size, start)
	}
	table := make([]byte, count*gptEntry)
	if n, err := disk.ReadAt(table, int64(start)*gptSector); n < len(table) {
		return nil, err
	}
	var out []Partition
	for i := range int(count) {
		e := table[i*gptEntry : (i+1)*gptEntry]
		if allZero(e[:16]) { // no type: unused
			continue
		}
		u := bytes.Clone(e[16:32])
		slices.Reverse(u[0:4]) // a GUID's first three fields are little-endian
		slices.Reverse(u[4:6])
		slices.Reverse(u[6:8])
		var label []uint16
		for j := 56; j < gptEntry; j += 2 {
			c := le.Uint16(e[j:])
			if c == 0 {
				break
			}
			label = append(label, c)
		}
		out = append(out, Partition{i + 1, hex.EncodeToString(u), string(utf16.Decode(label))})
	}
	return out, nil
}

// System is where the kernel shows block devices. Linux is the one there is.
type System struct{ Block, Dev string }

// Linux is sysfs and devtmpfs where they are mounted.
var Linux = System{"/sys/class/block", "/dev"}

// Disks returns the nodes of all whole disks, sorted: not partitions, RAM
// disks, loops or mapped devices.
func (s System) Disks() ([]string, error) {
	entries, err := os.ReadDir(s.Block)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		n := e.Name()
		if strings.HasPrefix(n, "dm-") || strings.HasPrefix(n, "loop") || strings.HasPrefix(n, "ram") || strings.HasPrefix(n, "zram") {
			continue
		}
		if _, err := os.Stat(filepath.Join(s.Block, n, "partition")); err == nil {
			continue
		}
		out = append(out, filepath.Join(s.Dev, n))
	}
	if len(out) > maxDisks {
		return nil, fmt.Errorf("%d disks, at most %d are looked at", len(out), maxDisks)
	}
	return out, nil
}

// Find returns the nodes of all partitions that fit.
func (s System) Find(fits func(Partition) bool) ([]string, error) {
	disks, err := s.Disks()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, d := range disks {
		for _, p := range readDisk(d) {
			if !fits(p) {
				continue
			}
			if node := s.node(filepath.Base(d), p.Number); node != "" {
				out = append(out, node)
			}
		}
	}
	return out, nil
}

// readDisk returns what a GPT says, or nothing.
func readDisk(node string) []Partition {
	f, err := os.Open(node)
	if err != nil {
		return nil
	}
	defer f.Close()
	list, err := ReadGPT(f)
	if err != nil {
		return nil
	}
	return list
}

// node is the kernel's device of a partition, "" when it shows none.
func (s System) node(disk string, number int) string {
	subs, err := filepath.Glob(filepath.Join(s.Block, disk, disk+"*", "partition"))
	if err != nil {
		return ""
	}
	for _, path := range subs {
		text, err := readSys(path)
		if err == nil && text == strconv.Itoa(number) {
			return filepath.Join(s.Dev, filepath.Base(filepath.Dir(path)))
		}
	}
	return ""
}

// readSys reads a sysfs attribute, which says one page for its size.
func readSys(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := bounded.ReadAll(f, 4096)
	return strings.TrimSpace(string(data)), err
}

func allZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}
