package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/containers/buildah/define"
	"github.com/containers/podman/v5/pkg/bindings"
	"github.com/containers/podman/v5/pkg/bindings/images"
	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/docker"
	dockerarchive "go.podman.io/image/v5/docker/archive"
	ociarchive "go.podman.io/image/v5/oci/archive"
	"go.podman.io/image/v5/oci/layout"
	"go.podman.io/image/v5/pkg/compression"
	"go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage/pkg/archive"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// layoutTag names the image inside the private OCI layout.
const layoutTag = "publish"

// DefaultPodmanSocket is CONTAINER_HOST, or the system service's socket.
func DefaultPodmanSocket() string {
	if h := os.Getenv("CONTAINER_HOST"); h != "" {
		return h
	}
	return "unix:///run/podman/podman.sock"
}

// acquire brings the image, built or found, into an OCI layout below work with
// compressed layers and an OCI manifest, and returns the layout's directory.
func (r *run) acquire(ctx context.Context) (string, error) {
	ref := r.o.Image
	if r.o.Context != "" {
		id, err := r.step("build", func(s Step) (string, error) { return r.build(ctx) })
		if err != nil {
			return "", err
		}
		ref = id
	}
	dir := filepath.Join(r.work, "layout")
	_, err := r.step("prepare", func(s Step) (string, error) {
		src, err := r.source(ctx, ref)
		if err != nil {
			return "", err
		}
		dst, err := layout.NewReference(dir, layoutTag)
		if err != nil {
			return "", err
		}
		format := compression.Gzip
		if r.o.Compression == "zstd" {
			format = compression.Zstd
		}
		sys := r.system()
		sys.CompressionFormat = &format
		_, err = r.copy(ctx, dst, src, &copy.Options{
			SourceCtx: r.system(), DestinationCtx: sys,
			ForceManifestMIMEType: v1.MediaTypeImageManifest,
			RemoveSignatures:      true, // of other tools' simple signing; a layout cannot hold them
		}, s)
		if err != nil {
			return "", failed(cause.PublishFailed, "read image "+ref, err)
		}
		// The export is a second plain copy: gone before anything else starts.
		return dir, os.RemoveAll(filepath.Join(r.work, "export"))
	})
	return dir, err
}

// source opens a reference: a transport prefix, or an image in podman.
func (r *run) source(ctx context.Context, ref string) (types.ImageReference, error) {
	transport, rest, _ := strings.Cut(ref, ":")
	var parse func(string) (types.ImageReference, error)
	switch transport {
	case "oci":
		parse = layout.ParseReference
	case "oci-archive":
		parse = ociarchive.ParseReference
	case "docker-archive":
		parse = dockerarchive.ParseReference
	case "docker":
		if strings.HasPrefix(rest, "//") {
			parse = docker.ParseReference
		}
	}
	if parse == nil {
		return r.export(ctx, ref)
	}
	src, err := parse(rest)
	if err != nil {
		return nil, cause.New(cause.Usage, "--image %s: %w", ref, err)
	}
	return src, nil
}

// podman connects to the service.
func (r *run) podman(ctx context.Context) (context.Context, error) {
	uri := r.o.PodmanSocket
	if uri == "" {
		uri = DefaultPodmanSocket()
	}
	if strings.HasPrefix(uri, "/") {
		uri = "unix://" + uri
	}
	conn, err := bindings.NewConnection(ctx, uri)
	if err != nil {
		return nil, cause.New(cause.PodmanUnavailable, "podman's service at %s: %w", uri, err)
	}
	return conn, nil
}

// export streams an image out of podman's storage and unpacks the stream, an
// OCI layout in a tar, as it comes.
func (r *run) export(ctx context.Context, ref string) (types.ImageReference, error) {
	conn, err := r.podman(ctx)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(r.work, "export")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	pr, pw := io.Pipe()
	go func() {
		err := images.Export(conn, []string{ref}, pw, new(images.ExportOptions).WithFormat("oci-archive"))
		pw.CloseWithError(err)
	}()
	err = archive.Untar(pr, dir, &archive.TarOptions{NoLchown: true, InUserNS: true, Compression: archive.Uncompressed})
	if err == nil {
		// Tar readers stop at the end marker; the sender's error comes after it.
		_, err = io.Copy(io.Discard, pr)
	}
	pr.CloseWithError(err)
	if err != nil {
		return nil, failed(cause.PublishFailed, "export "+ref+" from podman", err)
	}
	return layout.NewReference(dir, "")
}

