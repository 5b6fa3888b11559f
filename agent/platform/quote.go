package platform

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// TEE implements Attester.
func (p *TPM) TEE() string { return string(policy.PlatformTPM) }

// Register implements Attester.
func (p *TPM) Register() eventlog.Register { return p.PCR14() }

// CheckLaunch implements Attester with PCR 8, which the early stage extended.
func (p *TPM) CheckLaunch(ctx context.Context, initdata *policy.Initdata) error {
	values, err := p.ReadPCRs(ctx, PCRLaunch)
	if err != nil {
		return err
	}
	return policy.CheckBindingPCR8(initdata, values[PCRLaunch])
}

// Evidence implements Attester: a quote of all PCRs over the first 32 bytes of
// reportData, and the values that it covers.
func (p *TPM) Evidence(ctx context.Context, reportData [kbs.ReportDataSize]byte, _ []byte) (json.RawMessage, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, err := p.key(ctx)
	if err != nil {
		return nil, err
	}
	q, err := p.quote(ctx, tpm2.NamedHandle{Handle: k.handle, Name: k.name}, reportData[:32])
	if err != nil {
		return nil, err
	}
	return json.Marshal(kbs.TPMEvidence{
		Quote:    kbs.TPMQuote{Signature: tpm2.Marshal(q.signature), Message: q.message, PCRs: q.pcrs},
		AKPublic: k.spki,
	})
}

// quote is a quote with the values that it covers.
type quote struct {
	signature tpm2.TPMTSignature
	message   []byte   // TPMS_ATTEST
	pcrs      []string // of the SHA-256 bank, hex
}

// quote quotes all PCRs. mu is held.
func (p *TPM) quote(ctx context.Context, key tpm2.NamedHandle, qualifying []byte) (*quote, error) {
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
			SignHandle:     tpm2.AuthHandle{Handle: key.Handle, Name: key.Name, Auth: tpm2.PasswordAuth(nil)},
			QualifyingData: tpm2.TPM2BData{Buffer: qualifying},
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
		if bytes.Equal(h.Sum(nil), quoted.PCRDigest.Buffer) {
			return &quote{answer.Signature, answer.Quoted.Bytes(), pcrs}, nil
		}
	}
	return nil, cause.New(cause.EvidenceFailed, "the PCRs kept changing during the quote")
}

// nvAuth is who may read an index: the owner those that the owner defined (TCG
// registry of reserved handles, 01 40 xxxx and up to 01 7f ffff), the index's
// own empty password all others.
func nvAuth(index tpm2.TPMHandle, name tpm2.TPM2BName) tpm2.AuthHandle {
	if index >= 0x01400000 && index < 0x01800000 {
		return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	}
	return tpm2.AuthHandle{Handle: index, Name: name, Auth: tpm2.PasswordAuth(nil)}
}

// nvPublic returns an NV index's public area and name; nil when there is none.
func (p *TPM) nvPublic(index tpm2.TPMHandle) (*tpm2.TPMSNVPublic, tpm2.TPM2BName, error) {
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(p.t)
	if err != nil {
		if errors.Is(err, tpm2.TPMRCHandle) {
			return nil, tpm2.TPM2BName{}, nil
		}
		return nil, tpm2.TPM2BName{}, p.failed(fmt.Sprintf("look for NV %#x", uint32(index)), err)
	}
	contents, err := public.NVPublic.Contents()
	if err != nil {
		return nil, tpm2.TPM2BName{}, cause.New(cause.EvidenceFailed, "NV %#x: %w", uint32(index), err)
	}
	return contents, public.NVName, nil
}

// readNV reads an NV index whole; found is false when there is none.
func (p *TPM) readNV(index tpm2.TPMHandle, most int) (data []byte, found bool, err error) {
	public, name, err := p.nvPublic(index)
	if err != nil || public == nil {
		return nil, false, err
	}
	size := int(public.DataSize)
	if size > most {
		return nil, false, cause.New(cause.EvidenceFailed, "NV %#x holds %d bytes, at most %d are read", uint32(index), size, most)
	}
	for len(data) < size {
		n := min(size-len(data), 512)
		part, err := tpm2.NVRead{
			AuthHandle: nvAuth(index, name),
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: name},
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
