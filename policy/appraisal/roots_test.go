package appraisal

import (
	"encoding/pem"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/tdxtest"
)

// An anchor file is a CA certificate or several, and nothing else.
func TestParseRoots(t *testing.T) {
	p := tdxtest.New(t, tdxtest.Config{})
	root := string(p.RootPEM())
	leaf := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.PCK.Raw}))
	for what, c := range map[string]struct {
		text string
		ok   bool
	}{
		"one": {root, true}, "two": {root + root, true}, "a comment before": {"# mine\n" + root, true},
		"none": {"", false}, "text": {"hello", false}, "no CA": {leaf, false}, "one that is no CA": {root + leaf, false},
		"a key":          {"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", false},
		"half of one":    {root[:len(root)/2], false},
		"half behind":    {root + root[:len(root)/2], false},
		"broken base64":  {strings.Replace(root, "MII", "!!!", 1), false},
		"broken content": {strings.Replace(root, "MII", "AII", 1), false},
	} {
		if _, err := ParseRoots("x", []byte(c.text)); (err == nil) != c.ok {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzRoots(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("-----BEGIN"))
	f.Fuzz(func(t *testing.T, b []byte) {
		set, err := ParseRoots("x", b)
		if (err == nil) != (set.Roots != nil) {
			t.Fatalf("%v beside %v", set, err)
		}
	})
}
