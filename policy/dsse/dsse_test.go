package dsse_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

const payloadType = "application/vnd.test+json"

func TestPAEIsThatOfTheSpecification(t *testing.T) {
	// The example of protocol.md.
	got := dsse.PAE("http://example.com/HelloWorld", []byte("hello world"))
	if want := "DSSEv1 29 http://example.com/HelloWorld 11 hello world"; string(got) != want {
		t.Fatalf("PAE is %q, expected %q", got, want)
	}
}

func TestVerifyCountsDistinctTrustedKeys(t *testing.T) {
	a, b, c := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519"), dssetest.New(t, "rsa")
	other := dssetest.New(t, "ecdsa")
	signed := func(keys ...dsse.Signer) []byte {
		out, err := dsse.Sign(payloadType, []byte("payload"), keys...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	twice := func() []byte { // one key, two valid signatures
		e1, _ := dsse.Parse(signed(a))
		e2, _ := dsse.Parse(signed(a))
		e1.Signatures = append(e1.Signatures, e2.Signatures...)
		out, err := e1.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}()
	all := []crypto.PublicKey{a.PublicKey(), b.PublicKey(), c.PublicKey()}
	for name, x := range map[string]struct {
		envelope  []byte
		keys      []crypto.PublicKey
		threshold int
		matched   int
		is        error
	}{
		"one of three, one wanted":                     {signed(a), all, 1, 1, nil},
		"three kinds of keys, three wanted":            {signed(a, b, c), all, 3, 3, nil},
		"an untrusted one beside two is ignored":       {signed(a, other, b), all, 2, 2, nil},
		"one of three, two wanted":                     {signed(a), all, 2, 1, dsse.ErrThreshold},
		"the same key signing twice counts once":       {twice, all, 2, 1, dsse.ErrThreshold},
		"the same key trusted twice counts once":       {signed(a), []crypto.PublicKey{a.PublicKey(), a.PublicKey()}, 2, 1, dsse.ErrThreshold},
		"another key":                                  {signed(other), all, 1, 0, dsse.ErrThreshold},
		"no trusted key at all":                        {signed(a), nil, 1, 0, dsse.ErrThreshold},
		"a threshold of zero is not \"no check\"":      {signed(a), all, 0, 0, dsse.ErrThreshold},
		"a negative threshold":                         {signed(a), all, -1, 0, dsse.ErrThreshold},
		"no signature":                                 {[]byte(`{"payloadType":"` + payloadType + `","payload":"","signatures":[]}`), all, 1, 0, dsse.ErrUnsigned},
		"signatures left out":                          {[]byte(`{"payloadType":"` + payloadType + `","payload":""}`), all, 1, 0, dsse.ErrUnsigned},
		"a keyid that lies makes no difference either": {bytes.Replace(signed(other), []byte(`"keyid":""`), []byte(`"keyid":"`+a.Fingerprint+`"`), 1), all, 1, 0, dsse.ErrThreshold},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := dsse.Parse(x.envelope)
			if err != nil {
				t.Fatal(err)
			}
			matched, err := e.Verify(payloadType, x.keys, x.threshold)
			if !errors.Is(err, x.is) || (err == nil) != (x.is == nil) || len(matched) != x.matched {
				t.Fatalf("matched %v, error %v; expected %d and %v", matched, err, x.matched, x.is)
			}
		})
	}
}

func TestVerifyCoversPayloadAndType(t *testing.T) {
	a := dssetest.New(t, "ecdsa")
	out, err := dsse.Sign(payloadType, []byte("payload"), a)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(e *dsse.Envelope){
		"a flipped bit in the payload": func(e *dsse.Envelope) { e.Payload[0] ^= 1 },
		"a byte appended":              func(e *dsse.Envelope) { e.Payload = append(e.Payload, ' ') },
		"another type":                 func(e *dsse.Envelope) { e.PayloadType = "application/x" },
		"a flipped bit in r":           func(e *dsse.Envelope) { e.Signatures[0].Sig[6] ^= 1 },
		"a byte after the signature":   func(e *dsse.Envelope) { e.Signatures[0].Sig = append(e.Signatures[0].Sig, 0) },
	} {
		e, err := dsse.Parse(out)
		if err != nil {
			t.Fatal(err)
		}
		change(e)
		if _, err := e.Verify(e.PayloadType, []crypto.PublicKey{a.PublicKey()}, 1); !errors.Is(err, dsse.ErrThreshold) {
			t.Errorf("%s: %v", name, err)
		}
	}
	e, _ := dsse.Parse(out)
	if _, err := e.Verify("application/x", []crypto.PublicKey{a.PublicKey()}, 1); !errors.Is(err, dsse.ErrPayloadType) {
		t.Errorf("another type expected: %v", err)
	}
}

