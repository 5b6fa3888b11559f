package policycmd

import (
	"crypto"
	"fmt"
	"regexp"
	"time"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
)

// The kinds of documents.
const (
	kindPolicy    = "policy"
	kindReference = "reference"
)

// document is a decoded policy or reference document, in whatever form it came.
type document struct {
	policy      *policy.Policy     // one of these two
	reference   *release.Reference // is set
	payload     []byte             // canonical JSON
	payloadType string
	form        string         // "yaml", "json" or "envelope"
	envelope    *dsse.Envelope // of the last, with signatures that nobody has verified
}

var referenceVersion = regexp.MustCompile(`(?m)^(?:\{\s*)?"?apiVersion"?[ ]*:[ ]*["']?cvm-agent\.reference-values/`)

// kindOf only chooses the strict decoder that a document has to pass.
func kindOf(data []byte) string {
	if e, err := parseEnvelope(data); err == nil {
		if e.PayloadType == release.ReferencePayloadType {
			return kindReference
		}
		return kindPolicy
	}
	if referenceVersion.Match(data) {
		return kindReference
	}
	return kindPolicy
}

// readDocument reads YAML, canonical JSON or an envelope whose signatures are
// not looked at.
func readDocument(c *cobra.Command, path string) (*document, error) {
	data, err := readInput(c, path, policy.MaxSize, cause.PolicyTooLarge)
	if err != nil {
		return nil, err
	}
	d := &document{form: "json", payload: data, payloadType: policy.PayloadType}
	if kindOf(data) == kindReference {
		d.payloadType = release.ReferencePayloadType
	}
	if e, perr := parseEnvelope(data); perr == nil {
		if e.PayloadType != d.payloadType {
			return nil, cause.New(cause.PolicyMalformed, "%s: payload type is %q, expected %q or %q", path, e.PayloadType, policy.PayloadType, release.ReferencePayloadType)
		}
		d.form, d.payload, d.envelope = "envelope", e.Payload, e
	} else if !looksLikeJSON(data) {
		d.form = "yaml"
	}
	if d.payloadType == release.ReferencePayloadType {
		err = d.decodeReference()
	} else {
		err = d.decodePolicy()
	}
	if err != nil {
		return nil, named(path, err)
	}
	return d, nil
}

func (d *document) decodePolicy() (err error) {
	if d.form != "yaml" {
		d.policy, err = policy.DecodeJSON(d.payload)
		return err
	}
	if d.policy, err = policy.DecodeYAML(d.payload); err != nil {
		return err
	}
	d.payload, err = d.policy.Canonical()
	return err
}

func (d *document) decodeReference() (err error) {
	if d.form != "yaml" {
		d.reference, err = release.DecodeReferenceJSON(d.payload)
		return err
	}
	if d.reference, err = release.DecodeReferenceYAML(d.payload); err != nil {
		return err
	}
	d.payload, err = d.reference.Canonical()
	return err
}

// referenceSummary is what check, verify and show say of a reference document.
type referenceSummary struct {
	Name      string   `json:"name"`
	Version   uint64   `json:"version"`
	Expires   string   `json:"expires,omitempty"`
	Digest    string   `json:"digest"` // of the signed bytes
	Form      string   `json:"form,omitempty"`
	Launch    []string `json:"launch"`
	Resources []string `json:"resources"`
	Signers   []string `json:"signers,omitempty"`
}

func summarizeReference(d *release.Reference, payload []byte) referenceSummary {
	s := referenceSummary{Name: d.Name, Version: d.Version, Expires: d.Expires, Digest: release.Digest(payload)}
	for _, l := range d.Launch {
		s.Launch = append(s.Launch, l.Platform+" "+l.Label)
	}
	for _, r := range d.Resources {
		s.Resources = append(s.Resources, r.Resource...)
	}
	return s
}

func (s referenceSummary) print(c *cobra.Command, format, verdict string) error {
	out := c.OutOrStdout()
	if format == "json" {
		return printJSON(out, s)
	}
	if verdict != "" {
		fmt.Fprintln(out, verdict)
	}
	fmt.Fprintf(out, "name     %s\nversion  %d\n", s.Name, s.Version)
	if s.Expires != "" {
		fmt.Fprintf(out, "expires  %s\n", s.Expires)
	}
	fmt.Fprintf(out, "digest   %s\n", s.Digest)
	for _, line := range []struct {
		what string
		list []string
	}{{"launch", s.Launch}, {"resource", s.Resources}, {"signer", s.Signers}} {
		for _, v := range line.list {
			fmt.Fprintf(out, "%-8s %s\n", line.what, v)
		}
	}
	return nil
}

// verifyReference judges an envelope as a broker with these signers would.
func verifyReference(c *cobra.Command, path, format string, envelope []byte, keys []crypto.PublicKey, threshold int, floor uint64) error {
	o, err := release.OpenReference(envelope, keys, threshold)
	if err == nil && o.Reference.Version < floor {
		err = cause.New(cause.PolicyBelowFloor, "reference values %s have version %d, the floor is %d", o.Reference.Name, o.Reference.Version, floor)
	}
	if err == nil {
		err = o.CheckExpiry(time.Now())
	}
	if err != nil {
		return named(path, err)
	}
	s := summarizeReference(o.Reference, o.Payload)
	s.Signers = o.Signers
	return s.print(c, format, "ok: "+path+" is signed and valid")
}
