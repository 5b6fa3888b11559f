package image

import (
	"encoding/json"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// maxManifest bounds a manifest, an index and a configuration, in bytes: the
// OCI distribution specification's own figure.
const maxManifest = 4 << 20

const (
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	encSuffix      = "+encrypted"
)

// layerTypes are the layer media types, without encSuffix. Foreign
// (nondistributable) layers come from other hosts and are refused.
var layerTypes = map[string]bool{
	ocispec.MediaTypeImageLayer: true, ocispec.MediaTypeImageLayerGzip: true, ocispec.MediaTypeImageLayerZstd: true,
	"application/vnd.docker.image.rootfs.diff.tar":      true,
	"application/vnd.docker.image.rootfs.diff.tar.gzip": true,
	"application/vnd.docker.image.rootfs.diff.tar.zstd": true,
}

func encrypted(mediaType string) bool { return strings.HasSuffix(mediaType, encSuffix) }

func malformed(format string, args ...any) error {
	return cause.New(cause.ManifestMalformed, format, args...)
}

func decode(what string, raw []byte, v any) error {
	if err := bounded.CheckJSON(raw, bounded.Limits{Bytes: maxManifest}); err != nil {
		return malformed("%s: %w", what, err)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return malformed("%s: %w", what, err)
	}
	return nil
}

func checkDescriptor(what string, d ocispec.Descriptor, max int64) error {
	if err := d.Digest.Validate(); err != nil || d.Digest.Algorithm() != digest.SHA256 {
		return malformed("%s has no SHA-256 digest", what)
	}
	if d.Size < 0 || d.Size > max {
		return malformed("%s has size %d, expected 0 to %d", what, d.Size, max)
	}
	return nil
}

// pickPlatform returns the digest of the linux/arch manifest if raw is an
// index, and "" if it is a manifest.
func pickPlatform(raw []byte, arch string) (digest.Digest, error) {
	var head struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
	}
	if err := decode("manifest", raw, &head); err != nil {
		return "", err
	}
	// A document that can be read both ways could be signed as one and run as
	// the other.
	if head.Manifests != nil && head.Layers != nil {
		return "", malformed("manifest is both an index and a manifest")
	}
	if head.MediaType != ocispec.MediaTypeImageIndex && head.MediaType != dockerIndex && head.Manifests == nil {
		return "", nil
	}
	var index ocispec.Index
	if err := decode("index", raw, &index); err != nil {
		return "", err
	}
	for _, m := range index.Manifests {
		if m.Platform == nil || m.Platform.OS != "linux" || m.Platform.Architecture != arch {
			continue
		}
		return m.Digest, checkDescriptor("index entry", m, maxManifest)
	}
	return "", cause.New(cause.ImageNotFound, "the image index has no manifest for linux/%s", arch)
}

// parseManifest reads an image manifest (OCI, or Docker schema 2).
func parseManifest(raw []byte) (*ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := decode("manifest", raw, &m); err != nil {
		return nil, err
	}
	if m.SchemaVersion != 2 {
		return nil, malformed("manifest has schemaVersion %d, expected 2", m.SchemaVersion)
	}
	if t := m.MediaType; t != "" && t != ocispec.MediaTypeImageManifest && t != dockerManifest {
		return nil, malformed("manifest has media type %.100q", t)
	}
	if t := m.Config.MediaType; t != ocispec.MediaTypeImageConfig && t != dockerConfig {
		return nil, malformed("configuration has media type %.100q: not a container image", t)
	}
	if err := checkDescriptor("configuration", m.Config, maxManifest); err != nil {
		return nil, err
	}
	if len(m.Layers) == 0 {
		return nil, malformed("manifest has no layers")
	}
	total := int64(0)
	for _, l := range m.Layers {
		if err := checkDescriptor("layer", l, 1<<50); err != nil {
			return nil, err
		}
		if !layerTypes[strings.TrimSuffix(l.MediaType, encSuffix)] {
			return nil, malformed("layer has media type %.100q", l.MediaType)
		}
		if len(l.URLs) > 0 {
			return nil, malformed("layer names other hosts to load from")
		}
		if total += l.Size; total > 1<<52 {
			return nil, malformed("layers have more than %d bytes", int64(1)<<52)
		}
	}
	return &m, nil
}

// parseConfig returns the diff IDs, of which there must be one per layer.
func parseConfig(raw []byte, arch string, layers int) ([]digest.Digest, error) {
	var c ocispec.Image
	if err := decode("configuration", raw, &c); err != nil {
		return nil, err
	}
	if c.OS != "linux" || c.Architecture != arch {
		return nil, malformed("configuration is for %.20q/%.20q, expected linux/%s", c.OS, c.Architecture, arch)
	}
	if c.RootFS.Type != "layers" || len(c.RootFS.DiffIDs) != layers {
		return nil, malformed("configuration has %d diff IDs for %d layers", len(c.RootFS.DiffIDs), layers)
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
			return nil, malformed("a diff ID is not a SHA-256 digest")
		}
	}
	return c.RootFS.DiffIDs, nil
}

// chainIDs computes the layer IDs as podman's own pull does, so that layers
// are shared.
func chainIDs(diffIDs []digest.Digest) []string {
	ids := make([]string, len(diffIDs))
	for n, d := range diffIDs {
		ids[n] = d.Encoded()
		if n > 0 {
			ids[n] = digest.Canonical.FromString(ids[n-1] + "+" + d.Encoded()).Encoded()
		}
	}
	return ids
}
