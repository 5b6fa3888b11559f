package broker

import (
	"os"
	"path/filepath"

	"github.com/goccy/go-yaml"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// join makes the directory of one more broker of a database: the same keys, TLS
// certificate and configuration as in o.Join, an address, a name and an audit
// log of its own. The admin's token stays where it is.
func join(o InitOptions) error {
	c, err := LoadConfig(filepath.Join(o.Join, FileConfig))
	if err != nil {
		return err
	}
	if c.Postgres == nil {
		return cause.New(cause.Usage, "the broker in %s has a storage of its own: only brokers of one PostgreSQL database can be joined", o.Join)
	}
	if o.Name == "" || o.Name == c.Name {
		return cause.New(cause.Usage, "--join needs a --name that no other broker of the database has")
	}
	files := map[string]file{}
	secret := func(p *string, name string, max int64) error {
		if *p == "" {
			return nil
		}
		b, err := bounded.ReadSecret(*p, max)
		if err != nil {
			return cause.Wrap(cause.Config, err)
		}
		files[name], *p = file{b, 0o600}, name
		return nil
	}
	for _, s := range []struct {
		p    *string
		name string
		max  int64
	}{{&c.KEK.File, "kek", kek.Size}, {&c.TokenKey, "token.key", maxPEMFile}, {&c.TLS.Key, "tls.key", maxPEMFile}, {&c.Postgres.DSNFile, fileDSN, maxDSN}} {
		if err := secret(s.p, s.name, s.max); err != nil {
			return err
		}
	}
	if p := c.KEK.PKCS11; p != nil {
		if err := secret(&p.PINFile, "token.pin", 1<<10); err != nil {
			return err
		}
	}
	for p, name := range map[*string]string{&c.TLS.Certificate: "tls.pem", &c.AdminTokenHashes: "admin.sha256"} {
		if *p == "" {
			continue
		}
		b, err := bounded.ReadFile(*p, maxPEMFile)
		if err != nil {
			return cause.Wrap(cause.Config, err)
		}
		files[name], *p = file{b, 0o600}, name
	}
	if b, err := bounded.ReadFile(filepath.Join(o.Join, FileCA), maxPEMFile); err == nil { // for policies; not needed to serve
		files[FileCA] = file{b, 0o644}
	}
	c.Listen, c.Name, c.AuditLog, c.MetricsListen = o.Listen, o.Name, "audit.ndjson", ""
	return writeDir(o.Dir, *c, files)
}

// writeDir writes everything, and the configuration last: its presence says
// that all else is there.
func writeDir(dir string, c Config, files map[string]file) error {
	config, err := yaml.MarshalWithOptions(c, yaml.UseJSONMarshaler())
	if err != nil {
		return cause.Wrap(cause.Internal, err)
	}
	check := c
	if err := check.validate(); err != nil {
		return cause.Wrap(cause.Usage, err)
	}
	if err := newDir(dir); err != nil {
		return err
	}
	for name, f := range files {
		if err := f.write(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return file{config, 0o600}.write(filepath.Join(dir, FileConfig))
}

// newDir makes the directory; one with a configuration is left alone.
func newDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return cause.Wrap(cause.StorageFailed, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, FileConfig)); err == nil {
		return cause.New(cause.Usage, "%s has a %s already: nothing was changed", dir, FileConfig)
	}
	return nil
}
