package rig

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// App describes an example image: FROM scratch, one static HTTP server and its
// data files. What the server answers is in the files, so that two images
// differ in their content alone.
type App struct {
	Name    string
	Version string
	Sick    bool              // /healthz answers 503
	Files   map[string]string // further files: absolute path in the image to content
}

// BuildApp compiles the server, once per rig, and returns a directory with a
// Containerfile for the image.
func (r *Rig) BuildApp(ctx context.Context, a App) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	server := r.Path("app", "server")
	if _, err := os.Stat(server); err != nil {
		if err := os.MkdirAll(filepath.Dir(server), 0o700); err != nil {
			return "", err
		}
		if _, err := r.Run(ctx, []string{"CGO_ENABLED=0"}, "go", "-C", root, "build", "-ldflags", "-s -w", "-o", server, "./tests/demo/app"); err != nil {
			return "", err
		}
	}
	dir := r.Path("app", a.Name+"-"+a.Version)
	health := "ok\n"
	if a.Sick {
		health = "sick\n"
	}
	files := map[string]string{
		"/srv/greeting": a.Name + " " + a.Version + "\n",
		"/srv/health":   health,
	}
	for name, text := range a.Files {
		files[name] = text
	}
	for name, text := range files {
		file := filepath.Join(dir, "root", name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	if err := os.Link(server, filepath.Join(dir, "root", "server")); err != nil {
		return "", err
	}
	containerfile := "FROM scratch\nCOPY root/ /\nUSER 1000:1000\nENTRYPOINT [\"/server\"]\n"
	return dir, os.WriteFile(filepath.Join(dir, "Containerfile"), []byte(containerfile), 0o644)
}

// ListenOn is the server's argument: the address where it listens.
func ListenOn(port uint16) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// WaitHTTP asks the loopback port until the answer holds want, for up to a
// minute.
func WaitHTTP(ctx context.Context, port uint16, path, want string) error {
	return Eventually(ctx, time.Minute, func() error {
		body, err := get(ctx, port, path)
		if err == nil && !strings.Contains(body, want) {
			err = fmt.Errorf("port %d answers %q, not %q", port, body, want)
		}
		return err
	})
}

// get returns the body of any answer.
func get(ctx context.Context, port uint16, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+ListenOn(port)+path, nil)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 64<<10))
	return strings.TrimSpace(string(body)), err
}
