package keyrelease

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// AnnotationID is the key provider's name, as in the layer annotation
// org.opencontainers.image.enc.keys.provider.attestation-agent.
const (
	AnnotationID  = "provider.attestation-agent"
	AnnotationKey = "org.opencontainers.image.enc.keys." + AnnotationID
)

// Bounds on an annotation, which comes from the registry.
const (
	maxAnnotation = 64 << 10 // bytes
	maxPackets    = 16
	kekSize       = 32 // bytes of an AES-256 key
	wrapAESGCM    = "A256GCM"
)

// Resources gets a resource of the broker; *Session is one.
type Resources interface {
	Resource(ctx context.Context, uri string) ([]byte, error)
}

// packet is a wrapped layer key as the attestation-agent key provider writes
// it; the members of its v2 form are optional.
type packet struct {
	KID         string `json:"kid"`          // kbs:///repository/type/tag
	WrappedData []byte `json:"wrapped_data"` // ciphertext ‖ 16-byte tag
	IV          []byte `json:"iv"`           // 12 bytes
	WrapType    string `json:"wrap_type"`    // "A256GCM"

	Version          string          `json:"version,omitempty"`  // v2: "0.1.0"
	Provider         string          `json:"provider,omitempty"` // v2: "kbs"
	ProviderSettings json.RawMessage `json:"provider_settings,omitempty"`
	Annotations      json.RawMessage `json:"annotations,omitempty"`
}

// UnwrapLayerKey opens the layer key in a layer's annotation (standard base64
// packets, separated by commas) with a KEK of the broker, and returns
// ocicrypt's private options (JSON). With several packets the first whose key
// the broker releases counts. A packet chooses which resource is asked for,
// never which broker.
func UnwrapLayerKey(ctx context.Context, r Resources, annotation string) ([]byte, error) {
	if len(annotation) > maxAnnotation {
		return nil, cause.New(cause.KeyMalformed, "the layer's key annotation has %d bytes, at most %d", len(annotation), maxAnnotation)
	}
	parts := strings.Split(annotation, ",")
	if len(parts) > maxPackets {
		return nil, cause.New(cause.KeyMalformed, "the layer's key annotation has %d packets, at most %d", len(parts), maxPackets)
	}
	var first error
	for _, part := range parts {
		options, err := unwrapPart(ctx, r, part)
		if err == nil {
			return options, nil
		}
		if first == nil {
			first = err
		}
		if code := cause.Of(err); code != cause.KeyRefused && code != cause.KeyMalformed {
			return nil, err // not about this packet: the broker, or the end of time
		}
	}
	return nil, first
}

func unwrapPart(ctx context.Context, r Resources, part string) ([]byte, error) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(part))
	if err != nil {
		return nil, cause.New(cause.KeyMalformed, "the layer's key packet is not standard base64")
	}
	return unwrapPacket(ctx, r, raw)
}

// unwrapPacket opens one packet (JSON) with the KEK that it names.
func unwrapPacket(ctx context.Context, r Resources, raw []byte) ([]byte, error) {
	p, err := parsePacket(raw)
	if err != nil {
		return nil, err
	}
	kek, err := r.Resource(ctx, p.KID)
	if err != nil {
		return nil, err
	}
	defer clear(kek)
	if len(kek) != kekSize {
		return nil, cause.New(cause.KeyMalformed, "the key %s has %d bytes, expected %d", bound(p.KID), len(kek), kekSize)
	}
	options, err := openPacket(p, kek)
	if err != nil {
		return nil, err
	}
	if err := checkOptions(options); err != nil {
		clear(options)
		return nil, err
	}
	return options, nil
}

// parsePacket reads one packet strictly.
func parsePacket(raw []byte) (*packet, error) {
	var p packet
	if err := bounded.DecodeJSON(raw, &p, bounded.Limits{Bytes: maxAnnotation, Depth: 8, Nodes: 256, String: maxAnnotation}); err != nil {
		return nil, cause.New(cause.KeyMalformed, "the layer's key packet: %w", err)
	}
	switch {
	case p.WrapType != wrapAESGCM:
		return nil, cause.New(cause.KeyMalformed, "the layer's key packet has wrap_type %q, expected %s", bound(p.WrapType), wrapAESGCM)
	case len(p.IV) != 12:
		return nil, cause.New(cause.KeyMalformed, "the layer's key packet has an iv of %d bytes, expected 12", len(p.IV))
	case len(p.WrappedData) <= 16:
		return nil, cause.New(cause.KeyMalformed, "the layer's key packet holds no key")
	case p.Version != "" && p.Version != "0.1.0":
		return nil, cause.New(cause.KeyMalformed, "the layer's key packet has version %q, expected 0.1.0", bound(p.Version))
	case p.Provider != "" && p.Provider != "kbs":
		return nil, cause.New(cause.KeyMalformed, "the layer's key packet is for provider %q, expected kbs", bound(p.Provider))
	}
	return &p, nil
}

func openPacket(p *packet, kek []byte) ([]byte, error) {
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, cause.New(cause.KeyMalformed, "the key %s: %w", p.KID, err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, cause.New(cause.KeyMalformed, "the key %s: %w", p.KID, err)
	}
	options, err := aead.Open(nil, p.IV, p.WrappedData, nil)
	if err != nil {
		return nil, cause.New(cause.KeyMalformed, "the layer key does not unwrap with %s: another key, or changed data", p.KID)
	}
	return options, nil
}

// checkOptions holds the unwrapped options to a usable key: an empty or short
// one must fail here, not decrypt to garbage.
func checkOptions(options []byte) error {
	var o struct {
		SymKey []byte `json:"symkey"`
	}
	if err := bounded.CheckJSON(options, bounded.Limits{Bytes: maxAnnotation, Depth: 8, Nodes: 256}); err != nil {
		return cause.New(cause.KeyMalformed, "the unwrapped layer key is not JSON that can be read")
	}
	// The error would quote the input, which is a key.
	if json.Unmarshal(options, &o) != nil {
		return cause.New(cause.KeyMalformed, "the unwrapped layer key is not of ocicrypt's form")
	}
	defer clear(o.SymKey)
	if len(o.SymKey) != kekSize {
		return cause.New(cause.KeyMalformed, "the unwrapped layer key has %d bytes, expected %d", len(o.SymKey), kekSize)
	}
	return nil
}

func bound(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
