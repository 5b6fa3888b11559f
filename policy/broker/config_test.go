package broker

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
)

// configured loads a configuration that Init made, with lines added and
// replaced.
func configured(t *testing.T, dir, add string, replace ...string) (*Config, error) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, FileConfig))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "changed.yaml")
	if err := os.WriteFile(path, []byte(strings.NewReplacer(replace...).Replace(string(text))+add), 0o600); err != nil {
		t.Fatal(err)
	}
	return LoadConfig(path)
}

func initDir(t *testing.T, o InitOptions) string {
	t.Helper()
	o.Dir, o.Hosts, o.Listen, o.Now = filepath.Join(t.TempDir(), "b"), []string{"broker.example"}, "127.0.0.1:0", time.Now()
	if err := Init(o); err != nil {
		t.Fatal(err)
	}
	return o.Dir
}

func TestConfigRefused(t *testing.T) {
	dir := initDir(t, InitOptions{})
	for what, c := range map[string]struct{ want, add string }{
		"two storages":                   {"exactly one of storage and postgres", "postgres: {dsnFile: dsn}\n"},
		"a metrics address twice":        {"metricsListen", "metricsListen: a:1\nmetricsListen: b:1\n"},
		"a name with a space":            {"name must be", "name: a b\n"},
		"no collateral in collateral":    {"at least one", "collateral: {}\n"},
		"an unknown word":                {"if-present", "collateral: {cache: c, missing: {revocation: maybe}}\n"},
		"an unknown kind":                {"unknown field", "collateral: {cache: c, missing: {crl: require}}\n"},
		"a proxy that is a path":         {"collateral.proxy", "collateral: {proxy: /proxy}\n"},
		"a proxy with a password":        {"collateral.proxy", "collateral: {proxy: \"https://u:p@proxy.example\"}\n"},
		"a proxy by ftp":                 {"scheme", "collateral: {proxy: \"ftp://proxy.example\"}\n"},
		"roots for a proxy without TLS":  {"proxyRoots", "collateral: {proxy: \"http://proxy.example\", proxyRoots: r.pem}\n"},
		"roots for no proxy":             {"proxyRoots", "collateral: {cache: c, proxyRoots: r.pem}\n"},
		"a negative rate":                {"peerRate", "limits: {peerRate: -2}\n"},
		"a negative number of days":      {"instanceDays", "limits: {instanceDays: -2}\n"},
		"a negative bound of one peer":   {"peerConnections", "limits: {peerConnections: -1}\n"},
		"an unknown limit":               {"unknown field", "limits: {peers: 1}\n"},
		"a pool without end":             {"connections", "postgres: {dsnFile: dsn, connections: 100000}\n"},
		"a token beside the file of KEK": {"kek", "kek: {file: kek, pkcs11: {module: m, token: t, key: k, pinFile: p}}\n"},
	} {
		var replace []string
		switch {
		case strings.HasPrefix(what, "a pool"):
			replace = []string{"storage: broker.db\n", ""}
		case strings.HasPrefix(what, "a token"):
			replace = []string{"kek:\n  file: kek\n", ""}
		}
		if _, err := configured(t, dir, c.add, replace...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	c, err := configured(t, dir, "name: b1\nlimits: {peerRate: -1}\ncollateral: {cache: cache, missing: {tcbInfo: if-present}}\n")
	if err != nil {
		t.Fatal(err)
	}
	if c.Collateral.Cache != filepath.Join(dir, "cache") || c.Limits.PeerRate != -1 || c.Limits.PeerBurst < 1 || c.Limits.InstanceDays != 90 {
		t.Errorf("%+v, %+v", c.Collateral, c.Limits)
	}
	s, err := c.Collateral.source()
	if err != nil || s.Client != nil || !s.Policy.Revocation.Required() || s.Policy.TCBInfo.Required() {
		t.Errorf("%+v, %v", s, err)
	}
	// Without the block everything that is missing refuses, and nothing is asked.
	if s, err = (*Collateral)(nil).source(); err != nil || s.Client != nil || !s.Policy.Revocation.Required() || !s.Policy.TCBInfo.Required() {
		t.Errorf("%+v, %v", s, err)
	}
}

// The proxy is asked over TLS that ends at its own roots, and only there.
func TestCollateralProxy(t *testing.T) {
	const address = "https://kdsintf.amd.com/vcek/v1/Milan/crl"
	proxy := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/mirror/kdsintf.amd.com/vcek/v1/Milan/crl" {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte("a list"))
	}))
	defer proxy.Close()
	roots := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(roots, encodePEM("CERTIFICATE", proxy.Certificate().Raw), 0o600); err != nil {
		t.Fatal(err)
	}
	// The environment does not lead elsewhere.
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	t.Setenv("NO_PROXY", "")
	s, err := (&Collateral{Proxy: proxy.URL + "/mirror", ProxyRoots: roots}).source()
	if err != nil {
		t.Fatal(err)
	}
	if p, err := s.Get(t.Context(), address); err != nil || string(p.Body) != "a list" {
		t.Errorf("%+v, %v", p, err)
	}
	if s, err = (&Collateral{Proxy: proxy.URL + "/mirror"}).source(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), address); err == nil || !strings.Contains(err.Error(), collateral.ErrMissing.Error()) {
		t.Errorf("a proxy of an unknown root: %v", err)
	}
	if err := os.WriteFile(roots, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (&Collateral{Proxy: proxy.URL, ProxyRoots: roots}).source(); err == nil {
		t.Error("roots without a certificate were taken")
	}
}

