// Package image brings a signed, possibly encrypted container image from a
// registry into podman's storage: it resolves the manifest by digest, checks
// signatures and the signed SBOM (package signature), and streams each layer
// once: registry → size and SHA-256 → ocicrypt → confined child (package
// unpack) → staging directory. A layer is published only when blob digest, HMAC
// and diff ID agree, an image only when all its layers are.
//
// It promises: nothing of a failed fetch stays in storage; what podman runs by
// Stored.ImageID is the configuration and content that the signed manifest
// names; a layer that is already there is read again and compared with what
// was verified; nothing is asked of any host but the registry, its mirrors and
// the redirect targets that the policy names. It decides nothing about who must
// sign; that is the policy's.
//
// README.md says why this way of filling the storage was chosen.
package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/storage"
	_ "go.podman.io/storage/drivers/overlay" // the one driver that is used

	"github.com/cc-runtime/cvm-agent/agent/image/signature"
	"github.com/cc-runtime/cvm-agent/agent/image/unpack"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Limits that hold where the policy names none.
const (
	DefaultMaxLayers = 127
	DefaultMaxFiles  = 1_000_000
	DefaultMaxBytes  = 32 << 30 // unpacked, of all layers
	DefaultMaxRatio  = 200
)

// Config is what New needs.
type Config struct {
	Store       storage.Store // if nil, GraphRoot and RunRoot are opened
	GraphRoot   string        // podman's graph root
	RunRoot     string        // podman's run root
	Registries  []policy.Registry
	StateDir    string // where the records of verified layers are kept; protected storage
	Logger      *slog.Logger
	OnWait      func(err error, next time.Duration) // a registry does not answer; next attempt in next
	Parallel    int                                 // layers at a time, default 3
	StallsAfter time.Duration                       // a silent connection is dropped after this, default 30s
}

// Client fetches images into one storage.
type Client struct {
	cfg     Config
	store   storage.Store
	owned   bool
	records records
	bases   keyed // images under way, by their first layer
}

// Reexec must be called first in main: see package unpack.
func Reexec() { unpack.Reexec() }

