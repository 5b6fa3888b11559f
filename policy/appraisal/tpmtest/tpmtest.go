// Package tpmtest runs a real swtpm with an EK certificate by a CA of its own,
// and does with it what a guest does: make an AK, activate a credential,
// extend, quote. No program imports it.
package tpmtest

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// CA is a swtpm_localca: it issues EK certificates.
type CA struct{ dir string }

// NewCA makes a CA; its keys appear with the first TPM.
func NewCA(t testing.TB) *CA {
	t.Helper()
	ca := &CA{dir: t.TempDir()}
	write(t, ca.path("localca.options"), "--platform-manufacturer Test\n--platform-version 1.0\n--platform-model Test\n")
	write(t, ca.path("localca.conf"), "statedir = "+ca.dir+"\nsigningkey = "+ca.path("sign.pem")+"\nissuercert = "+ca.path("issuer.pem")+"\ncertserial = "+ca.path("serial")+"\n")
	write(t, ca.path("setup.conf"), "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = "+ca.path("localca.conf")+"\ncreate_certs_tool_options = "+ca.path("localca.options")+"\nactive_pcr_banks = sha256\n")
	return ca
}

func (c *CA) path(name string) string { return filepath.Join(c.dir, name) }

// RootsPEM are the issuer and the root certificate of the CA.
func (c *CA) RootsPEM(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(c.path("issuer.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TPM is a running swtpm with an attestation key.
type TPM struct {
	t        testing.TB
	tpm      transport.TPM
	Socket   string
	EKCert   []byte // DER
	AKPublic []byte // TPMT_PUBLIC
	AKSPKI   []byte // SPKI DER
	ak       tpm2.NamedHandle
	ek       tpm2.NamedHandle
}

// Kind is the kind of attestation key.
type Kind int

// The kinds, and one that no verifier may accept.
const (
	RSA Kind = iota
	ECC
	Unrestricted
)

// Start makes and starts a TPM whose EK certificate is by ca.
func Start(t testing.TB, ca *CA, kind Kind) *TPM {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	setup := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", dir, "--create-ek-cert", "--pcr-banks", "sha256",
		"--config", ca.path("setup.conf"), "--write-ek-cert-files", dir)
	if out, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("swtpm_setup: %v\n%s", err, out)
	}
	p := &TPM{t: t, Socket: filepath.Join(dir, "s")}
	run := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--server", "type=unixio,path="+p.Socket,
		"--ctrl", "type=unixio,path="+filepath.Join(dir, "c"), "--flags", "startup-clear")
	if err := run.Start(); err != nil {
		t.Fatalf("swtpm: %v", err)
	}
	t.Cleanup(func() { _ = run.Process.Kill(); _ = run.Wait() })
	for until := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		// The socket is there a moment before it is listened on.
		var c net.Conn
		if c, err = net.Dial("unix", p.Socket); err == nil {
			_ = c.Close()
			break
		}
		if time.Now().After(until) {
			t.Fatalf("swtpm does not listen: %v", err)
		}
	}
	conn, err := linuxudstpm.Open(p.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	p.tpm = conn

	certs, err := filepath.Glob(filepath.Join(dir, "ek-rsa*.crt"))
	if err != nil || len(certs) != 1 {
		t.Fatalf("EK certificates: %v, %v", certs, err)
	}
	if p.EKCert, err = os.ReadFile(certs[0]); err != nil {
		t.Fatal(err)
	}
	p.ek = p.primary(tpm2.TPMRHEndorsement, tpm2.RSAEKTemplate)
	p.makeAK(kind)
	return p
}

func (p *TPM) primary(hierarchy tpm2.TPMHandle, template tpm2.TPMTPublic) tpm2.NamedHandle {
	p.t.Helper()
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: hierarchy, InPublic: tpm2.New2B(template)}.Execute(p.tpm)
	if err != nil {
		p.t.Fatalf("TPM2_CreatePrimary: %v", err)
	}
	return tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}
}

