// Package signature checks who has signed an image and its SBOM, with cosign as
// a library and without any service but the registry.
//
// Both of cosign's storage forms count: the legacy tags sha256-….sig and
// sha256-….att, and Sigstore bundles as OCI 1.1 referrers (cosign falls back to
// the tag schema where the registry has no referrers API). A signature is
// checked together with its claims: a legacy payload must name the digest of
// the policy and the repository of the policy, without a tag; a bundle's
// statement must name the digest (that form has no field for the repository).
//
// A signer is a public key (inline, or a broker resource with a pinned digest)
// or a keyless identity with the trusted root that the policy embeds; keyless
// signatures need their transparency log entry with them.
package signature

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/cosign/v2/pkg/oci"
	ociremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	"github.com/sigstore/sigstore-go/pkg/root"
	sigs "github.com/sigstore/sigstore/pkg/signature"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// Bounds on what is attached to one image.
const (
	maxSignatures = 64
	maxPayload    = 64 << 10 // of a simple-signing payload, bytes
	maxStatement  = 64 << 20 // of an SBOM attestation, bytes
	maxKey        = 64 << 10
)

// KeyResource fetches a public key (PEM) that the policy names as a broker
// resource. The caller's answer is checked against the policy's digest.
type KeyResource func(ctx context.Context, uri string) ([]byte, error)

// Source is where an image's signatures are read.
type Source struct {
	Repository string          // of the policy's reference, in full: host/path
	Ref        name.Digest     // where to read: the original or a mirror
	Options    []remote.Option // transport; must bound and confine
}

func (s Source) digest() string { return s.Ref.DigestStr() }

// options returns cosign's options for one signer.
func (s Source) options(ctx context.Context, signer policy.Signer, keys KeyResource) (*cosign.CheckOpts, error) {
	co := &cosign.CheckOpts{
		RegistryClientOpts: []ociremote.Option{ociremote.WithRemoteOptions(s.Options...)},
		Offline:            true,
		MaxWorkers:         2,
	}
	if k := signer.Keyless; k != nil {
		tr, err := root.NewTrustedRootFromJSON([]byte(k.TrustedRoot))
		if err != nil {
			return nil, cause.New(cause.PolicyInvalid, "the trusted root of a keyless signer: %w", err)
		}
		if k.Issuer == "" || k.Identity == "" {
			return nil, cause.New(cause.PolicyInvalid, "a keyless signer without issuer or identity")
		}
		co.TrustedMaterial = tr
		co.Identities = []cosign.Identity{{Issuer: k.Issuer, Subject: k.Identity}}
		return co, nil
	}
	pub, err := publicKey(ctx, signer, keys)
	if err != nil {
		return nil, err
	}
	if co.SigVerifier, err = sigs.LoadVerifier(pub, crypto.SHA256); err != nil {
		return nil, cause.New(cause.PolicyInvalid, "a signer's key: %w", err)
	}
	co.IgnoreTlog, co.IgnoreSCT = true, true
	return co, nil
}

func publicKey(ctx context.Context, signer policy.Signer, keys KeyResource) (crypto.PublicKey, error) {
	pem := []byte(signer.Key)
	if signer.KeyResource != "" {
		if keys == nil {
			return nil, cause.New(cause.PolicyInvalid, "a signer's key is the broker resource %s and the policy has no broker", signer.KeyResource)
		}
		var err error
		if pem, err = keys(ctx, signer.KeyResource); err != nil {
			return nil, cause.Wrap(cause.KeyRefused, fmt.Errorf("fetching the public key %s: %w", signer.KeyResource, err))
		}
	}
	if len(pem) == 0 || len(pem) > maxKey {
		return nil, cause.New(cause.KeyMalformed, "a signer's public key has %d bytes", len(pem))
	}
	pub, err := dsse.ParsePublicKeyPEM(pem)
	if err != nil {
		return nil, cause.New(cause.KeyMalformed, "a signer's public key: %w", err)
	}
	if signer.KeyResource != "" {
		der, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			return nil, cause.Wrap(cause.Internal, err)
		}
		sum := sha256.Sum256(der)
		if got := "sha256:" + hex.EncodeToString(sum[:]); got != signer.KeyDigest {
			return nil, cause.New(cause.SignatureInvalid, "the public key %s has digest %s, the policy pins %s", signer.KeyResource, got, signer.KeyDigest)
		}
	}
	return pub, nil
}

