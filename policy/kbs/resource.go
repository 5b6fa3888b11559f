package kbs

import (
	"fmt"
	"regexp"
	"strings"
)

// ResourceURI names one resource: kbs://[host[:port]]/repository/type/tag.
// Host is kept for display only: a client that has one broker ignores it, and
// no connection is ever made to it.
type ResourceURI struct {
	Host       string
	Repository string
	Type       string
	Tag        string
}

var (
	segment = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9_.-]*$`)
	host    = regexp.MustCompile(`^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)
)

// maxSegment bounds one segment, in bytes.
const maxSegment = 255

// ParseResourceURI reads kbs://[host[:port]]/repository/type/tag. Queries,
// fragments, percent-encoding and other schemes are errors.
func ParseResourceURI(s string) (ResourceURI, error) {
	rest, ok := strings.CutPrefix(s, "kbs://")
	if !ok {
		return ResourceURI{}, fmt.Errorf("resource %q does not start with kbs://", clip(s))
	}
	h, path, ok := strings.Cut(rest, "/")
	if !ok || (h != "" && (len(h) > maxSegment || !host.MatchString(h))) {
		return ResourceURI{}, fmt.Errorf("resource %q is not kbs://[host[:port]]/repository/type/tag", clip(s))
	}
	u, err := ParseResourcePath(path)
	if err != nil {
		return ResourceURI{}, err
	}
	u.Host = h
	return u, nil
}

// ParseResourcePath reads "repository/type/tag", the form in the endpoint.
func ParseResourcePath(p string) (ResourceURI, error) {
	parts := strings.Split(p, "/")
	if len(parts) != 3 {
		return ResourceURI{}, fmt.Errorf("resource path %q has %d segments, expected repository/type/tag", clip(p), len(parts))
	}
	for _, s := range parts {
		if len(s) > maxSegment || !segment.MatchString(s) {
			return ResourceURI{}, fmt.Errorf("resource path %q: segment %q is not [A-Za-z0-9_-][A-Za-z0-9_.-]* of at most %d bytes", clip(p), clip(s), maxSegment)
		}
	}
	return ResourceURI{Repository: parts[0], Type: parts[1], Tag: parts[2]}, nil
}

// Path is "repository/type/tag".
func (u ResourceURI) Path() string { return u.Repository + "/" + u.Type + "/" + u.Tag }

// String is kbs:///repository/type/tag: without the host, so that one resource
// has one name.
func (u ResourceURI) String() string { return "kbs:///" + u.Path() }
