package broker

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// Config is the broker's configuration file, YAML, decoded strictly. Relative
// paths are relative to the file's directory.
type Config struct {
	Listen  string    `json:"listen"` // host:port; port 0 takes a free one
	TLS     TLSFiles  `json:"tls"`
	Storage string    `json:"storage"`
	KEK     KEKSource `json:"kek"`
	// TokenKey is a PEM file with the ECDSA P-256 key that signs tokens, mode 0600.
	TokenKey string `json:"tokenKey"`
	// AdminTokenHashes is a file with the SHA-256 of admin tokens in hex, one a
	// line. Without it the admin side is off: there is no default token.
	AdminTokenHashes string       `json:"adminTokenHashes,omitempty"`
	AuditLog         string       `json:"auditLog"`
	EKRoots          []RootConfig `json:"ekRoots,omitempty"`
	ListedEKs        []string     `json:"listedEKs,omitempty"`  // SHA-256 of EK SPKIs
	TrustedAKs       []string     `json:"trustedAKs,omitempty"` // SHA-256 of AK SPKIs, for dialect kbs
	// RuleSigners, when given, makes signed reference documents the only rules
	// of this broker: rules of single resources are refused and not looked at.
	RuleSigners *RuleSignerConfig `json:"ruleSigners,omitempty"`
	Limits      Limits            `json:"limits,omitzero"`
}

// RuleSignerConfig is a threshold of PEM files with public keys. A fingerprint
// would not do: an envelope carries no key to compare with it.
type RuleSignerConfig struct {
	Keys      []string `json:"keys"`
	Threshold int      `json:"threshold,omitempty"` // default 1
}

// TLSFiles names the server's certificate chain and key, PEM; the key's mode
// is 0600.
type TLSFiles struct {
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
}

// KEKSource is exactly one of a file of 32 bytes with mode 0600 and the name
// of a systemd credential.
type KEKSource struct {
	File       string `json:"file,omitempty"`
	Credential string `json:"credential,omitempty"`
}

// RootConfig is a named set of EK certificate issuers: PEM files, or
// directories whose *.pem and *.crt files are read.
type RootConfig struct {
	Name  string   `json:"name"`
	Paths []string `json:"paths"`
}

// Limits bounds the broker; zero means the default.
type Limits struct {
	Sessions    int `json:"sessions,omitempty"`    // default 10000
	Connections int `json:"connections,omitempty"` // default 1024
}

const (
	maxConfig  = 1 << 20
	maxPEMFile = 1 << 20
)

// LoadConfig reads and validates a configuration file.
func LoadConfig(path string) (*Config, error) {
	data, err := bounded.ReadFile(path, maxConfig)
	if err != nil {
		return nil, cause.New(cause.Config, "%w", err)
	}
	var c Config
	if _, err := bounded.DecodeYAML(data, &c, bounded.Limits{Bytes: maxConfig, Depth: 8}); err != nil {
		return nil, cause.New(cause.Config, "%s: %w", path, err)
	}
	if err := c.validate(); err != nil {
		return nil, cause.New(cause.Config, "%s: %w", path, err)
	}
	dir := filepath.Dir(path)
	for _, p := range []*string{&c.TLS.Certificate, &c.TLS.Key, &c.Storage, &c.KEK.File, &c.TokenKey, &c.AdminTokenHashes, &c.AuditLog} {
		resolve(dir, p)
	}
	for i := range c.EKRoots {
		for j := range c.EKRoots[i].Paths {
			resolve(dir, &c.EKRoots[i].Paths[j])
		}
	}
	if r := c.RuleSigners; r != nil {
		for i := range r.Keys {
			resolve(dir, &r.Keys[i])
		}
	}
	return &c, nil
}

func resolve(dir string, p *string) {
	if *p != "" && !filepath.IsAbs(*p) {
		*p = filepath.Join(dir, *p)
	}
}

func (c *Config) validate() error {
	for name, v := range map[string]string{
		"listen": c.Listen, "tls.certificate": c.TLS.Certificate, "tls.key": c.TLS.Key,
		"storage": c.Storage, "tokenKey": c.TokenKey, "auditLog": c.AuditLog,
	} {
		if v == "" {
			return fmt.Errorf("%s is missing", name)
		}
	}
	if (c.KEK.File == "") == (c.KEK.Credential == "") {
		return errors.New("set exactly one of kek.file and kek.credential")
	}
	if strings.ContainsAny(c.KEK.Credential, "/\x00") || strings.HasPrefix(c.KEK.Credential, ".") {
		return fmt.Errorf("kek.credential %q is not a name", c.KEK.Credential)
	}
	if c.Limits.Sessions == 0 {
		c.Limits.Sessions = 10000
	}
	if c.Limits.Connections == 0 {
		c.Limits.Connections = 1024
	}
	if c.Limits.Sessions < 1 || c.Limits.Sessions > 1e6 || c.Limits.Connections < 1 || c.Limits.Connections > 1e5 {
		return errors.New("limits: sessions must be 1 to 1000000, connections 1 to 100000")
	}
	var names []string
	for _, r := range c.EKRoots {
		if r.Name == "" || len(r.Paths) == 0 || slices.Contains(names, r.Name) {
			return fmt.Errorf("ekRoots: %q has no name, no paths, or is there twice", r.Name)
		}
		names = append(names, r.Name)
	}
	if r := c.RuleSigners; r != nil {
		if r.Threshold == 0 {
			r.Threshold = 1
		}
		if len(r.Keys) == 0 || r.Threshold < 1 {
			return errors.New("ruleSigners: expected at least one key and a threshold of at least 1")
		}
	}
	for _, list := range [][]string{c.ListedEKs, c.TrustedAKs} {
		for _, fp := range list {
			if d, err := hex.DecodeString(fp); err != nil || len(d) != 32 || strings.ToLower(fp) != fp {
				return fmt.Errorf("listedEKs, trustedAKs: %q is not 64 lowercase hex digits", fp)
			}
		}
	}
	return nil
}

