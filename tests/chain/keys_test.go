package chain

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/agent/keyrelease"
	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/agent/platform/platformtest"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// akCertificate is a certificate by a made issuer for the AK that the options
// make, in a file, and the issuer in PEM.
func akCertificate(t *testing.T, spec string, o platform.AKOptions) (file string, issuer []byte) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	guest, err := platform.Open(context.Background(), platformtest.Bare(nil), platform.Options{TPM: spec, AK: o})
	must(err)
	defer guest.Close()
	a, err := guest.Choose([]policy.Platform{policy.PlatformTPM}, 0)
	must(err)
	auth, err := a.Auth(context.Background())
	must(err)
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](auth.AKPublic)
	must(err)
	var key crypto.PublicKey
	key, err = tpm2.Pub(*public)
	must(err)

	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	now := time.Now()
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cloud"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, &ca.PublicKey, ca)
	must(err)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 3}}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, root, key, ca)
	must(err)
	file = filepath.Join(t.TempDir(), "ak.der")
	must(os.WriteFile(file, der, 0o600))
	return file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rootDER})
}

// Each kind of AK, and each way to vouch for it, from the TPM to the opened key.
func TestTPMKeysEndToEnd(t *testing.T) {
	v := newVM(t, 0)
	// The attester of this test opens the TPM itself; swtpm serves one at a time.
	register := v.log
	if err := v.tpm.Close(); err != nil {
		t.Fatal(err)
	}
	sets := func(name string, roots []byte) []appraisal.RootSet {
		t.Helper()
		set, err := appraisal.ParseRoots(name, roots)
		if err != nil {
			t.Fatal(err)
		}
		return []appraisal.RootSet{set}
	}
	file, issuer := akCertificate(t, v.soft.Spec, platform.AKOptions{Algorithm: platform.AlgorithmECC})
	byEK := newBench(t, &appraisal.TPM{EKRoots: sets("maker", v.soft.Roots)})
	byAK := newBench(t, &appraisal.TPM{AKRoots: sets("cloud", issuer)})
	digest := imageOne[strings.Index(imageOne, "@")+1:]
	for b, root := range map[*bench]string{byEK: "maker", byAK: "cloud"} {
		rule := release.Rule{APIVersion: release.RuleAPIVersion, Platforms: []string{"tpm"}, EKRoots: []string{root}, Images: []string{digest},
			Policy: &release.PolicyRule{Names: []string{"shop"}, Signers: []string{v.signer.Fingerprint}}}
		if err := b.admin.PutRule(context.Background(), webKey, rule); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		ak platform.AKOptions
		at *bench
		ok bool
	}{
		"RSA by activation":                         {platform.AKOptions{Algorithm: platform.AlgorithmRSA}, byEK, true},
		"ECC by activation":                         {platform.AKOptions{Algorithm: platform.AlgorithmECC}, byEK, true},
		"ECC by certificate":                        {platform.AKOptions{Algorithm: platform.AlgorithmECC, Certificate: "file:" + file}, byAK, true},
		"a certificate where EKs alone are trusted": {platform.AKOptions{Algorithm: platform.AlgorithmECC, Certificate: "file:" + file}, byEK, false},
		"activation where AKs alone are trusted":    {platform.AKOptions{Algorithm: platform.AlgorithmECC}, byAK, false},
	} {
		t.Run(name, func(t *testing.T) {
			guest, err := platform.Open(context.Background(), platformtest.Bare(nil), platform.Options{TPM: v.soft.Spec, AK: c.ak})
			if err != nil {
				t.Fatal(err)
			}
			defer guest.Close()
			a, err := guest.Choose([]policy.Platform{policy.PlatformTPM}, 0)
			if err != nil {
				t.Fatal(err)
			}
			client := v.client(t, c.at.policy, func(k *keyrelease.Config) { k.Attester, k.EventLog = a, register.Bytes })
			if c.ok {
				released(t, client)
				return
			}
			refused(t, client, cause.AttestationRefused, "no ")
		})
	}
}
