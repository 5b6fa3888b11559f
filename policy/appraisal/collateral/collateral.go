// Package collateral finds what the vendors of TEEs publish about their
// hardware: certificates, revocation lists, TCB information.
//
// It promises: nothing here talks to a vendor. What is wanted is named by the
// vendor's own address and looked up in memory, then in a cache directory, then,
// if one is configured, asked of a proxy; nothing else. What is found is
// bounded and not trusted: who asks checks its signature and its dates.
package collateral

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// MaxSize bounds one piece of collateral, in bytes: a revocation list is the
// largest.
const MaxSize = 2 << 20

const (
	maxHeader  = 64 << 10
	maxEntries = 4096        // in memory
	keepFor    = time.Hour   // what the proxy gave, before it is asked again
	failFor    = time.Minute // what the proxy could not give
	proxyWait  = 10 * time.Second
)

// ErrMissing says that neither the cache directory nor the proxy has it.
var ErrMissing = errors.New("not in the collateral cache and not at the proxy")

// Need says what becomes of evidence when a kind of collateral is missing.
type Need string

// The two answers. The zero value requires.
const (
	Require   Need = "require"    // refuse
	IfPresent Need = "if-present" // list the check as not checked
)

// Policy says, kind by kind, what becomes of evidence whose collateral is
// missing. Collateral that is there and wrong always refuses.
type Policy struct {
	Revocation Need `json:"revocation,omitempty"` // revocation lists; default "require"
	TCBInfo    Need `json:"tcbInfo,omitempty"`    // Intel's TCB info and QE identity; default "require"
}

// Validate accepts the two words and nothing.
func (p Policy) Validate() error {
	for name, n := range map[string]Need{"revocation": p.Revocation, "tcbInfo": p.TCBInfo} {
		if n != "" && n != Require && n != IfPresent {
			return fmt.Errorf("collateral.missing.%s is %q, expected %q or %q", name, n, Require, IfPresent)
		}
	}
	return nil
}

// Required says whether the kind must be there.
func (n Need) Required() bool { return n != IfPresent }

// Piece is one answer: a body, and the header fields of the vendor's answer
// that carry certificate chains (Intel's).
type Piece struct {
	Header http.Header
	Body   []byte
}

// Source finds collateral. The zero value has none. It is safe for concurrent
// use; its fields are not changed once it is used.
type Source struct {
	// Dir holds files by the vendor's address: HOST/PATH, with "?QUERY" kept in
	// the file's name, and beside it NAME.header, a JSON object of header name
	// to value, where a header matters. `cvmctl` and a plain copy both fill it.
	Dir string
	// Proxy is asked by appending HOST/PATH?QUERY of the vendor's address to
	// it. A PCCS or a mirror does for one host what a rewrite rule says.
	Proxy  *url.URL
	Client *http.Client // for Proxy; nil: no connection is ever opened
	Policy Policy
	Now    func() time.Time // nil: time.Now; for the age of what is in memory

	mu      sync.Mutex
	known   map[string]entry
	missing map[string]entry // apart: a peer can ask for any number of chips that there are not
}

type entry struct {
	piece *Piece
	err   error
	until time.Time
}

// Get returns what the vendor publishes at address, an https URL. The error
// is, or wraps, ErrMissing when it is nowhere.
func (s *Source) Get(ctx context.Context, address string) (*Piece, error) {
	if s == nil {
		return nil, ErrMissing
	}
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	s.mu.Lock()
	e, ok := s.known[address]
	if !ok || !now().Before(e.until) {
		e, ok = s.missing[address]
	}
	s.mu.Unlock()
	if ok && now().Before(e.until) {
		return e.piece, e.err
	}
	name, err := fileName(address)
	if err != nil {
		return nil, err
	}
	p, err := s.find(ctx, name)
	keep := keepFor
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		keep = failFor
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	to := &s.known
	if err != nil {
		to = &s.missing
	}
	if *to == nil || len(*to) >= maxEntries {
		*to = map[string]entry{}
	}
	(*to)[address] = entry{p, err, now().Add(keep)}
	return p, err
}

// fileName is the vendor's address as a path below Dir and Proxy.
func fileName(address string) (string, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.Host == "." || u.User != nil || u.Fragment != "" {
		return "", fmt.Errorf("collateral address %q is not an https URL", address)
	}
	name := u.Host + u.EscapedPath()
	if u.RawQuery != "" {
		name += "?" + u.RawQuery
	}
	if len(name) > 1024 || strings.Contains(name, "%2F") || strings.Contains(name, "%2f") || !filepath.IsLocal(name) || filepath.Clean(name) != name {
		return "", fmt.Errorf("collateral address %q cannot be a file's name", address)
	}
	return name, nil
}

func (s *Source) find(ctx context.Context, name string) (*Piece, error) {
	if s.Dir != "" {
		p, err := s.file(filepath.Join(s.Dir, filepath.FromSlash(name)))
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return p, err
		}
	}
	if s.Proxy == nil || s.Client == nil {
		return nil, fmt.Errorf("%s: %w", name, ErrMissing)
	}
	return s.ask(ctx, name)
}

func (s *Source) file(path string) (*Piece, error) {
	body, err := bounded.ReadFile(path, MaxSize)
	if err != nil {
		return nil, err
	}
	p := &Piece{Body: body, Header: http.Header{}}
	head, err := bounded.ReadFile(path+".header", maxHeader)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return nil, err
	}
	var fields map[string]string
	if err := bounded.CheckJSON(head, bounded.Limits{Bytes: maxHeader, Depth: 2}); err != nil {
		return nil, fmt.Errorf("%s.header: %w", path, err)
	}
	if err := json.Unmarshal(head, &fields); err != nil {
		return nil, fmt.Errorf("%s.header: %w", path, err)
	}
	for k, v := range fields {
		p.Header.Set(k, v)
	}
	return p, nil
}

func (s *Source) ask(ctx context.Context, name string) (*Piece, error) {
	ctx, cancel := context.WithTimeout(ctx, proxyWait)
	defer cancel()
	address := strings.TrimSuffix(s.Proxy.String(), "/") + "/" + name
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	// A redirect could lead anywhere, a vendor included.
	client := *s.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("collateral proxy: %w (%w)", err, ErrMissing)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("collateral proxy: %s for %s: %w", resp.Status, name, ErrMissing)
	}
	body, err := bounded.ReadAll(resp.Body, MaxSize)
	if err != nil {
		return nil, fmt.Errorf("collateral proxy: %s: %w", name, err)
	}
	return &Piece{Header: resp.Header, Body: body}, nil
}

// Put writes a piece below Dir, for tools that fill a cache.
func (s *Source) Put(address string, p Piece) error {
	name, err := fileName(address)
	if err != nil {
		return err
	}
	path := filepath.Join(s.Dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if len(p.Header) > 0 {
		fields := map[string]string{}
		for k := range p.Header {
			fields[k] = p.Header.Get(k)
		}
		head, err := json.Marshal(fields)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path+".header", head, 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(path, p.Body, 0o644)
}
