package broker

import (
	"bytes"
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/broker/adminclient"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/dssetest"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// fakePCR is what the tests extend into the PCRs that a launch pins.
var fakePCR = bytes.Repeat([]byte{7}, 32)

// measured makes the guest's TPM look like one that booted an image.
func (l *launched) measured(t *testing.T) map[string]string {
	t.Helper()
	pcrs := map[string]string{"12": release.ZeroPCR, "13": release.ZeroPCR}
	for i, name := range map[int]string{2: "2", 4: "4", 9: "9", 11: "11"} {
		l.tpm.Extend(i, fakePCR)
		pcrs[name] = hexOf(l.tpm.Read(i))
	}
	return pcrs
}

// document is a reference document that releases the tests' resource to l.
func (l *launched) document(pcrs map[string]string, version uint64) *release.Reference {
	return &release.Reference{
		APIVersion: release.ReferenceAPIVersion, Name: "shop-rules", Version: version,
		Launch: []release.Launch{{Label: "guest-1", Platform: "tpm", PCRs: maps.Clone(pcrs)}},
		Resources: []release.Resource{{
			Resource: []string{webKey}, Platforms: []string{"tpm"}, EKRoots: []string{"demo"},
			Policy: &release.PolicyRule{Names: []string{"shop"}, Signers: []string{l.signer.Fingerprint}}, Images: []string{imageOne},
		}},
	}
}

func signedDocument(t *testing.T, d *release.Reference, by ...dsse.Signer) []byte {
	t.Helper()
	b, err := release.SignReference(d, by...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// signersConfig makes 2 of the given keys the broker's rule signers.
func signersConfig(t *testing.T, keys ...*dssetest.Key) func(c *Config) {
	t.Helper()
	dir := t.TempDir()
	r := &RuleSignerConfig{Threshold: 2}
	for i, k := range keys {
		p := filepath.Join(dir, string(rune('a'+i))+".pub")
		if err := os.WriteFile(p, []byte(k.PEM), 0o600); err != nil {
			t.Fatal(err)
		}
		r.Keys = append(r.Keys, p)
	}
	return func(c *Config) { c.RuleSigners = r }
}

// Signed documents are the only rules once signers are configured; versions
// never go back, before and after a restart, and Lesson 25's rolled back
// document, put into the storage itself, releases nothing.
func TestLesson25_ReferenceDocuments(t *testing.T) {
	l := launch(t)
	pcrs := l.measured(t)
	one, two, stranger := dssetest.New(t, "ecdsa"), dssetest.New(t, "ed25519"), dssetest.New(t, "ecdsa")
	config := signersConfig(t, one, two)
	r := start(t, l.ca.RootsPEM(t), config)
	ctx := context.Background()
	key := []byte("the key of the web image, 32 b..")
	if err := r.admin.PutResource(ctx, webKey, key); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.PutRule(ctx, webKey, l.rule()); err == nil || !strings.Contains(err.Error(), "signed") {
		t.Errorf("an unsigned rule: %v", err)
	}
	g, status, body := l.attest(t, r, nil)
	if status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	if status, body := g.get(t); status != 401 || !strings.Contains(body, "no release rule") {
		t.Errorf("without a document: %d %s", status, body)
	}
	first := signedDocument(t, l.document(pcrs, 1), one, two)
	second := l.document(pcrs, 2)
	other := l.document(pcrs, 1)
	other.Resources[0].Images = nil
	expired := l.document(pcrs, 9)
	expired.Expires = time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)
	overlap := l.document(pcrs, 1)
	overlap.Name = "others-rules"
	put := func(what, want string, name string, envelope []byte) {
		t.Helper()
		err := r.admin.PutReference(ctx, name, envelope)
		if want == "" && err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, expected %q", what, err, want)
		}
	}
	put("one signature of two", "policy-signature-invalid", "shop-rules", signedDocument(t, l.document(pcrs, 1), one))
	put("one signer and a stranger", "policy-signature-invalid", "shop-rules", signedDocument(t, l.document(pcrs, 1), one, stranger))
	put("no envelope", "SerdeError", "shop-rules", []byte("{}"))
	put("another name", "policy-name-differs", "shop-rulez", first)
	put("an expired document", "policy-expired", "shop-rules", signedDocument(t, expired, one, two))
	put("the document", "", "shop-rules", first)
	put("the document again", "", "shop-rules", first)
	put("its version with other content", "policy-version-below-floor", "shop-rules", signedDocument(t, other, one, two))
	put("a document about the same resource", "belongs to the document", "others-rules", signedDocument(t, overlap, one, two))
	if status, body := g.get(t); status != 200 || !bytes.Equal(g.open(t, body), key) {
		t.Fatalf("release: %d %s", status, body)
	}
	second.Launch[0].PCRs["11"] = strings.Repeat("1", 64)
	put("a higher version", "", "shop-rules", signedDocument(t, second, one, two))
	if status, body := g.get(t); status != 401 || !strings.Contains(body, "pcr-11:") {
		t.Errorf("by the new document: %d %s", status, body)
	}
	put("the old document", "policy-version-below-floor", "shop-rules", first)
	shown, err := r.admin.Reference(ctx, "shop-rules")
	if err != nil || shown.Version != 2 || len(shown.Signers) != 2 || len(shown.Resources) != 1 || shown.Resources[0] != webKey || len(shown.Envelope) == 0 {
		t.Errorf("%+v, %v", shown, err)
	}
	if names, err := r.admin.References(ctx); err != nil || len(names) != 1 || names[0] != "shop-rules" {
		t.Errorf("%v, %v", names, err)
	}

	// Somebody with the storage and the KEK puts the old envelope back.
	r.stop()
	s, err := OpenStore(filepath.Join(r.dir, "broker.db"), fixed(readKEK(t, r.dir)))
	if err != nil {
		t.Fatal(err)
	}
	name := []byte("shop-rules")
	if err := s.backend.update(func(tx transaction) error {
		return s.put(tx, bucketReferences, name, first)
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	r = run(t, r.dir, config)
	put("the old document after a restart", "policy-version-below-floor", "shop-rules", first)
	if g, status, body = l.attest(t, r, nil); status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	if status, body := g.get(t); status != 401 || !strings.Contains(body, "the mark is version 2") {
		t.Errorf("rolled back in the storage: %d %s", status, body)
	}

	// Deleting leaves the mark.
	if err := r.admin.DeleteReference(ctx, "shop-rules"); err != nil {
		t.Fatal(err)
	}
	if err := r.admin.DeleteReference(ctx, "shop-rules"); err == nil {
		t.Error("deleted twice")
	}
	put("the old document after a delete", "policy-version-below-floor", "shop-rules", first)
	if status, body := g.get(t); status != 401 || !strings.Contains(body, "no release rule") {
		t.Errorf("after a delete: %d %s", status, body)
	}
	put("the resource's new document", "", "others-rules", signedDocument(t, overlap, one, two))
	if status, body := g.get(t); status != 200 {
		t.Errorf("by another document: %d %s", status, body)
	}
	r.stop()
	checkAudit(t, r, string(key))
	log, err := os.ReadFile(filepath.Join(r.dir, "audit.ndjson"))
	if err != nil || !strings.Contains(string(log), `"rules":"shop-rules version 2 sha256:`) {
		t.Errorf("the records do not name the document that decided: %v", err)
	}
}

// A document releases nothing once it has expired or its signers are no longer
// those of the configuration.
func TestReferenceIsVerifiedOnEachLoad(t *testing.T) {
	one, two := dssetest.New(t, "ecdsa"), dssetest.New(t, "ecdsa")
	d := (&launched{signer: one}).document(map[string]string{"2": strings.Repeat("2", 64), "4": strings.Repeat("4", 64), "9": strings.Repeat("9", 64), "11": strings.Repeat("1", 64), "12": release.ZeroPCR, "13": release.ZeroPCR}, 3)
	now := time.Unix(1_800_000_000, 0)
	d.Expires = now.Add(time.Minute).UTC().Format(time.RFC3339)
	envelope := signedDocument(t, d, one)
	server := &Server{now: func() time.Time { return now }}
	var err error
	if server.documents, err = newDocuments(RuleSigners{Keys: []crypto.PublicKey{one.PublicKey()}, Threshold: 1}); err != nil {
		t.Fatal(err)
	}
	o, err := server.documents.open(envelope)
	if err != nil {
		t.Fatal(err)
	}
	uri := mustURI(t, webKey)
	stored := StoredReference{Name: "shop-rules", Mark: markOf(o), Envelope: envelope}
	get := func(r StoredReference) error {
		_, _, err := server.rule(Grounds{Reference: func() (*StoredReference, error) { return &r, nil }}, uri)
		return err
	}
	if err := get(stored); err != nil {
		t.Fatal(err)
	}
	renamed, lower, other := stored, stored, stored
	renamed.Name = "other"
	lower.Mark.Version = 2
	other.Mark.Digest = "sha256:" + strings.Repeat("0", 64)
	for what, r := range map[string]StoredReference{"another name": renamed, "another version": lower, "another digest": other, "no envelope": {Name: "shop-rules", Mark: stored.Mark}} {
		if err := get(r); err == nil {
			t.Errorf("%s: released", what)
		}
	}
	if _, _, err := server.rule(Grounds{Reference: func() (*StoredReference, error) { return &stored, nil }, Rule: &release.Rule{}}, mustURI(t, "kbs:///shop/key/other")); err == nil {
		t.Error("a resource that the document does not name fell back to an unsigned rule")
	}
	now = now.Add(time.Minute)
	if err := get(stored); err == nil || !strings.Contains(err.Error(), "policy-expired") {
		t.Errorf("expired: %v", err)
	}
	now = now.Add(-time.Minute)
	if server.documents, err = newDocuments(RuleSigners{Keys: []crypto.PublicKey{two.PublicKey()}, Threshold: 1}); err != nil {
		t.Fatal(err)
	}
	if err := get(stored); err == nil || !strings.Contains(err.Error(), "policy-signature-invalid") {
		t.Errorf("other signers: %v", err)
	}
	for what, s := range map[string]RuleSigners{
		"no key": {Threshold: 1}, "no threshold": {Keys: []crypto.PublicKey{one.PublicKey()}},
		"one key for two": {Keys: []crypto.PublicKey{one.PublicKey(), one.PublicKey()}, Threshold: 2},
	} {
		if _, err := newDocuments(s); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}

// A guest whose log ever named a policy outside the rule gets nothing, even
// once it is back at one inside.
func TestPolicyHistoryEndToEnd(t *testing.T) {
	l := launch(t)
	r := start(t, l.ca.RootsPEM(t), nil)
	ctx := context.Background()
	if err := errors.Join(r.admin.PutResource(ctx, webKey, []byte("k")), r.admin.PutRule(ctx, webKey, l.rule())); err != nil {
		t.Fatal(err)
	}
	stranger := strings.Repeat("e", 64)
	foreign := "sha256:" + strings.Repeat("4", 64)
	l.event(t, eventlog.Event{Kind: eventlog.KindPolicyStaged, Policy: "shop", PolicyVersion: 3, PolicyDigest: foreign, Signers: []string{stranger}})
	l.event(t, eventlog.Event{Kind: eventlog.KindRolledBack, Policy: "shop", PolicyVersion: 3, PolicyDigest: foreign, Reason: "policy-invalid"})
	g, status, body := l.attest(t, r, nil)
	if status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	if status, body := g.get(t); status != 401 || variant(t, status, body) != "PolicyDeny" || !strings.Contains(body, appraisal.CheckPolicyHistory+":") {
		t.Errorf("a foreign policy in the log: %d %s", status, body)
	}
	both := l.rule()
	both.Policy.Signers = append(both.Policy.Signers, stranger)
	if err := r.admin.PutRule(ctx, webKey, both); err != nil {
		t.Fatal(err)
	}
	if status, body := g.get(t); status != 200 {
		t.Errorf("a rule that lists both signers: %d %s", status, body)
	}
}

// A tombstone is for good: no session of the instance, old or new, gets
// anything, and its token says so, signed, over the key that is fresh with the
// session's nonce.
func TestTombstone(t *testing.T) {
	l := launch(t)
	r := start(t, l.ca.RootsPEM(t), nil)
	ctx := context.Background()
	if err := errors.Join(r.admin.PutResource(ctx, webKey, []byte("k")), r.admin.PutRule(ctx, webKey, l.rule()),
		r.admin.SetMark(ctx, "shop", adminclient.Mark{Version: 2, Signers: []string{l.signer.Fingerprint}})); err != nil {
		t.Fatal(err)
	}
	g, status, body := l.attest(t, r, nil)
	if status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	id := agentClaims(t, r, g.token).InstanceID
	if status, _ := g.get(t); status != 200 {
		t.Fatalf("before: %d", status)
	}
	list, err := r.admin.Instances(ctx)
	if err != nil || len(list) != 1 || list[0].ID != id || list[0].Tombstone || !strings.HasPrefix(list[0].Identity, "tpm:") {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := r.admin.SetTombstone(ctx, strings.Repeat("0", 32)); err == nil {
		t.Error("a tombstone for nobody")
	}
	for range 2 { // again changes nothing
		if err := r.admin.SetTombstone(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	if i, err := r.admin.Instance(ctx, id); err != nil || !i.Tombstone || i.Identity != list[0].Identity {
		t.Errorf("%+v, %v", i, err)
	}
	if status, body := g.get(t); status != 401 || variant(t, status, body) != "PolicyDeny" || !strings.Contains(body, "destroyed") {
		t.Errorf("an old session: %d %s", status, body)
	}
	r.stop()
	r = run(t, r.dir, nil)
	if g, status, body = l.attest(t, r, nil); status != 200 {
		t.Fatalf("attest: %d %s", status, body)
	}
	if status, body := g.get(t); status != 401 || !strings.Contains(body, "destroyed") {
		t.Errorf("a new session after a restart: %d %s", status, body)
	}
	c := agentClaims(t, r, g.token)
	if !c.Tombstone || c.InstanceID != id || c.VersionMark != 2 || len(c.Signers) != 1 || c.Signers[0] != l.signer.Fingerprint || c.PolicyName != "shop" {
		t.Errorf("claims: %+v", c)
	}
	// Signed over this session: nonce and key are in the same token.
	claims := tokenClaims(t, r, g.token)
	k, err := claims.TEEPubKey()
	if err != nil || claims.Nonce != g.nonce || k.X == "" || !strings.Contains(g.jwk, k.X) {
		t.Errorf("nonce %q, key %+v, %v", claims.Nonce, k, err)
	}
	// Nobody but an admin.
	for _, c := range [][2]string{{"PUT", adminclient.PathInstance + id + "/tombstone"}, {"GET", adminclient.PathInstances}, {"GET", adminclient.PathInstance + id},
		{"PUT", adminclient.PathReference + "shop"}, {"GET", adminclient.PathReferences}, {"DELETE", adminclient.PathReference + "shop"}} {
		if status, body, _ := r.call(t, c[0], c[1], "", "", ""); status != 401 || variant(t, status, body) != "AdminAuthAccess" {
			t.Errorf("%s %s: %d %s", c[0], c[1], status, body)
		}
	}
	if err := r.admin.PutReference(ctx, "shop-rules", signedDocument(t, l.document(l.measured(t), 1), l.signer)); err == nil || !strings.Contains(err.Error(), "ruleSigners") {
		t.Errorf("a document without configured signers: %v", err)
	}
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }

func mustURI(t *testing.T, s string) kbs.ResourceURI {
	t.Helper()
	u, err := kbs.ParseResourceURI(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func readKEK(t *testing.T, dir string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "kek"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
