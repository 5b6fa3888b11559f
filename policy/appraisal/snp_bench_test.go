package appraisal

import (
	"crypto/ecdsa"
	"crypto/sha512"
	"math/big"
	"testing"

	"github.com/google/go-sev-guest/abi"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/snptest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// BenchmarkSNPAppraise is what one attestation costs a broker that knows the
// certificates. Its limit is BenchmarkP384Verify in the same run.
func BenchmarkSNPAppraise(b *testing.B) {
	s := newSNPSession(b, snptest.Config{})
	mustPass(b, s.appraise(b))
	b.ReportAllocs()
	for b.Loop() {
		a, err := s.verifier.Appraise(s.in)
		if err != nil || a.Verdict.Refusal() != nil {
			b.Fatal(err, a.Verdict.Refusal())
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "appraisals/s")
}

// BenchmarkSNPAppraiseParallel is the same on all cores.
func BenchmarkSNPAppraiseParallel(b *testing.B) {
	s := newSNPSession(b, snptest.Config{})
	mustPass(b, s.appraise(b))
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			a, err := s.verifier.Appraise(s.in)
			if err != nil || a.Verdict.Refusal() != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "appraisals/s")
}

// BenchmarkSNPAppraiseUnknownChain verifies the chain each time, as for a chip
// that is seen first.
func BenchmarkSNPAppraiseUnknownChain(b *testing.B) {
	s := newSNPSession(b, snptest.Config{})
	mustPass(b, s.appraise(b))
	for b.Loop() {
		v := &SNP{Roots: s.verifier.Roots, Collateral: s.verifier.Collateral}
		if a, err := v.Appraise(s.in); err != nil || a.Verdict.Refusal() != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "appraisals/s")
}

// BenchmarkP384Verify is the bare signature verification below all of them.
func BenchmarkP384Verify(b *testing.B) {
	c := snptest.New(b, snptest.Config{})
	raw := c.Report(b, [64]byte{}, snptest.Options{})
	sum := sha512.Sum384(abi.SignedComponent(raw))
	r, err := kbs.SNPReportFromRaw(raw)
	if err != nil {
		b.Fatal(err)
	}
	var rs [2]*big.Int
	for i, v := range []kbs.Bytes{r.Signature.R, r.Signature.S} {
		rs[i] = abi.AmdBigInt(v)
	}
	for b.Loop() {
		if !ecdsa.Verify(&c.Signer.Keys.Vcek.PublicKey, sum[:], rs[0], rs[1]) {
			b.Fatal("not valid")
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "verifications/s")
}