// secretFile reads a file that nobody but its owner may read.
func secretFile(path string, max int64) ([]byte, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if m := st.Mode(); !m.IsRegular() || m.Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %s: it must be a regular file that only its owner can read", path, m)
	}
	return bounded.ReadFile(path, max)
}

// kek reads the key-encryption key; credentials is systemd's credential
// directory, empty when there is none.
func (c *Config) kek(credentials string) ([]byte, error) {
	path := c.KEK.File
	if c.KEK.Credential != "" {
		if credentials == "" {
			return nil, cause.New(cause.Config, "kek.credential %q: systemd passed no credentials directory", c.KEK.Credential)
		}
		path = filepath.Join(credentials, c.KEK.Credential)
	}
	b, err := secretFile(path, kekSize)
	if err != nil {
		return nil, cause.New(cause.Config, "KEK: %w", err)
	}
	if len(b) != kekSize {
		return nil, cause.New(cause.Config, "KEK: %s has %d bytes, expected %d", path, len(b), kekSize)
	}
	return b, nil
}

func (c *Config) certificate() (tls.Certificate, error) {
	cert, err := bounded.ReadFile(c.TLS.Certificate, maxPEMFile)
	if err != nil {
		return tls.Certificate{}, cause.New(cause.Config, "tls.certificate: %w", err)
	}
	key, err := secretFile(c.TLS.Key, maxPEMFile)
	if err != nil {
		return tls.Certificate{}, cause.New(cause.Config, "tls.key: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	return pair, cause.Wrap(cause.Config, err)
}

func (c *Config) tokenKey() (*ecdsa.PrivateKey, error) {
	b, err := secretFile(c.TokenKey, maxPEMFile)
	if err != nil {
		return nil, cause.New(cause.Config, "tokenKey: %w", err)
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, cause.New(cause.Config, "tokenKey: %s is not one PEM block PRIVATE KEY (PKCS #8)", c.TokenKey)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, cause.New(cause.Config, "tokenKey: %w", err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, cause.New(cause.Config, "tokenKey: %T, expected ECDSA on P-256", key)
	}
	return ec, nil
}

func (c *Config) adminHashes() ([][32]byte, error) {
	if c.AdminTokenHashes == "" {
		return nil, nil
	}
	b, err := bounded.ReadFile(c.AdminTokenHashes, 64<<10)
	if err != nil {
		return nil, cause.New(cause.Config, "adminTokenHashes: %w", err)
	}
	var list [][32]byte
	for i, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		d, err := hex.DecodeString(strings.TrimSpace(line))
		if err != nil || len(d) != 32 {
			return nil, cause.New(cause.Config, "adminTokenHashes: line %d is not 64 hex digits", i+1)
		}
		list = append(list, [32]byte(d))
	}
	return list, nil
}

func (c *Config) roots() ([]appraisal.RootSet, error) {
	var sets []appraisal.RootSet
	for _, r := range c.EKRoots {
		var data []byte
		for _, p := range r.Paths {
			files, err := pemFiles(p)
			if err != nil {
				return nil, cause.New(cause.Config, "ekRoots %q: %w", r.Name, err)
			}
			for _, f := range files {
				b, err := bounded.ReadFile(f, maxPEMFile)
				if err != nil {
					return nil, cause.New(cause.Config, "ekRoots %q: %w", r.Name, err)
				}
				data = append(append(data, b...), '\n')
			}
		}
		set, err := appraisal.ParseRoots(r.Name, data)
		if err != nil {
			return nil, cause.Wrap(cause.Config, err)
		}
		sets = append(sets, set)
	}
	return sets, nil
}

// pemFiles lists path itself, or the certificates in it when it is a directory.
func pemFiles(path string) ([]string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); (ext == ".pem" || ext == ".crt") && e.Type()&fs.ModeType == 0 {
			files = append(files, filepath.Join(path, e.Name()))
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s has no *.pem or *.crt file", path)
	}
	return files, nil
}

// ruleSigners reads the keys that may sign reference documents; nil when none
// are configured.
func (c *Config) ruleSigners() (*RuleSigners, error) {
	if c.RuleSigners == nil {
		return nil, nil
	}
	out := &RuleSigners{Threshold: c.RuleSigners.Threshold}
	for _, path := range c.RuleSigners.Keys {
		b, err := bounded.ReadFile(path, maxPEMFile)
		if err != nil {
			return nil, cause.New(cause.Config, "ruleSigners: %w", err)
		}
		keys, err := dsse.ParsePublicKeysPEM(b)
		if err != nil {
			return nil, cause.New(cause.Config, "ruleSigners: %s: %w", path, err)
		}
		out.Keys = append(out.Keys, keys...)
	}
	return out, nil
}
