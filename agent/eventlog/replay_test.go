package eventlog

import (
	"bytes"
	"crypto"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-eventlog/cel"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// encode builds a log without any check of ours.
func encode(t testing.TB, events ...Event) []byte {
	var buf bytes.Buffer
	for i, e := range events {
		b, err := e.normal().Canonical()
		if err != nil {
			t.Fatal(err)
		}
		encodeRecord(t, &buf, uint64(i), IndexPCR14, b)
	}
	return buf.Bytes()
}

func encodeRecord(t testing.TB, buf *bytes.Buffer, n uint64, index uint8, body []byte) {
	d, err := content(body).GenerateDigest(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	rec := cel.Record{RecNum: n, Index: index, IndexType: cel.PCRType, Digests: map[crypto.Hash][]byte{crypto.SHA256: d}, Content: cel.TLV{Type: ContentType, Value: body}}
	if err := rec.EncodeCELR(buf); err != nil {
		t.Fatal(err)
	}
}

// Row 6: the policy was measured after the server had started. Order is part
// of what replays.
func TestLesson06_EventOrder(t *testing.T) {
	p1, i1 := policyEvent(KindPolicy, 1), imageEvent(KindImage, "web", "1")
	s2, m2 := policyEvent(KindPolicyStaged, 2), imageEvent(KindImageStaged, "web", "2")
	c2, r2 := policyEvent(KindCommitted, 2), policyEvent(KindRolledBack, 2)
	s3, c3, r3 := policyEvent(KindPolicyStaged, 3), policyEvent(KindCommitted, 3), policyEvent(KindRolledBack, 3)
	destroy, debug := Event{Kind: KindDestroy}, Event{Kind: KindDebug}
	other := s2
	other.Policy = "db"
	tests := []struct {
		name   string
		events []Event
		want   string // "" means it replays; else part of the error
	}{
		{"a first launch", []Event{p1, i1}, ""},
		{"an upgrade", []Event{p1, i1, s2, m2, c2}, ""},
		{"an upgrade given up while staged", []Event{p1, i1, s2, m2, r2}, ""},
		{"an upgrade given up after its commit", []Event{p1, i1, s2, m2, c2, r2}, ""},
		{"the same version staged again after a roll-back", []Event{p1, i1, s2, m2, r2, s2, m2, c2}, ""},
		{"two upgrades and a roll-back of the second", []Event{p1, i1, s2, m2, c2, s3, c3, r3}, ""},
		{"destroy as the last event", []Event{p1, i1, destroy}, ""},
		{"debug before everything", []Event{debug, p1, i1}, ""},
		{"an image before its policy", []Event{i1, p1}, "before the policy event"},
		{"a second policy", []Event{p1, policyEvent(KindPolicy, 2)}, "second policy event"},
		{"a workload's image twice", []Event{p1, i1, imageEvent(KindImage, "web", "2")}, "second image event"},
		{"a first-launch image during an upgrade", []Event{p1, s2, i1}, "after an upgrade began"},
		{"a first-launch image after a roll-back", []Event{p1, s2, r2, i1}, "after an upgrade began"},
		{"a staged image with nothing staged", []Event{p1, m2}, "nothing staged"},
		{"a commit of what was never staged", []Event{p1, c2}, "not staged"},
		{"a commit of another version than staged", []Event{p1, s2, c3}, "not staged"},
		{"staging a lower version", []Event{policyEvent(KindPolicy, 3), s2}, "does not follow"},
		{"staging the running version", []Event{policyEvent(KindPolicy, 2), s2}, "does not follow"},
		{"staging another policy name", []Event{p1, other}, "does not follow"},
		{"staging while another is staged", []Event{p1, s2, s3}, "is staged"},
		{"rolling back the first launch", []Event{p1, policyEvent(KindRolledBack, 1)}, "neither staged nor just committed"},
		{"rolling back twice", []Event{p1, s2, c2, r2, r2}, "neither staged nor just committed"},
		{"rolling back a set that the next staging confirmed", []Event{p1, s2, c2, s3, r3, r2}, "neither staged nor just committed"},
		{"anything after destroy", []Event{p1, destroy, i1}, "after destroy"},
		{"debug twice", []Event{debug, debug}, "second debug"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Replay(encode(t, tt.events...))
			switch {
			case tt.want == "" && err != nil:
				t.Fatal(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || cause.Of(err) != cause.EventLogDiverged):
				t.Fatalf("got %v, expected %q", err, tt.want)
			}
		})
	}
}

func TestRunningTakesOnlyTheLastCommittedSet(t *testing.T) {
	log := []Event{
		policyEvent(KindPolicy, 1), imageEvent(KindImage, "web", "1"),
		policyEvent(KindPolicyStaged, 2), imageEvent(KindImageStaged, "web", "2"),
		policyEvent(KindCommitted, 2), policyEvent(KindRolledBack, 2),
	}
	tests := []struct {
		n                 int
		version           uint64
		image             string
		staged, wasRolled bool
	}{
		{2, 1, "1", false, false}, {3, 1, "1", true, false}, {4, 1, "1", true, false}, {5, 2, "2", false, false}, {6, 1, "1", false, true},
	}
	for _, tt := range tests {
		r, err := Replay(encode(t, log[:tt.n]...))
		if err != nil {
			t.Fatal(err)
		}
		s := r.Running()
		if s.Version != tt.version || !s.Has("registry.example/web@sha256:"+hex64(tt.image)) || len(s.Images) != 1 || (s.Staged != nil) != tt.staged || (s.RolledBack != nil) != tt.wasRolled {
			t.Fatalf("after %d events: %+v", tt.n, s)
		}
	}
}

// Row 7: the register is the one that nothing at locality 0 can reset.
func TestLesson07_OnlyPCR14AndRTMR3(t *testing.T) {
	b, err := policyEvent(KindPolicy, 1).normal().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	for _, index := range []uint8{0, 4, 8, 16, 23} {
		var buf bytes.Buffer
		encodeRecord(t, &buf, 0, index, b)
		if _, err := Replay(buf.Bytes()); err == nil || !strings.Contains(err.Error(), "none of PCR 14 and RTMR3") {
			t.Fatalf("index %d: %v", index, err)
		}
	}
}

func TestReplayRefuses(t *testing.T) {
	good, err := policyEvent(KindPolicy, 1).normal().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	record := func(n uint64, body string) []byte {
		var buf bytes.Buffer
		encodeRecord(t, &buf, n, IndexPCR14, []byte(body))
		return buf.Bytes()
	}
	wrongDigest := record(0, string(good))
	wrongDigest[14+5+5] ^= 1
	huge := append([]byte{0, 0, 0, 0, 8}, make([]byte, 8)...)
	huge = append(huge, 1, 0xff, 0xff, 0xff, 0xff)
	tests := map[string][]byte{
		"a record number that skips one":          record(1, string(good)),
		"a digest that is not of the content":     wrongDigest,
		"a length field of 4 GiB":                 huge,
		"more than 1 MiB":                         make([]byte, MaxLog+1),
		"an event kind that nobody explains":      record(0, `{"kind":"exec"}`),
		"a member that the kind does not have":    record(0, `{"kind":"destroy","workload":"web"}`),
		"an unknown member":                       record(0, `{"kind":"destroy","note":"x"}`),
		"white space, so not canonical":           record(0, `{"kind": "destroy"}`),
		"a duplicate member":                      record(0, `{"kind":"destroy","kind":"destroy"}`),
		"an image by tag":                         append(record(0, string(good)), record(1, `{"image":"r.example/a:latest","kind":"image","workload":"web"}`)...),
		"a truncated record":                      record(0, string(good))[:40],
		"text after the end":                      append(record(0, string(good)), "end"...),
		"a reason of two lines":                   record(0, `{"kind":"destroy","reason":"a\nb"}`),
		"a version beyond what JSON can carry":    record(0, strings.Replace(string(good), `"policyVersion":1`, `"policyVersion":9007199254740992`, 1)),
		"signers that are not in ascending order": record(0, strings.Replace(string(good), hex64("a"), hex64("c"), 1)),
	}
	for name, data := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := Replay(data); cause.Of(err) != cause.EventLogDiverged {
				t.Fatalf("got %v", err)
			}
		})
	}
}

