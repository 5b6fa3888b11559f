package policy_test

import (
	"fmt"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
)

func TestChooseMirrors(t *testing.T) {
	registries := []policy.Registry{{Host: "a", PlainHTTP: true, Mirrors: []string{"m1", "m2", "m3"}}, {Host: "b", Mirrors: []string{"m1"}}, {Host: "c"}}
	for name, c := range map[string]struct {
		chosen        map[string][]string
		want, refused string
	}{
		"nothing chosen":                     {nil, "a[m1 m2 m3] b[m1] c[] ", "[]"},
		"fewer, in another order":            {map[string][]string{"a": {"m3", "m1"}}, "a[m3 m1] b[m1] c[] ", "[]"},
		"none":                               {map[string][]string{"a": {}}, "a[] b[m1] c[] ", "[]"},
		"another registry's mirror":          {map[string][]string{"b": {"m2"}}, "a[m1 m2 m3] b[] c[] ", "[b: m2]"},
		"a mirror where the policy has none": {map[string][]string{"c": {"m1"}}, "a[m1 m2 m3] b[m1] c[] ", "[c: m1]"},
		"a registry that the policy has not": {map[string][]string{"d": {"m1"}, "a": {"x", "m1"}}, "a[m1] b[m1] c[] ", "[a: x d]"},
	} {
		out, refused := policy.ChooseMirrors(registries, c.chosen)
		got := ""
		for _, r := range out {
			got += fmt.Sprintf("%s%v ", r.Host, r.Mirrors)
		}
		if got != c.want || fmt.Sprint(refused) != c.refused || !out[0].PlainHTTP {
			t.Errorf("%s: %s, %v", name, got, refused)
		}
	}
	if len(registries[0].Mirrors) != 3 {
		t.Error("the policy was changed")
	}
}
