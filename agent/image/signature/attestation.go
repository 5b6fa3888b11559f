package signature

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	ociremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// bundles looks at the Sigstore bundles among the image's referrers and returns
// the first statement that want wants, that verifies and that is of this image.
func (s Source) bundles(ctx context.Context, co *cosign.CheckOpts, want func(*statement) bool) (f found, ok *statement, err error) {
	index, err := ociremote.Referrers(s.Ref, "", co.RegistryClientOpts...)
	if err != nil {
		return f, nil, registryError(err)
	}
	if len(index.Manifests) > maxSignatures {
		return f, nil, cause.New(cause.SignatureInvalid, "%d referrers are attached, the limit is %d", len(index.Manifests), maxSignatures)
	}
	nco := *co
	nco.NewBundleFormat = true
	if nco.TrustedMaterial == nil {
		nco.TrustedMaterial = &root.BaseTrustedMaterial{} // a key is all there is to trust
	}
	for _, m := range index.Manifests {
		ref, err := name.NewDigest(s.Ref.Context().Name()+"@"+m.Digest.String(), nameOptions(s.Ref)...)
		if err != nil {
			return f, nil, cause.Wrap(cause.SignatureInvalid, err)
		}
		b, err := ociremote.Bundle(ref, co.RegistryClientOpts...)
		if err != nil {
			var c *cause.Error
			if errors.As(err, &c) {
				return f, nil, err
			}
			f.why = err
			continue // an artifact of another kind
		}
		st, err := bundleStatement(b)
		if err != nil {
			f.any, f.why = true, err
			continue
		}
		if !want(st) {
			continue
		}
		f.any = true
		// First: is it by this signer at all? Then: is it of this image?
		if _, err := cosign.VerifyNewBundle(ctx, &nco, ownSubject(st), b); err != nil {
			f.why = err
			continue
		}
		if !st.isOf(s.Repository, s.digest()) {
			f.other = st.claims()
			continue
		}
		raw, err := hex.DecodeString(s.hash().Hex)
		if err != nil {
			return f, nil, cause.Wrap(cause.Internal, err)
		}
		if _, err := cosign.VerifyNewBundle(ctx, &nco, verify.WithArtifactDigest("sha256", raw), b); err != nil {
			f.why = err
			continue
		}
		return f, st, nil
	}
	return f, nil, nil
}

// ownSubject asks for whatever digest the statement claims.
func ownSubject(st *statement) verify.ArtifactPolicyOption {
	for _, s := range st.Subject {
		if raw, err := hex.DecodeString(s.Digest["sha256"]); err == nil && len(raw) == 32 {
			return verify.WithArtifactDigest("sha256", raw)
		}
	}
	return verify.WithArtifactDigest("sha256", make([]byte, 32))
}

func nameOptions(d name.Digest) []name.Option {
	if d.Context().Scheme() == "http" {
		return []name.Option{name.Insecure}
	}
	return nil
}

func bundleStatement(b *bundle.Bundle) (*statement, error) {
	env := b.GetDsseEnvelope()
	if env == nil {
		return nil, errors.New("the bundle has no DSSE envelope")
	}
	if env.GetPayloadType() != inTotoType {
		return nil, fmt.Errorf("the bundle's payload has type %.60q", env.GetPayloadType())
	}
	return parseStatement(env.GetPayload())
}

// SBOM returns the predicate of an SBOM attestation that each of signers has
// signed. Where several signers are required, their statements must agree to
// the byte.
func SBOM(ctx context.Context, s Source, signers []policy.Signer, keys KeyResource) ([]byte, error) {
	if len(signers) == 0 {
		return nil, cause.New(cause.PolicyInvalid, "the policy names no signer for the SBOM of %s", s.Ref)
	}
	var out []byte
	for n, signer := range signers {
		co, err := s.options(ctx, signer, keys)
		if err != nil {
			return nil, err
		}
		p, err := s.sbomBy(ctx, co)
		if err != nil {
			return nil, err
		}
		if n > 0 && string(p) != string(out) {
			return nil, cause.New(cause.SBOMSignature, "%s: the required signers have signed different SBOMs", s.Ref)
		}
		out = p
	}
	return out, nil
}

