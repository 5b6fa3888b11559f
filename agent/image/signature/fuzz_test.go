package signature

import "testing"

func FuzzSignaturePayload(f *testing.F) {
	f.Add([]byte(`{"critical":{"identity":{"docker-reference":"r.example/a"},"image":{"docker-manifest-digest":"sha256:00"},"type":"cosign container image signature"},"optional":null}`))
	f.Add([]byte(`{"_type":"https://in-toto.io/Statement/v1","predicateType":"https://spdx.dev/Document","subject":[{"name":"r.example/a","digest":{"sha256":"00"}}],"predicate":{}}`))
	f.Add([]byte(`{"payloadType":"application/vnd.in-toto+json","payload":"e30=","signatures":[]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if p, err := parsePayload(raw); err == nil {
			if got := p.mismatch(p.Critical.Identity.DockerReference, p.Critical.Image.Digest); got != "" {
				t.Errorf("does not match itself: %s", got)
			}
			if p.mismatch(p.Critical.Identity.DockerReference+"x", p.Critical.Image.Digest) == "" {
				t.Error("matches another repository")
			}
		}
		if st, err := parseStatement(raw); err == nil {
			_ = st.claims()
			if st.isOf("r.example/other", "sha256:") && len(st.Subject) == 0 {
				t.Error("nothing is of something")
			}
			_, _ = predicate(st)
		}
		_, _ = envelopeStatement(raw)
	})
}

func TestTheClaimsOfAPayload(t *testing.T) {
	p, err := parsePayload([]byte(`{"critical":{"identity":{"docker-reference":"r.example/a"},"image":{"docker-manifest-digest":"sha256:00"},"type":"cosign container image signature"},"optional":null}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		repository, digest string
		ok                 bool
	}{
		"this image":       {"r.example/a", "sha256:00", true},
		"another digest":   {"r.example/a", "sha256:01", false},
		"another registry": {"s.example/a", "sha256:00", false},
		"a tag":            {"r.example/a:x", "sha256:00", false},
	} {
		if got := p.mismatch(c.repository, c.digest) == ""; got != c.ok {
			t.Errorf("%s: %v", name, got)
		}
	}
}
