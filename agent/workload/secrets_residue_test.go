package workload

import (
	"os"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// When one secret cannot be written the ones before it do not stay: nobody
// knows of their directory any more.
func TestAFailedWriteLeavesNoSecret(t *testing.T) {
	s := &Secrets{root: t.TempDir()}
	_, err := s.Write("c", "", []policy.Secret{{Name: "a"}, {Name: "b"}}, map[string][]byte{"a": []byte("value")})
	if cause.Of(err) != cause.Internal {
		t.Errorf("%v", err)
	}
	if left, _ := os.ReadDir(s.root); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
