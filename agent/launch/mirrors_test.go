package launch

import (
	"slices"
	"testing"
)

// The early stage adds the seed's choice of mirrors as one line of JSON.
func TestMirrorsOfTheSeedAreConfiguration(t *testing.T) {
	const yaml = "trust: {signers: [\"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"]}\n"
	c, err := DecodeConfig([]byte(yaml + `mirrors: {"registry.example.org:5000":["m2","m1:443"]}` + "\n"))
	if err != nil || len(c.Mirrors) != 1 || !slices.Equal(c.Mirrors["registry.example.org:5000"], []string{"m2", "m1:443"}) {
		t.Errorf("%v, %v", c.Mirrors, err)
	}
	if _, err := DecodeConfig([]byte(yaml + "mirrors: {}\nmirrors: {}\n")); err == nil {
		t.Error("two choices")
	}
}
