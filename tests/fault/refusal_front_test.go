package fault

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// outlet is an address that can be taken away and given back. Taken away,
// connections to it are refused, as those to a machine where nothing listens;
// nobody else gets the port meanwhile.
type outlet struct {
	host  string // 127.0.0.1:port
	serve func(net.Listener) (stop func() error)

	mu    sync.Mutex
	bound int          // socket that holds the port while down
	stop  func() error // nil while down
}

// bind makes a socket with the outlet's port, which does not listen.
func (o *outlet) bind() (err error) {
	if o.bound, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	if err = unix.SetsockoptInt(o.bound, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	at := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if o.host != "" {
		port, err := strconv.Atoi(strings.TrimPrefix(o.host, "127.0.0.1:"))
		if err != nil {
			return err
		}
		at.Port = port
	}
	// A listener is gone only when its Accept has returned, a moment after its
	// Close. An unbound socket must not stay: Listen would give it any address.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Bind(o.bound, at)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(deadline) {
			return errors.Join(err, unix.Close(o.bound))
		}
	}
}

func (o *outlet) up() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stop != nil {
		return nil
	}
	if o.host == "" {
		if err := o.bind(); err != nil {
			return err
		}
	}
	if err := unix.Listen(o.bound, 128); err != nil {
		return err
	}
	socket := os.NewFile(uintptr(o.bound), "outlet")
	defer socket.Close()
	l, err := net.FileListener(socket) // has a descriptor of its own
	if err != nil {
		return err
	}
	o.host = l.Addr().String()
	o.stop = o.serve(l)
	return nil
}

func (o *outlet) down() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stop == nil {
		return nil
	}
	err := o.stop()
	o.stop = nil
	return errors.Join(err, o.bind())
}

// gate passes connections on to the broker.
type gate struct{ outlet }

func newGate(to string) (*gate, error) {
	g := &gate{}
	g.serve = func(l net.Listener) func() error {
		var mu sync.Mutex
		open := map[net.Conn]bool{}
		go forward(l, "tcp", to, func(c net.Conn, opened bool) {
			mu.Lock()
			defer mu.Unlock()
			if opened {
				open[c] = true
			} else {
				delete(open, c)
			}
		})
		return func() error {
			err := l.Close()
			mu.Lock()
			defer mu.Unlock()
			for c := range open {
				c.Close()
			}
			return err
		}
	}
	return g, g.up()
}

// forward serves l with connections to an address until l is closed.
func forward(l net.Listener, network, address string, note func(c net.Conn, opened bool)) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		note(in, true)
		go func() {
			defer note(in, false)
			defer in.Close()
			out, err := net.Dial(network, address)
			if err != nil {
				return
			}
			defer out.Close()
			go func() {
				_, _ = io.Copy(out, in)
				out.Close()
			}()
			_, _ = io.Copy(in, out)
		}()
	}
}

// lie answers in place of the registry, whose own answer is honest.
type lie func(w http.ResponseWriter, r *http.Request, honest *http.Response)

// front is a registry: the real one behind a proxy that can lie.
type front struct {
	outlet
	mu    sync.Mutex
	about string // "manifests" or "blobs"
	lie   lie
	asked int // lies told
}

func newFront(registry string) (*front, error) {
	f := &front{}
	backend := &url.URL{Scheme: "http", Host: registry}
	proxy := &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) {
		p.SetURL(backend)
		p.Out.Host = p.In.Host // what the registry calls itself in upload locations
	}}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		lie := f.lie
		if lie != nil && !f.concerns(r) {
			lie = nil
		}
		if lie != nil {
			f.asked++
		}
		f.mu.Unlock()
		if lie == nil {
			proxy.ServeHTTP(w, r)
			return
		}
		ask, err := http.NewRequestWithContext(r.Context(), r.Method, backend.JoinPath(r.URL.Path).String(), nil)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		ask.Header["Accept"] = r.Header["Accept"] // but no range: lies need the whole
		honest, err := http.DefaultClient.Do(ask)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer honest.Body.Close()
		lie(w, r, honest)
	})
	f.serve = func(l net.Listener) func() error {
		s := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
		go func() { _ = s.Serve(l) }() // ends with Close
		return s.Close
	}
	return f, f.up()
}

// concerns says whether a lie is about this request. Of blobs only layers are
// lied about: they are what is large.
func (f *front) concerns(r *http.Request) bool {
	if r.Method != http.MethodGet {
		return false
	}
	parts := strings.Split(r.URL.Path, "/")
	return len(parts) > 2 && parts[len(parts)-2] == f.about && strings.HasPrefix(parts[len(parts)-1], "sha256:")
}

func (f *front) honest() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lie, f.asked = nil, 0
}

// lies has the registry lie from now on about manifests or layers. elsewhere
// is where a redirect goes.
func (f *front) lies(about, how, elsewhere string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.about = map[string]string{"manifest": "manifests", "layer": "blobs"}[about]
	tell := map[string]lie{
		"other":     otherBytes,
		"truncated": truncated,
		"endless":   endless,
		"redirect": func(w http.ResponseWriter, r *http.Request, _ *http.Response) {
			http.Redirect(w, r, "http://"+elsewhere+r.URL.Path, http.StatusTemporaryRedirect)
		},
	}[how]
	if f.about == "" || tell == nil {
		return errors.New("no such lie: " + about + " " + how)
	}
	if about == "layer" {
		whole := tell
		tell = func(w http.ResponseWriter, r *http.Request, honest *http.Response) {
			if honest.ContentLength < 256<<10 { // configuration, signature, SBOM
				w.Header().Set("Content-Type", honest.Header.Get("Content-Type"))
				_, _ = io.Copy(w, honest.Body)
				return
			}
			whole(w, r, honest)
		}
	}
	f.lie = tell
	return nil
}

// otherBytes answers with as many bytes, one of them changed.
func otherBytes(w http.ResponseWriter, _ *http.Request, honest *http.Response) {
	body, _ := io.ReadAll(honest.Body)
	// White space at the end of JSON, or the checksum of gzip: still readable.
	body[len(body)-1] ^= 1
	copyHeader(w, honest)
	_, _ = w.Write(body)
}

// truncated announces everything and breaks off in the middle.
func truncated(w http.ResponseWriter, r *http.Request, honest *http.Response) {
	body, _ := io.ReadAll(honest.Body)
	half := body[:len(body)/2]
	copyHeader(w, honest)
	if from, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
		at, _ := strconv.Atoi(strings.TrimSuffix(from, "-"))
		w.Header().Set("Content-Length", strconv.Itoa(len(body)-at))
		w.WriteHeader(http.StatusPartialContent)
		half = half[min(at, len(half)):]
	}
	_, _ = w.Write(half)
	if f, ok := w.(http.Flusher); ok {
		f.Flush()
	}
	panic(http.ErrAbortHandler)
}

// endless goes on for ever after the honest bytes.
func endless(w http.ResponseWriter, r *http.Request, honest *http.Response) {
	w.Header().Set("Content-Type", honest.Header.Get("Content-Type"))
	_, _ = io.Copy(w, honest.Body)
	more := bytes.Repeat([]byte(" "), 1<<20)
	for r.Context().Err() == nil {
		if _, err := w.Write(more); err != nil {
			return
		}
	}
}

func copyHeader(w http.ResponseWriter, honest *http.Response) {
	for _, h := range []string{"Content-Type", "Content-Length", "Docker-Content-Digest", "Etag"} {
		w.Header().Set(h, honest.Header.Get(h))
	}
}
