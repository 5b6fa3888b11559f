package platform

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// What Azure's paravisor (HCL) keeps in the vTPM.
const (
	nvHCLReport   = tpm2.TPMHandle(0x01400001)
	nvHCLUserData = tpm2.TPMHandle(0x01400002)
	azureAK       = tpm2.TPMHandle(0x81000003)
)

// userDataSize is the size of the user-data that an HCL report carries, bytes.
const userDataSize = 64

// hclWait bounds the time until the paravisor's report carries new user-data.
const hclWait = 10 * time.Second

// AzureOptions say where the parts of the evidence are that the guest does not
// have. Nothing is asked that is not named here.
type AzureOptions struct {
	// VCEK is a file with the chip's certificate, PEM or DER. "" : THIM.
	VCEK string
	// THIM is the base URL of the host's service for VCEK and TD quotes
	// (http://169.254.169.254 on Azure). It is not trusted: the verifier judges
	// what it gives. "": none.
	THIM string
}

// Check is for the one place where the configuration is validated.
func (o AzureOptions) Check() error {
	if o.VCEK != "" && !filepath.IsAbs(o.VCEK) {
		return fmt.Errorf("vcek is %q, expected an absolute path", o.VCEK)
	}
	if o.THIM == "" {
		return nil
	}
	u, err := url.Parse(o.THIM)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("thim is %q, expected http://host[:port]", o.THIM)
	}
	return nil
}

// Azure is a SEV-SNP or TDX guest behind Azure's paravisor: the vTPM lives in
// the TEE at a higher privilege, and its AK is in the runtime data that the
// hardware's report covers.
type Azure struct {
	tpm     *TPM
	options AzureOptions
	kind    uint32 // hclSNP or hclTDX
}

// openAzure returns nil when the TPM holds no HCL report.
func openAzure(ctx context.Context, tpm *TPM, o AzureOptions) (*Azure, error) {
	tpm.mu.Lock()
	defer tpm.mu.Unlock()
	if err := tpm.usable(ctx); err != nil {
		return nil, err
	}
	data, found, err := tpm.readNV(nvHCLReport, maxHCL)
	if err != nil {
		return nil, err
	}
	if !found || !bytes.HasPrefix(data, []byte(hclMagic)) {
		return nil, nil
	}
	r, err := parseHCL(data)
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "NV %#x: %w", uint32(nvHCLReport), err)
	}
	return &Azure{tpm: tpm, options: o, kind: r.kind}, nil
}

// TEE implements Attester.
func (a *Azure) TEE() string {
	if a.kind == hclTDX {
		return string(policy.PlatformAzTDXvTPM)
	}
	return string(policy.PlatformAzSNPvTPM)
}

// Register implements Attester.
func (a *Azure) Register() eventlog.Register { return a.tpm.PCR14() }

// CheckLaunch implements Attester: HOST_DATA and MRCONFIGID are the paravisor's,
// PCR 8 is ours.
func (a *Azure) CheckLaunch(ctx context.Context, initdata *policy.Initdata) error {
	return a.tpm.CheckLaunch(ctx, initdata)
}

// Auth implements Attester: the HCL report vouches for the AK.
func (a *Azure) Auth(context.Context) (*kbs.CVMAgentAuth, error) {
	return &kbs.CVMAgentAuth{Version: kbs.Dialect}, nil
}

// Additional implements Attester: the AK in the HCL report names the instance.
func (a *Azure) Additional(context.Context, string, *kbs.CVMAgentChallenge) (kbs.AdditionalCVMAgent, error) {
	return kbs.AdditionalCVMAgent{}, nil
}

// Evidence implements Attester: an HCL report whose user-data is reportData, a
// quote over the same 48 bytes by the AK that the report names, and what
// vouches for the report.
func (a *Azure) Evidence(ctx context.Context, reportData [kbs.ReportDataSize]byte, _ []byte) (json.RawMessage, error) {
	p := a.tpm
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.usable(ctx); err != nil {
		return nil, err
	}
	raw, report, err := a.reportOver(ctx, padded(reportData))
	if err != nil {
		return nil, err
	}
	public, err := tpm2.ReadPublic{ObjectHandle: azureAK}.Execute(p.t)
	if err != nil {
		return nil, p.failed("read the AK", err)
	}
	q, err := p.quote(ctx, tpm2.NamedHandle{Handle: azureAK, Name: public.Name}, reportData[:])
	if err != nil {
		return nil, err
	}
	rsassa, err := q.signature.Signature.RSASSA()
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "the AK at %#x does not sign with RSASSA: %w", uint32(azureAK), err)
	}
	e := kbs.AzureEvidence{
		Version:   kbs.AzureVersion,
		Quote:     kbs.AzureQuote{Signature: rsassa.Sig.Buffer, Message: q.message, PCRs: q.pcrs},
		HCLReport: raw,
	}
	if a.kind == hclTDX {
		e.TDQuote, err = a.tdQuote(ctx, report.hardware)
	} else {
		e.VCEK, err = a.vcek(ctx)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(e)
}

