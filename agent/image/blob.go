package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// layerReader is the stream of one layer blob. It holds the registry to the
// signed size and digest: io.EOF comes only after exactly those bytes. A
// connection that breaks is taken up again where it broke.
type layerReader struct {
	ctx    context.Context
	end    *endpoint
	desc   ocispec.Descriptor
	body   io.ReadCloser
	off    int64
	idle   int // breaks in a row that brought no byte
	sum    hash.Hash
	onWait func(error, time.Duration)
	done   error
}

// maxBreaks is how often in a row a registry may end a body early before that
// counts as its answer.
const maxBreaks = 3

func (e *endpoint) layer(ctx context.Context, d ocispec.Descriptor, onWait func(error, time.Duration)) *layerReader {
	return &layerReader{ctx: context.WithValue(ctx, streamKey{}, true), end: e, desc: d, sum: sha256.New(), onWait: onWait}
}

func (r *layerReader) Close() error {
	if r.body == nil {
		return nil
	}
	return r.body.Close()
}

func (r *layerReader) Read(p []byte) (int, error) {
	if r.done != nil {
		return 0, r.done
	}
	n, err := r.read(p)
	if err != nil {
		r.done = err
	}
	return n, err
}

func (r *layerReader) read(p []byte) (int, error) {
	for {
		if r.body == nil {
			if err := r.open(); err != nil {
				return 0, err
			}
		}
		if r.off == r.desc.Size {
			return 0, r.finish()
		}
		if room := r.desc.Size - r.off; int64(len(p)) > room {
			p = p[:room]
		}
		n, err := r.body.Read(p)
		r.sum.Write(p[:n])
		r.off += int64(n)
		if n > 0 {
			r.idle = 0
			return n, nil
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			if r.idle++; r.idle >= maxBreaks || errors.Is(err, io.EOF) && r.off == 0 {
				return 0, cause.New(cause.LayerTruncated, "layer %s ends after %d bytes, expected %d", r.desc.Digest, r.off, r.desc.Size)
			}
		case r.ctx.Err() != nil:
			return 0, cause.Wrap(cause.RegistryUnavailable, fmt.Errorf("fetching layer %s: %w", r.desc.Digest, context.Cause(r.ctx)))
		default:
			r.idle++
		}
		// Take it up again. A host that accepts connections only to break them
		// is waited for like one that does not answer.
		r.body.Close()
		r.body = nil
		pause := min(200*time.Millisecond<<min(r.idle, 5), 5*time.Second)
		r.onWait(fmt.Errorf("layer %s broke off after %d bytes: %w", r.desc.Digest, r.off, err), pause)
		select {
		case <-time.After(pause):
		case <-r.ctx.Done():
		}
	}
}

func (r *layerReader) open() error {
	rng := ""
	if r.off > 0 {
		rng = fmt.Sprintf("bytes=%d-", r.off)
	}
	resp, err := r.end.get(r.ctx, "blobs/"+r.desc.Digest.String(), "", rng)
	if err != nil {
		return err
	}
	skip, rest := int64(0), r.desc.Size-r.off
	if resp.StatusCode == http.StatusOK && r.off > 0 { // no ranges here
		skip, rest = r.off, r.desc.Size
	}
	// A length that is announced wrong is an answer, not an accident.
	if n := resp.ContentLength; n > rest {
		resp.Body.Close()
		return cause.New(cause.LayerTooLarge, "layer %s has %d bytes, expected %d", r.desc.Digest, n, rest)
	} else if n >= 0 && n < rest {
		resp.Body.Close()
		return cause.New(cause.LayerTruncated, "layer %s has %d bytes, expected %d", r.desc.Digest, n, rest)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, skip); err != nil {
		resp.Body.Close()
		return cause.Wrap(cause.RegistryUnavailable, fmt.Errorf("taking up layer %s: %w", r.desc.Digest, err))
	}
	r.body = resp.Body
	return nil
}

// finish is the verdict once the signed number of bytes is here.
func (r *layerReader) finish() error {
	var one [1]byte
	if n, _ := io.ReadFull(r.body, one[:]); n > 0 {
		return cause.New(cause.LayerTooLarge, "layer %s is longer than its signed %d bytes", r.desc.Digest, r.desc.Size)
	}
	if got := digest.NewDigest(digest.SHA256, r.sum); got != r.desc.Digest {
		return cause.New(cause.LayerMismatch, "layer has digest %s, expected %s", got, r.desc.Digest)
	}
	return io.EOF
}

// ahead reads r in a goroutine of its own, so that network and digest overlap
// with decryption. It holds at most aheadChunks × aheadSize bytes.
type ahead struct {
	full, free chan []byte
	stop       chan struct{}
	cur, all   []byte
	err        error // set before full is closed
}

const (
	aheadChunks = 8
	aheadSize   = 256 << 10
)

func newAhead(r io.Reader) *ahead {
	a := &ahead{full: make(chan []byte, aheadChunks), free: make(chan []byte, aheadChunks), stop: make(chan struct{})}
	for range aheadChunks {
		a.free <- make([]byte, aheadSize)
	}
	go func() {
		defer close(a.full)
		for {
			var b []byte
			select {
			case b = <-a.free:
			case <-a.stop:
				return
			}
			n, err := 0, error(nil)
			for n < aheadSize && err == nil {
				var m int
				m, err = r.Read(b[n:aheadSize])
				n += m
			}
			if n > 0 {
				a.full <- b[:n]
			}
			if err != nil {
				a.err = err
				return
			}
		}
	}()
	return a
}

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.cur) == 0 {
		if a.all != nil {
			a.free <- a.all[:aheadSize]
			a.all = nil
		}
		b, ok := <-a.full
		if !ok {
			return 0, a.err
		}
		a.cur, a.all = b, b
	}
	n := copy(p, a.cur)
	a.cur = a.cur[n:]
	return n, nil
}

// close ends the goroutine after its current read.
func (a *ahead) close() { close(a.stop) }
