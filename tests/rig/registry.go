package rig

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
)

// Registry is a real OCI registry, plain HTTP on the loopback.
type Registry struct {
	*Process
	Host string // 127.0.0.1:port, as in image references
	Dir  string // its storage

	rig  *Rig
	argv []string
}

// StartRegistry starts distribution's registry. It has no referrers API, so
// that the tag-schema fallback is what gets used. Its access log is in Log.
func (r *Rig) StartRegistry(ctx context.Context) (*Registry, error) {
	name := r.name("registry")
	host, err := freeAddress()
	if err != nil {
		return nil, err
	}
	dir := r.Path(name)
	if err := os.MkdirAll(filepath.Join(dir, "data"), 0o700); err != nil {
		return nil, err
	}
	// No telemetry and no debug server: it listens on one address.
	config := fmt.Sprintf(`version: 0.1
log: {level: info, formatter: text, accesslog: {disabled: false}}
storage:
  filesystem: {rootdirectory: %q}
  delete: {enabled: true}
  maintenance: {uploadpurging: {enabled: false}}
http: {addr: %q}
`, filepath.Join(dir, "data"), host)
	file := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	reg := &Registry{Host: host, Dir: filepath.Join(dir, "data"), rig: r, argv: []string{r.Tool("registry"), "serve", file}}
	return reg, reg.Restart(ctx)
}

// StartReferrersRegistry starts crane's registry, which has the referrers API.
func (r *Rig) StartReferrersRegistry(ctx context.Context) (*Registry, error) {
	name := r.name("crane")
	host, err := freeAddress()
	if err != nil {
		return nil, err
	}
	dir := r.Path(name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	reg := &Registry{Host: host, Dir: dir, rig: r, argv: []string{r.Tool("crane"), "registry", "serve", "--address", host, "--disk", dir}}
	return reg, reg.Restart(ctx)
}

// Restart starts the registry again on the same address and storage, stopping
// it first if it runs.
func (reg *Registry) Restart(ctx context.Context) error {
	if reg.Process != nil {
		reg.Stop()
	}
	p, err := reg.rig.Start(filepath.Base(reg.argv[0]), []string{"OTEL_TRACES_EXPORTER=none"}, reg.argv...)
	if err != nil {
		return err
	}
	reg.Process = p
	return p.ready(ctx, readyWithin, func() error { return httpOK("http://" + reg.Host + "/v2/") })
}

// Reference is the image reference of a repository here, with a tag or digest
// suffix such as ":v1".
func (reg *Registry) Reference(repository, suffix string) string {
	return reg.Host + "/" + repository + suffix
}

// httpOK asks once.
func httpOK(url string) error {
	response, err := http.Get(url)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", url, response.Status)
	}
	return nil
}

// freeAddress picks a loopback port that was free a moment ago.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// FreePort is the port of such an address.
func FreePort() (uint16, error) {
	address, err := net.ResolveTCPAddr("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	l, err := net.ListenTCP("tcp", address)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port), nil
}
