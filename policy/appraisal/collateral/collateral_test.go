package collateral

import (
	"errors"
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

func TestAddressesStayBelowTheDirectory(t *testing.T) {
	s := &Source{Dir: filepath.Join(t.TempDir(), "cache")}
	for _, a := range []string{"https://../etc/passwd", "https://h/../../x", "http://h/x", "file:///etc/passwd", "https://h/a%2F..%2Fb", "https://u@h/x", "https://h/" + strings.Repeat("x", 2000)} {
		if _, err := s.Get(t.Context(), a); err == nil || errors.Is(err, ErrMissing) {
			t.Errorf("%s: %v", a, err)
		}
	}
}
