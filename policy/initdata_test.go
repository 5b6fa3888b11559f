package policy_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

func pack(t testing.TB, algorithm string, data map[string]string) *policy.Initdata {
	t.Helper()
	raw, err := policy.PackInitdata(algorithm, data)
	if err != nil {
		t.Fatal(err)
	}
	i, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestInitdataRoundTrip(t *testing.T) {
	a, next := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519")
	link := signed(t, version(t, 4, naming(1, next)), a, next)
	envelope := signed(t, version(t, 5), next)
	for name, zip := range map[string]bool{"plain": false, "gzip": true} {
		data := map[string]string{policy.KeySigners: a.PEM, policy.KeyRotation: "[" + string(link) + "]", "aa.toml": "x = 'y'\n"}
		if zip {
			text, err := policy.GzipText(envelope)
			if err != nil {
				t.Fatal(err)
			}
			data[policy.KeyPolicyGzip] = text
		} else {
			data[policy.KeyPolicy] = string(envelope)
		}
		i := pack(t, "sha256", data)
		v, err := policy.OpenInitdata(i, trust(1, 5, a), now)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if v.Policy.Version != 5 || i.Data["aa.toml"] != "x = 'y'\n" {
			t.Fatalf("%s: opened %+v", name, v)
		}
		again, err := policy.PackInitdata("sha256", i.Data)
		if err != nil || !bytes.Equal(again, i.Raw) {
			t.Fatalf("%s: packing is not deterministic: %v", name, err)
		}
	}
}

func TestInitdataDigestIsOverTheExactBytes(t *testing.T) {
	raw := []byte("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"a\" = '''\nx'''\n")
	i, err := policy.ParseInitdata(raw)
	if err != nil {
		t.Fatal(err)
	}
	if want := sha256.Sum256(raw); !bytes.Equal(i.Digest(), want[:]) {
		t.Fatal("the digest is not that of the file")
	}
	for algorithm, n := range map[string]int{"sha256": 32, "sha384": 48, "sha512": 64} {
		i := pack(t, algorithm, map[string]string{"a": "b"})
		if len(i.Digest()) != n || len(i.HostData()) != 32 || len(i.MRConfigID()) != 48 {
			t.Fatalf("%s: digest of %d bytes", algorithm, len(i.Digest()))
		}
		// Truncated or zero-padded on the right, as initdata 0.1.0 says.
		if !bytes.Equal(i.HostData(), i.Digest()[:32]) || !bytes.Equal(i.MRConfigID()[:min(n, 48)], i.Digest()[:min(n, 48)]) {
			t.Fatalf("%s: the fields do not begin with the digest", algorithm)
		}
		if n == 32 && !bytes.Equal(i.MRConfigID()[32:], make([]byte, 16)) {
			t.Fatal("MRCONFIGID is not padded with zeros")
		}
	}
}

func TestParseInitdataRefuses(t *testing.T) {
	head := "version = \"0.1.0\"\nalgorithm = \"sha256\"\n"
	for name, in := range map[string]string{
		"another version":          "version = \"0.2.0\"\nalgorithm = \"sha256\"\n[data]\n",
		"no version":               "algorithm = \"sha256\"\n[data]\n",
		"another algorithm":        "version = \"0.1.0\"\nalgorithm = \"md5\"\n[data]\n",
		"an unknown member":        head + "x = 1\n[data]\n",
		"an unknown table":         head + "[data]\n[more]\n",
		"a name in another case":   "Version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n",
		"two names but for case":   head + "Algorithm = \"sha512\"\n[data]\n",
		"a number in data":         head + "[data]\na = 1\n",
		"a table in data":          head + "[data.a]\nb = \"c\"\n",
		"a duplicate key":          head + "[data]\na = \"1\"\na = \"2\"\n",
		"a duplicate table":        head + "[data]\n[data]\n",
		"not TOML":                 "{}",
		"invalid UTF-8":            head + "[data]\na = \"\xff\"\n",
		"2 MiB and more":           head + "#" + strings.Repeat("x", policy.MaxInitdata),
		"deep nesting":             head + "a = " + strings.Repeat("[", 1<<20) + "\n",
		"deep nesting with values": head + "a = " + strings.Repeat("[1,", 1<<19) + "\n",
		"65 entries": func() string {
			s := head + "[data]\n"
			for i := range 65 {
				s += fmt.Sprintf("k%d = \"\"\n", i)
			}
			return s
		}(),
	} {
		if _, err := policy.ParseInitdata([]byte(in)); cause.Of(err) != cause.InitdataMalformed {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestInitdataWithoutAPolicy(t *testing.T) {
	if _, err := policy.OpenInitdata(pack(t, "sha256", map[string]string{"a": "b"}), policy.Trust{}, now); cause.Of(err) != cause.PolicyMissing {
		t.Errorf("none: %v", err)
	}
	both := pack(t, "sha256", map[string]string{policy.KeyPolicy: "{}", policy.KeyPolicyGzip: "e30="})
	if _, err := both.Envelope(); cause.Of(err) != cause.InitdataMalformed {
		t.Errorf("two: %v", err)
	}
}

// TestLesson05_ZeroBindingRefused: an all-zero launch field was taken for
// "unset" elsewhere, and any policy ran.
func TestLesson05_ZeroBindingRefused(t *testing.T) {
	i := pack(t, "sha256", map[string]string{"a": "b"})
	other := pack(t, "sha256", map[string]string{"a": "c"})
	pcr, err := i.PCR8()
	if err != nil {
		t.Fatal(err)
	}
	otherPCR, err := other.PCR8()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		check       func(*policy.Initdata, []byte) error
		good, other []byte
	}{
		"PCR 8":      {policy.CheckBindingPCR8, pcr, otherPCR},
		"HOST_DATA":  {policy.CheckBindingHostData, i.HostData(), other.HostData()},
		"MRCONFIGID": {policy.CheckBindingMRConfigID, i.MRConfigID(), other.MRConfigID()},
	} {
		if err := c.check(i, c.good); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for what, bad := range map[string]struct {
			value []byte
			code  cause.Code
		}{
			"zero":          {make([]byte, len(c.good)), cause.LaunchUnbound},
			"nothing":       {nil, cause.LaunchBinding},
			"of another":    {c.other, cause.LaunchBinding},
			"truncated":     {c.good[:len(c.good)-1], cause.LaunchBinding},
			"one bit off":   {append([]byte{c.good[0] ^ 1}, c.good[1:]...), cause.LaunchBinding},
			"byte too many": {append(bytes.Clone(c.good), 0), cause.LaunchBinding},
		} {
			if err := c.check(i, bad.value); cause.Of(err) != bad.code {
				t.Errorf("%s, %s: %v, expected %s", name, what, err, bad.code)
			}
		}
	}
	// The digest itself, not extended, is no PCR value.
	if err := policy.CheckBindingPCR8(i, i.Digest()); cause.Of(err) != cause.LaunchBinding {
		t.Errorf("the bare digest in PCR 8: %v", err)
	}
	if err := policy.CheckBindingPCR8(pack(t, "sha384", map[string]string{"a": "b"}), pcr); cause.Of(err) != cause.LaunchBinding {
		t.Errorf("sha384 in PCR 8: %v", err)
	}
}

// TestLesson40_Sizes: a policy was larger than the transport's limit. The sizes
// are stated here, and gzip's ratio is bounded.
func TestLesson40_Sizes(t *testing.T) {
	if policy.MaxSize != 1<<20 || policy.TransportLimit != 256<<10 || policy.MaxInitdata != 2<<20 {
		t.Fatal("the documented sizes have changed: README.md states them")
	}
	// The largest envelope that is accepted fits into initdata.
	big := "{" + strings.Repeat(" ", policy.MaxSize-2) + "}"
	i := pack(t, "sha256", map[string]string{policy.KeyPolicy: big})
	if e, err := i.Envelope(); err != nil || len(e) != policy.MaxSize {
		t.Fatalf("1 MiB: %d bytes, %v", len(e), err)
	}
	over := pack(t, "sha256", map[string]string{policy.KeyPolicy: big + " "})
	if _, err := over.Envelope(); cause.Of(err) != cause.PolicyTooLarge {
		t.Fatalf("1 MiB and a byte: %v", err)
	}
	// A policy of 20 workloads stays under the transport's limit, plain and packed.
	a := dssetest.New(t, "ecdsa")
	p := decoded(t, "full.yaml")
	p.NextSigners = nil
	w := p.Workloads[0]
	p.Workloads = nil
	for n := range 20 {
		w.Name = fmt.Sprintf("w%d", n)
		w.Run.Ports = nil
		p.Workloads = append(p.Workloads, w)
	}
	envelope := signed(t, p, a)
	text, err := policy.GzipText(envelope)
	if err != nil {
		t.Fatal(err)
	}
	plain := pack(t, "sha256", map[string]string{policy.KeyPolicy: string(envelope), policy.KeySigners: a.PEM})
	packed := pack(t, "sha256", map[string]string{policy.KeyPolicyGzip: text, policy.KeySigners: a.PEM})
	t.Logf("20 workloads: envelope %d bytes, initdata %d, with gzip %d", len(envelope), len(plain.Raw), len(packed.Raw))
	if len(plain.Raw) > policy.TransportLimit || len(packed.Raw) > len(plain.Raw) {
		t.Fatalf("initdata of %d bytes, packed %d", len(plain.Raw), len(packed.Raw))
	}

	squeeze := func(data []byte) string {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		if _, err := z.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		return base64.StdEncoding.EncodeToString(out.Bytes())
	}
	noise := make([]byte, policy.MaxSize+1)
	for n := range noise {
		noise[n] = byte(rand.Uint32())
	}
	whole, err := base64.StdEncoding.DecodeString(squeeze([]byte("{}")))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		text string
		code cause.Code
	}{
		"a bomb of 64 MiB":           {squeeze(make([]byte, 1<<26)), cause.PolicyTooLarge},
		"1 MiB of zeros: over ratio": {squeeze(make([]byte, policy.MaxSize)), cause.PolicyTooLarge},
		"noise of 1 MiB and a byte":  {squeeze(noise), cause.PolicyTooLarge},
		"a truncated stream":         {base64.StdEncoding.EncodeToString(whole[:len(whole)-4]), cause.InitdataMalformed},
		"a second member":            {base64.StdEncoding.EncodeToString(append(bytes.Clone(whole), whole...)), cause.InitdataMalformed},
		"a byte after the stream":    {base64.StdEncoding.EncodeToString(append(bytes.Clone(whole), 0)), cause.InitdataMalformed},
		"not gzip":                   {base64.StdEncoding.EncodeToString([]byte("{}")), cause.InitdataMalformed},
		"not base64":                 {"%", cause.InitdataMalformed},
	} {
		if _, err := policy.GunzipText(c.text); cause.Of(err) != c.code {
			t.Errorf("%s: %v, expected %s", name, err, c.code)
		}
	}
}

func FuzzParseInitdata(f *testing.F) {
	a := dssetest.New(f, "ed25519")
	envelope := signed(f, version(f, 1), a)
	text, err := policy.GzipText(envelope)
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range []map[string]string{{policy.KeyPolicy: string(envelope), policy.KeySigners: a.PEM}, {policy.KeyPolicyGzip: text}, {}} {
		f.Add(pack(f, "sha256", data).Raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		i, err := policy.ParseInitdata(raw)
		if err != nil {
			if cause.Of(err) == cause.Internal {
				t.Fatalf("an error without a cause: %v", err)
			}
			return
		}
		if _, err := policy.OpenInitdata(i, trust(1, 0, a), now); err != nil && cause.Of(err) == cause.Internal {
			t.Fatalf("an error without a cause: %v", err)
		}
		if _, err := policy.PackInitdata(i.Algorithm, i.Data); err != nil {
			t.Fatalf("what was parsed cannot be packed: %v", err)
		}
	})
}
