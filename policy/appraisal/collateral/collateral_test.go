package collateral

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
)

func TestNothingIsAskedWithoutAProxy(t *testing.T) {
	for name, s := range map[string]*Source{
		"no source":                nil,
		"a zero source":            {},
		"an empty directory":       {Dir: t.TempDir()},
		"a client without proxy":   {Client: http.DefaultClient},
		"a proxy without a client": {Proxy: &url.URL{Scheme: "https", Host: "proxy.invalid"}},
	} {
		if _, err := s.Get(t.Context(), "https://kdsintf.amd.com/vcek/v1/Milan/crl"); !errors.Is(err, ErrMissing) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDirectoryThenProxy(t *testing.T) {
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RequestURI())
		if strings.HasSuffix(r.URL.Path, "gone") {
			http.Redirect(w, r, "https://vendor.invalid/", http.StatusFound)
			return
		}
		w.Header().Set("TCB-Info-Issuer-Chain", "chain")
		_, _ = w.Write([]byte("from the proxy"))
	}))
	defer proxy.Close()
	base, _ := url.Parse(proxy.URL + "/mirror/")
	s := &Source{Dir: t.TempDir(), Proxy: base, Client: proxy.Client()}
	const inDir, atProxy = "https://vendor.invalid/a/b?fmspc=00", "https://vendor.invalid/c?x=1&y=2"
	if err := s.Put(inDir, Piece{Header: http.Header{"X-Chain": {"abc"}}, Body: []byte("from the directory")}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		p, err := s.Get(t.Context(), inDir)
		if err != nil || string(p.Body) != "from the directory" || p.Header.Get("x-chain") != "abc" {
			t.Fatalf("%+v, %v", p, err)
		}
		p, err = s.Get(t.Context(), atProxy)
		if err != nil || string(p.Body) != "from the proxy" || p.Header.Get("tcb-info-issuer-chain") != "chain" {
			t.Fatalf("%+v, %v", p, err)
		}
		if _, err := s.Get(t.Context(), "https://vendor.invalid/gone"); !errors.Is(err, ErrMissing) {
			t.Fatal(err)
		}
	}
	if len(asked) != 2 || asked[0] != "/mirror/vendor.invalid/c?x=1&y=2" {
		t.Fatalf("the proxy was asked for %q", asked)
	}
}

// Whoever forges reports can name chips without end: the lists that everybody
// needs are not driven out by what is not there.
func TestWhatIsMissingDrivesNothingOut(t *testing.T) {
	asked := 0
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		_, _ = w.Write([]byte("a list"))
	}))
	defer proxy.Close()
	base, _ := url.Parse(proxy.URL)
	s := &Source{Proxy: base, Client: proxy.Client()}
	const list = "https://vendor.invalid/crl"
	if _, err := s.Get(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	s.Client = nil // from here on nothing is found
	for i := range maxEntries + 10 {
		if _, err := s.Get(t.Context(), fmt.Sprintf("https://vendor.invalid/vcek/%d", i)); !errors.Is(err, ErrMissing) {
			t.Fatal(err)
		}
	}
	if p, err := s.Get(t.Context(), list); err != nil || string(p.Body) != "a list" || asked != 1 {
		t.Errorf("%v; the proxy was asked %d times", err, asked)
	}
	if n := len(s.missing); n > maxEntries {
		t.Errorf("%d addresses are kept as missing", n)
	}
}

func TestAddressesStayBelowTheDirectory(t *testing.T) {
	s := &Source{Dir: filepath.Join(t.TempDir(), "cache")}
	for _, a := range []string{"https://../etc/passwd", "https://h/../../x", "http://h/x", "file:///etc/passwd", "https://h/a%2F..%2Fb", "https://u@h/x", "https://h/" + strings.Repeat("x", 2000)} {
		if _, err := s.Get(t.Context(), a); err == nil || errors.Is(err, ErrMissing) {
			t.Errorf("%s: %v", a, err)
		}
	}
}