func (p *TPM) makeAK(kind Kind) {
	p.t.Helper()
	template := tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgRSA,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true,
			Restricted: kind != Unrestricted, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Scheme: tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgRSASSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			KeyBits: 2048,
		}),
	}
	if kind == ECC {
		template.Type = tpm2.TPMAlgECC
		template.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		})
	}
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(template)}.Execute(p.tpm)
	if err != nil {
		p.t.Fatalf("AK: %v", err)
	}
	p.ak = tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		p.t.Fatal(err)
	}
	p.AKPublic = tpm2.Marshal(*pub)
	key, err := tpm2.Pub(*pub)
	if err != nil {
		p.t.Fatal(err)
	}
	if p.AKSPKI, err = x509.MarshalPKIXPublicKey(key); err != nil {
		p.t.Fatal(err)
	}
}

// Auth is what the guest sends under dialect cvm-agent/1.
func (p *TPM) Auth() *kbs.CVMAgentAuth {
	return &kbs.CVMAgentAuth{Version: kbs.Dialect, EKCert: p.EKCert, AKPublic: p.AKPublic}
}

// Extend extends a SHA-256 PCR.
func (p *TPM) Extend(pcr int, digest []byte) {
	p.t.Helper()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest}}},
	}.Execute(p.tpm)
	if err != nil {
		p.t.Fatalf("TPM2_PCR_Extend: %v", err)
	}
}

// Activate runs TPM2_ActivateCredential and returns its error.
func (p *TPM) Activate(c *kbs.CVMAgentChallenge) ([]byte, error) {
	blob, err := tpm2.Unmarshal[tpm2.TPM2BIDObject](c.CredentialBlob)
	if err != nil {
		return nil, err
	}
	secret, err := tpm2.Unmarshal[tpm2.TPM2BEncryptedSecret](c.Secret)
	if err != nil {
		return nil, err
	}
	// The EK's use is authorised by PolicySecret over the endorsement hierarchy.
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: p.ak.Handle, Name: p.ak.Name, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle: tpm2.AuthHandle{Handle: p.ek.Handle, Name: p.ek.Name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16,
			func(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
				_, err := tpm2.PolicySecret{
					AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
					PolicySession: session,
					NonceTPM:      nonce,
				}.Execute(t)
				return err
			})},
		CredentialBlob: *blob,
		Secret:         *secret,
	}.Execute(p.tpm)
	if err != nil {
		return nil, err
	}
	return rsp.CertInfo.Buffer, nil
}

// Evidence quotes the given PCRs over the first 32 bytes of reportData.
func (p *TPM) Evidence(reportData [kbs.ReportDataSize]byte, pcrs ...uint) *kbs.TPMEvidence {
	p.t.Helper()
	rsp, err := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: p.ak.Handle, Name: p.ak.Name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: reportData[:32]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:      selection(pcrs...),
	}.Execute(p.tpm)
	if err != nil {
		p.t.Fatalf("TPM2_Quote: %v", err)
	}
	return &kbs.TPMEvidence{
		AKPublic: p.AKSPKI,
		Quote: kbs.TPMQuote{
			Signature: tpm2.Marshal(rsp.Signature),
			Message:   rsp.Quoted.Bytes(),
			PCRs:      p.pcrs(),
		},
	}
}

// JSON is the evidence as it travels.
func JSON(t testing.TB, e *kbs.TPMEvidence) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func selection(pcrs ...uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...),
	}}}
}

func (p *TPM) pcrs() []string {
	p.t.Helper()
	values := make([]string, kbs.PCRCount)
	for i := range values {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection(uint(i))}.Execute(p.tpm)
		if err != nil || len(rsp.PCRValues.Digests) != 1 {
			p.t.Fatalf("TPM2_PCR_Read %d: %v", i, err)
		}
		values[i] = hex.EncodeToString(rsp.PCRValues.Digests[0].Buffer)
	}
	return values
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Read returns the value of a PCR, 32 bytes.
func (p *TPM) Read(pcr int) []byte {
	p.t.Helper()
	b, err := hex.DecodeString(p.pcrs()[pcr])
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}
