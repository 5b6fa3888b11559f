// Package seed reads the cloud-init seed that the host gave, and lets through
// what is on an allow-list.
//
// It promises that whatever it returns was written anew from checked values:
// nothing of the host's text reaches cloud-init. It mounts nothing, runs
// nothing, and judges no policy. The types in document.go are the allow-list.
package seed

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The files of a seed (NoCloud).
const (
	UserDataFile      = "user-data"
	MetaDataFile      = "meta-data"
	NetworkConfigFile = "network-config"
)

// Limits has the size in bytes that each file may have. Initdata grows when it
// is indented or quoted.
var Limits = map[string]int64{
	UserDataFile:      2 * policy.MaxInitdata,
	MetaDataFile:      16 << 10,
	NetworkConfigFile: 64 << 10,
}

// Files are the contents of a seed's files, by name.
type Files map[string][]byte

// Seed is a seed that was accepted.
type Seed struct {
	Document
	Initdata []byte // exact bytes
}

// Parse checks the files against the allow-list. The cause is SeedRefused for
// what is well formed and not wanted, naming the key; SeedMalformed for what
// cannot be decoded; SeedMissing without user-data.
func Parse(files Files) (*Seed, error) {
	for name := range files {
		if _, known := Limits[name]; !known {
			return nil, cause.New(cause.SeedRefused, "the file %s is not on the allow-list", bounded.OneLine(name))
		}
	}
	text, found := files[UserDataFile]
	if !found {
		return nil, cause.New(cause.SeedMissing, "the seed has no %s", UserDataFile)
	}
	if err := checkKind(text); err != nil {
		return nil, err
	}
	var s Seed
	if err := decode(UserDataFile, text, &s.UserData, s.UserData.check); err != nil {
		return nil, err
	}
	if text, found := files[MetaDataFile]; found && len(bytes.TrimSpace(text)) > 0 {
		s.MetaData = &MetaData{}
		if err := decode(MetaDataFile, text, s.MetaData, s.MetaData.check); err != nil {
			return nil, err
		}
	}
	if text, found := files[NetworkConfigFile]; found && len(bytes.TrimSpace(text)) > 0 {
		s.NetworkConfig = &NetworkConfig{}
		if err := decode(NetworkConfigFile, text, s.NetworkConfig, s.NetworkConfig.check); err != nil {
			return nil, err
		}
	}
	s.Initdata = []byte(s.UserData.CVMAgent.Initdata)
	return &s, nil
}

// decode decodes one file strictly, then checks its values.
func decode(name string, text []byte, v any, check func() error) error {
	where, err := bounded.DecodeYAML(text, v, bounded.Limits{Bytes: Limits[name], Depth: 8, Nodes: 4096})
	if err == nil {
		err = check()
		where.Locate(err)
	}
	if err == nil {
		return nil
	}
	var f *bounded.FieldError
	switch {
	case errors.Is(err, bounded.ErrUnknownField) && errors.As(err, &f):
		f.Msg = "not on the allow-list"
		return cause.New(cause.SeedRefused, "%s: %w", name, f)
	case errors.Is(err, errValue):
		return cause.New(cause.SeedRefused, "%s: %w", name, err)
	}
	return cause.New(cause.SeedMalformed, "%s: %w", name, err)
}

// kinds are the other things that cloud-init takes user-data for, by how they
// begin (cloudinit/handlers: INCLUSION_TYPES_MAP; MIME and gzip before it).
var kinds = []struct{ prefix, is string }{
	{"\x1f\x8b", "gzip"},
	{"#!", "a script"},
	{"#include-once", "#include-once"},
	{"#include", "#include"},
	{"#upstart-job", "#upstart-job"},
	{"#part-handler", "#part-handler"},
	{"#cloud-boothook", "#cloud-boothook"},
	{"#cloud-config-archive", "#cloud-config-archive"},
	{"#cloud-config-jsonp", "#cloud-config-jsonp"},
	{"## template:", "a template (jinja)"},
	{"content-type:", "MIME"},
	{"mime-version:", "MIME"},
	{"from ", "MIME"},
}

// checkKind requires #cloud-config, and names what else it is.
func checkKind(text []byte) error {
	first, _, _ := bytes.Cut(text, []byte("\n"))
	if strings.TrimRight(string(first), " \t\r") == "#cloud-config" {
		return nil
	}
	start := bytes.TrimLeft(text, " \t\r\n")
	for _, k := range kinds {
		if len(start) >= len(k.prefix) && (string(start[:len(k.prefix)]) == k.prefix || strings.EqualFold(string(start[:len(k.prefix)]), k.prefix)) {
			return cause.New(cause.SeedRefused, "%s is %s: only #cloud-config is accepted", UserDataFile, k.is)
		}
	}
	return cause.New(cause.SeedRefused, "%s begins with %.40q, expected the line #cloud-config", UserDataFile, first)
}

// Sanitized are the files for cloud-init: NoCloud's three, written from the
// checked values alone. JSON is YAML of one reading.
func (s *Seed) Sanitized() (Files, error) {
	type ntp struct {
		Enabled bool     `json:"enabled"`
		Servers []string `json:"servers"`
	}
	user := struct {
		Hostname string `json:"hostname,omitempty"`
		FQDN     string `json:"fqdn,omitempty"`
		Timezone string `json:"timezone,omitempty"`
		Locale   string `json:"locale,omitempty"`
		NTP      *ntp   `json:"ntp,omitempty"`
	}{Hostname: s.UserData.Hostname, FQDN: s.UserData.FQDN, Timezone: s.UserData.Timezone, Locale: s.UserData.Locale}
	if s.UserData.NTP != nil {
		user.NTP = &ntp{true, s.UserData.NTP.Servers}
	}
	meta := MetaData{}
	if s.MetaData != nil {
		meta = *s.MetaData
	}
	if meta.InstanceID == "" {
		meta.InstanceID = "cvm" // the root is fresh at every boot: one is as good as another
	}
	out := Files{}
	for name, v := range map[string]any{UserDataFile: user, MetaDataFile: meta, NetworkConfigFile: s.NetworkConfig} {
		if name == NetworkConfigFile && s.NetworkConfig == nil {
			continue
		}
		text, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out[name] = append(text, '\n')
	}
	out[UserDataFile] = append([]byte("#cloud-config\n"), out[UserDataFile]...)
	return out, nil
}