// build lets podman build the Containerfile and returns the image's ID. The
// image keeps a local name, so that podman's cache serves the next build.
func (r *run) build(ctx context.Context) (string, error) {
	conn, err := r.podman(ctx)
	if err != nil {
		return "", err
	}
	file, err := containerfile(r.o.Context, r.o.Build.File)
	if err != nil {
		return "", err
	}
	var tail bytes.Buffer
	out := io.Writer(&tail)
	if r.o.Build.Output != nil {
		out = io.MultiWriter(&tail, r.o.Build.Output)
	}
	network := define.NetworkDefault
	var namespaces define.NamespaceOptions
	switch r.o.Build.Network {
	case "":
	case "none":
		network = define.NetworkDisabled
	case "host":
		network = define.NetworkEnabled
		namespaces = define.NamespaceOptions{{Name: "network", Host: true}}
	default:
		return "", cause.New(cause.Usage, "--build-network %q: expected host or none", r.o.Build.Network)
	}
	var opts images.BuildOptions
	opts.BuildOptions = define.BuildOptions{
		ContextDirectory:       r.o.Context,
		Args:                   r.o.Build.Args,
		Target:                 r.o.Build.Target,
		NoCache:                r.o.Build.NoCache,
		Layers:                 true,
		Output:                 "localhost/cvmctl-publish/" + strings.ToLower(r.o.Workload) + ":latest",
		OutputFormat:           define.OCIv1ImageManifest,
		PullPolicy:             define.PullIfMissing,
		ConfigureNetwork:       network,
		NamespaceOptions:       namespaces,
		RemoveIntermediateCtrs: true,
		CommonBuildOpts:        &define.CommonBuildOptions{},
		Out:                    out,
		Err:                    out,
	}
	report, err := images.Build(conn, []string{file}, opts)
	if err != nil {
		return "", failed(cause.PublishFailed, "build "+file+lastLine(tail.String()), err)
	}
	return report.ID, nil
}

func containerfile(dir, file string) (string, error) {
	info, err := os.Stat(dir)
	if err != nil || !info.IsDir() {
		return "", cause.New(cause.Usage, "context %s is not a directory", dir)
	}
	candidates := []string{file}
	if file == "" {
		candidates = []string{filepath.Join(dir, "Containerfile"), filepath.Join(dir, "Dockerfile")}
	}
	for _, c := range candidates {
		if info, err := os.Stat(c); err == nil && info.Mode().IsRegular() {
			return filepath.Abs(c)
		}
	}
	return "", cause.New(cause.Usage, "no Containerfile in %s", dir)
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	if s == "" {
		return ""
	}
	s = s[strings.LastIndex(s, "\n")+1:]
	return fmt.Sprintf(" (last output: %.200s)", s)
}

// system is the library context of one copy. Nothing of the machine's own
// registry configuration may rewrite, mirror or block what is published, and
// no cache outlives the run.
func (r *run) system() *types.SystemContext {
	arch := r.o.Arch
	if arch == "" {
		arch = runtime.GOARCH
	}
	sys := &types.SystemContext{
		OSChoice:                    "linux",
		ArchitectureChoice:          arch,
		BigFilesTemporaryDir:        r.work,
		BlobInfoCacheDir:            filepath.Join(r.work, "cache"),
		SystemRegistriesConfPath:    filepath.Join(r.work, "registries.conf"),
		SystemRegistriesConfDirPath: filepath.Join(r.work, "registries.conf.d"),
		RegistriesDirPath:           filepath.Join(r.work, "registries.d"),
		AuthFilePath:                r.o.Registry.AuthFile,
		DockerRegistryUserAgent:     "cvmctl",
	}
	if r.o.Registry.CAFile != "" {
		sys.DockerCertPath = filepath.Join(r.work, "certs")
	}
	return sys
}

// copy runs one image copy and feeds its progress to the step.
func (r *run) copy(ctx context.Context, dst, src types.ImageReference, opts *copy.Options, s Step) ([]byte, error) {
	// The source is judged by its digests alone: who may have signed it before
	// is not this program's question.
	pc, err := signature.NewPolicyContext(&signature.Policy{Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()}})
	if err != nil {
		return nil, err
	}
	defer func() { _ = pc.Destroy() }() // holds nothing: the policy has no keys
	events := make(chan types.ProgressProperties, 16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		var total int64
		for e := range events {
			switch e.Event {
			case types.ProgressEventNewArtifact:
				total += max(e.Artifact.Size, 0)
				s.Size(total)
			case types.ProgressEventRead:
				s.Add(int64(e.OffsetUpdate))
			}
		}
	}()
	opts.Progress, opts.ProgressInterval = events, 200e6
	defer func() { close(events); <-done }()
	return r.copier(ctx, pc, dst, src, opts)
}

// failed gives err a code: cancelled and full storage by name, else code.
func failed(code cause.Code, doing string, err error) error {
	switch {
	case errors.Is(err, context.Canceled):
		code = cause.Cancelled
	case errors.Is(err, syscall.ENOSPC):
		code = cause.StorageFull
	}
	var e *cause.Error
	if errors.As(err, &e) {
		return err
	}
	return cause.New(code, "%s: %w", doing, err)
}
