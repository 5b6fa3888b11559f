package keyrelease

import (
	"math/big"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// A broker that was restarted has forgotten the session. That is no refusal of
// the key: the caller opens a new session and asks again.
func TestLesson20_AForgottenSessionIsNoRefusal(t *testing.T) {
	for _, variant := range []string{"TokenNotFound", "TokenVerifierError"} {
		b := newTrustee(t)
		asked := 0
		b.resource = func(w http.ResponseWriter, _ string) { asked++; deny(w, variant, "who are you") }
		s, err := b.client(nil).Attest(deadline(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Resource(deadline(t, time.Minute), "kbs:///default/key/1")
		s.Close()
		if cause.Of(err) != cause.BrokerUnavailable || asked != 1 {
			t.Errorf("%s: asked %d times: %v", variant, asked, err)
		}
	}
}

func TestClosingASessionZeroisesItsKey(t *testing.T) {
	b := newTrustee(t)
	s, err := b.client(nil).Attest(deadline(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	words := s.key.D.Bits() //nolint:staticcheck // looked at, not computed with
	if !slices.ContainsFunc(words, func(w big.Word) bool { return w != 0 }) {
		t.Fatal("the key is zero from the start")
	}
	s.Close()
	if slices.ContainsFunc(words, func(w big.Word) bool { return w != 0 }) {
		t.Error("the key is still in memory")
	}
}