// reportOver has the paravisor make a report with the given user-data. It makes
// one some time after the write: what is read before still has the old.
func (a *Azure) reportOver(ctx context.Context, userData [userDataSize]byte) ([]byte, *hclReport, error) {
	if err := a.writeUserData(userData); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, hclWait)
	defer cancel()
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		raw, found, err := a.tpm.readNV(nvHCLReport, maxHCL)
		if err != nil {
			return nil, nil, err
		}
		if !found {
			return nil, nil, cause.New(cause.EvidenceFailed, "NV %#x is gone", uint32(nvHCLReport))
		}
		r, err := parseHCL(raw)
		if err != nil {
			return nil, nil, cause.New(cause.EvidenceFailed, "NV %#x: %w", uint32(nvHCLReport), err)
		}
		if r.kind != a.kind {
			return nil, nil, cause.New(cause.EvidenceFailed, "NV %#x: a report of kind %d, it was %d", uint32(nvHCLReport), r.kind, a.kind)
		}
		if bytes.Equal(r.userData, userData[:]) {
			return raw, r, nil
		}
		select {
		case <-ctx.Done():
			return nil, nil, cause.New(cause.EvidenceFailed, "the paravisor's report does not carry the new user-data after %s", hclWait)
		case <-time.After(pause):
		}
	}
}

// writeUserData writes the NV index that the paravisor reads, defining it at
// the first use.
func (a *Azure) writeUserData(userData [userDataSize]byte) error {
	p := a.tpm
	public, name, err := p.nvPublic(nvHCLUserData)
	if err != nil {
		return err
	}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if public == nil {
		_, err := tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: nvHCLUserData, NameAlg: tpm2.TPMAlgSHA256, DataSize: userDataSize,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthWrite: true, AuthRead: true, NT: tpm2.TPMNTOrdinary},
		})}.Execute(p.t)
		if err != nil {
			return p.failed("define the NV index of the user-data", err)
		}
		if public, name, err = p.nvPublic(nvHCLUserData); err != nil {
			return err
		}
	}
	if public == nil || public.DataSize != userDataSize {
		return cause.New(cause.EvidenceFailed, "NV %#x is not of %d bytes", uint32(nvHCLUserData), userDataSize)
	}
	if _, err := (tpm2.NVWrite{
		AuthHandle: owner,
		NVIndex:    tpm2.NamedHandle{Handle: nvHCLUserData, Name: name},
		Data:       tpm2.TPM2BMaxNVBuffer{Buffer: userData[:]},
	}).Execute(p.t); err != nil {
		return p.failed("write the user-data", err)
	}
	return nil
}

// vcek is the chip's certificate, DER.
func (a *Azure) vcek(ctx context.Context) ([]byte, error) {
	switch {
	case a.options.VCEK != "":
		der, err := readCertificate(a.options.VCEK)
		if err != nil {
			return nil, cause.New(cause.EvidenceFailed, "azure.vcek: %w", err)
		}
		return der, nil
	case a.options.THIM != "":
		return thimVCEK(ctx, a.options.THIM)
	}
	return nil, cause.New(cause.EvidenceFailed, "the VCEK is neither in a file (azure.vcek) nor asked of the host (azure.thim)")
}

// tdQuote has the host turn the TDREPORT in the HCL report into a quote.
func (a *Azure) tdQuote(ctx context.Context, hardware []byte) ([]byte, error) {
	if a.options.THIM == "" {
		return nil, cause.New(cause.EvidenceFailed, "a TD quote needs the host's service and azure.thim names none")
	}
	return thimQuote(ctx, a.options.THIM, hardware[:tdReportSize])
}

// firstCertificate returns the first certificate of PEM or DER text.
func firstCertificate(data []byte) ([]byte, error) {
	der := data
	if block, _ := pem.Decode(data); block != nil {
		if block.Type != "CERTIFICATE" {
			return nil, errors.New("the first PEM block is no certificate")
		}
		der = block.Bytes
	}
	if len(der) > maxKeyCert {
		return nil, errors.New("the certificate is too long")
	}
	_, err := x509.ParseCertificate(der)
	return der, err
}