func isSBOM(st *statement) bool {
	return st.PredicateType == spdxPredicate || st.PredicateType == cdxPredicate || strings.HasPrefix(st.PredicateType, cdxPredicate+"/")
}

func (s Source) sbomBy(ctx context.Context, co *cosign.CheckOpts) ([]byte, error) {
	legacy, st, err := s.legacyAttestation(ctx, co)
	if err != nil {
		return nil, err
	}
	var bundled found
	if st == nil {
		if bundled, st, err = s.bundles(ctx, co, isSBOM); err != nil {
			return nil, err
		}
	}
	switch {
	case st != nil:
		return predicate(st)
	case legacy.other != "" || bundled.other != "":
		return nil, cause.New(cause.SBOMOtherImage, "%s: the SBOM attestation is of %s", s.Ref, legacy.other+bundled.other)
	case legacy.any || bundled.any:
		return nil, cause.New(cause.SBOMSignature, "%s: no SBOM attestation verifies with the required key: %w", s.Ref, errors.Join(legacy.why, bundled.why))
	}
	return nil, cause.New(cause.SBOMMissing, "%s has no SBOM attestation", s.Ref)
}

// predicate undoes cosign's habit of wrapping a predicate that it could not
// parse as {"Data": "…"}.
func predicate(st *statement) ([]byte, error) {
	var wrapped struct{ Data, Timestamp string }
	// Its first member tells; the tens of megabytes of an SBOM need no third look.
	member, _, _ := bytes.Cut(st.Predicate[:min(len(st.Predicate), 64)], []byte(":"))
	member = bytes.TrimSpace(bytes.TrimPrefix(bytes.TrimSpace(member), []byte("{")))
	if (string(member) == `"Data"` || string(member) == `"Timestamp"`) && bounded.DecodeJSON(st.Predicate, &wrapped, bounded.Limits{Bytes: maxStatement, Nodes: 16}) == nil && wrapped.Data != "" {
		return []byte(wrapped.Data), nil
	}
	if len(st.Predicate) == 0 || st.Predicate[0] != '{' {
		return nil, cause.New(cause.SBOMMalformed, "the SBOM attestation has no predicate")
	}
	return st.Predicate, nil
}

// legacyAttestation looks at the sha256-….att tag.
func (s Source) legacyAttestation(ctx context.Context, co *cosign.CheckOpts) (f found, ok *statement, err error) {
	tag, err := ociremote.AttestationTag(s.Ref, co.RegistryClientOpts...)
	if err != nil {
		return f, nil, cause.Wrap(cause.Internal, err)
	}
	list, err := attached(tag, co)
	if err != nil {
		return f, nil, err
	}
	for _, att := range list {
		raw, err := att.Payload()
		if err != nil {
			return f, nil, registryError(err)
		}
		st, err := envelopeStatement(raw)
		if err != nil {
			f.any, f.why = true, err
			continue
		}
		if !isSBOM(st) {
			continue
		}
		f.any = true
		// Without a claim verifier: claims are judged below, with their own cause.
		if _, _, err := cosign.VerifyImageAttestation(ctx, only(att), s.hash(), co); err != nil {
			f.why = err
			continue
		}
		if !st.isOf(s.Repository, s.digest()) {
			f.other = st.claims()
			continue
		}
		return f, st, nil
	}
	return f, nil, nil
}

func envelopeStatement(raw []byte) (*statement, error) {
	var env struct {
		PayloadType string          `json:"payloadType"`
		Payload     []byte          `json:"payload"` // standard base64 in the text
		Signatures  json.RawMessage `json:"signatures"`
	}
	if err := bounded.DecodeJSON(raw, &env, bounded.Limits{Bytes: 2 * maxStatement, Nodes: 1024}); err != nil {
		return nil, fmt.Errorf("attestation envelope: %w", err)
	}
	if env.PayloadType != inTotoType {
		return nil, fmt.Errorf("attestation has payload type %.60q", env.PayloadType)
	}
	return parseStatement(env.Payload)
}