func TestParseRefuses(t *testing.T) {
	sig := `{"keyid":"","sig":"AA=="}`
	for name, c := range map[string]struct {
		in string
		is error
	}{
		"an unknown member":         {`{"payloadType":"t","payload":"AA==","signatures":[],"x":1}`, bounded.ErrUnknownField},
		"a certificate member":      {`{"payloadType":"t","payload":"AA==","signatures":[{"sig":"AA==","cert":""}]}`, bounded.ErrUnknownField},
		"a name in another case":    {`{"PayloadType":"t","payload":"AA==","signatures":[]}`, bounded.ErrUnknownField},
		"two payloads":              {`{"payloadType":"t","payload":"AA==","payload":"AQ==","signatures":[]}`, bounded.ErrDuplicateKey},
		"no type":                   {`{"payload":"AA==","signatures":[]}`, nil},
		"bad base64":                {`{"payloadType":"t","payload":"A","signatures":[]}`, nil},
		"stray bits in base64":      {`{"payloadType":"t","payload":"AB==","signatures":[]}`, nil},
		"a line break in base64":    {`{"payloadType":"t","payload":"AA==\n","signatures":[]}`, nil},
		"an empty signature":        {`{"payloadType":"t","payload":"AA==","signatures":[{"sig":""}]}`, nil},
		"a signature of 2 KiB":      {`{"payloadType":"t","payload":"AA==","signatures":[{"sig":"` + strings.Repeat("AAAA", 683) + `"}]}`, nil},
		"17 signatures":             {`{"payloadType":"t","payload":"AA==","signatures":[` + strings.Repeat(sig+",", 16) + sig + `]}`, bounded.ErrTooLarge},
		"1 MiB and a byte":          {strings.Repeat(" ", 1<<20) + "{", bounded.ErrTooLarge},
		"a number for the payload":  {`{"payloadType":"t","payload":1,"signatures":[]}`, nil},
		"null for the payload type": {`{"payloadType":null,"payload":"","signatures":[]}`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := dsse.Parse([]byte(c.in))
			if err == nil || (c.is != nil && !errors.Is(err, c.is)) {
				t.Fatalf("error %v, expected %v", err, c.is)
			}
		})
	}
	// The specification lets a signer use either alphabet.
	if _, err := dsse.Parse([]byte(`{"payloadType":"t","payload":"_-8=","signatures":[]}`)); err != nil {
		t.Fatalf("URL-safe base64: %v", err)
	}
}

func TestParsePublicKeyPEMRefusesOtherKeys(t *testing.T) {
	ok := dssetest.New(t, "ed25519").PEM
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	for name, c := range map[string]string{
		"nothing":              "",
		"text before":          "x\n" + ok,
		"text after":           ok + "x",
		"two keys":             ok + ok,
		"a private key":        string(dssetest.New(t, "ecdsa").PKCS8),
		"a damaged block":      strings.Replace(ok, "-----END", "----END", 1),
		"a damaged then whole": strings.Replace(ok, "-----END", "----END", 1) + ok,
		"P-384":                spki(t, p384.Public()),
	} {
		if _, err := dsse.ParsePublicKeyPEM([]byte(c)); !errors.Is(err, dsse.ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	small := &rsa.PublicKey{N: dssetest.New(t, "rsa").PublicKey().(*rsa.PublicKey).N, E: 3}
	if err := dsse.CheckPublicKey(small); !errors.Is(err, dsse.ErrKey) {
		t.Errorf("RSA with exponent 3: %v", err)
	}
	if keys, err := dsse.ParsePublicKeysPEM([]byte(ok + "\n" + dssetest.New(t, "rsa").PEM)); err != nil || len(keys) != 2 {
		t.Errorf("two keys, two wanted: %v", err)
	}
}

func TestSignRefusesTheSameKeyTwice(t *testing.T) {
	a := dssetest.New(t, "ecdsa")
	if _, err := dsse.Sign(payloadType, nil, a, a); !errors.Is(err, dsse.ErrKey) {
		t.Fatal(err)
	}
	if _, err := dsse.Sign(payloadType, nil); err == nil {
		t.Fatal("signed without a key")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`{"payloadType":"t","payload":"AA==","signatures":[{"keyid":"k","sig":"AA=="}]}`,
		`{"payloadType":"t","payload":"_-8=","signatures":[]}`, `{}`, `[]`,
		fmt.Sprintf(`{"payloadType":"t","payload":%q,"signatures":[]}`, base64.StdEncoding.EncodeToString([]byte(`{"a":1}`))),
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := dsse.Parse(data)
		if err != nil {
			return
		}
		if !json.Valid(data) {
			t.Fatal("accepted what is not JSON")
		}
		out, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := dsse.Parse(out)
		if err != nil || !bytes.Equal(again.Payload, e.Payload) || again.PayloadType != e.PayloadType || len(again.Signatures) != len(e.Signatures) {
			t.Fatalf("does not round-trip: %v", err)
		}
	})
}
