package broker

import (
	"context"
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func TestAdmin(t *testing.T) {
	r := start(t, nil, nil)
	ctx := context.Background()
	const uri = "kbs:///default/key/1"
	wrong, err := adminclient.New(r.url, r.ca, strings.Repeat("x", 43))
	if err != nil {
		t.Fatal(err)
	}
	if err := wrong.PutResource(ctx, uri, []byte("x")); cause.Of(err) != cause.NotPermitted {
		t.Errorf("a wrong token: %v", err)
	}
	if status, body, _ := r.call(t, "POST", "/kbs/v0/resource/default/key/1", "", "", "x"); status != 401 || variant(t, status, body) != "AdminAuthAccess" {
		t.Errorf("no token: %d %s", status, body)
	}
	if err := r.admin.PutResource(ctx, uri, nil); err == nil {
		t.Error("an empty resource was stored")
	}
	if err := r.admin.PutResource(ctx, uri, make([]byte, MaxResource+1)); err == nil {
		t.Error("a resource over the limit was stored")
	}
	if err := r.admin.PutResource(ctx, uri, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.PutRule(ctx, uri, release.Rule{}); err == nil {
		t.Error("an empty rule was set")
	}
	if err := r.admin.PutRule(ctx, uri, anyPolicy()); err != nil {
		t.Fatal(err)
	}
	if rule, err := r.admin.Rule(ctx, uri); err != nil || !rule.AnyPolicy {
		t.Errorf("%+v, %v", rule, err)
	}
	if names, err := r.admin.Resources(ctx); err != nil || len(names) != 1 || names[0] != uri {
		t.Errorf("%v, %v", names, err)
	}
	if names, err := r.admin.Rules(ctx); err != nil || len(names) != 1 {
		t.Errorf("%v, %v", names, err)
	}
	if err := r.admin.SetMark(ctx, "shop", adminclient.Mark{Version: 3, Signers: []string{strings.Repeat("a", 64)}}); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.SetMark(ctx, "shop", adminclient.Mark{Version: 2}); err == nil {
		t.Error("a mark went down")
	}
	if names, err := r.admin.Marks(ctx); err != nil || len(names) != 1 || names[0] != "shop" {
		t.Errorf("%v, %v", names, err)
	}
	// Everything is there after a restart.
	r.stop()
	r = run(t, r.dir, nil)
	if m, err := r.admin.Mark(ctx, "shop"); err != nil || m.Version != 3 || len(m.Signers) != 1 {
		t.Errorf("%+v, %v", m, err)
	}
	if err := r.admin.DeleteResource(ctx, uri); err != nil {
		t.Fatal(err)
	}
	if _, err := r.admin.Rule(ctx, uri); err == nil {
		t.Error("the rule outlived its resource")
	}
	if err := r.admin.DeleteResource(ctx, uri); err == nil {
		t.Error("deleted twice")
	}
}

// Without a configured hash nobody is an admin.
func TestNoDefaultAdmin(t *testing.T) {
	r := start(t, nil, func(c *Config) { c.AdminTokenHashes = "" })
	if _, err := r.admin.Resources(context.Background()); cause.Of(err) != cause.NotPermitted {
		t.Errorf("%v", err)
	}
}
