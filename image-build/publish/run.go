package publish

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/renameio/v2"
	"github.com/sigstore/sigstore/pkg/signature"
	"go.podman.io/image/v5/copy"
	imagesignature "go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/types"
	"golang.org/x/sync/errgroup"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// copier copies one image; it has the signature of copy.Image.
type copier func(ctx context.Context, pc *imagesignature.PolicyContext, dst, src types.ImageReference, o *copy.Options) ([]byte, error)

// run is one publication under way.
type run struct {
	o      *Options
	target target
	work   string // 0700, removed at the end
	signer signature.SignerVerifier
	// policySigner signs the policy file; nil: it stays unsigned.
	policySigner dsse.Signer
	transport    http.RoundTripper
	copier       copier

	mu   sync.Mutex
	done []string // what is outside this machine by now, in order
}

// did notes what an aborted run leaves behind.
func (r *run) did(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done = append(r.done, what)
}

// step runs f as a displayed step; f's string is shown as the detail.
func (r *run) step(name string, f func(Step) (string, error)) (string, error) {
	s := r.o.Display.Step(name)
	out, err := f(s)
	if err != nil {
		s.Fail(err)
		return "", err
	}
	s.Done(strings.TrimPrefix(out, r.work+"/"))
	return out, nil
}

// Run publishes. The sequence, `&` being side by side:
//
//	build → prepare → ( sbom & key → push ) → check → sign → attest → verify → policy → rule → tag
//
// Nothing is signed before the SBOM is there and the pushed image is checked,
// and the release rule and the tag come only after everything verified: until
// then nobody finds the image and the broker gives its key to nobody. An error names what was
// already pushed; the key of a failed run is taken back from the broker.
func Run(ctx context.Context, o Options) (*Result, error) { return publish(ctx, o, copy.Image) }

func publish(ctx context.Context, o Options, c copier) (res *Result, err error) {
	t, err := o.check()
	if err != nil {
		return nil, err
	}
	r := &run{o: &o, target: t, copier: c}
	if r.signer, err = loadSigner(o.KeyFile, o.Password); err != nil {
		return nil, err
	}
	doc, err := r.preparePolicy()
	if err != nil {
		return nil, err
	}
	keys, err := r.preparedBroker()
	if err != nil {
		return nil, err
	}
	if r.work, err = os.MkdirTemp(o.TempDir, "cvmctl-publish-"); err != nil {
		return nil, cause.New(cause.StorageFailed, "%w", err)
	}
	defer func() {
		if rmErr := removeTree(r.work); rmErr != nil {
			err = errors.Join(err, cause.New(cause.StorageFailed, "plain content is left: %w", rmErr))
		}
	}()
	if err := r.prepareRegistry(); err != nil {
		return nil, err
	}
	enc, err := newEncryption(&o)
	if err != nil {
		return nil, err
	}
	defer enc.erase()
	stored := false // the key is with the broker
	defer func() {
		if err == nil {
			return
		}
		if stored {
			r.takeBack(keys, enc)
		}
		err = r.aborted(err)
	}()

	dir, err := r.acquire(ctx)
	if err != nil {
		return nil, err
	}
	local, err := layoutImage(dir)
	if err != nil {
		return nil, err
	}

	var sbom, manifest []byte
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := r.step("sbom", func(s Step) (_ string, err error) {
			sbom, err = r.scan(gctx, dir, s)
			return bytesText(int64(len(sbom))) + " SPDX", err
		})
		return err
	})
	g.Go(func() error {
		if enc != nil && enc.kek != nil {
			if _, err := r.step("key", func(Step) (string, error) {
				where, err := r.storeKey(gctx, keys, enc)
				stored = err == nil && keys != nil
				return where, err
			}); err != nil {
				return err
			}
		}
		_, err := r.step("push", func(s Step) (_ string, err error) {
			manifest, err = r.push(gctx, dir, enc, s)
			return r.target.repo.Name() + "@" + digestOf(manifest), err
		})
		if err == nil {
			r.did("image " + digestOf(manifest))
		}
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}

	d := r.target.repo.Digest(digestOf(manifest))
	res = &Result{
		Reference: r.target.String(), Digest: d.Name(), ManifestDigest: d.DigestStr(),
		SBOMDigest: digestOf(sbom), Encrypted: enc != nil, Bundles: o.Bundle,
	}
	config, err := local.ConfigName()
	if err != nil {
		return nil, err
	}
	res.ConfigDigest = config.String()
	if enc != nil {
		res.KeyResource = enc.resource
	}
	return res, r.finish(ctx, res, d, local, enc, keys, sbom, doc)
}

