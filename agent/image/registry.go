package image

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Bounds on what one registry may make the agent do outside of layers.
const (
	maxSmallBody = 64 << 20 // a signed SBOM
	maxRequests  = 400      // per image: manifests, signatures, attestations
	maxWait      = 30 * time.Minute
	maxTries     = 3 // of a mirror, before the next host is asked
)

// endpoint is one repository on one host. The last of an image's endpoints is
// the one that the policy names, the others are mirrors.
type endpoint struct {
	host   string
	repo   name.Repository
	gate   *gate
	mu     sync.Mutex
	authed http.RoundTripper
}

func (c *Client) endpoints(ref name.Digest) ([]*endpoint, error) {
	rules := map[string]policy.Registry{}
	for _, r := range c.cfg.Registries {
		rules[r.Host] = r
	}
	own := ref.Context().RegistryStr()
	var ends []*endpoint
	for _, host := range append(rules[own].Mirrors[:len(rules[own].Mirrors):len(rules[own].Mirrors)], own) {
		var opts []name.Option
		if rules[host].PlainHTTP {
			opts = append(opts, name.Insecure)
		}
		repo, err := name.NewRepository(host+"/"+ref.Context().RepositoryStr(), opts...)
		if err != nil {
			return nil, cause.New(cause.PolicyInvalid, "registry %q: %w", host, err)
		}
		g := &gate{
			plain: map[string]bool{}, hosts: map[string]bool{host: true, repo.RegistryStr(): true},
			bases: map[string]http.RoundTripper{}, onWait: c.cfg.OnWait, left: maxRequests, mirror: host != own,
		}
		for _, h := range rules[host].Redirects {
			g.hosts[h] = true
		}
		for h := range g.hosts {
			g.plain[h] = rules[h].PlainHTTP
			if g.bases[h], err = newTransport(rules[h].TLSRoots, c.cfg.StallsAfter); err != nil {
				return nil, err
			}
		}
		ends = append(ends, &endpoint{host: host, repo: repo, gate: g})
	}
	return ends, nil
}

// newTransport trusts the PEM roots alone, or the system's if there are none.
// No proxy is used and no compression asked for: digests are of exact bytes.
func newTransport(roots []string, stall time.Duration) (http.RoundTripper, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(roots) > 0 {
		conf.RootCAs = x509.NewCertPool()
		for _, r := range roots {
			if !conf.RootCAs.AppendCertsFromPEM([]byte(r)) {
				return nil, cause.New(cause.PolicyInvalid, "a registry's TLS root is not a PEM certificate")
			}
		}
	}
	d := &net.Dialer{Timeout: 10 * time.Second}
	return &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := d.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &stallConn{Conn: c, after: stall}, nil
		},
		TLSClientConfig: conf, TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: stall,
		DisableCompression: true, MaxIdleConnsPerHost: 4, IdleConnTimeout: 30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10, ReadBufferSize: 128 << 10,
	}, nil
}

// stallConn fails a read that brings nothing for too long.
type stallConn struct {
	net.Conn
	after time.Duration
}

func (c *stallConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.after)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

type streamKey struct{}

// gate is the only way to the network: go-containerregistry and cosign get it
// as their transport. It refuses hosts that the policy does not name, waits for
// ones that do not answer, and bounds what they answer.
type gate struct {
	hosts, plain map[string]bool
	bases        map[string]http.RoundTripper
	onWait       func(error, time.Duration)
	mirror       bool
	mu           sync.Mutex
	left         int // requests
}

func (g *gate) RoundTrip(req *http.Request) (*http.Response, error) {
	host := req.URL.Host
	if !g.hosts[host] {
		return nil, cause.New(cause.RegistryRedirect, "the registry sends us to %q, which the policy does not name", host)
	}
	switch plain := req.URL.Scheme != "https"; {
	case plain && !g.plain[host]:
		return nil, cause.New(cause.RegistryRedirect, "the registry sends us to %s without TLS, which the policy does not allow", host)
	case !plain && g.plain[host]:
		// go-containerregistry always tries HTTPS first: no cause, so that
		// the one of the second attempt counts.
		return nil, fmt.Errorf("%s is a plain HTTP registry", host)
	}
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		return nil, cause.New(cause.Internal, "%s request to a registry", req.Method)
	}
	stream := req.Context().Value(streamKey{}) != nil
	if !stream {
		g.mu.Lock()
		g.left--
		left := g.left
		g.mu.Unlock()
		if left < 0 {
			return nil, cause.New(cause.ManifestMalformed, "the image takes more than %d registry requests: too many signatures or referrers", maxRequests)
		}
	}
	tries := uint(0)
	if g.mirror {
		tries = maxTries
	}
	var last error // backoff forgets it when the context ends
	resp, err := backoff.Retry(req.Context(), func() (*http.Response, error) {
		resp, err := g.once(req, stream)
		if err != nil && req.Context().Err() == nil {
			last = err
		}
		return resp, err
	}, backoff.WithBackOff(newBackOff()), backoff.WithMaxElapsedTime(maxWait), backoff.WithMaxTries(tries), backoff.WithNotify(g.onWait))
	if err == nil {
		return resp, nil
	}
	var p *backoff.PermanentError
	switch {
	case errors.As(err, &p):
		err = p.Unwrap()
	case last != nil && !errors.Is(err, last):
		err = fmt.Errorf("%w (%w)", last, err)
	}
	return nil, cause.Wrap(cause.RegistryUnavailable, fmt.Errorf("registry %s does not answer: %w", host, err))
}

