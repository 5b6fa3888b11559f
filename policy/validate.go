package policy

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Bounds of Validate. maxInteger is the largest integer that RFC 8785 keeps
// exact (2^53 − 1).
const (
	maxInteger   = 1<<53 - 1
	maxWorkloads = 32
	maxSigners   = 16
	maxList      = 256
	maxString    = 32 << 10 // bytes of an argument, an environment value …
	maxRoot      = 512 << 10

	maxBrokerURLs = 7 // besides the first
	maxVMPL       = 3
)

// The promises that a policy can give up by name, under dialect kbs.
const (
	AcceptNoEventLog    = "no-event-log"    // runtime events do not reach the broker (plain SNP and tpm)
	AcceptNoVersionMark = "no-version-mark" // the broker does not vouch for the newest version
	AcceptNoTombstone   = "no-tombstone"    // the broker does not remember that the instance was destroyed
)

// The values of Broker.Dialect.
const (
	DialectCVMAgent = "cvm-agent/1"
	DialectKBS      = "kbs"
)

var (
	dnsLabel   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	fileName   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	envName    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)
	userSpec   = regexp.MustCompile(`^([0-9]{1,9}|[a-z_][a-z0-9_-]{0,31})(:([0-9]{1,9}|[a-z_][a-z0-9_-]{0,31}))?$`)
	hostPort   = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)
	imageParts = regexp.MustCompile(`^([^/@]+)/([a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*)@sha256:([0-9a-f]{64})$`)
	imageTag   = regexp.MustCompile(`:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	sha256Ref  = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// rule is a broken rule: FieldError with the cause PolicyInvalid, without a
// position, which Positions.Locate can fill in.
func rule(path, format string, args ...any) error {
	return ruleAs(cause.PolicyInvalid, path, format, args...)
}

func ruleAs(code cause.Code, path, format string, args ...any) error {
	return cause.New(code, "policy: %w", &bounded.FieldError{Path: path, Msg: fmt.Sprintf(format, args...)})
}

func oneOf[T ~string](path string, got T, want ...T) error {
	if slices.Contains(want, got) {
		return nil
	}
	var names []string
	for _, w := range want {
		if w != "" {
			names = append(names, string(w))
		}
	}
	if got == "" {
		return rule(path, "is missing, expected %s", strings.Join(names, " or "))
	}
	return rule(path, "%q, expected %s", got, strings.Join(names, " or "))
}

// first returns the first error of checks that are cheap to make in any case.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// each applies check to every element, with its path, after bounding their
// number.
func each[T any](path string, list []T, max int, check func(path string, v T) error) error {
	if len(list) > max {
		return rule(path, "%d entries, at most %d are accepted", len(list), max)
	}
	for i, v := range list {
		if err := check(fmt.Sprintf("%s[%d]", path, i), v); err != nil {
			return err
		}
	}
	return nil
}

// unique remembers values and refuses the second of each.
type unique map[string]string

func (u unique) add(path, value string) error {
	if have, dup := u[value]; dup {
		return rule(path, "%q is a duplicate of %s", value, have)
	}
	u[value] = path
	return nil
}

// Validate checks every rule on a decoded policy that needs nothing but the
// policy. The error is a cause with a *bounded.FieldError that names the path.
func (p *Policy) Validate() error {
	if p.APIVersion != APIVersion {
		return rule("apiVersion", "%q, expected %q", p.APIVersion, APIVersion)
	}
	if !dnsLabel.MatchString(p.Name) {
		return rule("name", "%q is not a DNS label (a-z, 0-9 and -, at most 63 bytes)", clip(p.Name))
	}
	if p.Version < 1 || p.Version > maxInteger {
		return rule("version", "%d, expected 1 to 2^53-1", p.Version)
	}
	if p.MinimumVersion > p.Version {
		return rule("minimumVersion", "%d is above the version %d", p.MinimumVersion, p.Version)
	}
	if _, err := p.expiry(); err != nil {
		return err
	}
	if p.NextSigners != nil {
		if _, err := p.NextSigners.parse(); err != nil {
			return err
		}
	}
	if len(p.Platforms) == 0 {
		return rule("platforms", "is missing, expected at least one")
	}
	seen := unique{}
	if err := each("platforms", p.Platforms, 8, func(path string, v Platform) error {
		return first(oneOf(path, v, PlatformSNP, PlatformTDX, PlatformAzSNPvTPM, PlatformAzTDXvTPM, PlatformTPM), seen.add(path, string(v)))
	}); err != nil {
		return err
	}
	if p.VMPL > maxVMPL {
		return rule("vmpl", "%d, expected 0 to %d", p.VMPL, maxVMPL)
	}
	if p.VMPL > 0 && !slices.Contains(p.Platforms, PlatformSNP) {
		return rule("vmpl", "%d, but platforms has no %s: nothing else has privilege levels", p.VMPL, PlatformSNP)
	}
	if err := p.validateBroker(); err != nil {
		return err
	}
	hosts := unique{}
	if err := each("registries", p.Registries, maxList, func(path string, r Registry) error {
		return first(r.validate(path), hosts.add(path+".host", r.Host))
	}); err != nil {
		return err
	}
	if err := p.validateWorkloads(); err != nil {
		return err
	}
	return first(p.Upgrade.validate("upgrade"), p.Control.validate("control"),
		oneOf("log.workload", p.Log.Workload, "", "journal", "none"))
}

func (p *Policy) expiry() (time.Time, error) {
	t, err := time.Parse(time.RFC3339, p.Expires)
	if err != nil || !strings.HasSuffix(p.Expires, "Z") {
		return time.Time{}, rule("expires", "%q is not a time like 2027-01-31T00:00:00Z (RFC 3339, UTC)", clip(p.Expires))
	}
	return t, nil
}

func (s *SignerSet) parse() (signerSet, error) {
	out := signerSet{threshold: s.Threshold}
	if len(s.Keys) == 0 {
		return out, rule("nextSigners.keys", "is missing, expected at least one")
	}
	seen := unique{}
	if err := each("nextSigners.keys", s.Keys, maxSigners, func(path, k string) error {
		pub, err := dsse.ParsePublicKeyPEM([]byte(k))
		if err != nil {
			return rule(path, "%v", err)
		}
		out.keys = append(out.keys, pub)
		return addKey(seen, path, k)
	}); err != nil {
		return out, err
	}
	if s.Threshold < 1 || s.Threshold > len(s.Keys) {
		return out, rule("nextSigners.threshold", "%d, expected 1 to %d, the number of keys", s.Threshold, len(s.Keys))
	}
	return out, nil
}

// addKey requires a usable key that was not there yet, however it is written.
func addKey(seen unique, path, pemKey string) error {
	pub, err := dsse.ParsePublicKeyPEM([]byte(pemKey))
	if err != nil {
		return rule(path, "%v", err)
	}
	id, err := dsse.Fingerprint(pub)
	if err != nil {
		return rule(path, "%v", err)
	}
	return seen.add(path, id)
}

func (p *Policy) validateBroker() error {
	b := p.Broker
	if b == nil {
		return nil
	}
	urls := unique{}
	if err := first(checkURL("broker.url", b.URL), urls.add("broker.url", strings.TrimSuffix(b.URL, "/"))); err != nil {
		return err
	}
	if err := each("broker.urls", b.URLs, maxBrokerURLs, func(path, u string) error {
		return first(checkURL(path, u), urls.add(path, strings.TrimSuffix(u, "/")))
	}); err != nil {
		return err
	}
	if err := checkRoots("broker.tlsRoots", b.TLSRoots, true); err != nil {
		return err
	}
	if len(b.TokenKeys) == 0 {
		return rule("broker.tokenKeys", "is missing, expected at least one: the policy pins who signs tokens")
	}
	keys, accepted := unique{}, unique{}
	if err := each("broker.tokenKeys", b.TokenKeys, maxSigners, func(path, k string) error { return addKey(keys, path, k) }); err != nil {
		return err
	}
	if err := oneOf("broker.dialect", b.Dialect, "", DialectCVMAgent, DialectKBS); err != nil {
		return err
	}
	if err := each("broker.accept", b.Accept, 8, func(path, a string) error {
		return first(oneOf(path, a, AcceptNoEventLog, AcceptNoVersionMark, AcceptNoTombstone), accepted.add(path, a))
	}); err != nil {
		return err
	}
	if b.Dialect != DialectKBS {
		if len(b.Accept) > 0 {
			return rule("broker.accept", "nothing has to be given up under dialect %s", DialectCVMAgent)
		}
		return nil
	}
	for _, name := range p.GivenUp() {
		if !slices.Contains(b.Accept, name) {
			return rule("broker.accept", "dialect kbs cannot keep a promise on these platforms: accept %q by name, or use dialect %s", name, DialectCVMAgent)
		}
	}
	return nil
}

// checkURL requires scheme, host and port, and nothing that could carry a
// secret or a path.
func checkURL(path, text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || !hostPort.MatchString(u.Host) || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.ContainsAny(text, "?#") || (u.Path != "" && u.Path != "/") {
		return rule(path, "%q is not https://host[:port]", clip(text))
	}
	return nil
}

// GivenUp lists the promises that cannot hold with this policy's dialect and
// platforms, in the words of Broker.Accept.
func (p *Policy) GivenUp() []string {
	if p.Broker == nil || p.Broker.Dialect != DialectKBS {
		return nil
	}
	out := []string{AcceptNoVersionMark, AcceptNoTombstone}
	if slices.Contains(p.Platforms, PlatformSNP) || slices.Contains(p.Platforms, PlatformTPM) {
		out = append(out, AcceptNoEventLog)
	}
	return out
}

func checkRoots(path string, roots []string, required bool) error {
	if required && len(roots) == 0 {
		return rule(path, "is missing, expected at least one PEM certificate")
	}
	return each(path, roots, maxSigners, func(path, text string) error {
		rest := []byte(strings.TrimSpace(text))
		if len(rest) == 0 || len(rest) > maxString {
			return rule(path, "%d bytes, expected a PEM certificate of at most %d", len(rest), maxString)
		}
		for len(rest) > 0 {
			block, after := pem.Decode(rest)
			if block == nil || block.Type != "CERTIFICATE" || !strings.HasPrefix(string(rest), "-----BEGIN CERTIFICATE-----") {
				return rule(path, "is not PEM certificates and nothing else")
			}
			if _, err := x509.ParseCertificate(block.Bytes); err != nil {
				return rule(path, "%v", err)
			}
			rest = []byte(strings.TrimSpace(string(after)))
		}
		return nil
	})
}

func (r *Registry) validate(path string) error {
	if !hostPort.MatchString(r.Host) {
		return rule(path+".host", "%q is not host[:port]", clip(r.Host))
	}
	if r.PlainHTTP && len(r.TLSRoots) > 0 {
		return rule(path+".tlsRoots", "TLS roots for a registry that is reached by plain HTTP")
	}
	host := func(path, h string) error {
		if !hostPort.MatchString(h) {
			return rule(path, "%q is not host[:port]", clip(h))
		}
		return nil
	}
	return first(checkRoots(path+".tlsRoots", r.TLSRoots, false),
		each(path+".mirrors", r.Mirrors, maxSigners, host),
		each(path+".redirectTo", r.Redirects, maxSigners, host))
}

func (u *Upgrade) validate(path string) error {
	d := u.Deadlines
	for name, v := range map[string]Duration{"registry": d.Registry, "broker": d.Broker, "fetch": d.Fetch, "sbom": d.SBOM, "start": d.Start} {
		if v < 0 {
			return rule(path+".deadlines."+name, "is negative")
		}
	}
	return oneOf(path+".strategy", u.Strategy, "", "replace")
}

func (c *Control) validate(path string) error {
	seen := unique{}
	if len(c.ReadUIDs) > maxList || len(c.OrderUIDs) > maxList {
		return rule(path, "more than %d uids", maxList)
	}
	return each(path+".orderKeys", c.OrderKeys, maxSigners, func(path string, k OrderKey) error {
		if err := addKey(seen, path+".key", k.Key); err != nil {
			return err
		}
		if len(k.Orders) == 0 {
			return rule(path+".orders", "is missing, expected upgrade or destroy")
		}
		orders := unique{}
		return each(path+".orders", k.Orders, 2, func(path, o string) error {
			return first(oneOf(path, o, "upgrade", "destroy"), orders.add(path, o))
		})
	})
}

func checkResource(path, uri string) error {
	u, err := kbs.ParseResourceURI(uri)
	if err != nil {
		return rule(path, "%v", err)
	}
	if u.Host != "" {
		return rule(path, "%q names a host: the policy's broker is the only one, write %s", clip(uri), u)
	}
	return nil
}

func checkAddr(path, ip string) error {
	if _, err := netip.ParseAddr(ip); ip != "" && err != nil {
		return rule(path, "%q is not an IP address", clip(ip))
	}
	return nil
}

func checkDigest(path, d string) error {
	if !sha256Ref.MatchString(d) {
		return rule(path, "%q is not sha256: and %d lowercase hexadecimal digits", clip(d), hex.EncodedLen(sha256.Size))
	}
	return nil
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
