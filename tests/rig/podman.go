package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// Podman is a podman service over storage of its own.
type Podman struct {
	*Process
	Dir       string
	Socket    string // path of its API socket
	URL       string // unix://Socket
	GraphRoot string
	RunRoot   string
	Env       []string // what makes a podman or storage library use this configuration

	rig  *Rig
	name string
}

// StartPodman starts a podman service named name, with its storage, its
// configuration and its socket under the work directory.
//
// The configuration is the rig's, not the product's: the host's network, since
// nested machines often cannot make bridges, cgroupfs, and modest limits.
func (r *Rig) StartPodman(ctx context.Context, name string) (*Podman, error) {
	dir := r.Path(name)
	p := &Podman{
		rig: r, name: name, Dir: dir,
		Socket:    filepath.Join(dir, "podman.sock"),
		GraphRoot: filepath.Join(dir, "graph"),
		RunRoot:   filepath.Join(dir, "run"),
	}
	p.URL = "unix://" + p.Socket
	p.Env = []string{
		"CONTAINERS_CONF=" + filepath.Join(dir, "containers.conf"),
		"CONTAINERS_STORAGE_CONF=" + filepath.Join(dir, "storage.conf"),
	}
	for _, d := range []string{p.GraphRoot, p.RunRoot, filepath.Join(dir, "tmp"), filepath.Join(dir, "networks"), filepath.Join(dir, "volumes")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	// File locks, or each rig would leak some of the machine's shared-memory
	// ones when its storage is removed.
	files := map[string]string{
		"containers.conf": fmt.Sprintf(`[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096", "memlock=8388608:8388608"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
image_copy_tmp_dir = %q
[network]
network_config_dir = %q
`, filepath.Join(dir, "tmp"), filepath.Join(dir, "networks")),
		"storage.conf": fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", p.GraphRoot, p.RunRoot),
	}
	for file, text := range files {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	r.OnClose(func() error {
		// Containers first: what holds no mount any more needs no force.
		_, err := p.Command(context.Background(), "rm", "--all", "--force", "--time", "0")
		return errors.Join(err, unmountUnder(dir))
	})
	return p, p.Restart(ctx)
}

// Restart starts the service again over the same storage. Containers live on,
// as they do when the real one is restarted.
func (p *Podman) Restart(ctx context.Context) error {
	if p.Process != nil {
		p.Stop()
	}
	if err := os.Remove(p.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	argv := append(p.argv(), "system", "service", "--time=0", p.URL)
	process, err := p.rig.Start(p.name, p.Env, argv...)
	if err != nil {
		return err
	}
	p.Process = process
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", p.Socket)
		},
	}}
	return process.ready(ctx, readyWithin, func() error {
		response, err := client.Get("http://podman/_ping")
		if err == nil {
			response.Body.Close()
		}
		return err
	})
}

// Command runs the stock podman program over the same storage.
func (p *Podman) Command(ctx context.Context, args ...string) (string, error) {
	return p.rig.Run(ctx, p.Env, append(p.argv(), args...)...)
}

// Leftovers lists what is in the storage: containers, running or not, images
// with their intermediate layers, and volumes.
func (p *Podman) Leftovers(ctx context.Context) ([]string, error) {
	var left []string
	for what, args := range map[string][]string{
		"container": {"ps", "--all", "--external", "--no-trunc", "--format", "{{.ID}} {{.Names}}"},
		"image":     {"images", "--all", "--no-trunc", "--format", "{{.ID}} {{.Repository}}"},
		"volume":    {"volume", "ls", "--format", "{{.Name}}"},
	} {
		out, err := p.Command(ctx, args...)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			left = append(left, what+" "+strings.TrimSpace(line))
		}
	}
	return left, nil
}

func (p *Podman) argv() []string {
	return []string{"podman", "--root", p.GraphRoot, "--runroot", p.RunRoot, "--tmpdir", filepath.Join(p.Dir, "tmp"),
		"--volumepath", filepath.Join(p.Dir, "volumes"), "--runtime", "runc"}
}