// found is what one look at the registry brought for one signer.
type found struct {
	any   bool   // something of the kind is attached, by whomever
	other string // a valid signature claims something else: what
	why   error  // why what is attached did not verify
}

// Verify checks that each of signers has signed the image. None is an error.
func Verify(ctx context.Context, s Source, signers []policy.Signer, keys KeyResource) error {
	if len(signers) == 0 {
		return cause.New(cause.PolicyInvalid, "the policy names no signer for %s", s.Ref)
	}
	for n, signer := range signers {
		co, err := s.options(ctx, signer, keys)
		if err != nil {
			return err
		}
		if err := s.verifyOne(ctx, co); err != nil {
			var c *cause.Error
			if errors.As(err, &c) && len(signers) > 1 {
				return cause.New(c.Code, "signer %d of %d: %w", n+1, len(signers), c.Err)
			}
			return err
		}
	}
	return nil
}

func (s Source) verifyOne(ctx context.Context, co *cosign.CheckOpts) error {
	legacy, ok, err := s.legacy(ctx, co)
	if err != nil || ok {
		return err
	}
	bundled, st, err := s.bundles(ctx, co, func(st *statement) bool { return st.PredicateType == signPredicate })
	if err != nil || st != nil {
		return err
	}
	switch {
	case legacy.other != "" || bundled.other != "":
		return cause.New(cause.SignatureOtherImage, "%s: a valid signature is of %s", s.Ref, legacy.other+bundled.other)
	case legacy.any || bundled.any:
		return cause.New(cause.SignatureInvalid, "%s: no signature verifies with the required key: %w", s.Ref, errors.Join(legacy.why, bundled.why))
	}
	return cause.New(cause.ImageUnsigned, "%s has no signature", s.Ref)
}

// legacy looks at the sha256-….sig tag. ok says that a signature verifies and
// claims this image.
func (s Source) legacy(ctx context.Context, co *cosign.CheckOpts) (f found, ok bool, err error) {
	tag, err := ociremote.SignatureTag(s.Ref, co.RegistryClientOpts...)
	if err != nil {
		return f, false, cause.Wrap(cause.Internal, err)
	}
	list, err := attached(tag, co)
	if err != nil || len(list) == 0 {
		return f, false, err
	}
	f.any = true
	// Claims are checked below, where "valid, but of another image" can be
	// told from "invalid".
	for _, sig := range list {
		payload, err := sig.Payload()
		if err != nil {
			return f, false, registryError(err)
		}
		if _, err := cosign.VerifyImageSignature(ctx, sig, s.hash(), co); err != nil {
			f.why = err
			continue
		}
		claim, err := parsePayload(payload)
		if err != nil {
			f.why = err
			continue
		}
		if other := claim.mismatch(s.Repository, s.digest()); other != "" {
			f.other = other
			continue
		}
		return f, true, nil
	}
	return f, false, nil
}

// attached lists the signatures or attestations under a tag; none is no error.
func attached(tag name.Tag, co *cosign.CheckOpts) ([]oci.Signature, error) {
	set, err := ociremote.Signatures(tag, co.RegistryClientOpts...)
	if err != nil {
		return nil, registryError(err)
	}
	list, err := set.Get()
	if err != nil {
		return nil, registryError(err)
	}
	if len(list) > maxSignatures {
		return nil, cause.New(cause.SignatureInvalid, "%d signatures are attached, the limit is %d", len(list), maxSignatures)
	}
	return list, nil
}

// registryError gives an error from below cosign its cause; one of ours in
// there keeps its own.
func registryError(err error) error {
	var t *transport.Error
	if errors.As(err, &t) && t.StatusCode < 500 && t.StatusCode != http.StatusTooManyRequests {
		return cause.Wrap(cause.SignatureInvalid, fmt.Errorf("reading signatures: %w", err))
	}
	if strings.Contains(err.Error(), "does not match") || strings.Contains(err.Error(), "error verifying") {
		return cause.Wrap(cause.SignatureInvalid, fmt.Errorf("reading signatures: %w", err))
	}
	return cause.Wrap(cause.RegistryUnavailable, fmt.Errorf("reading signatures: %w", err))
}
