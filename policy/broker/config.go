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
	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// Config is the broker's configuration file, YAML, decoded strictly. Relative
// paths are relative to the file's directory.
type Config struct {
	Listen string   `json:"listen"` // host:port; port 0 takes a free one
	TLS    TLSFiles `json:"tls"`
	// Name is the broker's in audit records, for several that share a database.
	Name string `json:"name,omitempty"`
	// MetricsListen is the host:port of GET /metrics, plain HTTP. Left out: there
	// is none. It must not be where guests are.
	MetricsListen string `json:"metricsListen,omitempty"`
	// Exactly one of Storage, the file of the embedded storage, and Postgres.
	Storage  string          `json:"storage,omitempty"`
	Postgres *PostgresConfig `json:"postgres,omitempty"`
	KEK      KEKSource       `json:"kek"`
	// TokenKey is a PEM file with the ECDSA P-256 key that signs tokens, mode 0600.
	TokenKey string `json:"tokenKey"`
	// AdminTokenHashes is a file with the SHA-256 of admin tokens in hex, one a
	// line. Without it the admin side is off: there is no default token.
	AdminTokenHashes string       `json:"adminTokenHashes,omitempty"`
	AuditLog         string       `json:"auditLog"`
	EKRoots          []RootConfig `json:"ekRoots,omitempty"`
	AKRoots          []RootConfig `json:"akRoots,omitempty"`    // issuers of AK certificates; names are of one space with ekRoots
	ListedEKs        []string     `json:"listedEKs,omitempty"`  // SHA-256 of EK SPKIs
	TrustedAKs       []string     `json:"trustedAKs,omitempty"` // SHA-256 of AK SPKIs, for dialect kbs
	// RuleSigners, when given, makes signed reference documents the only rules
	// of this broker: rules of single resources are refused and not looked at.
	RuleSigners *RuleSignerConfig `json:"ruleSigners,omitempty"`
	Collateral  *Collateral       `json:"collateral,omitempty"`
	Limits      Limits            `json:"limits,omitzero"`
}

// RuleSignerConfig is a threshold of PEM files with public keys. A fingerprint
// would not do: an envelope carries no key to compare with it.
type RuleSignerConfig struct {
	Keys      []string `json:"keys"`
	Threshold int      `json:"threshold,omitempty"` // default 1
}

// PostgresConfig is a database that several brokers may share. They then need
// the same KEK, token key and TLS root.
type PostgresConfig struct {
	// DSNFile (mode 0600) holds a libpq URL or key=value list: a password there
	// is in no argument list and no environment.
	DSNFile     string `json:"dsnFile"`
	Connections int    `json:"connections,omitempty"` // at most, to the database; default 16
}

// TLSFiles names the server's certificate chain and key, PEM; the key's mode
// is 0600.
type TLSFiles struct {
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
}

// KEKSource is where the key-encryption key comes from.
type KEKSource = kek.Config

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
	// One peer is an IPv4 address or an IPv6 /64.
	PeerRate        int `json:"peerRate,omitempty"`        // requests a second; default 500, -1: no limit
	PeerBurst       int `json:"peerBurst,omitempty"`       // default 4 times the rate
	PeerConnections int `json:"peerConnections,omitempty"` // default 0: no limit of its own
	// InstanceDays is after how many days a guest that does not come back is
	// forgotten; default 90, -1: never.
	InstanceDays int `json:"instanceDays,omitempty"`
}