// A log of 4000 images took half a second to read: every event copies its set.
func TestImagesOfOnePolicyAreBounded(t *testing.T) {
	events := []Event{policyEvent(KindPolicy, 1)}
	for i := range maxImages {
		events = append(events, imageEvent(KindImage, fmt.Sprintf("w%d", i), "1"))
	}
	if _, err := Replay(encode(t, events...)); err != nil {
		t.Fatal(err)
	}
	_, err := Replay(encode(t, append(events, imageEvent(KindImage, "more", "1"))...))
	if cause.Of(err) != cause.EventLogDiverged || !strings.Contains(err.Error(), "more than 64 images") {
		t.Errorf("one more: %v", err)
	}
}

func FuzzReplay(f *testing.F) {
	f.Add([]byte{})
	f.Add(encode(f, policyEvent(KindPolicy, 1), imageEvent(KindImage, "web", "1"), policyEvent(KindPolicyStaged, 2)))
	f.Add(encode(f, Event{Kind: KindDebug}, Event{Kind: KindDestroy, Reason: "x"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Replay(data)
		if err != nil {
			return
		}
		again := encode(t, r.Events...)
		if r2, err := Replay(again); err != nil || r2.SHA256 != r.SHA256 || r2.SHA384 != r.SHA384 {
			t.Fatalf("re-encoded log replays differently: %v", err)
		}
	})
}