// New opens the storage. The roots are shared with podman's service through
// the lock files of the storage library.
func New(cfg Config) (*Client, error) {
	if cfg.StateDir == "" {
		return nil, cause.New(cause.Config, "no state directory for image records")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.OnWait == nil {
		cfg.OnWait = func(error, time.Duration) {}
	}
	if cfg.Parallel <= 0 {
		cfg.Parallel = 3
	}
	if cfg.StallsAfter <= 0 {
		cfg.StallsAfter = 30 * time.Second
	}
	c := &Client{cfg: cfg, store: cfg.Store, records: records{dir: filepath.Join(cfg.StateDir, "layers")}}
	if err := os.MkdirAll(c.records.dir, 0o700); err != nil {
		return nil, storageError("", fmt.Errorf("making the state directory: %w", err))
	}
	if c.store == nil {
		store, err := storage.GetStore(storage.StoreOptions{
			GraphRoot: cfg.GraphRoot, RunRoot: cfg.RunRoot, GraphDriverName: "overlay",
		})
		if err != nil {
			return nil, storageError(cfg.GraphRoot, fmt.Errorf("opening the container storage: %w", err))
		}
		c.store, c.owned = store, true
	}
	if n := c.store.GraphDriverName(); n != "overlay" {
		return nil, cause.New(cause.StorageFailed, "the container storage uses driver %q, expected overlay", n)
	}
	return c, nil
}

// Close releases the storage if New opened it. Mounts stay.
func (c *Client) Close() error {
	if !c.owned {
		return nil
	}
	_, err := c.store.Shutdown(false)
	if errors.Is(err, storage.ErrLayerUsedByContainer) {
		return nil
	}
	return err
}

// Image is a manifest whose digest has been checked, and its configuration.
type Image struct {
	c        *Client
	ref      name.Digest // the policy's reference
	via      int         // index of the endpoint that served it
	ends     []*endpoint
	raw      []byte // the single-platform manifest, exact bytes
	digest   digest.Digest
	manifest ocispec.Manifest
	config   []byte
	diffIDs  []digest.Digest
	limits   policy.ImageLimits
}

// Ref is the reference that was resolved, and that signatures are checked for.
func (i *Image) Ref() string { return i.ref.String() }

// Digest is the digest that the policy names: of the manifest or its index.
func (i *Image) Digest() string { return i.ref.DigestStr() }

// PlatformDigest is the digest of the single-platform manifest.
func (i *Image) PlatformDigest() string { return i.digest.String() }

// ImageID is what podman will call the image: the configuration's digest, hex.
func (i *Image) ImageID() string { return i.manifest.Config.Digest.Encoded() }

// Manifest is the single-platform manifest.
func (i *Image) Manifest() ocispec.Manifest { return i.manifest }

// Size is the sum of the layers' signed sizes, in bytes.
func (i *Image) Size() int64 {
	n := int64(0)
	for _, l := range i.manifest.Layers {
		n += l.Size
	}
	return n
}

// Resolve fetches the manifest of ref (repository@sha256:…), the one for this
// platform if ref is an index, and the configuration. All are bounded and their
// digests checked on the exact bytes. It waits for a registry that does not
// answer until ctx ends.
func (c *Client) Resolve(ctx context.Context, ref string) (*Image, error) {
	if !strings.Contains(ref, "@sha256:") {
		return nil, cause.New(cause.PolicyImageNotByDigest, "the image %q is not named by digest", ref)
	}
	d, err := name.NewDigest(ref)
	if err != nil {
		return nil, cause.New(cause.PolicyInvalid, "the image reference %q: %w", ref, err)
	}
	ends, err := c.endpoints(d)
	if err != nil {
		return nil, err
	}
	i := &Image{c: c, ref: d, ends: ends}
	for via, end := range ends {
		i.via = via
		if err = i.resolveAt(ctx, end); err == nil {
			break
		}
		if via+1 < len(ends) {
			c.cfg.Logger.Warn("mirror does not serve the image", "mirror", end.host, "image", ref, "error", err)
		}
	}
	if err != nil {
		return nil, err
	}
	return i, i.Limit(policy.ImageLimits{})
}

func (i *Image) resolveAt(ctx context.Context, end *endpoint) error {
	dg := digest.Digest(i.ref.DigestStr())
	raw, err := end.manifest(ctx, dg)
	if err != nil {
		return err
	}
	pick, err := pickPlatform(raw, runtime.GOARCH)
	if err != nil {
		return err
	}
	if pick != "" {
		dg = pick
		if raw, err = end.manifest(ctx, dg); err != nil {
			return err
		}
	}
	m, err := parseManifest(raw)
	if err != nil {
		return err
	}
	config, err := end.blob(ctx, m.Config.Digest, m.Config.Size)
	if err != nil {
		return err
	}
	diffIDs, err := parseConfig(config, runtime.GOARCH, len(m.Layers))
	if err != nil {
		return err
	}
	i.raw, i.digest, i.manifest, i.config, i.diffIDs = raw, dg, *m, config, diffIDs
	return nil
}

// Limit sets the policy's limits (zero: the defaults) and checks the ones that
// the manifest already breaks.
func (i *Image) Limit(l policy.ImageLimits) error {
	if l.MaxLayers <= 0 {
		l.MaxLayers = DefaultMaxLayers
	}
	if l.MaxFiles <= 0 {
		l.MaxFiles = DefaultMaxFiles
	}
	if l.MaxBytes == 0 || l.MaxBytes > 1<<62 {
		l.MaxBytes = DefaultMaxBytes
	}
	if l.MaxRatio <= 0 {
		l.MaxRatio = DefaultMaxRatio
	}
	i.limits = l
	if n := len(i.manifest.Layers); n > l.MaxLayers {
		return cause.New(cause.ImageLimits, "the image has %d layers, the limit is %d", n, l.MaxLayers)
	}
	if n := i.Size(); uint64(n) > l.MaxBytes {
		return cause.New(cause.ImageLimits, "the image has %d bytes, the limit is %d", n, l.MaxBytes)
	}
	return nil
}

// Encrypted says whether any layer is.
func (i *Image) Encrypted() bool {
	return slices.ContainsFunc(i.manifest.Layers, func(l ocispec.Descriptor) bool { return encrypted(l.MediaType) })
}

// CheckEncryption holds the manifest against the policy's "required" (every
// layer is encrypted), "optional" or "forbidden" (none is).
func (i *Image) CheckEncryption(mode string) error {
	for n, l := range i.manifest.Layers {
		switch enc := encrypted(l.MediaType); {
		case mode == "required" && !enc:
			return cause.New(cause.EncryptionRequired, "layer %d of %s is plain (%s), the policy requires encryption", n+1, i.ref, l.MediaType)
		case mode == "forbidden" && enc:
			return cause.New(cause.PolicyInvalid, "layer %d of %s is encrypted, the policy forbids it", n+1, i.ref)
		}
	}
	if mode != "required" && mode != "optional" && mode != "forbidden" {
		return cause.New(cause.PolicyInvalid, "encryption rule %q, expected required, optional or forbidden", mode)
	}
	return nil
}

// KeyResource fetches a public key that the policy names as a broker resource;
// its digest is checked against the policy by this package.
type KeyResource = signature.KeyResource

// VerifySignatures checks that every required signer has signed this image
// under its original reference, in either of cosign's storage forms. Nothing
// but the registry is contacted.
func (i *Image) VerifySignatures(ctx context.Context, s policy.Signatures, keys KeyResource) error {
	return i.atEndpoints(func(e *endpoint) error {
		src, err := i.source(ctx, e)
		if err != nil {
			return err
		}
		return signature.Verify(ctx, src, s.Required, keys)
	})
}

// SBOM returns the predicate (SPDX or CycloneDX JSON) of a signed SBOM
// attestation of this image, by the rule's signers or, if it names none, by
// those of fallback. It is nil if the rule requires none.
func (i *Image) SBOM(ctx context.Context, rule policy.SBOM, fallback policy.Signatures, keys KeyResource) ([]byte, error) {
	if !rule.Required {
		return nil, nil
	}
	signers := rule.Signers
	if len(signers) == 0 {
		signers = fallback.Required
	}
	var out []byte
	err := i.atEndpoints(func(e *endpoint) error {
		src, err := i.source(ctx, e)
		if err != nil {
			return err
		}
		out, err = signature.SBOM(ctx, src, signers, keys)
		return err
	})
	return out, err
}

// atEndpoints tries the endpoint that served the image and, when a mirror lacks
// what is needed, the next ones. The last one's verdict counts.
func (i *Image) atEndpoints(f func(*endpoint) error) (err error) {
	for _, e := range i.ends[i.via:] {
		if err = f(e); err == nil {
			return nil
		}
	}
	return err
}

func (i *Image) source(ctx context.Context, e *endpoint) (signature.Source, error) {
	opts, err := e.remoteOptions(ctx)
	if err != nil {
		return signature.Source{}, err
	}
	return signature.Source{Repository: i.ref.Context().Name(), Ref: e.repo.Digest(i.ref.DigestStr()), Options: opts}, nil
}
