package eventlog_test

// What stands below the dashed line in main is all that a relying party needs:
// it imports go-eventlog and the standard library, nothing of this project.

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"testing"

	"github.com/google/go-eventlog/cel"
	"github.com/google/go-eventlog/register"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
)

type pcr14 struct{ value [32]byte }

func (p *pcr14) Name() string { return "pcr14" }
func (p *pcr14) Index() int   { return 14 }
func (p *pcr14) Extend(_ context.Context, d map[crypto.Hash][]byte) error {
	p.value = sha256.Sum256(append(p.value[:], d[crypto.SHA256]...))
	return nil
}
func (p *pcr14) Read(context.Context) ([]byte, error) { return p.value[:], nil }

func TestPublicToolReplaysOurLog(t *testing.T) {
	reg := &pcr14{}
	l, err := eventlog.Open(t.Context(), t.TempDir(), reg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	digest := "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, e := range []eventlog.Event{
		{Kind: eventlog.KindPolicy, Policy: "web", PolicyVersion: 1, PolicyDigest: digest, Signers: []string{digest[7:]}},
		{Kind: eventlog.KindImage, Workload: "web", Image: "registry.example/web@" + digest},
	} {
		if err := l.Append(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	data, value := l.Bytes(), reg.value
	// ------------------------------------------------------------------
	log, err := cel.DecodeToCEL(bytes.NewBuffer(data))
	if err != nil {
		t.Fatal(err)
	}
	bank := register.PCRBank{TCGHashAlgo: 0x0b, PCRs: []register.PCR{{Index: 14, Digest: value[:], DigestAlg: crypto.SHA256}}}
	if err := log.Replay(bank); err != nil {
		t.Fatalf("the log does not replay: %v", err)
	}
	for _, rec := range log.Records() {
		if want := sha256.Sum256(rec.Content.Value); !bytes.Equal(want[:], rec.Digests[crypto.SHA256]) {
			t.Fatal("a digest is not over its content")
		}
		var e map[string]any
		if err := json.Unmarshal(rec.Content.Value, &e); err != nil || e["kind"] == "" {
			t.Fatalf("content is not JSON: %v", err)
		}
	}
	bank.PCRs[0].Digest = make([]byte, 32)
	if log.Replay(bank) == nil {
		t.Fatal("the log replays to a zero register")
	}
}
