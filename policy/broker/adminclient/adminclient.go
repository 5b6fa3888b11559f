// Package adminclient speaks to a key broker's admin side: resources, release
// rules and version marks. It needs a bearer token and trusts the given roots
// alone, never the system's. It does not read evidence or receive keys.
package adminclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// The admin endpoints beside the protocol's own POST and DELETE of
// kbs.PathResource. Rule paths are followed by "<repository>/<type>/<tag>".
const (
	PathResources = "/admin/v0/resources" // GET: the list
	PathRules     = "/admin/v0/rules"     // GET: the list
	PathRule      = "/admin/v0/rule/"     // GET, PUT, DELETE
	PathMark      = "/admin/v0/mark/"     // GET, PUT; followed by the policy's name
)

// Rule is a release rule, see the release package.
type Rule = release.Rule

// PolicyRule is the part of a rule that names launch policies.
type PolicyRule = release.PolicyRule

// Mark is what the broker says, signed, about a policy name: the lowest
// version that may run and the current signers. A mark never goes down.
type Mark struct {
	Version uint64   `json:"version"`
	Signers []string `json:"signers,omitempty"` // SHA-256 of SPKI, lowercase hex
}

// RulesAreSigned is the detail by which a broker that takes signed reference
// documents refuses the rule of a single resource.
const RulesAreSigned = "rules are signed here: put a reference document"

// IsRulesAreSigned says whether err is that refusal.
func IsRulesAreSigned(err error) bool {
	var e *kbs.Error
	return errors.As(err, &e) && e.Variant() == kbs.VariantPolicyDeny && e.Body.Detail == RulesAreSigned
}

// Client talks to one broker. It is safe for concurrent use.
type Client struct {
	base  string
	token string
	http  *http.Client
}

// New returns a client for the broker at https://host[:port]. caPEM holds the
// only roots that its certificate may chain to; token is the admin token.
func New(brokerURL string, caPEM []byte, token string) (*Client, error) {
	u, err := url.Parse(brokerURL)
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return nil, cause.New(cause.Usage, "broker URL %q is not https://host[:port]", brokerURL)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(caPEM) {
		return nil, cause.New(cause.Usage, "no certificate among the broker's TLS roots")
	}
	token = strings.TrimSpace(token)
	if len(token) < 32 || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return nil, cause.New(cause.Usage, "the admin token is empty, too short or not printable ASCII")
	}
	return &Client{
		base:  "https://" + u.Host,
		token: token,
		http: &http.Client{
			Timeout: 30 * time.Second,
			Transport: &http.Transport{
				Proxy:                 nil, // the token goes to the broker alone
				TLSClientConfig:       &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
				TLSHandshakeTimeout:   10 * time.Second,
				ResponseHeaderTimeout: 20 * time.Second,
				ForceAttemptHTTP2:     true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return errors.New("the broker redirected, which it never does")
			},
		},
	}, nil
}

// PutResource stores or replaces a resource. It is released to nobody until a
// rule for it is set. uri is kbs:///repository/type/tag; data is 1 byte to 1 MiB.
func (c *Client) PutResource(ctx context.Context, uri string, data []byte) error {
	u, err := parse(uri)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodPost, kbs.PathResource+u.Path(), data, nil)
}

// DeleteResource removes a resource and its rule.
func (c *Client) DeleteResource(ctx context.Context, uri string) error {
	u, err := parse(uri)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodDelete, kbs.PathResource+u.Path(), nil, nil)
}

// Resources lists the names of all resources as kbs:///repository/type/tag.
func (c *Client) Resources(ctx context.Context) ([]string, error) {
	var list []string
	return list, c.do(ctx, http.MethodGet, PathResources, nil, &list)
}

// PutRule sets the release rule of a resource, which need not be there yet.
func (c *Client) PutRule(ctx context.Context, uri string, rule Rule) error {
	u, err := parse(uri)
	if err != nil {
		return err
	}
	body, err := rule.Encode()
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodPut, PathRule+u.Path(), body, nil)
}