// finish signs, checks, and makes the image findable and its key releasable.
func (r *run) finish(ctx context.Context, res *Result, d name.Digest, local ggcr.Image, enc *encryption, keys keyBroker, sbom []byte, doc *policy.Policy) (err error) {
	// Before anything is signed: an image that is not what was asked for gets
	// no signature.
	if _, err = r.step("check", func(Step) (string, error) {
		res.Layers, err = r.checkImage(ctx, d, local, enc)
		state := "plain"
		if enc != nil {
			state = "all encrypted"
		}
		return fmt.Sprintf("%d layers, %s", len(res.Layers), state), err
	}); err != nil {
		return err
	}
	if res.Signature, err = r.step("sign", func(Step) (string, error) {
		tag, err := r.sign(ctx, d)
		return tag, failedIf(cause.RegistryUnavailable, "sign", err)
	}); err != nil {
		return err
	}
	if res.Attestation, err = r.step("attest", func(Step) (string, error) {
		tag, err := r.attest(ctx, d, sbom)
		return tag, failedIf(cause.RegistryUnavailable, "attest", err)
	}); err != nil {
		return err
	}
	if _, err = r.step("verify", func(Step) (string, error) {
		return "signature and attestation", r.checkSignatures(ctx, d, sbom)
	}); err != nil {
		return err
	}
	if r.o.SBOMOut != "" {
		if err := renameio.WriteFile(r.o.SBOMOut, sbom, 0o644); err != nil {
			return failed(cause.StorageFailed, "--sbom-out", err)
		}
	}
	if doc != nil {
		if _, err = r.step("policy", func(Step) (string, error) {
			return r.o.Policy.Out, r.writePolicy(doc, res)
		}); err != nil {
			return err
		}
	}
	if keys != nil && doc != nil {
		if _, err = r.step("rule", func(Step) (string, error) { return r.putRule(ctx, keys, doc, res) }); err != nil {
			return err
		}
	}
	if r.target.tag == "" {
		return nil
	}
	_, err = r.step("tag", func(Step) (string, error) {
		desc, err := remote.Get(d, r.remoteOptions(ctx)...)
		if err == nil {
			err = remote.Tag(r.target.repo.Tag(r.target.tag), desc, r.remoteOptions(ctx)...)
		}
		return r.target.String(), failedIf(cause.RegistryUnavailable, "tag", err)
	})
	return err
}

func failedIf(code cause.Code, doing string, err error) error {
	if err == nil {
		return nil
	}
	return failed(code, doing, err)
}

// aborted adds to err what is already outside this machine.
func (r *run) aborted(err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.done) == 0 {
		return err
	}
	inner := err
	var e *cause.Error
	if errors.As(err, &e) {
		inner = e.Err
	}
	return cause.New(cause.Of(err), "%w (already done: %s; the tag was not set)", inner, strings.Join(r.done, ", "))
}

// takeBack removes the key of a failed run. The image's pushed layers become
// noise. ctx may be the reason of the failure, so this has its own.
func (r *run) takeBack(keys keyBroker, enc *encryption) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := keys.DeleteResource(ctx, enc.resource); err == nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.done = slices.DeleteFunc(r.done, func(s string) bool { return s == "key "+enc.resource })
	}
}

// digestOf is "sha256:…" over data.
func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// writeSecret writes a file that nobody else can read and that was not there.
func writeSecret(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return cause.New(cause.StorageFailed, "%w", err)
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return cause.New(cause.StorageFailed, "write %s: %w", path, errors.Join(err, os.Remove(path)))
	}
	return nil
}
