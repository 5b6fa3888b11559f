package platform

import (
	"bytes"
	"crypto/x509"
	"io"
	"net/http"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// answers is a host's service that says one thing.
type answers []byte

func (a answers) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(a))}, nil
}

// The host's word about its chip is a certificate and a quote of bounded size,
// or a failure to make evidence.
func FuzzTHIM(f *testing.F) {
	f.Add([]byte(`{"vcekCert":"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n","certificateChain":"","tcbm":"1"}`))
	f.Add([]byte(`{"quote":"AAAA"}`))
	f.Add([]byte(`{"quote":"AAAA","quote":"BBBB"}`))
	kept := thimClient.Transport
	f.Cleanup(func() { thimClient.Transport = kept })
	f.Fuzz(func(t *testing.T, b []byte) {
		thimClient.Transport = answers(b)
		der, err := thimVCEK(t.Context(), "http://host")
		if err != nil && cause.Of(err) != cause.EvidenceFailed {
			t.Fatal(err)
		}
		if err == nil {
			if _, err := x509.ParseCertificate(der); err != nil {
				t.Fatalf("no certificate: %v", err)
			}
		}
		quote, err := thimQuote(t.Context(), "http://host", make([]byte, 1024))
		if err == nil && (len(quote) == 0 || len(quote) > maxTDQuote) || err != nil && cause.Of(err) != cause.EvidenceFailed {
			t.Fatalf("a quote of %d bytes, %v", len(quote), err)
		}
	})
}
