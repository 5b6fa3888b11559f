package keyrelease

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// maxHead bounds the head of an answer, in bytes.
const maxHead = 64 << 10

// newTransport trusts the policy's roots and nothing of the system, asks no
// proxy of the environment and follows no redirect.
func newTransport(roots []string) (*http.Client, error) {
	pool := x509.NewCertPool()
	for i, pem := range roots {
		if !pool.AppendCertsFromPEM([]byte(pem)) {
			return nil, cause.New(cause.PolicyInvalid, "broker.tlsRoots[%d] holds no certificate", i)
		}
	}
	if len(roots) == 0 {
		return nil, cause.New(cause.PolicyInvalid, "broker.tlsRoots is empty: no broker could be trusted")
	}
	return &http.Client{
		Timeout:       60 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			Proxy:                  nil,
			DialContext:            (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool},
			TLSHandshakeTimeout:    10 * time.Second,
			ResponseHeaderTimeout:  30 * time.Second,
			MaxResponseHeaderBytes: maxHead,
			MaxConnsPerHost:        8,
			IdleConnTimeout:        30 * time.Second,
			ForceAttemptHTTP2:      true,
		},
	}, nil
}

// post sends a message and returns the body of a 200 answer and the session
// cookie that came with it, if any. An error answer is a *kbs.Error.
func (cl *Client) post(ctx context.Context, base *url.URL, path string, cookie *http.Cookie, message any) ([]byte, *http.Cookie, error) {
	body, err := json.Marshal(message)
	if err != nil {
		return nil, nil, cause.New(cause.Internal, "encode the request: %w", err)
	}
	if len(body) > kbs.MaxBody {
		return nil, nil, cause.New(cause.EvidenceFailed, "the request has %d bytes, the protocol takes %d", len(body), kbs.MaxBody)
	}
	return cl.do(ctx, http.MethodPost, base, path, cookie, body)
}

// do sends one request. The path is joined to one of the policy's URLs: nothing
// that the broker or an image says changes where a request goes.
func (cl *Client) do(ctx context.Context, method string, base *url.URL, path string, cookie *http.Cookie, body []byte) ([]byte, *http.Cookie, error) {
	request, err := http.NewRequestWithContext(ctx, method, base.JoinPath(path).String(), bytes.NewReader(body))
	if err != nil {
		return nil, nil, cause.New(cause.Internal, "make the request: %w", err)
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if cookie != nil {
		request.AddCookie(cookie)
	}
	answer, err := cl.http.Do(request)
	if err != nil {
		return nil, nil, connectionError(err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(io.LimitReader(answer.Body, kbs.MaxBody+1))
	if err != nil {
		return nil, nil, cause.New(cause.BrokerUnavailable, "the broker's answer broke off: %w", err)
	}
	if len(data) > kbs.MaxBody {
		return nil, nil, cause.New(cause.BrokerProtocol, "the broker's answer is longer than %d bytes", kbs.MaxBody)
	}
	switch {
	case answer.StatusCode >= 500 || answer.StatusCode == http.StatusTooManyRequests:
		return nil, nil, cause.New(cause.BrokerUnavailable, "%w", kbs.DecodeError(answer.StatusCode, data))
	case answer.StatusCode >= 300 && answer.StatusCode < 400:
		return nil, nil, cause.New(cause.BrokerProtocol, "the broker answered %d, a redirect: not followed", answer.StatusCode)
	case answer.StatusCode != http.StatusOK:
		return nil, nil, kbs.DecodeError(answer.StatusCode, data)
	}
	return data, sessionCookie(answer), nil
}

// sessionCookie returns the session cookie of an answer, by its value alone: it
// is sent to this broker's endpoints and nowhere else.
func sessionCookie(answer *http.Response) *http.Cookie {
	for _, c := range answer.Cookies() {
		if c.Name != kbs.CookieName || len(c.Value) > 128 {
			continue
		}
		if id, err := hex.DecodeString(c.Value); err == nil && len(id) >= 16 {
			return &http.Cookie{Name: kbs.CookieName, Value: c.Value}
		}
	}
	return nil
}

// connectionError tells a broker that cannot be trusted from one that is not
// there: the first is final.
func connectionError(err error) error {
	var (
		verification *tls.CertificateVerificationError
		alert        tls.AlertError
		header       tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &verification):
		return cause.New(cause.BrokerTLS, "the broker's certificate: %w", verification.Err)
	case errors.As(err, &alert), errors.As(err, &header), errors.Is(err, http.ErrSchemeMismatch):
		return cause.New(cause.BrokerTLS, "the broker's TLS: %w", err)
	}
	return cause.New(cause.BrokerUnavailable, "%w", err)
}
