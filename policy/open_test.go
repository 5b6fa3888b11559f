package policy_test

import (
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

var now = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

// version is the minimal policy at a version, edited.
func version(t testing.TB, n uint64, edits ...func(*policy.Policy)) *policy.Policy {
	p := decoded(t, "minimal.yaml")
	p.Version = n
	for _, e := range edits {
		e(p)
	}
	return p
}

func naming(threshold int, keys ...*dssetest.Key) func(*policy.Policy) {
	return func(p *policy.Policy) {
		p.NextSigners = &policy.SignerSet{Threshold: threshold}
		for _, k := range keys {
			p.NextSigners.Keys = append(p.NextSigners.Keys, k.PEM)
		}
	}
}

func signed(t testing.TB, p *policy.Policy, keys ...dsse.Signer) []byte {
	t.Helper()
	out, err := policy.Sign(p, keys...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func trust(threshold int, floor uint64, keys ...*dssetest.Key) policy.Trust {
	t := policy.Trust{Threshold: threshold, VersionFloor: floor}
	for _, k := range keys {
		t.Fingerprints = append(t.Fingerprints, k.Fingerprint)
	}
	return t
}

func pems(keys ...*dssetest.Key) []byte {
	var out strings.Builder
	for _, k := range keys {
		out.WriteString(k.PEM)
	}
	return []byte(out.String())
}

func TestOpenRefuses(t *testing.T) {
	a, b, evil := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519"), dssetest.New(t, "ecdsa")
	good := signed(t, version(t, 5), a)
	unsigned, err := (&dsse.Envelope{PayloadType: policy.PayloadType, Payload: []byte("{}")}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	raw := func(typ, payload string, k dsse.Signer) []byte {
		out, err := dsse.Sign(typ, []byte(payload), k)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	canonical, err := version(t, 5).Canonical()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		envelope []byte
		keys     []byte
		trust    policy.Trust
		now      time.Time
		code     cause.Code
	}{
		"an unsigned policy":                      {unsigned, pems(a), trust(1, 0, a), now, cause.PolicyUnsigned},
		"a policy by another key":                 {signed(t, version(t, 5), evil), pems(a), trust(1, 0, a), now, cause.PolicySignature},
		"a key that only the initdata vouches":    {signed(t, version(t, 5), evil), pems(evil), trust(1, 0, a), now, cause.PolicySignature},
		"a trusted key that did not come along":   {good, pems(evil), trust(1, 0, a), now, cause.PolicySignature},
		"no keys along":                           {good, nil, trust(1, 0, a), now, cause.PolicySignature},
		"keys that are none":                      {good, []byte("x"), trust(1, 0, a), now, cause.PolicyMalformed},
		"one signature where two are wanted":      {good, pems(a, b), trust(2, 0, a, b), now, cause.PolicySignature},
		"no trusted signer at all":                {good, pems(a), policy.Trust{}, now, cause.Config},
		"a threshold of zero":                     {good, pems(a), trust(0, 0, a), now, cause.Config},
		"a fingerprint in capitals":               {good, pems(a), policy.Trust{Threshold: 1, Fingerprints: []string{strings.ToUpper(a.Fingerprint)}}, now, cause.Config},
		"an expired policy":                       {good, pems(a), trust(1, 0, a), now.AddDate(20, 0, 0), cause.PolicyExpired},
		"a policy that expires this moment":       {good, pems(a), trust(1, 0, a), time.Date(2036, 1, 1, 0, 0, 0, 0, time.UTC), cause.PolicyExpired},
		"a lower version than the floor":          {good, pems(a), trust(1, 6, a), now, cause.PolicyBelowFloor},
		"an envelope over 1 MiB":                  {append(good, strings.Repeat(" ", policy.MaxSize)...), pems(a), trust(1, 0, a), now, cause.PolicyTooLarge},
		"an envelope that is none":                {[]byte("{"), pems(a), trust(1, 0, a), now, cause.PolicyMalformed},
		"a payload of another type":               {raw("application/json", string(canonical), a), pems(a), trust(1, 0, a), now, cause.PolicyMalformed},
		"a signed policy with an unknown field":   {raw(policy.PayloadType, strings.Replace(string(canonical), `"name"`, `"nome":1,"name"`, 1), a), pems(a), trust(1, 0, a), now, cause.PolicyUnknownField},
		"a signed policy that is not canonical":   {raw(policy.PayloadType, string(canonical)+"\n", a), pems(a), trust(1, 0, a), now, cause.PolicyMalformed},
		"a signed policy with a tag for an image": {raw(policy.PayloadType, strings.Replace(string(canonical), "@sha256:"+strings.Repeat("5f", 32), ":v1", 1), a), pems(a), trust(1, 0, a), now, cause.PolicyImageNotByDigest},
		"next signers that have not signed":       {signed(t, version(t, 5, naming(1, b)), a), pems(a), trust(1, 0, a), now, cause.PolicyRotation},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := policy.Open(c.envelope, c.keys, nil, c.trust, c.now); cause.Of(err) != c.code {
				t.Fatalf("error %v, expected cause %s", err, c.code)
			}
		})
	}
}

func TestOpenAccepts(t *testing.T) {
	a, b, c := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519"), dssetest.New(t, "rsa")
	v, err := policy.Open(signed(t, version(t, 5), a, c), pems(a, b, c), nil, trust(2, 5, a, b, c), now)
	if err != nil {
		t.Fatal(err)
	}
	if len(v.Signers) != 2 || v.Policy.Version != 5 || v.Digest != policy.Digest(v.Payload) || len(v.Keys) != 3 {
		t.Fatalf("verified %+v", v)
	}
}

func TestRotationChain(t *testing.T) {
	old, next, third, evil := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519"), dssetest.New(t, "ecdsa"), dssetest.New(t, "ecdsa")
	hands := signed(t, version(t, 2, naming(1, next)), old, next)
	further := signed(t, version(t, 3, naming(1, third)), next, third)
	for name, c := range map[string]struct {
		envelope []byte
		chain    [][]byte
		code     cause.Code
	}{
		"by the next signers with the chain":          {signed(t, version(t, 4), next), [][]byte{hands}, ""},
		"over two links":                              {signed(t, version(t, 4), third), [][]byte{hands, further}, ""},
		"the link itself, by old and new":             {hands, nil, ""},
		"by the next signers without the chain":       {signed(t, version(t, 4), next), nil, cause.PolicySignature},
		"by the old signers after the chain":          {signed(t, version(t, 4), old), [][]byte{hands}, cause.PolicySignature},
		"a link by the old signers alone":             {signed(t, version(t, 4), next), [][]byte{signed(t, version(t, 2, naming(1, next)), old)}, cause.PolicyRotation},
		"a link by the new signers alone":             {signed(t, version(t, 4), evil), [][]byte{signed(t, version(t, 2, naming(1, evil)), evil)}, cause.PolicyRotation},
		"a link that names nobody":                    {signed(t, version(t, 4), old), [][]byte{signed(t, version(t, 2), old)}, cause.PolicyRotation},
		"links in the wrong order":                    {signed(t, version(t, 4), third), [][]byte{further, hands}, cause.PolicyRotation},
		"a link left out":                             {signed(t, version(t, 4), third), [][]byte{further}, cause.PolicyRotation},
		"a version that does not rise along the link": {signed(t, version(t, 2), next), [][]byte{hands}, cause.PolicyRotation},
		"a link of another policy":                    {signed(t, version(t, 4), next), [][]byte{signed(t, version(t, 2, naming(1, next), func(p *policy.Policy) { p.Name = "other" }), old, next)}, cause.PolicyRotation},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := policy.Open(c.envelope, pems(old), c.chain, trust(1, 0, old), now)
			if cause.Of(err) != c.code {
				t.Fatalf("error %v, expected cause %q", err, c.code)
			}
		})
	}
}