const (
	maxConfig  = 1 << 20
	maxPEMFile = 1 << 20
	maxDSN     = 4 << 10
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
	if p := c.Postgres; p != nil {
		resolve(dir, &p.DSNFile)
	}
	if p := c.KEK.PKCS11; p != nil {
		resolve(dir, &p.PINFile)
	}
	if p := c.Collateral; p != nil {
		resolve(dir, &p.Cache)
		resolve(dir, &p.ProxyRoots)
	}
	for _, sets := range [][]RootConfig{c.EKRoots, c.AKRoots} {
		for _, r := range sets {
			for j := range r.Paths {
				resolve(dir, &r.Paths[j])
			}
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
		"tokenKey": c.TokenKey, "auditLog": c.AuditLog,
	} {
		if v == "" {
			return fmt.Errorf("%s is missing", name)
		}
	}
	if (c.Storage == "") == (c.Postgres == nil) {
		return errors.New("set exactly one of storage and postgres")
	}
	if p := c.Postgres; p != nil && (p.DSNFile == "" || p.Connections < 0 || p.Connections > maxPostgres) {
		return fmt.Errorf("postgres: dsnFile is missing, or connections is not 1 to %d", maxPostgres)
	}
	if len(c.Name) > 64 || strings.ContainsFunc(c.Name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return errors.New("name must be at most 64 printable ASCII characters without spaces")
	}
	if err := c.KEK.Validate(); err != nil {
		return err
	}
	if err := c.Collateral.validate(); err != nil {
		return err
	}
	if err := c.Limits.complete(); err != nil {
		return err
	}
	var names []string
	for _, r := range slices.Concat(c.EKRoots, c.AKRoots) {
		if r.Name == "" || len(r.Paths) == 0 || slices.Contains(names, r.Name) {
			return fmt.Errorf("ekRoots, akRoots: %q has no name, no paths, or is there twice", r.Name)
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

// complete fills in the defaults.
func (l *Limits) complete() error {
	for _, d := range []struct {
		p *int
		v int
	}{{&l.Sessions, 10000}, {&l.Connections, 1024}, {&l.PeerRate, 500}, {&l.InstanceDays, 90}} {
		if *d.p == 0 {
			*d.p = d.v
		}
	}
	if l.PeerBurst == 0 {
		l.PeerBurst = 4 * max(1, l.PeerRate)
	}
	if l.Sessions < 1 || l.Sessions > 1e6 || l.Connections < 1 || l.Connections > 1e5 {
		return errors.New("limits: sessions must be 1 to 1000000, connections 1 to 100000")
	}
	if l.PeerRate < -1 || l.PeerRate > 1e6 || l.PeerBurst < 1 || l.PeerBurst > 1e7 || l.PeerConnections < 0 {
		return errors.New("limits: peerRate must be -1 or 1 to 1000000, peerBurst 1 to 10000000, peerConnections at least 0")
	}
	if l.InstanceDays < -1 || l.InstanceDays > 36500 {
		return errors.New("limits: instanceDays must be -1 or 1 to 36500")
	}
	return nil
}

func (c *Config) certificate() (tls.Certificate, error) {
	cert, err := bounded.ReadFile(c.TLS.Certificate, maxPEMFile)
	if err != nil {
		return tls.Certificate{}, cause.New(cause.Config, "tls.certificate: %w", err)
	}
	key, err := bounded.ReadSecret(c.TLS.Key, maxPEMFile)
	if err != nil {
		return tls.Certificate{}, cause.New(cause.Config, "tls.key: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	return pair, cause.Wrap(cause.Config, err)
}

func (c *Config) tokenKey() (*ecdsa.PrivateKey, error) {
	b, err := bounded.ReadSecret(c.TokenKey, maxPEMFile)
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

// roots reads the certificates of sets, those of field what.
func (c *Config) roots(what string, from []RootConfig) ([]appraisal.RootSet, error) {
	var sets []appraisal.RootSet
	for _, r := range from {
		var data []byte
		for _, p := range r.Paths {
			files, err := pemFiles(p)
			if err != nil {
				return nil, cause.New(cause.Config, "%s %q: %w", what, r.Name, err)
			}
			for _, f := range files {
				b, err := bounded.ReadFile(f, maxPEMFile)
				if err != nil {
					return nil, cause.New(cause.Config, "%s %q: %w", what, r.Name, err)
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
