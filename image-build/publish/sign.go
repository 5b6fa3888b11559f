package publish

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/cosign/v2/pkg/cosign/bundle"
	"github.com/sigstore/cosign/v2/pkg/oci/mutate"
	ociremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	"github.com/sigstore/cosign/v2/pkg/oci/static"
	ctypes "github.com/sigstore/cosign/v2/pkg/types"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/dsse"
	"github.com/sigstore/sigstore/pkg/signature/options"
	"github.com/sigstore/sigstore/pkg/signature/payload"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// predicateSPDX is what `cosign verify-attestation --type spdxjson` expects.
const predicateSPDX = "https://spdx.dev/Document"

// statement is an in-toto statement. The type v0.1 is what cosign writes and
// every verifier reads. The predicate stays as the bytes that were scanned.
type statement struct {
	Type          string          `json:"_type"`
	PredicateType string          `json:"predicateType"`
	Subject       []subject       `json:"subject"`
	Predicate     json.RawMessage `json:"predicate,omitempty"`
}

type subject struct {
	Name   string            `json:"name,omitempty"`
	Digest map[string]string `json:"digest"`
}

const (
	statementV01 = "https://in-toto.io/Statement/v0.1"
	statementV1  = "https://in-toto.io/Statement/v1"
)

// loadSigner opens a cosign private key and zeroises the passphrase.
func loadSigner(file string, password func() ([]byte, error)) (signature.SignerVerifier, error) {
	pem, err := bounded.ReadNamed(file, 64<<10)
	if err != nil {
		return nil, cause.New(cause.Usage, "private key: %w", err)
	}
	defer clear(pem)
	pass, err := password()
	if err != nil {
		return nil, cause.Wrap(cause.Usage, err)
	}
	defer clear(pass)
	sv, err := cosign.LoadPrivateKey(pem, pass, nil)
	if err != nil {
		return nil, cause.New(cause.Usage, "private key %s: the passphrase does not open it, or it is not a private key of cosign (%w)", file, err)
	}
	return sv, nil
}

// encode is JSON without HTML escapes, so that an embedded document keeps its
// bytes up to white space.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// sign pushes a cosign signature over the digest, its docker-reference being
// the repository, and returns the tag that holds it.
func (r *run) sign(ctx context.Context, d name.Digest) (string, error) {
	claim, err := payload.Cosign{Image: d}.MarshalJSON()
	if err != nil {
		return "", err
	}
	raw, err := r.signer.SignMessage(bytes.NewReader(claim), options.WithContext(ctx))
	if err != nil {
		return "", err
	}
	sig, err := static.NewSignature(claim, base64.StdEncoding.EncodeToString(raw))
	if err != nil {
		return "", err
	}
	opts := r.cosignOptions(ctx)
	se, err := mutate.AttachSignatureToEntity(ociremote.SignedUnknown(d, opts...), sig)
	if err != nil {
		return "", err
	}
	if err := ociremote.WriteSignatures(d.Repository, se, opts...); err != nil {
		return "", err
	}
	tag, err := ociremote.SignatureTag(d, opts...)
	if err != nil {
		return "", err
	}
	r.did("signature " + tag.TagStr())
	if !r.o.Bundle {
		return tag.Name(), nil
	}
	err = r.writeBundle(ctx, d, statement{Type: statementV1, PredicateType: ctypes.CosignSignPredicateType, Subject: subjectOf(d, "")})
	return tag.Name(), err
}

// attest pushes the SBOM as a signed in-toto statement about the digest.
func (r *run) attest(ctx context.Context, d name.Digest, sbom []byte) (string, error) {
	st := statement{Type: statementV01, PredicateType: predicateSPDX, Subject: subjectOf(d, d.Repository.Name()), Predicate: sbom}
	_, envelope, err := r.envelope(ctx, st)
	if err != nil {
		return "", err
	}
	att, err := static.NewAttestation(envelope,
		static.WithLayerMediaType(ctypes.DssePayloadType),
		static.WithAnnotations(map[string]string{"predicateType": predicateSPDX}))
	if err != nil {
		return "", err
	}
	opts := r.cosignOptions(ctx)
	se, err := mutate.AttachAttestationToEntity(ociremote.SignedUnknown(d, opts...), att)
	if err != nil {
		return "", err
	}
	if err := ociremote.WriteAttestations(d.Repository, se, opts...); err != nil {
		return "", err
	}
	tag, err := ociremote.AttestationTag(d, opts...)
	if err != nil {
		return "", err
	}
	r.did("attestation " + tag.TagStr())
	if !r.o.Bundle {
		return tag.Name(), nil
	}
	return tag.Name(), r.writeBundle(ctx, d, st)
}

// envelope signs a statement; it returns the payload and the DSSE envelope.
func (r *run) envelope(ctx context.Context, st statement) (body, envelope []byte, err error) {
	body, err = encode(st)
	if err != nil {
		return nil, nil, err
	}
	envelope, err = dsse.WrapSigner(r.signer, ctypes.IntotoPayloadType).SignMessage(bytes.NewReader(body), options.WithContext(ctx))
	return body, envelope, err
}

// writeBundle pushes a statement as a Sigstore bundle that refers to the
// image: OCI 1.1 referrers, or their tag schema where the registry has none.
func (r *run) writeBundle(ctx context.Context, d name.Digest, st statement) error {
	body, envelope, err := r.envelope(ctx, st)
	if err != nil {
		return err
	}
	pub, err := r.signer.PublicKey()
	if err != nil {
		return err
	}
	b, err := bundle.MakeNewBundle(pub, nil, body, envelope, nil, nil)
	if err != nil {
		return err
	}
	if err := ociremote.WriteAttestationNewBundleFormat(d, b, st.PredicateType, r.cosignOptions(ctx)...); err != nil {
		return err
	}
	r.did("bundle " + st.PredicateType)
	return nil
}

func subjectOf(d name.Digest, repo string) []subject {
	return []subject{{Name: repo, Digest: map[string]string{"sha256": d.DigestStr()[len("sha256:"):]}}}
}
