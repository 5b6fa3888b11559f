package adminclient

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The admin endpoints for reference documents, instances and the list of marks.
const (
	PathMarks      = "/admin/v0/marks"             // GET: the list of policy names
	PathReferences = "/admin/v0/reference-values"  // GET: the list
	PathReference  = "/admin/v0/reference-values/" // GET, PUT, DELETE; followed by the document's name
	PathInstances  = "/admin/v0/instances"         // GET: the list
	PathInstance   = "/admin/v0/instance/"         // GET; followed by the id. PUT with "/tombstone" behind it
)

// ReferenceMark is the high-water mark of a reference document's name.
type ReferenceMark struct {
	Version uint64 `json:"version"` // 0: there was none
	Digest  string `json:"digest"`  // sha256:… of the signed bytes
}

// Follows says whether next may take the place of a document with the mark m.
func (m ReferenceMark) Follows(name string, next ReferenceMark) error {
	if next.Version < m.Version {
		return cause.New(cause.PolicyBelowFloor, "reference values %q have version %d and never go down to %d", name, m.Version, next.Version)
	}
	if next.Version == m.Version && next.Digest != m.Digest {
		return cause.New(cause.PolicyBelowFloor, "reference values %q have version %d already, of other content: a change needs a higher version", name, m.Version)
	}
	return nil
}

// Reference is what a broker says of a reference document that it holds.
type Reference struct {
	Name      string   `json:"name"`
	Version   uint64   `json:"version"`
	Digest    string   `json:"digest"`
	Expires   string   `json:"expires,omitempty"`
	Signers   []string `json:"signers"`
	Resources []string `json:"resources"`
	Envelope  []byte   `json:"envelope,omitempty"` // as it was received
}

// Instance is a guest that has attested.
type Instance struct {
	ID        string    `json:"id"`
	Identity  string    `json:"identity"` // the attested key or launch that the id is bound to
	FirstSeen time.Time `json:"firstSeen"`
	LastSeen  time.Time `json:"lastSeen,omitzero"` // to a day
	Tombstone bool      `json:"tombstone"`
}

// PutReference stores a signed reference document. The broker verifies it by
// the signers of its own configuration.
func (c *Client) PutReference(ctx context.Context, name string, envelope []byte) error {
	return c.do(ctx, http.MethodPut, PathReference+url.PathEscape(name), envelope, nil)
}

// Reference returns one document with its envelope.
func (c *Client) Reference(ctx context.Context, name string) (*Reference, error) {
	var r Reference
	if err := c.do(ctx, http.MethodGet, PathReference+url.PathEscape(name), nil, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// References lists the names of all documents.
func (c *Client) References(ctx context.Context) ([]string, error) {
	var list []string
	err := c.do(ctx, http.MethodGet, PathReferences, nil, &list)
	return list, err
}

// Marks lists the policy names that have a version mark.
func (c *Client) Marks(ctx context.Context) ([]string, error) {
	var list []string
	err := c.do(ctx, http.MethodGet, PathMarks, nil, &list)
	return list, err
}

// DeleteReference removes a document: its resources are released to nobody
// from then on. Its version mark stays.
func (c *Client) DeleteReference(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, PathReference+url.PathEscape(name), nil, nil)
}

// Instances lists all instances.
func (c *Client) Instances(ctx context.Context) ([]Instance, error) {
	var list []Instance
	err := c.do(ctx, http.MethodGet, PathInstances, nil, &list)
	return list, err
}

// Instance returns one instance.
func (c *Client) Instance(ctx context.Context, id string) (*Instance, error) {
	var i Instance
	if err := c.do(ctx, http.MethodGet, PathInstance+url.PathEscape(id), nil, &i); err != nil {
		return nil, err
	}
	return &i, nil
}

// SetTombstone marks an instance as destroyed, for good: nothing is released
// to it any more.
func (c *Client) SetTombstone(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodPut, PathInstance+url.PathEscape(id)+"/tombstone", nil, nil)
}
