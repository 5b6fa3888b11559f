// Package broker is the key broker: it speaks the KBS protocol 0.4.0 and the
// dialect cvm-agent/1, judges evidence through the appraisal package, and
// releases a resource only to a guest whose evidence satisfies that resource's
// rule.
//
// It promises: a resource without a rule is never released; every refusal
// names the checks in the way; resources are sealed at rest, encrypted to the
// guest's fresh key on the wire, and in no log; every token and every release
// is in a hash-chained audit log before it leaves. It trusts no evidence of TEE
// "sample": none is known, in any build.
package broker
