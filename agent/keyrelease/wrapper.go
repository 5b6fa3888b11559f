package keyrelease

import (
	"context"
	"errors"

	"github.com/containers/ocicrypt/config"
)

// Unwrapper is ocicrypt's key wrapper for the attestation-agent provider, for
// callers that let ocicrypt pick the annotation. It unwraps only.
type Unwrapper struct {
	Context   context.Context // ocicrypt's interface has none
	Resources Resources
}

// UnwrapKey implements keywrap.KeyWrapper; annotation is one packet (JSON):
// ocicrypt has split the list and decoded its base64.
func (u *Unwrapper) UnwrapKey(_ *config.DecryptConfig, annotation []byte) ([]byte, error) {
	return unwrapPacket(u.Context, u.Resources, annotation)
}

// WrapKeys implements keywrap.KeyWrapper: the guest wraps nothing.
func (u *Unwrapper) WrapKeys(*config.EncryptConfig, []byte) ([]byte, error) {
	return nil, errors.New("the guest does not encrypt layers")
}

// GetAnnotationID implements keywrap.KeyWrapper.
func (u *Unwrapper) GetAnnotationID() string { return AnnotationKey }

// NoPossibleKeys implements keywrap.KeyWrapper.
func (u *Unwrapper) NoPossibleKeys(map[string][][]byte) bool { return false }

// GetPrivateKeys implements keywrap.KeyWrapper: they stay with the broker.
func (u *Unwrapper) GetPrivateKeys(map[string][][]byte) [][]byte { return nil }

// GetKeyIdsFromPacket implements keywrap.KeyWrapper.
func (u *Unwrapper) GetKeyIdsFromPacket(string) ([]uint64, error) { return nil, nil }

// GetRecipients implements keywrap.KeyWrapper.
func (u *Unwrapper) GetRecipients(string) ([]string, error) { return nil, nil }
