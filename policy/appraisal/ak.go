package appraisal

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// secretSize is the size of an activation secret, in bytes.
const secretSize = 32

// unmarshal reads one TPM structure and refuses anything that does not come
// back byte for byte, such as data after its end.
func unmarshal[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](data []byte, what string) (*T, error) {
	v, err := tpm2.Unmarshal[T, P](data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if !bytes.Equal(tpm2.Marshal(*v), data) {
		return nil, fmt.Errorf("%s: data after its end, or not in its one form", what)
	}
	return v, nil
}

// ak is an attestation key as its TPM describes it.
type ak struct {
	public *tpm2.TPMTPublic
	name   []byte // nameAlg ‖ digest
	key    crypto.PublicKey
	spki   []byte
}

// parseAK reads a TPMT_PUBLIC and computes its Name. It does not judge it.
func parseAK(data []byte) (*ak, error) {
	pub, err := unmarshal[tpm2.TPMTPublic](data, "ak_public")
	if err != nil {
		return nil, err
	}
	if pub.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, fmt.Errorf("ak_public: name algorithm %#04x, expected SHA-256", uint16(pub.NameAlg))
	}
	name, err := tpm2.ObjectName(pub)
	if err != nil {
		return nil, fmt.Errorf("ak_public: %w", err)
	}
	key, err := tpm2.Pub(*pub)
	if err != nil {
		return nil, fmt.Errorf("ak_public: %w", err)
	}
	if err := strongKey(key); err != nil {
		return nil, fmt.Errorf("ak_public: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("ak_public: %w", err)
	}
	return &ak{public: pub, name: name.Buffer, key: key, spki: spki}, nil
}

// strongKey accepts RSA of 2048 to 4096 bits and ECDSA on P-256.
func strongKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("RSA of %d bits, expected 2048 to 4096", n)
		}
		return nil
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return fmt.Errorf("ECC on %s, expected P-256", k.Curve.Params().Name)
		}
		return nil
	}
	return fmt.Errorf("%T, expected RSA or ECC", key)
}

// Name is the AK's Name in lowercase hex.
func (a *ak) Name() string { return hex.EncodeToString(a.name) }

// attributes lists what makes the key unfit to sign quotes that mean anything.
// restricted: it signs nothing but what the TPM made. fixedTPM, fixedParent and
// sensitiveDataOrigin: its private part was made in and never left the TPM.
func (a *ak) attributes() (wrong []string) {
	o := a.public.ObjectAttributes
	for _, c := range []struct {
		name        string
		found, want bool
	}{
		{"restricted", o.Restricted, true},
		{"sign", o.SignEncrypt, true},
		{"fixedTPM", o.FixedTPM, true},
		{"fixedParent", o.FixedParent, true},
		{"sensitiveDataOrigin", o.SensitiveDataOrigin, true},
		{"decrypt", o.Decrypt, false},
	} {
		if c.found != c.want {
			wrong = append(wrong, fmt.Sprintf("%s=%t", c.name, c.found))
		}
	}
	return wrong
}

// Challenge makes a credential that only the EK's TPM opens, and only for an
// AK of this Name (TPM 2.0 part 1, section 24). Whether the EK is trusted is
// judged with the evidence, so that the verdict shows it. An AK with a
// certificate needs no credential.
func (v *TPM) Challenge(auth *kbs.CVMAgentAuth, random io.Reader) (*kbs.CVMAgentChallenge, *Pending, error) {
	if len(auth.AKPublic) == 0 || (len(auth.EKCert) == 0) == (len(auth.AKCert) == 0) {
		return nil, nil, errors.New("ak_public and one of ek_cert and ak_cert are needed for a vTPM under dialect " + kbs.Dialect)
	}
	if len(auth.AKCert) > 0 {
		return nil, &Pending{AKPublic: bytes.Clone(auth.AKPublic), AKCert: bytes.Clone(auth.AKCert)}, nil
	}
	cert, err := parseEKCert(auth.EKCert)
	if err != nil {
		return nil, nil, err
	}
	ek, err := ekPublic(cert)
	if err != nil {
		return nil, nil, err
	}
	a, err := parseAK(auth.AKPublic)
	if err != nil {
		return nil, nil, err
	}
	kem, err := tpm2.ImportEncapsulationKey(ek)
	if err != nil {
		return nil, nil, fmt.Errorf("the EK: %w", err)
	}
	secret := make([]byte, secretSize)
	if _, err := io.ReadFull(random, secret); err != nil {
		return nil, nil, fmt.Errorf("activation secret: %w", err)
	}
	object, encrypted, err := tpm2.CreateCredential(random, kem, a.name, secret)
	if err != nil {
		return nil, nil, fmt.Errorf("credential for the EK: %w", err)
	}
	c := &kbs.CVMAgentChallenge{
		CredentialBlob: tpm2.Marshal(tpm2.TPM2BIDObject{Buffer: object}),
		Secret:         tpm2.Marshal(tpm2.TPM2BEncryptedSecret{Buffer: encrypted}),
	}
	return c, &Pending{EKCert: bytes.Clone(auth.EKCert), AKPublic: bytes.Clone(auth.AKPublic), Secret: secret}, nil
}

func orNone(s []string) string {
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}
