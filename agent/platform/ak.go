package platform

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// NV indices of EK certificates (TCG EK Credential Profile 2.5, section 2.2.1.4).
const (
	nvRSAEKCert = 0x01C00002
	nvECCEKCert = 0x01C0000A
)

// maxKeyCert bounds an EK or AK certificate, in bytes.
const maxKeyCert = 8 << 10

// AKOptions say which attestation key a bare vTPM makes and who vouches for it.
type AKOptions struct {
	// Algorithm is "rsa", "ecc", or "auto" ("" too): RSA, the one kind that
	// Trustee takes, unless the EK is ECC alone or the TPM makes no such key.
	Algorithm string
	// Certificate of the AK: "nv:0x…" or "file:/path"; "" for credential
	// activation with the EK.
	Certificate string
}

// The values of AKOptions.Algorithm.
const (
	AlgorithmAuto = "auto"
	AlgorithmRSA  = "rsa"
	AlgorithmECC  = "ecc"
)

// Check is for the one place where the configuration is validated.
func (o AKOptions) Check() error {
	switch o.Algorithm {
	case "", AlgorithmAuto, AlgorithmRSA, AlgorithmECC:
	default:
		return fmt.Errorf("algorithm is %q, expected auto, rsa or ecc", o.Algorithm)
	}
	_, _, err := o.source()
	return err
}

// source is where the AK's certificate is.
func (o AKOptions) source() (index tpm2.TPMHandle, path string, err error) {
	kind, where, _ := strings.Cut(o.Certificate, ":")
	switch {
	case o.Certificate == "":
		return 0, "", nil
	case kind == "file" && filepath.IsAbs(where):
		return 0, where, nil
	case kind == "nv":
		n, err := strconv.ParseUint(where, 0, 32)
		if err == nil && n>>24 == uint64(tpm2.TPMHTNVIndex) {
			return tpm2.TPMHandle(n), "", nil
		}
	}
	return 0, "", fmt.Errorf("certificate is %q, expected nv:0x01…… or file:/PATH", o.Certificate)
}

// attestationKey is a transient AK, never saved. It is a primary key of the
// endorsement hierarchy, so the same TPM makes the same AK again: the broker
// knows an instance by it across restarts of the daemon.
type attestationKey struct {
	handle   tpm2.TPMHandle
	name     tpm2.TPM2BName
	public   []byte // TPMT_PUBLIC
	spki     []byte // SPKI DER
	cert     []byte // DER; with it no EK is needed
	ekCert   []byte // DER
	ekPublic tpm2.TPMTPublic
}

// akAttributes make a key that signs nothing but what its TPM made.
var akAttributes = tpm2.TPMAObject{
	FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
	UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
}

// akRSA is a restricted RSA-2048 signing key with RSASSA-SHA256, the only
// scheme that Trustee's `tpm` verifier takes.
var akRSA = tpm2.TPMTPublic{
	Type:             tpm2.TPMAlgRSA,
	NameAlg:          tpm2.TPMAlgSHA256,
	ObjectAttributes: akAttributes,
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
		Scheme: tpm2.TPMTRSAScheme{
			Scheme:  tpm2.TPMAlgRSASSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		KeyBits: 2048,
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: make([]byte, 256)}),
}

// akECC is a restricted P-256 signing key with ECDSA-SHA256.
var akECC = tpm2.TPMTPublic{
	Type:             tpm2.TPMAlgECC,
	NameAlg:          tpm2.TPMAlgSHA256,
	ObjectAttributes: akAttributes,
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		CurveID: tpm2.TPMECCNistP256,
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
		Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
	}),
}

// Auth implements Attester: the AK's TPMT_PUBLIC, and its certificate or the
// EK's.
func (p *TPM) Auth(ctx context.Context) (*kbs.CVMAgentAuth, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, err := p.key(ctx)
	if err != nil {
		return nil, err
	}
	return &kbs.CVMAgentAuth{Version: kbs.Dialect, EKCert: k.ekCert, AKPublic: k.public, AKCert: k.cert}, nil
}

