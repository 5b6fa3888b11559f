package publish

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ociremote "github.com/sigstore/cosign/v2/pkg/oci/remote"
	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/oci/layout"
	dockerconfig "go.podman.io/image/v5/pkg/docker/config"
	"go.podman.io/image/v5/types"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// prepareRegistry writes the private registry configuration of this run (see
// system) and the transport that signatures and checks use.
func (r *run) prepareRegistry() error {
	conf := ""
	if r.o.Registry.PlainHTTP {
		conf = fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", r.target.repo.RegistryStr())
	}
	for _, d := range []string{"registries.conf.d", "registries.d", "certs", "cache"} {
		if err := os.Mkdir(filepath.Join(r.work, d), 0o700); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(r.work, "registries.conf"), []byte(conf), 0o600); err != nil {
		return err
	}
	transport := remote.DefaultTransport.(*http.Transport).Clone()
	if r.o.Registry.CAFile != "" {
		pem, err := bounded.ReadNamed(r.o.Registry.CAFile, 1<<20)
		if err != nil {
			return cause.New(cause.Usage, "--registry-ca: %w", err)
		}
		roots, err := x509.SystemCertPool()
		if err != nil {
			roots = x509.NewCertPool()
		}
		if !roots.AppendCertsFromPEM(pem) {
			return cause.New(cause.Usage, "--registry-ca: no certificate in %s", r.o.Registry.CAFile)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
		if err := os.WriteFile(filepath.Join(r.work, "certs", "ca.crt"), pem, 0o600); err != nil {
			return err
		}
	}
	r.transport = transport
	return nil
}

// remoteOptions is for requests beside the copy.
func (r *run) remoteOptions(ctx context.Context) []remote.Option {
	return []remote.Option{
		remote.WithContext(ctx), remote.WithTransport(r.transport),
		remote.WithAuthFromKeychain(keychain{r.system()}), remote.WithUserAgent("cvmctl"),
	}
}

func (r *run) cosignOptions(ctx context.Context) []ociremote.Option {
	opts := []ociremote.Option{ociremote.WithRemoteOptions(r.remoteOptions(ctx)...)}
	if r.o.Registry.PlainHTTP {
		opts = append(opts, ociremote.WithNameOptions(name.Insecure))
	}
	return opts
}

// keychain finds credentials where the copy finds them.
type keychain struct{ sys *types.SystemContext }

func (k keychain) Resolve(res authn.Resource) (authn.Authenticator, error) {
	c, err := dockerconfig.GetCredentials(k.sys, res.RegistryStr())
	if err != nil {
		return nil, err
	}
	if c == (types.DockerAuthConfig{}) {
		return authn.Anonymous, nil
	}
	return authn.FromConfig(authn.AuthConfig{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken}), nil
}

// push copies the layout's image to the registry, encrypting on the way, by
// digest alone: the tag is set once everything is checked. It returns the
// manifest that the library says it pushed.
func (r *run) push(ctx context.Context, dir string, enc *encryption, s Step) ([]byte, error) {
	src, err := layout.NewReference(dir, layoutTag)
	if err != nil {
		return nil, err
	}
	named, err := reference.ParseNormalizedNamed(r.target.repo.Name())
	if err != nil {
		return nil, err
	}
	dst, err := docker.NewReferenceUnknownDigest(named)
	if err != nil {
		return nil, err
	}
	opts := &copy.Options{SourceCtx: r.system(), DestinationCtx: r.system(), ForceManifestMIMEType: v1.MediaTypeImageManifest}
	if enc != nil {
		opts.OciEncryptConfig = enc.config
		opts.OciEncryptLayers = &[]int{} // empty, not nil: every layer
	}
	manifest, err := r.copy(ctx, dst, src, opts, s)
	if err != nil {
		return nil, failed(cause.RegistryUnavailable, "push to "+r.target.repo.Name(), err)
	}
	return manifest, nil
}
