package control

import "bytes"

// A serial port is a stream of bytes that never ends: a request that was begun
// by somebody who went away stays in it, and so does an answer that nobody
// read. What HTTP/1.1 with text bodies never holds is a NUL byte, so
//
//	NUL TAG LF
//
// begins anew, whatever came before: the receiver drops what it has. TAG is 1
// to 32 lowercase hex digits; the answer begins with the same three, so that
// the asker knows its own answer from a stranger's. A NUL with something else
// after it begins anew without a tag. A request without any of this is served
// too, and answered without.
const (
	anew   = 0x00
	maxTag = 32
)

// frames is what hears of the parts of the stream.
type frames interface {
	anew()         // the peer began anew
	tagged(string) // and gave this tag
	data(p []byte) // bytes of requests; never a NUL
}

// framer splits a stream into its parts, however it is cut into pieces.
type framer struct {
	to    frames
	inTag bool
	tag   []byte
}

func (f *framer) feed(p []byte) {
	for len(p) > 0 {
		switch {
		case p[0] == anew:
			f.to.anew()
			f.inTag, f.tag = true, f.tag[:0]
			p = p[1:]
		case f.inTag:
			c := p[0]
			hex := c >= '0' && c <= '9' || c >= 'a' && c <= 'f'
			switch {
			case c == '\n' && len(f.tag) > 0:
				f.inTag = false
				f.to.tagged(string(f.tag))
				p = p[1:]
			case hex && len(f.tag) < maxTag:
				f.tag = append(f.tag, c)
				p = p[1:]
			default: // no tag: what looked like one is data
				f.inTag = false
				if len(f.tag) > 0 {
					f.to.data(f.tag)
				}
			}
		default:
			n := bytes.IndexByte(p, anew)
			if n < 0 {
				n = len(p)
			}
			f.to.data(p[:n])
			p = p[n:]
		}
	}
}
