package platform

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// maxTHIM bounds an answer of the host's service, in bytes.
const maxTHIM = 256 << 10

// thimClient asks the host and nobody else: no proxy, no redirect.
var thimClient = &http.Client{
	Timeout:       20 * time.Second,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport:     &http.Transport{Proxy: nil, DisableKeepAlives: true},
}

// thimVCEK asks for the certificates of this host's chip.
func thimVCEK(ctx context.Context, base string) ([]byte, error) {
	var answer struct {
		VCEK string `json:"vcekCert"`
	}
	if err := thim(ctx, http.MethodGet, base+"/metadata/THIM/amd/certification", nil, &answer); err != nil {
		return nil, err
	}
	der, err := firstCertificate([]byte(answer.VCEK))
	if err != nil {
		return nil, cause.New(cause.EvidenceFailed, "azure.thim: vcekCert: %w", err)
	}
	return der, nil
}

// thimQuote asks for a quote of a TDREPORT.
func thimQuote(ctx context.Context, base string, report []byte) ([]byte, error) {
	body, err := json.Marshal(map[string]string{"report": base64.RawURLEncoding.EncodeToString(report)})
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	var answer struct {
		Quote string `json:"quote"`
	}
	if err := thim(ctx, http.MethodPost, base+"/acc/tdquote", body, &answer); err != nil {
		return nil, err
	}
	quote, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(answer.Quote, "="))
	if err != nil || len(quote) == 0 || len(quote) > maxTDQuote {
		return nil, cause.New(cause.EvidenceFailed, "azure.thim: no quote of 1 to %d bytes in base64url", maxTDQuote)
	}
	return quote, nil
}

func thim(ctx context.Context, method, url string, body []byte, answer any) error {
	request, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return cause.New(cause.Config, "azure.thim: %w", err)
	}
	request.Header.Set("Metadata", "true")
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := thimClient.Do(request)
	if err != nil {
		return cause.New(cause.EvidenceFailed, "azure.thim: %w", err)
	}
	defer response.Body.Close()
	data, err := bounded.ReadAll(io.Reader(response.Body), maxTHIM)
	switch {
	case err != nil:
		return cause.New(cause.EvidenceFailed, "azure.thim: %w", err)
	case response.StatusCode != http.StatusOK:
		return cause.New(cause.EvidenceFailed, "azure.thim: %s answered %d", url, response.StatusCode)
	}
	if err := bounded.CheckJSON(data, bounded.Limits{Bytes: maxTHIM, Depth: 8, String: maxTHIM}); err != nil {
		return cause.New(cause.EvidenceFailed, "azure.thim: %w", err)
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return cause.New(cause.EvidenceFailed, "azure.thim: %w", err)
	}
	return nil
}