// Additional implements Attester: the secret that only the EK's TPM opens, and
// only for this AK. A certified AK needs none.
func (p *TPM) Additional(ctx context.Context, _ string, c *kbs.CVMAgentChallenge) (kbs.AdditionalCVMAgent, error) {
	if p.options.Certificate != "" {
		return kbs.AdditionalCVMAgent{}, nil
	}
	secret, err := p.Activate(ctx, c)
	return kbs.AdditionalCVMAgent{Activation: secret}, err
}

// Activate proves that the AK and the EK of Auth live in one TPM: it returns
// the secret that the broker encrypted to them (TPM2_ActivateCredential).
func (p *TPM) Activate(ctx context.Context, c *kbs.CVMAgentChallenge) ([]byte, error) {
	if c == nil {
		return nil, cause.New(cause.BrokerProtocol, "the broker does not speak dialect %s: no credential in its challenge", kbs.Dialect)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	k, err := p.key(ctx)
	if err != nil {
		return nil, err
	}
	blob, err := tpm2.Unmarshal[tpm2.TPM2BIDObject](c.CredentialBlob)
	if err != nil {
		return nil, cause.New(cause.BrokerProtocol, "credential_blob is not a TPM2B_ID_OBJECT: %w", err)
	}
	secret, err := tpm2.Unmarshal[tpm2.TPM2BEncryptedSecret](c.Secret)
	if err != nil {
		return nil, cause.New(cause.BrokerProtocol, "secret is not a TPM2B_ENCRYPTED_SECRET: %w", err)
	}
	ek, err := p.createPrimary(k.ekPublic)
	if err != nil {
		return nil, err
	}
	defer func() { _ = p.flush(ek.ObjectHandle) }()
	answer, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: k.handle, Name: k.name, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle: tpm2.AuthHandle{
			Handle: ek.ObjectHandle, Name: ek.Name,
			Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, endorsementPolicy),
		},
		CredentialBlob: *blob,
		Secret:         *secret,
	}.Execute(p.t)
	if err != nil {
		return nil, p.failed("activate the credential", err)
	}
	return answer.CertInfo.Buffer, nil
}

// endorsementPolicy is PolicySecret(TPM_RH_ENDORSEMENT), the default EK's policy.
func endorsementPolicy(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: session,
		NonceTPM:      nonce,
	}.Execute(t)
	return err
}

// key returns the AK, made at first use. mu is held.
func (p *TPM) key(ctx context.Context) (*attestationKey, error) {
	if p.ak != nil {
		return p.ak, nil
	}
	if err := p.usable(ctx); err != nil {
		return nil, err
	}
	k := &attestationKey{}
	var err error
	if p.options.Certificate == "" {
		if k.ekCert, k.ekPublic, err = p.endorsement(); err != nil {
			return nil, err
		}
	}
	made, err := p.makeAK(k.ekPublic.Type == tpm2.TPMAlgECC)
	if err != nil {
		return nil, err
	}
	k.handle, k.name = made.ObjectHandle, made.Name
	keep := false
	defer func() {
		if !keep {
			_ = p.flush(made.ObjectHandle)
		}
	}()
	k.public = made.OutPublic.Bytes()
	if k.spki, err = spki(made.OutPublic); err != nil {
		return nil, err
	}
	if p.options.Certificate != "" {
		if k.cert, err = p.akCertificate(k.spki); err != nil {
			return nil, err
		}
	}
	keep = true
	p.ak = k
	return k, nil
}

