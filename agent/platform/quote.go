package platform

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// NV indices of EK certificates (TCG EK Credential Profile 2.5, section 2.2.1.4).
const (
	nvRSAEKCert = 0x01C00002
	nvECCEKCert = 0x01C0000A
)

// maxEKCert bounds an EK certificate, in bytes.
const maxEKCert = 8 << 10

// attestationKey is a transient AK, never saved. It is a primary key of the
// endorsement hierarchy, so the same TPM makes the same AK again: the broker
// knows an instance by it across restarts of the daemon.
type attestationKey struct {
	handle   tpm2.TPMHandle
	name     tpm2.TPM2BName
	public   []byte // TPMT_PUBLIC
	spki     []byte // SPKI DER
	ekCert   []byte // DER
	ekPublic tpm2.TPMTPublic
}

// akTemplate is a restricted RSA-2048 signing key with RSASSA-SHA256, the only
// scheme that Trustee's `tpm` verifier takes.
var akTemplate = tpm2.TPMTPublic{
	Type:    tpm2.TPMAlgRSA,
	NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
		UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
		Scheme: tpm2.TPMTRSAScheme{
			Scheme:  tpm2.TPMAlgRSASSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		KeyBits: 2048,
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: make([]byte, 256)}),
}

// TEE implements Attester.
func (p *TPM) TEE() string { return string(policy.PlatformTPM) }

// Auth implements Attester: the EK certificate and the AK's TPMT_PUBLIC.
func (p *TPM) Auth(ctx context.Context) (*kbs.CVMAgentAuth, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, err := p.key(ctx)
	if err != nil {
		return nil, err
	}
	return &kbs.CVMAgentAuth{Version: kbs.Dialect, EKCert: k.ekCert, AKPublic: k.public}, nil
}

// Activate implements Attester with TPM2_ActivateCredential.
func (p *TPM) Activate(ctx context.Context, c *kbs.CVMAgentChallenge) ([]byte, error) {
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

// Evidence implements Attester: a quote of all PCRs over the first 32 bytes of
// reportData, and the values that it covers.
func (p *TPM) Evidence(ctx context.Context, reportData [48]byte) (json.RawMessage, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, err := p.key(ctx)
	if err != nil {
		return nil, err
	}
	all := make([]int, PCRCount)
	for i := range all {
		all[i] = i
	}
	// The values are read beside the quote; a PCR that moved in between (the
	// kernel extends some) makes them disagree, and both are taken anew.
	for range 5 {
		values, err := p.readPCRs(ctx, all...)
		if err != nil {
			return nil, err
		}
		answer, err := tpm2.Quote{
			SignHandle:     tpm2.AuthHandle{Handle: k.handle, Name: k.name, Auth: tpm2.PasswordAuth(nil)},
			QualifyingData: tpm2.TPM2BData{Buffer: reportData[:32]},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      selection(all...),
		}.Execute(p.t)
		if err != nil {
			return nil, p.failed("quote", err)
		}
		attest, err := answer.Quoted.Contents()
		if err != nil {
			return nil, cause.New(cause.EvidenceFailed, "read the quote back: %w", err)
		}
		quoted, err := attest.Attested.Quote()
		if err != nil {
			return nil, cause.New(cause.EvidenceFailed, "read the quote back: %w", err)
		}
		h := sha256.New()
		pcrs := make([]string, PCRCount)
		for i := range all {
			h.Write(values[i])
			pcrs[i] = hex.EncodeToString(values[i])
		}
		if !bytes.Equal(h.Sum(nil), quoted.PCRDigest.Buffer) {
			continue
		}
		return json.Marshal(kbs.TPMEvidence{
			Quote: kbs.TPMQuote{
				Signature: tpm2.Marshal(answer.Signature),
				Message:   answer.Quoted.Bytes(),
				PCRs:      pcrs,
			},
			AKPublic: k.spki,
		})
	}
	return nil, cause.New(cause.EvidenceFailed, "the PCRs kept changing during the quote")
}

// key returns the AK, made at first use under the EK that has a certificate.
func (p *TPM) key(ctx context.Context) (*attestationKey, error) {
	if p.ak != nil {
		return p.ak, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ekCert, ekTemplate, err := p.endorsement()
	if err != nil {
		return nil, err
	}
	made, err := p.createPrimary(akTemplate)
	if err != nil {
		return nil, err
	}
	keep := false
	defer func() {
		if !keep {
			_ = p.flush(made.ObjectHandle)
		}
	}()
	public, err := made.OutPublic.Contents()
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "read the AK back: %w", err)
	}
	pub, err := tpm2.Pub(*public)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "read the AK back: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "encode the AK: %w", err)
	}
	keep = true
	p.ak = &attestationKey{
		handle: made.ObjectHandle, name: made.Name, public: made.OutPublic.Bytes(),
		spki: spki, ekCert: ekCert, ekPublic: ekTemplate,
	}
	return p.ak, nil
}

// endorsement finds the EK certificate, and the default template of its key.
func (p *TPM) endorsement() ([]byte, tpm2.TPMTPublic, error) {
	for _, c := range []struct {
		index    tpm2.TPMHandle
		template tpm2.TPMTPublic
	}{{nvRSAEKCert, tpm2.RSAEKTemplate}, {nvECCEKCert, tpm2.ECCEKTemplate}} {
		der, found, err := p.readNV(c.index)
		if err != nil {
			return nil, tpm2.TPMTPublic{}, err
		}
		if found {
			return der, c.template, nil
		}
	}
	return nil, tpm2.TPMTPublic{}, cause.New(cause.EvidenceFailed, "the TPM holds no EK certificate (NV %#x, %#x)", nvRSAEKCert, nvECCEKCert)
}

// readNV reads an NV index whole; found is false when there is none.
func (p *TPM) readNV(index tpm2.TPMHandle) (data []byte, found bool, err error) {
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(p.t)
	if err != nil {
		if errors.Is(err, tpm2.TPMRCHandle) {
			return nil, false, nil
		}
		return nil, false, p.failed(fmt.Sprintf("look for NV %#x", uint32(index)), err)
	}
	contents, err := public.NVPublic.Contents()
	if err != nil {
		return nil, false, cause.New(cause.EvidenceFailed, "NV %#x: %w", uint32(index), err)
	}
	size := int(contents.DataSize)
	if size > maxEKCert {
		return nil, false, cause.New(cause.EvidenceFailed, "NV %#x holds %d bytes, at most %d", uint32(index), size, maxEKCert)
	}
	for len(data) < size {
		n := min(size-len(data), 512)
		part, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: public.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: public.NVName},
			Size:       uint16(n),
			Offset:     uint16(len(data)),
		}.Execute(p.t)
		if err != nil {
			return nil, false, p.failed(fmt.Sprintf("read NV %#x", uint32(index)), err)
		}
		if len(part.Data.Buffer) == 0 {
			return nil, false, cause.New(cause.EvidenceFailed, "NV %#x ended early", uint32(index))
		}
		data = append(data, part.Data.Buffer...)
	}
	return data, true, nil
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
