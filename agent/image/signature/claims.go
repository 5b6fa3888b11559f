package signature

import (
	"encoding/json"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

const (
	payloadType   = "cosign container image signature" // red hat's simple signing, as cosign writes it
	signPredicate = "https://sigstore.dev/cosign/sign/v1"
	spdxPredicate = "https://spdx.dev/Document"
	cdxPredicate  = "https://cyclonedx.org/bom"
	inTotoType    = "application/vnd.in-toto+json"
)

func (s Source) hash() v1.Hash {
	h, _ := v1.NewHash(s.digest()) // a name.Digest has a valid one
	return h
}

// payload is the part of a simple-signing document that makes claims.
type payload struct {
	Critical struct {
		Identity struct {
			DockerReference string `json:"docker-reference"`
		} `json:"identity"`
		Image struct {
			Digest string `json:"docker-manifest-digest"`
		} `json:"image"`
		Type string `json:"type"`
	} `json:"critical"`
	Optional json.RawMessage `json:"optional"`
}

func parsePayload(data []byte) (*payload, error) {
	var p payload
	if err := bounded.DecodeJSON(data, &p, bounded.Limits{Bytes: maxPayload, Depth: 16, Nodes: 1024}); err != nil {
		return nil, fmt.Errorf("signature payload: %w", err)
	}
	if p.Critical.Type != payloadType {
		return nil, fmt.Errorf("signature payload has type %.60q, expected %q", p.Critical.Type, payloadType)
	}
	return &p, nil
}

// mismatch says what a payload claims instead of repository@digest, or "".
func (p *payload) mismatch(repository, digest string) string {
	if d := p.Critical.Image.Digest; d != digest {
		return fmt.Sprintf("another image, digest %.80q", d)
	}
	if r := p.Critical.Identity.DockerReference; r != repository {
		return fmt.Sprintf("the reference %.200q", r)
	}
	return ""
}

// statement is an in-toto statement, v0.1 or v1.
type statement struct {
	Type          string          `json:"_type"`
	PredicateType string          `json:"predicateType"`
	Subject       []subject       `json:"subject"`
	Predicate     json.RawMessage `json:"predicate"`
}

type subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

func parseStatement(data []byte) (*statement, error) {
	if err := bounded.CheckJSON(data, bounded.Limits{Bytes: maxStatement, Depth: 64, Nodes: 16 << 20}); err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	var st statement
	if err := json.Unmarshal(data, &st); err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	if st.Type != "https://in-toto.io/Statement/v0.1" && st.Type != "https://in-toto.io/Statement/v1" {
		return nil, fmt.Errorf("statement has type %.60q", st.Type)
	}
	return &st, nil
}

// isOf says whether the statement is about the digest (sha256:<hex>), in this
// repository where it says so (cosign's legacy attestations do).
func (st *statement) isOf(repository, digest string) bool {
	for _, s := range st.Subject {
		if "sha256:"+s.Digest["sha256"] == digest && (s.Name == "" || s.Name == repository) {
			return true
		}
	}
	return false
}

// claims says what a statement is about, for an error.
func (st *statement) claims() string {
	if len(st.Subject) == 0 {
		return "nothing"
	}
	return fmt.Sprintf("%.200q, digest %.80q", st.Subject[0].Name, st.Subject[0].Digest["sha256"])
}