// makeAK makes the kind of key that the configuration asks for.
func (p *TPM) makeAK(ekIsECC bool) (*tpm2.CreatePrimaryResponse, error) {
	switch {
	case p.options.Algorithm == AlgorithmRSA:
		return p.createPrimary(akRSA)
	case p.options.Algorithm == AlgorithmECC || ekIsECC:
		return p.createPrimary(akECC)
	}
	made, err := p.createPrimary(akRSA)
	if cause.Of(err) != cause.EvidenceFailed {
		return made, err // made, or a TPM that does not answer
	}
	// The TPM refused the template: ECC is what the others make.
	made, eccErr := p.createPrimary(akECC)
	return made, errors.Join(eccErr, onlyWith(eccErr, err))
}

// onlyWith is err where there is another error to go with it.
func onlyWith(other, err error) error {
	if other == nil {
		return nil
	}
	return err
}

// akCertificate reads the AK's certificate and holds it against the key: one of
// another key would be refused by every broker, with a worse message.
func (p *TPM) akCertificate(key []byte) ([]byte, error) {
	index, path, err := p.options.source()
	if err != nil {
		return nil, cause.New(cause.Config, "AK: %w", err)
	}
	var der []byte
	if path != "" {
		if der, err = readCertificate(path); err != nil {
			return nil, cause.New(cause.EvidenceFailed, "the AK certificate: %w", err)
		}
	} else {
		found := false
		if der, found, err = p.readNV(index, maxKeyCert); err != nil {
			return nil, err
		}
		if !found {
			return nil, cause.New(cause.EvidenceFailed, "the TPM holds no AK certificate (NV %#x)", uint32(index))
		}
		if der, err = withoutPadding(der); err != nil {
			return nil, cause.New(cause.EvidenceFailed, "NV %#x: %w", uint32(index), err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "the AK certificate: %w", err)
	}
	if !bytes.Equal(cert.RawSubjectPublicKeyInfo, key) {
		return nil, cause.New(cause.EvidenceFailed, "the AK certificate is of another key than this TPM's AK")
	}
	return der, nil
}

// withoutPadding cuts a DER value out of an NV index that is larger: DER has one
// end, whatever its last byte is.
func withoutPadding(data []byte) ([]byte, error) {
	var value asn1.RawValue
	rest, err := asn1.Unmarshal(data, &value)
	if err != nil {
		return nil, fmt.Errorf("no DER: %w", err)
	}
	if len(bytes.Trim(rest, "\x00\xff")) > 0 {
		return nil, errors.New("data after the certificate's end")
	}
	return value.FullBytes, nil
}

// readCertificate reads one certificate, PEM or DER.
func readCertificate(path string) ([]byte, error) {
	data, err := bounded.ReadFile(path, 4*maxKeyCert)
	if err != nil {
		return nil, err
	}
	return firstCertificate(data)
}

// endorsement finds the EK certificate, and the default template of its key.
func (p *TPM) endorsement() ([]byte, tpm2.TPMTPublic, error) {
	for _, c := range []struct {
		index    tpm2.TPMHandle
		template tpm2.TPMTPublic
	}{{nvRSAEKCert, tpm2.RSAEKTemplate}, {nvECCEKCert, tpm2.ECCEKTemplate}} {
		der, found, err := p.readNV(c.index, maxKeyCert)
		if err != nil {
			return nil, tpm2.TPMTPublic{}, err
		}
		if found {
			return der, c.template, nil
		}
	}
	return nil, tpm2.TPMTPublic{}, cause.New(cause.EvidenceFailed, "the TPM holds no EK certificate (NV %#x, %#x)", nvRSAEKCert, nvECCEKCert)
}

func (p *TPM) createPrimary(template tpm2.TPMTPublic) (*tpm2.CreatePrimaryResponse, error) {
	made, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(p.t)
	if err != nil {
		return nil, p.failed("create a primary key", err)
	}
	return made, nil
}

// spki is a key in the form that X.509 has for it.
func spki(public tpm2.TPM2BPublic) ([]byte, error) {
	contents, err := public.Contents()
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "read the AK back: %w", err)
	}
	pub, err := tpm2.Pub(*contents)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "read the AK back: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "encode the AK: %w", err)
	}
	return der, nil
}
