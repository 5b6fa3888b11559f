package seed

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// errValue marks a value that decodes and is not accepted.
var errValue = errors.New("value not accepted")

// Values end up in files of systemd and of cloud-init: each is matched as a
// whole, and none can hold a line break, a slash that climbs, or a blank.
var (
	label     = regexp.MustCompile(`\A[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\z`)
	name      = regexp.MustCompile(`\A[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?){0,8}\z`)
	zone      = regexp.MustCompile(`\A[A-Za-z][A-Za-z0-9_+-]{0,31}(/[A-Za-z][A-Za-z0-9_+-]{0,31}){0,2}\z`)
	locale    = regexp.MustCompile(`\A(C|POSIX|[a-z]{2,3}(_[A-Z]{2})?)(\.(UTF-8|utf8))?\z`)
	instance  = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\z`)
	ethernet  = regexp.MustCompile(`\A(en|eth)[a-z0-9]{0,12}\z`)
	pattern   = regexp.MustCompile(`\A(en|eth)[a-z0-9]{0,12}\*?\z`)
	ethernets = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9_-]{0,31}\z`)
	hostPort  = regexp.MustCompile(`\A([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?\z`)
	mac       = regexp.MustCompile(`\A[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}\z`)
)

const (
	maxEthernets  = 8
	maxAddresses  = 16
	maxRoutes     = 32
	maxServers    = 8
	maxRegistries = 16
	minMTU        = 576
)

// refuse is a value that is not accepted, at a path that Locate knows.
func refuse(path, format string, args ...any) error {
	return &bounded.FieldError{Path: path, Msg: fmt.Sprintf(format, args...), Err: errValue}
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func match(path, value string, re *regexp.Regexp, what string) error {
	if value == "" || re.MatchString(value) {
		return nil
	}
	return refuse(path, "%.80q is no %s", value, what)
}

func all[T any](path string, list []T, most int, check func(path string, v T) error) error {
	if len(list) > most {
		return refuse(path, "%d entries, at most %d are accepted", len(list), most)
	}
	for i, v := range list {
		if err := check(fmt.Sprintf("%s[%d]", path, i), v); err != nil {
			return err
		}
	}
	return nil
}

// server is a DNS name or an address.
func server(path, s string) error {
	if isAddress(s) || (name.MatchString(s) && len(s) <= 253) {
		return nil
	}
	return refuse(path, "%.80q is no DNS name or address", s)
}

func registry(path, s string) error {
	if hostPort.MatchString(s) {
		return nil
	}
	return refuse(path, "%.80q is not host[:port]", s)
}

// isAddress: no zone, which could hold anything.
func isAddress(s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && a.Zone() == ""
}

func address(path, s string) error {
	if isAddress(s) {
		return nil
	}
	return refuse(path, "%.80q is no address", s)
}

func prefix(path, s string) error {
	if _, err := netip.ParsePrefix(s); err != nil {
		return refuse(path, "%.80q is no address/prefix", s)
	}
	return nil
}

func domain(path, s string) error {
	if s == "" || len(s) > 253 {
		return refuse(path, "is empty or too long")
	}
	return match(path, s, name, "DNS name")
}

func (u *UserData) check() error {
	if u.CVMAgent.Initdata == "" {
		return refuse("cvm_agent.initdata", "is missing")
	}
	if len(u.CVMAgent.Mirrors) > maxRegistries {
		return refuse("cvm_agent.mirrors", "%d registries, at most %d are accepted", len(u.CVMAgent.Mirrors), maxRegistries)
	}
	for _, host := range sortedKeys(u.CVMAgent.Mirrors) {
		at := "cvm_agent.mirrors." + host
		if err := first(registry(at, host), all(at, u.CVMAgent.Mirrors[host], maxServers, registry)); err != nil {
			return err
		}
	}
	if u.NTP != nil {
		if len(u.NTP.Servers) == 0 {
			return refuse("ntp.servers", "is empty")
		}
		if err := all("ntp.servers", u.NTP.Servers, maxServers, server); err != nil {
			return err
		}
	}
	return first(
		match("hostname", u.Hostname, label, "DNS label"),
		match("fqdn", u.FQDN, name, "DNS name"),
		match("timezone", u.Timezone, zone, "time zone"),
		match("locale", u.Locale, locale, "locale"))
}

func (m *MetaData) check() error {
	return first(
		match("instance-id", m.InstanceID, instance, "identifier"),
		match("local-hostname", m.LocalHostname, name, "DNS name"))
}

func (n *NetworkConfig) check() error {
	at, inner := "", Network{n.Version, n.Ethernets}
	if n.Network != nil {
		if n.Version != 0 || n.Ethernets != nil {
			return refuse("network", "stands beside what belongs into it")
		}
		at, inner = "network.", *n.Network
	}
	if inner.Version != 2 {
		return refuse(at+"version", "%d, expected 2", inner.Version)
	}
	if len(inner.Ethernets) > maxEthernets {
		return refuse(at+"ethernets", "%d entries, at most %d are accepted", len(inner.Ethernets), maxEthernets)
	}
	for _, id := range sortedKeys(inner.Ethernets) {
		e := inner.Ethernets[id]
		if err := e.check(at+"ethernets."+id, id); err != nil {
			return err
		}
	}
	return nil
}

func (e *Ethernet) check(at, id string) error {
	if !ethernets.MatchString(id) {
		return refuse(at, "no identifier of an interface")
	}
	m := Match{}
	if e.Match != nil {
		m = *e.Match
	}
	switch {
	case m == Match{} && !ethernet.MatchString(id):
		return refuse(at, "without a match it must be the name of an interface that begins with en or eth")
	case e.SetName != "" && m.MACAddress == "":
		return refuse(at+".set-name", "needs match.macaddress")
	case e.MTU != nil && *e.MTU < minMTU:
		return refuse(at+".mtu", "%d, expected at least %d", *e.MTU, minMTU)
	}
	if err := first(
		match(at+".match.name", m.Name, pattern, "name of an interface that begins with en or eth"),
		match(at+".match.macaddress", m.MACAddress, mac, "MAC address"),
		match(at+".set-name", e.SetName, ethernet, "name of an interface that begins with en or eth"),
		all(at+".addresses", e.Addresses, maxAddresses, prefix),
		all(at+".routes", e.Routes, maxRoutes, func(path string, r Route) error {
			if err := address(path+".via", r.Via); err != nil || r.To == "default" {
				return err
			}
			return prefix(path+".to", r.To)
		})); err != nil {
		return err
	}
	for path, gateway := range map[string]string{".gateway4": e.Gateway4, ".gateway6": e.Gateway6} {
		if gateway != "" {
			if err := address(at+path, gateway); err != nil {
				return err
			}
		}
	}
	if n := e.Nameservers; n != nil {
		return first(all(at+".nameservers.addresses", n.Addresses, maxServers, address),
			all(at+".nameservers.search", n.Search, maxServers, domain))
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
