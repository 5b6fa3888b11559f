package collateral

import (
	"path/filepath"
	"testing"
)

// An address out of a certificate leads to a file below the cache directory,
// and to one only.
func FuzzAddress(f *testing.F) {
	f.Add("https://kdsintf.amd.com/vcek/v1/Milan/crl")
	f.Add("https://api.trustedservices.intel.com/sgx/certification/v4/pckcrl?ca=platform&encoding=der")
	f.Add("https://host/../../etc/passwd")
	f.Add("https://host/a?b/../../c")
	f.Add("https://host/..")
	f.Fuzz(func(t *testing.T, address string) {
		name, err := fileName(address)
		if err != nil {
			return
		}
		if path := filepath.Join("/cache", name); path != "/cache/"+name || len(name) > 1024 {
			t.Fatalf("%q leads to %q", address, path)
		}
	})
}
