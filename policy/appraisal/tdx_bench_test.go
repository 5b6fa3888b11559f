package appraisal

import (
	"testing"

	"github.com/google/go-tdx-guest/abi"
	"github.com/google/go-tdx-guest/verify"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
)

// BenchmarkTDXAppraise is one attestation with chain and collateral in memory;
// its parts tell what the library's opinion costs beside our own rows.
func BenchmarkTDXAppraise(b *testing.B) {
	log, register := measured(b)
	c := newTDX(b, tdxtest.Config{}).ours(b, log)
	c.report.RTMR[3] = register
	c.sign(b)
	accepted(b, c.appraise(b))
	b.Run("whole", func(b *testing.B) {
		for b.Loop() {
			a, err := c.verifier.Appraise(c.in)
			if err != nil || a.Verdict.Refusal() != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("new platform", func(b *testing.B) {
		for b.Loop() {
			v := &TDX{Roots: c.verifier.Roots, Collateral: c.verifier.Collateral}
			a, err := v.Appraise(c.in)
			if err != nil || a.Verdict.Refusal() != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("library alone", func(b *testing.B) {
		now := &verify.TimeSet{PckCertChain: c.in.Time}
		for b.Loop() {
			quote, err := abi.QuoteToProto(c.quote)
			if err == nil {
				err = verify.TdxQuote(quote, &verify.Options{TrustedRoots: c.verifier.Roots, Now: now})
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}