func TestCheckUpgrade(t *testing.T) {
	old, next := dssetest.New(t, "ecdsa"), dssetest.New(t, "ecdsa")
	running, err := policy.Open(signed(t, version(t, 5), old), pems(old), nil, trust(1, 0, old), now)
	if err != nil {
		t.Fatal(err)
	}
	handing, err := policy.Open(signed(t, version(t, 5, naming(1, next)), old, next), pems(old), nil, trust(1, 0, old), now)
	if err != nil {
		t.Fatal(err)
	}
	other := func(p *policy.Policy) { p.Name = "other" }
	gone := func(p *policy.Policy) { p.Expires = "2026-01-01T00:00:00Z" }
	for name, c := range map[string]struct {
		from     *policy.Verified
		envelope []byte
		code     cause.Code
	}{
		"a higher version":                         {running, signed(t, version(t, 6), old), ""},
		"the same version":                         {running, signed(t, version(t, 5), old), cause.PolicyNotNewer},
		"a lower version":                          {running, signed(t, version(t, 4), old), cause.PolicyNotNewer},
		"another name":                             {running, signed(t, version(t, 6, other), old), cause.PolicyOtherName},
		"an expired one":                           {running, signed(t, version(t, 6, gone), old), cause.PolicyExpired},
		"by another signer":                        {running, signed(t, version(t, 6), next), cause.PolicySignature},
		"by the next signers that are named":       {handing, signed(t, version(t, 6), next), ""},
		"by the old signers before the hand-over":  {handing, signed(t, version(t, 6), old), ""},
		"that names next signers who did not sign": {running, signed(t, version(t, 6, naming(1, next)), old), cause.PolicyRotation},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := c.from.OpenUpgrade(c.envelope, now)
			if cause.Of(err) != c.code {
				t.Fatalf("error %v, expected cause %q", err, c.code)
			}
			if err == nil && c.from.CheckUpgrade(v) != nil {
				t.Fatal("CheckUpgrade disagrees with OpenUpgrade")
			}
		})
	}
	// After the hand-over the old signers are out.
	after, err := handing.OpenUpgrade(signed(t, version(t, 6), next), now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := after.OpenUpgrade(signed(t, version(t, 7), old), now); cause.Of(err) != cause.PolicySignature {
		t.Fatalf("old signer after the hand-over: %v", err)
	}
}
