package control

import (
	"net/http"
	"strings"
	"testing"
)

// Lesson 30: the socket gives nobody evidence, a token or a key, whatever data
// they bring: it has status, events and two orders, and no other path.
func TestLesson30_NoEvidenceOverTheSocket(t *testing.T) {
	c := NewClient(serve(t, newAgent()))
	for path, want := range map[string]int{
		"/v1/status": 200, "/v1/events": 200,
		"/": 404, "/v1": 404, "/v1/": 404, "/v1/evidence": 404, "/v1/quote": 404, "/v1/report": 404, "/v1/token": 404, "/v1/attest": 404,
		"/v1/secret/x": 404, "/v1/resource/a/b/c": 404, "/v1/status/evidence": 404, "/kbs/v0/auth": 404, "/kbs/v0/resource/a/b/c": 404,
		"/aa/token": 404, "/aa/evidence?runtime_data=x": 404, "/cdh/resource/a/b/c": 404, "/debug/pprof/": 404,
	} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			if want == 200 && method == http.MethodPost {
				continue
			}
			req, err := http.NewRequest(method, "http://x"+path, strings.NewReader(`{"report_data":"AAAA"}`))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("%s %s: %d, expected %d", method, path, resp.StatusCode, want)
			}
		}
	}
}
