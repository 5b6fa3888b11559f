package keyrelease

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// route is the policy's broker URLs, the one that answered last in front.
type route struct {
	mu    sync.Mutex
	bases []*url.URL
}

func newRoute(b policy.Broker) (*route, error) {
	r := &route{}
	for _, text := range append([]string{b.URL}, b.URLs...) {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
			return nil, cause.New(cause.PolicyInvalid, "broker URL %q is not https://host[:port]", text)
		}
		r.bases = append(r.bases, u)
	}
	return r, nil
}

// order is the URLs in the order in which they are asked.
func (r *route) order() []*url.URL {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.bases)
}

// prefer puts a URL in front.
func (r *route) prefer(u *url.URL) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.Index(r.bases, u)
	r.bases = append(append([]*url.URL{u}, r.bases[:i]...), r.bases[i+1:]...)
}

// leave takes an error of a session's URL. Where there are others the URL goes
// to the end and the session is of no more use: the next one is opened
// elsewhere.
func (r *route) leave(u *url.URL, err error) error {
	if cause.Of(err) != cause.BrokerUnavailable || errors.Is(err, errSessionGone) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.bases) == 1 {
		return err
	}
	i := slices.Index(r.bases, u)
	r.bases = append(append(slices.Clone(r.bases[:i]), r.bases[i+1:]...), u)
	return cause.New(cause.BrokerUnavailable, "%w: %s: %w", errSessionGone, u.Host, err)
}

// String lists hosts, for logs.
func (r *route) String() string {
	var hosts []string
	for _, u := range r.order() {
		hosts = append(hosts, u.Host)
	}
	return strings.Join(hosts, ", ")
}

// failover does try at one URL after the other until one answers. What an
// answering broker says is final, a refusal too: asking the next one would be
// shopping for a yes.
func failover[T any](ctx context.Context, cl *Client, try func(*url.URL) (T, error)) (T, error) {
	var none T
	bases := cl.route.order()
	var failed error // the first that a later try can help
	var texts []string
	for _, base := range bases {
		v, err := try(base)
		if err == nil {
			cl.route.prefer(base)
			return v, nil
		}
		code := cause.Of(err)
		if len(bases) == 1 || ctx.Err() != nil || (code != cause.BrokerUnavailable && code != cause.BrokerTLS) {
			return none, err
		}
		cl.c.Logger.Warn("the key broker does not answer at this URL", "host", base.Host, "error", err)
		texts = append(texts, base.Host+": "+textOf(err))
		if failed == nil || code == cause.BrokerUnavailable {
			failed = err
		}
	}
	return none, cause.New(cause.Of(failed), "none of %d brokers answers: %s", len(bases), strings.Join(texts, "; "))
}

// textOf is an error's text without its cause code.
func textOf(err error) string {
	var e *cause.Error
	if errors.As(err, &e) {
		return e.Err.Error()
	}
	return err.Error()
}
