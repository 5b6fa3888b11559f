package main

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"runtime"
	"time"
)

// bareTime is how long each bare loop runs.
const bareTime = time.Second

// bare is the physical limit: nothing but the cryptography of a session, on
// all processors, over keys and messages at hand.
type bare struct {
	report  *ecdsa.PrivateKey // P-384, as a VCEK
	token   *ecdsa.PrivateKey // P-256, as the broker's token key and a policy's signer
	guest   *ecdh.PublicKey   // P-256, as a guest's session key
	digest  []byte            // SHA-384
	message []byte            // SHA-256
	signed  []byte            // digest, by report
	policy  []byte            // message, by token
}

func newBare() (*bare, error) {
	b := &bare{}
	var err error
	if b.report, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader); err != nil {
		return nil, err
	}
	if b.token, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	guest, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	b.guest = guest.PublicKey()
	long, short := sha512.Sum384([]byte("a report")), sha256.Sum256([]byte("a token"))
	b.digest, b.message = long[:], short[:]
	if b.signed, err = b.report.Sign(rand.Reader, b.digest, crypto.SHA384); err != nil {
		return nil, err
	}
	b.policy, err = b.token.Sign(rand.Reader, b.message, crypto.SHA256)
	return b, err
}

// verify is one signature of a report.
func (b *bare) verify() error {
	if !ecdsa.VerifyASN1(&b.report.PublicKey, b.digest, b.signed) {
		return fmt.Errorf("a good signature does not verify")
	}
	return nil
}

// session is all the asymmetric cryptography that the broker cannot avoid in
// one session of an agent with a kept connection: the report's signature, the
// token's, the policy's under the rule, and the key that the resource is
// encrypted with. Hashes, AES and TLS records are not in it.
func (b *bare) session() error {
	if err := b.verify(); err != nil {
		return err
	}
	if _, err := b.token.Sign(rand.Reader, b.message, crypto.SHA256); err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(&b.token.PublicKey, b.message, b.policy) {
		return fmt.Errorf("a good signature does not verify")
	}
	ephemeral, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	_, err = ephemeral.ECDH(b.guest)
	return err
}

// perSecond runs do on all processors. Its rate is by the processor time that
// it had, so that others on the machine count on neither side of a ratio.
func perSecond(ctx context.Context, do func() error) (float64, error) {
	before := ownCPU()
	n, _, err := closedLoop(ctx, runtime.NumCPU(), 0, bareTime, func(context.Context, int) error { return do() })
	if err != nil {
		return 0, err
	}
	return float64(n*runtime.NumCPU()) / (ownCPU() - before), nil
}
