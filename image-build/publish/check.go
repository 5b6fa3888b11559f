package publish

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/cosign/v2/pkg/oci"
	ctypes "github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore-go/pkg/root"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

const encryptedSuffix = "+encrypted"

func refused(format string, args ...any) error {
	return cause.New(cause.PublishCheckFailed, format, args...)
}

// checkImage reads the manifest back from the registry by digest and compares
// it with what was to be published: local is the plain image, enc says how it
// should have been encrypted (nil: not). It returns the pushed layer digests.
func (r *run) checkImage(ctx context.Context, d name.Digest, local ggcr.Image, enc *encryption) ([]string, error) {
	desc, err := remote.Get(d, r.remoteOptions(ctx)...)
	if err != nil {
		return nil, refused("read back %s: %w", d, err)
	}
	if desc.MediaType != types.OCIManifestSchema1 {
		return nil, refused("the registry has a manifest of type %s, expected %s", desc.MediaType, types.OCIManifestSchema1)
	}
	m, err := ggcr.ParseManifest(bytes.NewReader(desc.Manifest))
	if err != nil {
		return nil, refused("read back %s: %w", d, err)
	}
	plain, err := local.Manifest()
	if err != nil {
		return nil, err
	}
	if m.Config.Digest != plain.Config.Digest {
		return nil, refused("the pushed image has configuration %s, expected %s", m.Config.Digest, plain.Config.Digest)
	}
	if len(m.Layers) != len(plain.Layers) {
		return nil, refused("the pushed image has %d layers, expected %d", len(m.Layers), len(plain.Layers))
	}
	var digests []string
	for i, l := range m.Layers {
		if err := r.checkLayer(ctx, d.Repository, i, l, plain, enc); err != nil {
			return nil, err
		}
		digests = append(digests, l.Digest.String())
	}
	return digests, r.checkBlob(ctx, d.Repository, m.Config)
}

func (r *run) checkLayer(ctx context.Context, repo name.Repository, i int, l ggcr.Descriptor, plain *ggcr.Manifest, enc *encryption) error {
	encrypted := strings.HasSuffix(string(l.MediaType), encryptedSuffix)
	if enc == nil {
		if encrypted || l.Digest != plain.Layers[i].Digest {
			return refused("layer %d was pushed as %s (%s), expected %s", i, l.Digest, l.MediaType, plain.Layers[i].Digest)
		}
		return r.checkBlob(ctx, repo, l)
	}
	if !encrypted {
		return refused("layer %d was pushed with media type %s: it is not encrypted", i, l.MediaType)
	}
	if slices.ContainsFunc(plain.Layers, func(p ggcr.Descriptor) bool { return p.Digest == l.Digest }) {
		return refused("layer %d was pushed with its plain content %s under an encrypted media type", i, l.Digest)
	}
	if enc.resource != "" {
		if err := checkPacket(l.Annotations[providerAnnotation], enc.resource); err != nil {
			return refused("layer %d: %w", i, err)
		}
	}
	if err := r.checkCipherText(ctx, repo, i, l); err != nil {
		return err
	}
	return r.checkBlob(ctx, repo, l)
}

// checkPacket wants exactly our key in the layer's provider annotation.
func checkPacket(annotation, resource string) error {
	raw, err := base64.StdEncoding.DecodeString(annotation)
	if err != nil {
		return err
	}
	var p packet
	if err := json.Unmarshal(raw, &p); err != nil {
		return refused("annotation %s holds no key packet: %w", providerAnnotation, err)
	}
	if p.KID != resource || p.WrapType != "A256GCM" {
		return refused("layer key is wrapped by %s (%s), expected %s (A256GCM)", p.KID, p.WrapType, resource)
	}
	return nil
}

// checkCipherText looks at the first bytes that the registry serves: the
// magic numbers of compressed layers and tar mean that nothing was encrypted,
// whatever the media type says. Cipher text matches by chance once in 2³².
func (r *run) checkCipherText(ctx context.Context, repo name.Repository, i int, l ggcr.Descriptor) error {
	layer, err := remote.Layer(repo.Digest(l.Digest.String()), r.remoteOptions(ctx)...)
	if err != nil {
		return refused("layer %d: %w", i, err)
	}
	rc, err := layer.Compressed()
	if err != nil {
		return refused("layer %d: %w", i, err)
	}
	defer rc.Close()
	head := make([]byte, 262)
	n, err := io.ReadFull(rc, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return refused("layer %d: %w", i, err)
	}
	head = head[:n]
	for _, magic := range []string{"\x1f\x8b\x08\x00", "\x28\xb5\x2f\xfd"} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return refused("layer %d is compressed plain content under media type %s", i, l.MediaType)
		}
	}
	if n == 262 && string(head[257:262]) == "ustar" {
		return refused("layer %d is a plain tar under media type %s", i, l.MediaType)
	}
	return nil
}

