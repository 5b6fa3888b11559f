package appraisal

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-tdx-guest/abi"
	tdxpb "github.com/google/go-tdx-guest/proto/tdx"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// FuzzTDXQuote: what is cut here survives the library, and both read the same
// version 4 quote.
func FuzzTDXQuote(f *testing.F) {
	p := tdxtest.New(f, tdxtest.Config{})
	f.Add(p.Quote(f, tdxtest.Report{}))
	f.Add(p.Quote(f, tdxtest.Report{Version: 5}))
	f.Add(testFile(f, "tdx-quote-v4.bin"))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseTDXQuote(b)
		if err != nil {
			return
		}
		v := NewVerdict("x")
		q.checkHeader(v)
		q.checkSignatures(v, nil)
		q.checkBody(v)
		_, _ = q.facts(), q.launchHash()
		if q.version != abi.QuoteVersion {
			return
		}
		parsed, err := abi.QuoteToProto(q.raw)
		if err != nil {
			return
		}
		quote := parsed.(*tdxpb.QuoteV4)
		d := quote.GetSignedData().GetCertificationData().GetQeReportCertificationData()
		if string(quote.GetTdQuoteBody().GetMrTd()) != string(q.mrTD()) || string(quote.GetSignedData().GetEcdsaAttestationKey()) != string(q.key) ||
			string(d.GetQeAuthData().GetData()) != string(q.qeAuth) || string(d.GetPckCertificateChainData().GetPckCertChain()) != string(q.chain) {
			t.Fatal("the library reads another quote")
		}
	})
}

// FuzzTDXEvidence: nothing that is made up is accepted.
func FuzzTDXEvidence(f *testing.F) {
	b, err := json.Marshal(kbs.TDXEvidence{Quote: testFile(f, "tdx-cos113-quote.bin"), EventLog: testFile(f, "ccel-ovmf.bin")[:ovmfEnd]})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, "")
	f.Add(b, `{"cvm-agent-instance":"a.b.c"}`)
	f.Add([]byte(`{"cc_eventlog":null,"quote":""}`), "{}")
	v := &TDX{}
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, primary []byte, additional string) {
		for _, dialect := range []string{kbs.DialectKBS, kbs.Dialect} {
			a, err := v.Appraise(Input{Dialect: dialect, Primary: primary, Additional: additional, Nonce: "nonce", Time: now})
			if err == nil && a.Verdict.Refusal() == nil {
				t.Fatal("accepted")
			}
		}
	})
}

func FuzzInstanceKey(f *testing.F) {
	f.Add(tdxtest.InstanceJWS(f, tdxtest.NewKey(f), "nonce"))
	f.Add("..")
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := instanceKey(s, "another nonce"); err == nil {
			t.Fatal("accepted")
		}
	})
}