// Every broker of a database has the same keys, and nothing else of the first.
func TestJoin(t *testing.T) {
	dsn := filepath.Join(t.TempDir(), "dsn")
	if err := os.WriteFile(dsn, []byte("host=/run/postgresql"), 0o600); err != nil {
		t.Fatal(err)
	}
	first := initDir(t, InitOptions{Name: "b1", DSNFile: dsn})
	second := filepath.Join(t.TempDir(), "b2")
	if err := Init(InitOptions{Dir: second, Join: first, Name: "b2", Listen: "127.0.0.1:9"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kek", "token.key", "tls.key", "tls.pem", "postgres.dsn", "admin.sha256", FileCA} {
		a, err1 := os.ReadFile(filepath.Join(first, name))
		b, err2 := os.ReadFile(filepath.Join(second, name))
		if err1 != nil || err2 != nil || string(a) != string(b) {
			t.Errorf("%s differs: %v, %v", name, err1, err2)
		}
		if st, err := os.Stat(filepath.Join(second, name)); err != nil || name != FileCA && st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
	if _, err := os.Stat(filepath.Join(second, FileAdminToken)); err == nil {
		t.Error("the admin's token was copied")
	}
	c, err := LoadConfig(filepath.Join(second, FileConfig))
	if err != nil || c.Name != "b2" || c.Listen != "127.0.0.1:9" || c.AuditLog != filepath.Join(second, "audit.ndjson") || c.KEK.File != filepath.Join(second, "kek") {
		t.Errorf("%+v, %v", c, err)
	}
	alone := initDir(t, InitOptions{})
	for what, x := range map[string]struct {
		o    InitOptions
		want string
	}{
		"storage of its own":   {InitOptions{Join: alone, Name: "b3"}, "storage of its own"},
		"the same name":        {InitOptions{Join: first, Name: "b1"}, "--name"},
		"no name":              {InitOptions{Join: first}, "--name"},
		"hosts of its own":     {InitOptions{Join: first, Name: "b3", Hosts: []string{"x"}}, "--join takes hosts"},
		"a directory in use":   {InitOptions{Join: first, Name: "b3", Dir: second}, "already"},
		"nothing to join":      {InitOptions{Join: t.TempDir(), Name: "b3"}, "no such file"},
		"a name with a space":  {InitOptions{Join: first, Name: "b 3"}, "name must be"},
		"a DSN others can see": {InitOptions{Hosts: []string{"x"}, DSNFile: "/etc/hostname"}, "only its owner"},
	} {
		if x.o.Dir == "" {
			x.o.Dir = filepath.Join(t.TempDir(), "new")
		}
		x.o.Listen, x.o.Now = "127.0.0.1:0", time.Now()
		if err := Init(x.o); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Stat(x.o.Dir); err == nil && x.o.Dir != second {
			t.Errorf("%s: a directory was made", what)
		}
	}
}
