package launch

import (
	"bytes"
	"os"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
)

// The document that an upgrade leaves is one from which a restarted daemon
// opens the same policy, also when the signers changed on the way.
func TestOrderSurvivesRestart(t *testing.T) {
	now := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	first, second := dssetest.New(t, "ecdsa"), dssetest.New(t, "ecdsa")
	example, err := os.ReadFile("../../policy/examples/minimal.yaml")
	if err != nil {
		t.Fatal(err)
	}
	sign := func(version uint64, next *dssetest.Key, keys ...*dssetest.Key) []byte {
		t.Helper()
		p, err := policy.DecodeYAML(example)
		if err != nil {
			t.Fatal(err)
		}
		p.Version = version
		if next != nil {
			p.NextSigners = &policy.SignerSet{Threshold: 1, Keys: []string{next.PEM}}
		}
		var out []byte
		if len(keys) == 1 {
			out, err = policy.Sign(p, keys[0])
		} else {
			out, err = policy.Sign(p, keys[0], keys[1])
		}
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	r := real{config: Config{Trust: Trust{Signers: []string{first.Fingerprint}, Threshold: 1, VersionFloor: 1}}}
	initdata, err := policy.PackInitdata("sha256", map[string]string{policy.KeyPolicy: string(sign(1, nil, first)), policy.KeySigners: first.PEM})
	if err != nil {
		t.Fatal(err)
	}
	running, err := r.Policy(initdata, now)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name  string
		order []byte
	}{
		{"a newer version by the same signer", sign(2, nil, first)},
		{"one that names the next signer", sign(3, second, first, second)},
		{"one by the next signer alone", sign(4, nil, second)},
		{"and another", sign(5, nil, second)},
	} {
		next, document, err := r.Order(step.order, running, initdata, now)
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		again, err := r.Policy(document, now)
		if err != nil {
			t.Fatalf("%s, after a restart: %v", step.name, err)
		}
		if again.Digest != next.Digest {
			t.Errorf("%s: %s after a restart, expected %s", step.name, again.Digest, next.Digest)
		}
		// What runs already can be ordered again, in either form.
		for _, same := range [][]byte{step.order, document} {
			v, d, err := r.Order(same, next, document, now)
			if err != nil || v != next || !bytes.Equal(d, document) {
				t.Errorf("%s, ordered again: %v", step.name, err)
			}
		}
		running, initdata = next, document
	}
	for name, tc := range map[string]struct {
		order []byte
		code  cause.Code
	}{
		"the former signer":           {sign(6, nil, first), cause.PolicySignature},
		"a lower version":             {sign(4, nil, second), cause.PolicyNotNewer},
		"no envelope and no initdata": {[]byte("hello"), cause.InitdataMalformed},
		"an envelope too large":       {append([]byte("{"), bytes.Repeat([]byte(" "), policy.MaxSize)...), cause.PolicyTooLarge},
	} {
		if _, _, err := r.Order(tc.order, running, initdata, now); cause.Of(err) != tc.code {
			t.Errorf("%s: %v, expected %s", name, err, tc.code)
		}
	}
}
