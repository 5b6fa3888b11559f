package unpack

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"go.podman.io/storage/pkg/archive"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The child's work is a pipeline of goroutines, so that two cores stay busy:
//
//	stdin → decompress ─┬→ diff ID
//	                    └→ tar filter (limits, file digests) → tar → storage's Unpack
//
// Buffers are shared and pooled: at most ring × chunkSize bytes per stage.
const (
	chunkSize = 256 << 10
	ring      = 12
	maxWindow = 32 << 20 // zstd; an encoder needs --ultra for more
)

type chunk struct {
	b    []byte
	refs atomic.Int32
}

// stage is a bounded queue of chunks from one writer to one or more readers.
type stage struct {
	free    chan *chunk
	readers []chan *chunk
	done    <-chan struct{} // closed when any part of the pipeline has failed
}

func newStage(done <-chan struct{}, readers int) *stage {
	s := &stage{free: make(chan *chunk, ring), done: done}
	for range ring {
		s.free <- &chunk{b: make([]byte, 0, chunkSize)}
	}
	for range readers {
		s.readers = append(s.readers, make(chan *chunk, ring))
	}
	return s
}

var errStopped = errors.New("stopped by another part of the unpacker")

func (s *stage) get() (*chunk, error) {
	select {
	case c := <-s.free:
		return c, nil
	case <-s.done:
		return nil, errStopped
	}
}

func (s *stage) send(c *chunk) error {
	c.refs.Store(int32(len(s.readers)))
	for _, r := range s.readers {
		r <- c // never blocks: the queue is as long as the ring
	}
	return nil
}

func (s *stage) close() {
	for _, r := range s.readers {
		close(r)
	}
}

func (s *stage) release(c *chunk) {
	if c.refs.Add(-1) == 0 {
		c.b = c.b[:0]
		s.free <- c
	}
}

// stageReader is one reader's io.Reader.
type stageReader struct {
	s   *stage
	ch  chan *chunk
	cur *chunk
	off int
}

func (r *stageReader) Read(p []byte) (int, error) {
	for r.cur == nil || r.off == len(r.cur.b) {
		if r.cur != nil {
			r.s.release(r.cur)
			r.cur, r.off = nil, 0
		}
		select {
		case c, ok := <-r.ch:
			if !ok {
				return 0, io.EOF
			}
			r.cur = c
		case <-r.s.done:
			return 0, errStopped
		}
	}
	n := copy(p, r.cur.b[r.off:])
	r.off += n
	return n, nil
}

// stageWriter is the writer's io.Writer.
type stageWriter struct {
	s   *stage
	cur *chunk
}

func (w *stageWriter) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if w.cur == nil {
			c, err := w.s.get()
			if err != nil {
				return 0, err
			}
			w.cur = c
		}
		n := copy(w.cur.b[len(w.cur.b):chunkSize], p)
		w.cur.b = w.cur.b[:len(w.cur.b)+n]
		if p = p[n:]; len(w.cur.b) == chunkSize {
			if err := w.s.send(w.cur); err != nil {
				return 0, err
			}
			w.cur = nil
		}
	}
	return total, nil
}

func (w *stageWriter) close() error {
	if w.cur != nil {
		if err := w.s.send(w.cur); err != nil {
			return err
		}
		w.cur = nil
	}
	w.s.close()
	return nil
}

// splitter runs the pipeline.
type splitter struct {
	in     *countingReader
	limits Limits
}

func newSplitter(in io.Reader, l Limits) *splitter {
	return &splitter{in: &countingReader{r: in}, limits: l}
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// run returns the SHA-256 and size of the unpacked archive once everything is
// on disk.
func (s *splitter) run(f *filter) (diffID []byte, total int64, err error) {
	done := make(chan struct{})
	var once sync.Once
	var first error
	fail := func(err error) {
		if err != nil && !errors.Is(err, errStopped) {
			once.Do(func() { first = err; close(done) })
		}
	}
	raw := newStage(done, 2)
	tarred := newStage(done, 1)
	sum := sha256.New()

	var wg sync.WaitGroup
	wg.Go(func() { // diff ID
		_, err := io.CopyBuffer(onlyWriter{sum}, &stageReader{s: raw, ch: raw.readers[0]}, make([]byte, chunkSize))
		fail(err)
	})
	wg.Go(func() { // tar filter
		w := &stageWriter{s: tarred}
		in := &stageReader{s: raw, ch: raw.readers[1]}
		if err := f.run(in, w); err != nil {
			fail(err)
			return
		}
		fail(w.close())
		_, err := io.Copy(io.Discard, in) // padding behind the archive's end
		fail(err)
	})
	wg.Go(func() { // files
		err := archive.Unpack(&stageReader{s: tarred, ch: tarred.readers[0]}, "/", &archive.TarOptions{
			WhiteoutFormat: archive.OverlayWhiteoutFormat,
		})
		fail(err)
	})
	total, err = s.decompress(raw)
	fail(err)
	wg.Wait()
	if first != nil {
		return nil, 0, first
	}
	return sum.Sum(nil), total, nil
}

type onlyWriter struct{ io.Writer }

// decompress fills the raw stage. The compression is told by its magic number:
// whatever it is, the diff ID decides.
func (s *splitter) decompress(out *stage) (int64, error) {
	br := bufio.NewReaderSize(s.in, chunkSize)
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	var r io.Reader = br
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		if r, err = gzip.NewReader(br); err != nil {
			return 0, cause.New(cause.LayerMalformed, "gzip: %w", err)
		}
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(2), zstd.WithDecoderLowmem(true))
		if err != nil {
			return 0, cause.New(cause.LayerMalformed, "zstd: %w", err)
		}
		defer z.Close()
		r = z
	}
	total := int64(0)
	for {
		c, err := out.get()
		if err != nil {
			return total, err
		}
		n := 0
		for n < chunkSize && err == nil {
			var m int
			m, err = r.Read(c.b[n:chunkSize])
			n += m
		}
		c.b = c.b[:n]
		total += int64(n)
		if total > s.limits.MaxBytes {
			return total, cause.New(cause.ImageLimits, "the layer unpacks to more than %d bytes", s.limits.MaxBytes)
		}
		if total > ratioFromByte && total/int64(s.limits.MaxRatio) > s.in.n {
			return total, cause.New(cause.ImageLimits, "the layer unpacks to more than %d times its size", s.limits.MaxRatio)
		}
		end := errors.Is(err, io.EOF)
		if err != nil && !end {
			return total, cause.New(cause.LayerMalformed, "decompressing: %w", err)
		}
		if n > 0 {
			if err := out.send(c); err != nil {
				return total, err
			}
		}
		if end {
			out.close()
			return total, nil
		}
	}
}
