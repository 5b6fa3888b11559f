package launch

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cc-runtime/cvm-agent/agent/image"
	"github.com/cc-runtime/cvm-agent/agent/keyrelease"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func (r real) Images(v *policy.Verified, onWait func(error, time.Duration)) (Images, error) {
	// What an upgrade's policy no longer allows is left out, as the policy says.
	registries, refused := policy.ChooseMirrors(v.Policy.Registries, r.config.Mirrors)
	if len(refused) > 0 {
		r.logger.Warn("mirrors that the policy does not allow are not asked", "mirrors", refused)
	}
	c, err := image.New(image.Config{GraphRoot: r.config.Storage.GraphRoot, RunRoot: r.config.Storage.RunRoot,
		Registries: registries, StateDir: filepath.Join(r.config.StateDir, "images"), Logger: r.logger, OnWait: onWait})
	if err != nil {
		return nil, err
	}
	return images{c}, nil
}

type images struct{ *image.Client }

func (c images) Resolve(ctx context.Context, rule policy.Workload) (Image, error) {
	i, err := c.Client.Resolve(ctx, rule.Image)
	if err != nil {
		return nil, err
	}
	if err := i.Limit(rule.Limits); err != nil {
		return nil, err
	}
	return remoteImage{i, rule}, nil
}

type remoteImage struct {
	*image.Image
	rule policy.Workload
}

func (i remoteImage) VerifySignatures(ctx context.Context, keys KeyFunc) error {
	return i.Image.VerifySignatures(ctx, i.rule.Signatures, image.KeyResource(keys))
}

func (i remoteImage) SBOM(ctx context.Context, keys KeyFunc) ([]byte, error) {
	return i.Image.SBOM(ctx, i.rule.SBOM, i.rule.Signatures, image.KeyResource(keys))
}

func (i remoteImage) CheckEncryption() error { return i.Image.CheckEncryption(i.rule.Encryption) }

func (i remoteImage) Unwrap(ctx context.Context, keys KeyFunc) (LayerKeys, error) {
	out := LayerKeys{}
	for n, layer := range i.Manifest().Layers {
		if !strings.HasSuffix(layer.MediaType, "+encrypted") {
			continue
		}
		annotation := layer.Annotations[keyrelease.AnnotationKey]
		if annotation == "" {
			return nil, cause.New(cause.KeyMalformed, "layer %d of %s is encrypted for nobody that this agent is: no annotation %s", n, i.rule.Name, keyrelease.AnnotationKey)
		}
		options, err := keyrelease.UnwrapLayerKey(ctx, getter(keys), annotation)
		if err != nil {
			return nil, err
		}
		out[layer.Digest.String()] = options
	}
	return out, nil
}

// getter is a KeyFunc as keyrelease wants it.
type getter KeyFunc

func (g getter) Resource(ctx context.Context, uri string) ([]byte, error) { return g(ctx, uri) }

func (i remoteImage) Fetch(ctx context.Context, keys LayerKeys, progress func(string)) (Stored, error) {
	var unwrap image.Unwrap
	if len(keys) > 0 {
		unwrap = func(_ context.Context, _ map[string]string, desc ocispec.Descriptor) ([]byte, error) {
			options, ok := keys[desc.Digest.String()]
			if !ok {
				return nil, cause.New(cause.KeyRefused, "no key was released for layer %s", desc.Digest)
			}
			return bytes.Clone(options), nil // Fetch wipes what it is given
		}
	}
	cached := 0
	stored, err := i.Image.Fetch(ctx, unwrap, func(p image.Progress) {
		if p.Cached {
			cached++
		}
		progress(fmt.Sprintf("%s of %s", mebibytes(p.Done), mebibytes(p.Total)))
	})
	if err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("%d layers, %s", len(i.Manifest().Layers), mebibytes(i.Size()))
	if cached > 0 {
		detail += ", cached and verified again"
	}
	return storedImage{stored, detail}, nil
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

type storedImage struct {
	*image.Stored
	detail string
}

func (s storedImage) ImageID() string { return s.Stored.ImageID }
func (s storedImage) Detail() string  { return s.detail }
