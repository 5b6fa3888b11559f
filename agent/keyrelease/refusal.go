package keyrelease

import (
	"errors"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Refusal is an error answer of the broker: errors.As finds it in what Attest
// and Resource return. Branch on Variant, the suffix of its type, never on the
// HTTP status.
type Refusal = kbs.Error

// Variant is the suffix of the type of the broker's answer in err, such as
// kbs.VariantPolicyDeny; "" when err is none or the type is not the protocol's.
func Variant(err error) string {
	var r *Refusal
	if !errors.As(err, &r) {
		return ""
	}
	return r.Variant()
}

// refusal gives an error answer of the broker the cause code that fits. A
// refusal is final; its reason is the broker's detail.
func refusal(code cause.Code, err error) error {
	var (
		coded  *cause.Error
		answer *Refusal
	)
	if errors.As(err, &coded) || !errors.As(err, &answer) {
		return err
	}
	switch answer.Variant() {
	case "", kbs.VariantInvalidRequestPath, kbs.VariantPluginNotFound, kbs.VariantSerdeError:
		return cause.New(cause.BrokerProtocol, "%w", answer)
	}
	return cause.New(code, "%w", answer)
}