func newBackOff() backoff.BackOff {
	b := backoff.NewExponentialBackOff() // with jitter
	b.InitialInterval, b.MaxInterval, b.Multiplier = 200*time.Millisecond, 5*time.Second, 2
	return b
}

// once makes one attempt; errors that time cannot mend are permanent.
func (g *gate) once(req *http.Request, stream bool) (*http.Response, error) {
	resp, err := g.bases[req.URL.Host].RoundTrip(req)
	if err != nil {
		var cert *tls.CertificateVerificationError
		if errors.As(err, &cert) {
			return nil, backoff.Permanent(cause.New(cause.RegistryTLS, "registry %s: %w", req.URL.Host, err))
		}
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		resp.Body.Close()
		return nil, fmt.Errorf("status %s", resp.Status)
	}
	if stream {
		return resp, nil
	}
	body, err := bounded.ReadAll(resp.Body, maxSmallBody)
	resp.Body.Close()
	if errors.Is(err, bounded.ErrTooLarge) {
		return nil, backoff.Permanent(malformed("the registry's answer has more than %d bytes", maxSmallBody))
	}
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// transport returns the round tripper that has a pull token, if one is needed.
// Only anonymous tokens are used: there is no credential to leak.
func (e *endpoint) transport(ctx context.Context) (http.RoundTripper, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.authed == nil {
		t, err := transport.NewWithContext(ctx, e.repo.Registry, authn.Anonymous, e.gate, []string{e.repo.Scope(transport.PullScope)})
		if err != nil {
			return nil, refused(err, "registry "+e.host)
		}
		e.authed = t
	}
	return e.authed, nil
}

func (e *endpoint) remoteOptions(ctx context.Context) ([]remote.Option, error) {
	t, err := e.transport(ctx)
	if err != nil {
		return nil, err
	}
	return []remote.Option{remote.WithContext(ctx), remote.WithTransport(t), remote.WithAuth(authn.Anonymous)}, nil
}

// refused gives an error of a registry call its cause.
func refused(err error, what string) error {
	var t *transport.Error
	if errors.As(err, &t) && t.StatusCode < 500 && t.StatusCode >= 400 {
		return cause.Wrap(cause.ImageNotFound, fmt.Errorf("%s: %w", what, err))
	}
	return cause.Wrap(cause.RegistryUnavailable, fmt.Errorf("%s: %w", what, err))
}

// get asks for one path below /v2/<repository>/.
func (e *endpoint) get(ctx context.Context, path, accept, rng string) (*http.Response, error) {
	t, err := e.transport(ctx)
	if err != nil {
		return nil, err
	}
	scheme := "https"
	if e.gate.plain[e.host] {
		scheme = "http"
	}
	url := fmt.Sprintf("%s://%s/v2/%s/%s", scheme, e.repo.RegistryStr(), e.repo.RepositoryStr(), path)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	if rng != "" {
		req.Header.Set("Range", rng)
	}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return nil, refused(err, "registry "+e.host)
	}
	if resp.StatusCode == http.StatusOK || rng != "" && resp.StatusCode == http.StatusPartialContent {
		return resp, nil
	}
	resp.Body.Close()
	if resp.StatusCode < 400 {
		return nil, cause.New(cause.RegistryUnavailable, "%s answers %s for %s", e.host, resp.Status, path)
	}
	return nil, cause.New(cause.ImageNotFound, "%s answers %s for %s of %s", e.host, resp.Status, path, e.repo.RepositoryStr())
}

const acceptManifests = ocispec.MediaTypeImageManifest + ", " + ocispec.MediaTypeImageIndex + ", " + dockerManifest + ", " + dockerIndex

func (e *endpoint) manifest(ctx context.Context, d digest.Digest) ([]byte, error) {
	resp, err := e.get(ctx, "manifests/"+d.String(), acceptManifests, "")
	if err != nil {
		return nil, err
	}
	return checked("manifest", resp, d, maxManifest, -1)
}

// blob fetches a small blob of known size.
func (e *endpoint) blob(ctx context.Context, d digest.Digest, size int64) ([]byte, error) {
	resp, err := e.get(ctx, "blobs/"+d.String(), "", "")
	if err != nil {
		return nil, err
	}
	return checked("configuration", resp, d, maxManifest, size)
}

func checked(what string, resp *http.Response, d digest.Digest, max, size int64) ([]byte, error) {
	defer resp.Body.Close()
	raw, err := bounded.ReadAll(resp.Body, max)
	if errors.Is(err, bounded.ErrTooLarge) {
		return nil, malformed("%s has more than %d bytes", what, max)
	}
	if err != nil {
		return nil, cause.Wrap(cause.RegistryUnavailable, err)
	}
	if got := digest.SHA256.FromBytes(raw); got != d || size >= 0 && size != int64(len(raw)) {
		return nil, cause.New(cause.ManifestMismatch, "the registry's %s has digest %s and %d bytes, expected %s", what, got, len(raw), d)
	}
	return raw, nil
}
