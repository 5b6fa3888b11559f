package snptest

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// AzureOptions say what Azure's evidence holds. The zero value is what a
// paravisor at VMPL 0 makes, with all PCRs zero.
type AzureOptions struct {
	Report   Options
	PCRs     map[int][32]byte
	UserData []byte                // 64 bytes; default: report_data, zero-padded
	Runtime  func(string) string   // changes the runtime data before it is hashed
	After    func(*kbs.AzureQuote) // changes the quote after it is signed
	Attest   func(*tpm2.TPMSAttest)
}

// ak is the key of every made vTPM: 2048 bits take a while.
var ak = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// AzureEvidence is the primary evidence of TEE "az-snp-vtpm".
func (c *Chain) AzureEvidence(t testing.TB, reportData [kbs.ReportDataSize]byte, o AzureOptions) json.RawMessage {
	t.Helper()
	return Azure(t, reportData, o, 2, func(rd [64]byte, ev *kbs.AzureEvidence) []byte {
		ev.VCEK = kbs.URLBase64(c.Signer.Vcek.Raw)
		return c.Report(t, rd, o.Report)
	})
}

// Azure is the evidence of either Azure form. hardware is given the report's
// REPORT_DATA; it returns the hardware report of a kind (2: SNP, 4: TDX) and
// sets what goes beside it.
func Azure(t testing.TB, reportData [kbs.ReportDataSize]byte, o AzureOptions, kind uint32, hardware func([64]byte, *kbs.AzureEvidence) []byte) json.RawMessage {
	t.Helper()
	key, err := ak()
	if err != nil {
		t.Fatal(err)
	}
	if o.UserData == nil {
		o.UserData = append(bytes.Clone(reportData[:]), make([]byte, 16)...)
	}
	runtime := fmt.Sprintf(`{"keys":[{"kid":"HCLAkPub","key_ops":["sign"],"kty":"RSA","e":%q,"n":%q}],"vm-configuration":{"secure-boot":true},"user-data":%q}`,
		base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes()), base64.RawURLEncoding.EncodeToString(key.N.Bytes()),
		strings.ToUpper(hex.EncodeToString(o.UserData)))
	if o.Runtime != nil {
		runtime = o.Runtime(runtime)
	}
	var rd [64]byte
	sum := sha256.Sum256([]byte(runtime))
	copy(rd[:], sum[:])
	ev := kbs.AzureEvidence{Version: kbs.AzureVersion, Quote: azureQuote(t, key, reportData, o)}
	ev.HCLReport = HCLReport(kind, hardware(rd, &ev), runtime)
	b, err := json.Marshal(ev)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// HCLReport wraps a hardware report of a kind (2: SNP, 4: TDX) and the runtime
// data as Azure's paravisor does.
func HCLReport(kind uint32, report []byte, runtime string) []byte {
	b := make([]byte, 2600)
	n := uint32(len(runtime))
	copy(b, "HCLA")
	for offset, v := range map[int]uint32{4: 2, 8: 1236 + n, 12: 2, 1216: 20 + n, 1220: 1, 1224: kind, 1228: 1, 1232: n} {
		binary.LittleEndian.PutUint32(b[offset:], v)
	}
	copy(b[32:], report)
	copy(b[1236:], runtime)
	return b
}

func azureQuote(t testing.TB, key *rsa.PrivateKey, reportData [kbs.ReportDataSize]byte, o AzureOptions) kbs.AzureQuote {
	t.Helper()
	q := kbs.AzureQuote{}
	all := sha256.New()
	for i := range kbs.PCRCount {
		v := o.PCRs[i]
		all.Write(v[:])
		q.PCRs = append(q.PCRs, hex.EncodeToString(v[:]))
	}
	a := tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: reportData[:]},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0xff, 0xff}}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: all.Sum(nil)},
		}),
	}
	if o.Attest != nil {
		o.Attest(&a)
	}
	q.Message = tpm2.Marshal(a)
	digest := sha256.Sum256(q.Message)
	var err error
	if q.Signature, err = rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:]); err != nil {
		t.Fatal(err)
	}
	if o.After != nil {
		o.After(&q)
	}
	return q
}
