// Package kbs holds the messages of the KBS protocol 0.4.0 (request, challenge,
// attestation, response), as Trustee speaks it, and the dialect "cvm-agent/1"
// on top of it. The exact bytes are in README.md.
//
// It promises: what it decodes is bounded before it is parsed, duplicate
// member names and wrong types are errors, member names are matched with
// their case, and members that it does not know are ignored, because both
// sides of the protocol grow. It opens no connection, checks no evidence and
// holds no private key.
package kbs

import (
	"fmt"

	jsonv2 "github.com/go-json-experiment/json"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// Version is the only protocol version spoken: it is compared exactly, not as
// a range.
const Version = "0.4.0"

// Dialect names the additions of this project; it is also the version string
// inside them.
const Dialect = "cvm-agent/1"

// DialectKBS is the protocol with nothing added.
const DialectKBS = "kbs"

// The endpoints. PathResource is followed by "<repository>/<type>/<tag>".
const (
	PathPrefix   = "/kbs/v0/"
	PathAuth     = PathPrefix + "auth"
	PathAttest   = PathPrefix + "attest"
	PathResource = PathPrefix + "resource/"
)

// CookieName is the session cookie: 32 lowercase hex digits.
const CookieName = "kbs-session-id"

// MaxBody bounds every request and response body, in bytes.
const MaxBody = 2 << 20

// NonceSize is the size of a challenge's nonce, in bytes.
const NonceSize = 32

// limits bounds the JSON of one message. Reports travel as arrays of single
// bytes, so the node budget is the size of a few reports and certificates.
var limits = bounded.Limits{Bytes: MaxBody, Depth: 16, Nodes: 65536, String: MaxBody}

// decode reads one JSON value into v: bounded, case-exact, no duplicates,
// unknown members ignored.
func decode(data []byte, v any, what string) error {
	if len(data) > MaxBody {
		return fmt.Errorf("%s has %d bytes, at most %d are read", what, len(data), MaxBody)
	}
	if err := bounded.CheckJSON(data, limits); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := jsonv2.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
