package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"

	"github.com/containers/ocicrypt/blockcipher"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const (
	pubOptsAnnotation = "org.opencontainers.image.enc.pubopts"
	maxOptions        = 64 << 10
	symmetricKeySize  = 32 // AES-256
)

// Unwrap returns the private options of one encrypted layer (ocicrypt's
// PrivateLayerBlockCipherOptions as JSON): the layer key, unwrapped. The slice stays the caller's, to
// wipe when Fetch has returned.
type Unwrap func(ctx context.Context, annotations map[string]string, desc ocispec.Descriptor) (privOpts []byte, err error)

// decrypter wraps a layer's stream. Its io.EOF comes after the HMAC of the
// whole ciphertext has been checked, and after the blob's own digest: a wrong
// HMAC over right bytes means a wrong key.
func decrypter(ctx context.Context, r io.Reader, d ocispec.Descriptor, unwrap Unwrap) (io.Reader, error) {
	if unwrap == nil {
		return nil, cause.New(cause.KeyRefused, "layer %s is encrypted and there is no key broker to ask", d.Digest)
	}
	pub, err := base64.StdEncoding.DecodeString(d.Annotations[pubOptsAnnotation])
	if err != nil || len(pub) == 0 || len(pub) > maxOptions {
		return nil, malformed("layer %s has no usable annotation %s", d.Digest, pubOptsAnnotation)
	}
	var opts blockcipher.LayerBlockCipherOptions
	if err := bounded.CheckJSON(pub, bounded.Limits{Bytes: maxOptions}); err != nil {
		return nil, malformed("annotation %s: %w", pubOptsAnnotation, err)
	}
	if err := json.Unmarshal(pub, &opts.Public); err != nil {
		return nil, malformed("annotation %s: %w", pubOptsAnnotation, err)
	}
	if opts.Public.CipherType != blockcipher.AES256CTR || len(opts.Public.Hmac) == 0 {
		return nil, cause.New(cause.LayerDecrypt, "layer %s uses cipher %.40q, expected %s with an HMAC", d.Digest, opts.Public.CipherType, blockcipher.AES256CTR)
	}
	priv, err := unwrap(ctx, d.Annotations, d)
	if err != nil {
		return nil, cause.Wrap(cause.KeyRefused, err)
	}
	if len(priv) > maxOptions || json.Unmarshal(priv, &opts.Private) != nil {
		// The parser's own words could quote the key.
		return nil, cause.New(cause.KeyMalformed, "the released key of layer %s cannot be decoded", d.Digest)
	}
	if n := len(opts.Private.SymmetricKey); n != symmetricKeySize {
		return nil, cause.New(cause.KeyMalformed, "the key of layer %s has %d bytes, expected %d", d.Digest, n, symmetricKeySize)
	}
	h, err := blockcipher.NewLayerBlockCipherHandler()
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	plain, _, err := h.Decrypt(r, opts)
	if err != nil {
		return nil, cause.New(cause.LayerDecrypt, "layer %s: %w", d.Digest, err)
	}
	return &plainReader{r: plain, digest: d.Digest.String()}, nil
}

// plainReader gives ocicrypt's own errors (the HMAC's) their cause.
type plainReader struct {
	r      io.Reader
	digest string
}

func (p *plainReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		// One of ours from below keeps its cause; ocicrypt's own is the HMAC's.
		var c *cause.Error
		if !errors.As(err, &c) {
			err = cause.New(cause.LayerDecrypt, "layer %s does not have the HMAC that goes with the released key", p.digest)
		}
	}
	return n, err
}
