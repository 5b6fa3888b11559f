package signature

import (
	"github.com/sigstore/cosign/v2/pkg/oci"
	"github.com/sigstore/cosign/v2/pkg/oci/empty"
)

// one is cosign's set of attestations with a single member, so that each gets
// a verdict of its own.
type one struct {
	oci.Signatures
	sig oci.Signature
}

func only(sig oci.Signature) oci.Signatures { return &one{empty.Signatures(), sig} }

func (o *one) Get() ([]oci.Signature, error) { return []oci.Signature{o.sig}, nil }