// Rule returns the release rule of a resource.
func (c *Client) Rule(ctx context.Context, uri string) (*Rule, error) {
	u, err := parse(uri)
	if err != nil {
		return nil, err
	}
	var r Rule
	if err := c.do(ctx, http.MethodGet, PathRule+u.Path(), nil, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// DeleteRule removes a rule: the resource is released to nobody from then on.
func (c *Client) DeleteRule(ctx context.Context, uri string) error {
	u, err := parse(uri)
	if err != nil {
		return err
	}
	return c.do(ctx, http.MethodDelete, PathRule+u.Path(), nil, nil)
}

// Rules lists the names of all resources that have a rule.
func (c *Client) Rules(ctx context.Context) ([]string, error) {
	var list []string
	return list, c.do(ctx, http.MethodGet, PathRules, nil, &list)
}

// SetMark raises the version mark of a policy name. A version below the
// present mark is refused.
func (c *Client) SetMark(ctx context.Context, name string, m Mark) error {
	body, err := json.Marshal(m)
	if err != nil {
		return cause.Wrap(cause.Internal, err)
	}
	return c.do(ctx, http.MethodPut, PathMark+url.PathEscape(name), body, nil)
}

// Mark returns the version mark of a policy name; a zero Version when none is
// set.
func (c *Client) Mark(ctx context.Context, name string) (*Mark, error) {
	var m Mark
	if err := c.do(ctx, http.MethodGet, PathMark+url.PathEscape(name), nil, &m); err != nil {
		return nil, err
	}
	return &m, nil
}

func parse(uri string) (kbs.ResourceURI, error) {
	u, err := kbs.ParseResourceURI(uri)
	return u, cause.Wrap(cause.Usage, err)
}

// refusal is the code of a broker's error answer. A document that is refused
// has its code in front of the detail, as adminError in the broker writes it.
func refusal(e *kbs.Error) cause.Code {
	if e.Status == http.StatusServiceUnavailable {
		return cause.BrokerUnavailable
	}
	switch e.Variant() {
	case kbs.VariantAdminAuthAccess:
		return cause.NotPermitted
	case kbs.VariantPluginInternalError:
		if strings.HasSuffix(e.Body.Detail, "not found") {
			return cause.NotFound
		}
	case kbs.VariantRateLimited:
		return cause.BrokerUnavailable
	case kbs.VariantPolicyDeny:
		code, _, _ := strings.Cut(e.Body.Detail, ": ")
		if cause.Known(cause.Code(code)) {
			return cause.Code(code)
		}
		return cause.NotPermitted
	}
	return cause.BrokerProtocol
}

// do sends one request and decodes a JSON answer into out, unless out is nil.
func (c *Client) do(ctx context.Context, method, path string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return cause.Wrap(cause.Usage, err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := c.http.Do(req)
	if err != nil {
		var unknown x509.UnknownAuthorityError
		var host x509.HostnameError
		var verify *tls.CertificateVerificationError
		if errors.As(err, &unknown) || errors.As(err, &host) || errors.As(err, &verify) {
			return cause.New(cause.BrokerTLS, "%w", err)
		}
		return cause.New(cause.BrokerUnavailable, "%w", err)
	}
	defer resp.Body.Close()
	answer, err := bounded.ReadAll(resp.Body, kbs.MaxBody)
	if err != nil {
		return cause.New(cause.BrokerProtocol, "answer to %s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		e := kbs.DecodeError(resp.StatusCode, answer)
		return cause.New(refusal(e), "%s %s: %w", method, path, e)
	}
	if out == nil {
		return nil
	}
	if err := bounded.DecodeJSON(answer, out, bounded.Limits{Bytes: kbs.MaxBody}); err != nil {
		return cause.New(cause.BrokerProtocol, "answer to %s %s: %w", method, path, fmt.Errorf("%w", err))
	}
	return nil
}
