package measure

import "fmt"

// stubCPIO is the archive in which systemd-stub hands one file to the initrd as
// /.extra/NAME (systemd 257, src/boot/cpio.c, pack_cpio_literal): "newc" without
// times and owners, the directory 0555, the file 0444, then the trailer.
func stubCPIO(name string, content []byte) []byte {
	const (
		directory = 0o040000 | 0o555
		regular   = 0o100000 | 0o444
	)
	out := cpioEntry(nil, 1, directory, ".extra", nil)
	out = cpioEntry(out, 2, regular, ".extra/"+name, content)
	// The stub writes this one length in capitals.
	return fmt.Appendf(out, "070701%032x%08x%048x%08X%08x%s\x00\x00\x00\x00", 0, 1, 0, len("TRAILER!!!")+1, 0, "TRAILER!!!")
}

func cpioEntry(out []byte, inode, mode uint32, name string, content []byte) []byte {
	// ino, mode, uid, gid, nlink, mtime, size, four device numbers, name, check
	out = fmt.Appendf(out, "070701%08x%08x%016x%08x%08x%08x%032x%08x%08x", inode, mode, 0, 1, 0, len(content), 0, len(name)+1, 0)
	out = append(out, name...)
	out = append(out, 0)
	out = append(out, make([]byte, -len(out)&3)...)
	out = append(out, content...)
	return append(out, make([]byte, -len(out)&3)...)
}
