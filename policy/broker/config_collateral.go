package broker

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Collateral says where certificates, revocation lists and TCB information of
// the TEEs' vendors come from, beside the evidence itself. The broker never
// asks a vendor.
type Collateral struct {
	Cache string `json:"cache,omitempty"` // directory, laid out as package collateral says
	Proxy string `json:"proxy,omitempty"` // URL that the vendor's address is appended to
	// ProxyRoots is a PEM file with the only roots of the proxy's certificate.
	ProxyRoots string            `json:"proxyRoots,omitempty"`
	Missing    collateral.Policy `json:"missing,omitzero"` // what is missing refuses, unless this says if-present
}

func (c *Collateral) validate() error {
	if c == nil {
		return nil
	}
	if c.Cache == "" && c.Proxy == "" && c.Missing == (collateral.Policy{}) {
		return errors.New("collateral: set at least one of cache, proxy and missing")
	}
	if err := c.Missing.Validate(); err != nil {
		return err
	}
	if c.Proxy == "" {
		if c.ProxyRoots != "" {
			return errors.New("collateral.proxyRoots is set without collateral.proxy")
		}
		return nil
	}
	u, err := url.Parse(c.Proxy)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" {
		return errors.New("collateral.proxy must be an URL of scheme, host and path alone")
	}
	// What the proxy gives is checked against the vendors' signatures, so plain
	// HTTP gives up nothing but who asks for which chip.
	if u.Scheme != "https" && (u.Scheme != "http" || c.ProxyRoots != "") {
		return fmt.Errorf("collateral.proxy has scheme %q, expected https, or http without proxyRoots", u.Scheme)
	}
	return nil
}

// source makes the one source that all verifiers share. Without configuration
// there is no collateral but what evidence carries, and what is missing refuses.
func (c *Collateral) source() (*collateral.Source, error) {
	if c == nil {
		return &collateral.Source{}, nil
	}
	s := &collateral.Source{Dir: c.Cache, Policy: c.Missing}
	if c.Proxy == "" {
		return s, nil
	}
	var err error
	if s.Proxy, err = url.Parse(c.Proxy); err != nil {
		return nil, cause.New(cause.Config, "collateral.proxy: %w", err)
	}
	// No proxy from the environment: a configured address is the one asked.
	t := &http.Transport{MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute, TLSHandshakeTimeout: 10 * time.Second, MaxResponseHeaderBytes: 256 << 10}
	if c.ProxyRoots != "" {
		b, err := bounded.ReadFile(c.ProxyRoots, maxPEMFile)
		if err != nil {
			return nil, cause.New(cause.Config, "collateral.proxyRoots: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(b) {
			return nil, cause.New(cause.Config, "collateral.proxyRoots: %s has no certificate", c.ProxyRoots)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	s.Client = &http.Client{Transport: t, Timeout: 15 * time.Second}
	return s, nil
}
