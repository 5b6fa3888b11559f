package keyrelease

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/containers/ocicrypt/keywrap"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

var _ keywrap.KeyWrapper = (*Unwrapper)(nil)

const vectorKEK = "d99b7705b0ba7a168295b3a3367270b0dd9b371bf514ca8b9ba7f0a33711daea"

// resources is a broker's shelf; it notes what it is asked for.
type resources struct {
	data  map[string][]byte
	asked []string
}

func (r *resources) Resource(_ context.Context, uri string) ([]byte, error) {
	r.asked = append(r.asked, uri)
	v, ok := r.data[uri]
	if !ok {
		return nil, cause.New(cause.KeyRefused, "broker answered 401 PolicyDeny: %s", uri)
	}
	return append([]byte(nil), v...), nil
}

func vector(t testing.TB) (packetJSON []byte, kek []byte) {
	t.Helper()
	raw, err := os.ReadFile("testdata/ocicrypt-annotation.json")
	if err != nil {
		t.Fatal(err)
	}
	kek, err = hex.DecodeString(vectorKEK)
	if err != nil {
		t.Fatal(err)
	}
	return raw, kek
}

func TestVectorOfGuestComponentsUnwraps(t *testing.T) {
	raw, kek := vector(t)
	r := &resources{data: map[string][]byte{"kbs:///default/key/1": kek}}
	for name, annotation := range map[string]string{
		"alone":               base64.StdEncoding.EncodeToString(raw),
		"after a refused one": wrap(t, kek, `{"symkey":"`+base64.StdEncoding.EncodeToString(make([]byte, 32))+`"}`, "kbs:///other/key/1") + "," + base64.StdEncoding.EncodeToString(raw),
	} {
		options, err := UnwrapLayerKey(context.Background(), r, annotation)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var o struct {
			SymKey        []byte         `json:"symkey"`
			Digest        string         `json:"digest"`
			CipherOptions map[string]any `json:"cipheroptions"`
		}
		if err := json.Unmarshal(options, &o); err != nil || len(o.SymKey) != 32 || !strings.HasPrefix(o.Digest, "sha256:") || o.CipherOptions["nonce"] == nil {
			t.Errorf("%s: options are not symkey, digest and nonce: %v", name, err)
		}
	}
	options, err := (&Unwrapper{Context: context.Background(), Resources: r}).UnwrapKey(nil, raw)
	if err != nil || len(options) == 0 {
		t.Errorf("through ocicrypt's interface: %v", err)
	}
}

func TestV2PacketUnwraps(t *testing.T) {
	raw, kek := vector(t)
	var p map[string]any
	if err := json.Unmarshal(raw, &p); err != nil {
		t.Fatal(err)
	}
	p["version"], p["provider"], p["provider_settings"], p["annotations"] = "0.1.0", "kbs", map[string]any{}, map[string]any{"x": "y"}
	v2, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	r := &resources{data: map[string][]byte{"kbs:///default/key/1": kek}}
	if _, err := UnwrapLayerKey(context.Background(), r, base64.StdEncoding.EncodeToString(v2)); err != nil {
		t.Error(err)
	}
}

func TestLesson14_EmptyAndShortKeysAreRefused(t *testing.T) {
	raw, kek := vector(t)
	annotation := base64.StdEncoding.EncodeToString(raw)
	for name, bad := range map[string][]byte{
		"an empty key":      {},
		"a key of 16 bytes": kek[:16],
		"a key of 31 bytes": kek[:31],
		"a key of 33 bytes": append(append([]byte(nil), kek...), 0),
		"another key":       make([]byte, 32),
		"the key in hex":    []byte(vectorKEK),
	} {
		r := &resources{data: map[string][]byte{"kbs:///default/key/1": bad}}
		options, err := UnwrapLayerKey(context.Background(), r, annotation)
		if cause.Of(err) != cause.KeyMalformed || options != nil {
			t.Errorf("%s gave %d bytes and %v, expected %s", name, len(options), err, cause.KeyMalformed)
		}
	}
	for name, options := range map[string]string{
		"no symkey":            `{"digest":"sha256:00"}`,
		"an empty symkey":      `{"symkey":""}`,
		"a symkey of 16 bytes": `{"symkey":"AAAAAAAAAAAAAAAAAAAAAA=="}`,
		"no JSON":              `hello`,
	} {
		r := &resources{data: map[string][]byte{"kbs:///default/key/1": kek}}
		if _, err := UnwrapLayerKey(context.Background(), r, wrap(t, kek, options, "kbs:///default/key/1")); cause.Of(err) != cause.KeyMalformed {
			t.Errorf("%s inside the packet gave %v, expected %s", name, err, cause.KeyMalformed)
		}
	}
}

func TestPacketsOutsideTheirBoundsAreRefused(t *testing.T) {
	raw, kek := vector(t)
	r := &resources{data: map[string][]byte{"kbs:///default/key/1": kek}}
	change := func(name, value string) string {
		var p map[string]any
		if err := json.Unmarshal(raw, &p); err != nil {
			t.Fatal(err)
		}
		p[name] = value
		out, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		return base64.StdEncoding.EncodeToString(out)
	}
	for name, annotation := range map[string]string{
		"nothing":               "",
		"not base64":            "%%%",
		"not JSON":              base64.StdEncoding.EncodeToString([]byte("x")),
		"another wrap_type":     change("wrap_type", "A256CTR"),
		"an iv of 16 bytes":     change("iv", "AAAAAAAAAAAAAAAAAAAAAA=="),
		"no key in it":          change("wrapped_data", "AAAA"),
		"another version":       change("version", "9"),
		"another provider":      change("provider", "evil"),
		"an unknown member":     change("kek", "x"),
		"no resource in kid":    change("kid", "https://evil.example/key"),
		"an endless annotation": strings.Repeat("A", maxAnnotation+1),
		"a hundred packets":     strings.Repeat("e30=,", 100),
	} {
		if _, err := UnwrapLayerKey(context.Background(), r, annotation); cause.Of(err) != cause.KeyMalformed && cause.Of(err) != cause.KeyRefused {
			t.Errorf("%s gave %v", name, err)
		}
	}
}

// wrap makes a packet as the key provider does.
func wrap(t testing.TB, kek []byte, options, kid string) string {
	t.Helper()
	block, err := aes.NewCipher(kek)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	iv := make([]byte, 12)
	raw, err := json.Marshal(packet{KID: kid, WrappedData: aead.Seal(nil, iv, []byte(options), nil), IV: iv, WrapType: wrapAESGCM})
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(raw)
}

func FuzzAnnotationPacket(f *testing.F) {
	raw, kek := vector(f)
	f.Add(base64.StdEncoding.EncodeToString(raw))
	f.Add("e30=,e30=")
	f.Fuzz(func(t *testing.T, annotation string) {
		r := &resources{data: map[string][]byte{"kbs:///default/key/1": kek}}
		options, err := UnwrapLayerKey(context.Background(), r, annotation)
		if err == nil && checkOptions(options) != nil {
			t.Error("accepted options without a usable key")
		}
	})
}