// checkBlob asks the registry whether it has a blob, in its full size.
func (r *run) checkBlob(ctx context.Context, repo name.Repository, want ggcr.Descriptor) error {
	layer, err := remote.Layer(repo.Digest(want.Digest.String()), r.remoteOptions(ctx)...)
	if err != nil {
		return refused("blob %s: %w", want.Digest, err)
	}
	size, err := layer.Size()
	if err != nil {
		return refused("the registry does not have blob %s: %w", want.Digest, err)
	}
	if size != want.Size {
		return refused("the registry has blob %s with %d bytes, expected %d", want.Digest, size, want.Size)
	}
	return nil
}

// checkSignatures verifies signature and attestation as a stranger with the
// public key would, from the registry, and compares their content.
func (r *run) checkSignatures(ctx context.Context, d name.Digest, sbom []byte) error {
	co := &cosign.CheckOpts{
		RegistryClientOpts: r.cosignOptions(ctx), SigVerifier: r.signer,
		IgnoreTlog: true, IgnoreSCT: true, Offline: true,
		ClaimVerifier: cosign.SimpleClaimVerifier,
	}
	sigs, _, err := cosign.VerifyImageSignatures(ctx, d, co)
	if err != nil {
		return refused("the pushed signature does not verify: %w", err)
	}
	if !slices.ContainsFunc(sigs, func(s oci.Signature) bool { return namesRepository(s, d) }) {
		return refused("no pushed signature names repository %s", d.Repository.Name())
	}
	co.ClaimVerifier = cosign.IntotoSubjectClaimVerifier
	atts, _, err := cosign.VerifyImageAttestations(ctx, d, co)
	if err != nil {
		return refused("the pushed attestation does not verify: %w", err)
	}
	if !slices.ContainsFunc(atts, func(s oci.Signature) bool { return predicateIs(s, predicateSPDX, sbom) }) {
		return refused("no pushed attestation holds the SBOM")
	}
	if !r.o.Bundle {
		return nil
	}
	co.NewBundleFormat = true
	co.TrustedMaterial = &noTrust{}
	bundles, _, err := cosign.VerifyImageAttestations(ctx, d, co)
	if err != nil {
		return refused("the pushed bundles do not verify: %w", err)
	}
	// Signatures are bundles too: each must be there under its own type.
	if !slices.ContainsFunc(bundles, func(s oci.Signature) bool { return predicateIs(s, ctypes.CosignSignPredicateType, nil) }) {
		return refused("no pushed bundle is a signature")
	}
	if !slices.ContainsFunc(bundles, func(s oci.Signature) bool { return predicateIs(s, predicateSPDX, sbom) }) {
		return refused("no pushed bundle holds the SBOM")
	}
	return nil
}

// noTrust is trusted material without certificate authorities or logs: the
// key alone verifies.
type noTrust struct{ root.BaseTrustedMaterial }

func namesRepository(s oci.Signature, d name.Digest) bool {
	body, err := s.Payload()
	if err != nil {
		return false
	}
	var claim struct {
		Critical struct {
			Identity struct {
				Reference string `json:"docker-reference"`
			} `json:"identity"`
		} `json:"critical"`
	}
	return json.Unmarshal(body, &claim) == nil && claim.Critical.Identity.Reference == d.Repository.Name()
}

// predicateIs says whether an attestation is of the type and, unless want is
// nil, carries exactly that predicate.
func predicateIs(s oci.Signature, predicateType string, want []byte) bool {
	body, err := s.Payload()
	if err != nil {
		return false
	}
	var env struct {
		Payload []byte `json:"payload"`
	}
	var st statement
	if json.Unmarshal(body, &env) != nil || json.Unmarshal(env.Payload, &st) != nil || st.PredicateType != predicateType {
		return false
	}
	if want == nil {
		return true
	}
	var a, b bytes.Buffer
	return json.Compact(&a, st.Predicate) == nil && json.Compact(&b, want) == nil && bytes.Equal(a.Bytes(), b.Bytes())
}
