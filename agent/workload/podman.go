// Package workload runs verified images as containers, through podman's
// service socket and its bindings.
//
// It promises: a container is created from an image ID and never from a name;
// after the creation podman's own record is read back, and the container is
// removed unless it is of that image and has the isolation that was asked for;
// whatever this package creates carries the labels of this package, and only
// that is ever listed, stopped or removed. It does not verify, fetch or decrypt
// images.
package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/containers/podman/v5/pkg/bindings"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/bindings/images"
	"github.com/containers/podman/v5/pkg/bindings/volumes"
	"github.com/containers/podman/v5/pkg/errorhandling"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Labels on everything that this package creates.
const (
	LabelPolicy   = "io.cvm-agent.policy"   // name of the policy
	LabelVersion  = "io.cvm-agent.version"  // decimal version of the policy
	LabelWorkload = "io.cvm-agent.workload" // name of the workload in the policy
	LabelImage    = "io.cvm-agent.image"    // repository@sha256:… as the policy names it
)

// Podman is a connection to podman's service. It is safe for concurrent use.
type Podman struct {
	socket string
	values context.Context // holds the connection, as the bindings want it
}

// Connect opens the service's unix socket (an absolute path) and asks for its
// version. While the service does not answer it tries again with backoff until
// ctx ends, telling onWait (may be nil) why and for how long it waits; then the
// error is cause.PodmanUnavailable.
func Connect(ctx context.Context, socket string, onWait func(err error, next time.Duration)) (*Podman, error) {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = 200 * time.Millisecond
	b.MaxInterval = 5 * time.Second
	for {
		p, err := dial(ctx, socket)
		if err == nil {
			return p, nil
		}
		next := b.NextBackOff()
		if onWait != nil {
			onWait(err, next)
		}
		select {
		case <-ctx.Done():
			return nil, cause.New(cause.PodmanUnavailable, "podman's service at %s did not answer: %s", socket, oneLine(err))
		case <-time.After(next):
		}
	}
}

// dial connects once. The values must outlive ctx: the connection is used for
// the daemon's life.
func dial(ctx context.Context, socket string) (*Podman, error) {
	values, err := bindings.NewConnectionWithOptions(context.WithoutCancel(ctx), bindings.Options{URI: "unix://" + socket})
	if err != nil {
		return nil, err
	}
	return &Podman{socket: socket, values: values}, nil
}

// joined takes deadline and cancellation from one context and the bindings'
// connection from another.
type joined struct {
	context.Context
	values context.Context
}

func (j joined) Value(key any) any {
	if v := j.Context.Value(key); v != nil {
		return v
	}
	return j.values.Value(key)
}

func (p *Podman) with(ctx context.Context) context.Context { return joined{ctx, p.values} }

// Owned is a container of ours as podman knows it.
type Owned struct {
	ID       string // 64 hex digits
	Name     string
	ImageID  string // 64 hex digits
	Policy   string
	Version  string
	Workload string
	State    string // podman's word: created, running, exited, …
}

// List returns the containers of the policy, in any state, or those of every
// policy when policyName is empty.
func (p *Podman) List(ctx context.Context, policyName string) ([]Owned, error) {
	opts := new(containers.ListOptions).WithAll(true).WithFilters(map[string][]string{"label": {labelFilter(policyName)}})
	list, err := containers.List(p.with(ctx), opts)
	if err != nil {
		return nil, failed(cause.PodmanUnavailable, "list containers", err)
	}
	owned := make([]Owned, 0, len(list))
	for _, c := range list {
		o := Owned{ID: c.ID, ImageID: c.ImageID, State: c.State,
			Policy: c.Labels[LabelPolicy], Version: c.Labels[LabelVersion], Workload: c.Labels[LabelWorkload]}
		if len(c.Names) > 0 {
			o.Name = c.Names[0]
		}
		owned = append(owned, o)
	}
	return owned, nil
}

// Stop asks the container to end and kills it after timeout. A container that
// is gone or not running is no error.
func (p *Podman) Stop(ctx context.Context, id string, timeout time.Duration) error {
	opts := new(containers.StopOptions).WithTimeout(uint(timeout / time.Second)).WithIgnore(true)
	if err := containers.Stop(p.with(ctx), id, opts); err != nil && !isGone(err) {
		return failed(cause.WorkloadStart, "stop container "+short(id), err)
	}
	return nil
}

// Remove removes the container, running or not, with its anonymous volumes.
func (p *Podman) Remove(ctx context.Context, id string) error {
	opts := new(containers.RemoveOptions).WithForce(true).WithVolumes(true).WithIgnore(true).WithTimeout(0)
	reports, err := containers.Remove(p.with(ctx), id, opts)
	if err == nil {
		for _, r := range reports {
			err = errors.Join(err, r.Err)
		}
	}
	if err != nil && !isGone(err) {
		return failed(cause.WorkloadStart, "remove container "+short(id), err)
	}
	return nil
}

// RemoveVolumes removes the named volumes of the policy, or those of every
// policy when policyName is empty, and returns their names.
func (p *Podman) RemoveVolumes(ctx context.Context, policyName string) ([]string, error) {
	opts := new(volumes.ListOptions).WithFilters(map[string][]string{"label": {labelFilter(policyName)}})
	list, err := volumes.List(p.with(ctx), opts)
	if err != nil {
		return nil, failed(cause.PodmanUnavailable, "list volumes", err)
	}
	var removed []string
	for _, v := range list {
		if err := volumes.Remove(p.with(ctx), v.Name, new(volumes.RemoveOptions).WithForce(true)); err != nil && !isGone(err) {
			return removed, failed(cause.StorageFailed, "remove volume "+v.Name, err)
		}
		removed = append(removed, v.Name)
	}
	return removed, nil
}

// RemoveImage removes the image with this ID (64 hex digits) and the layers
// that only it uses. An image that is gone is no error; one that a container
// uses is.
func (p *Podman) RemoveImage(ctx context.Context, imageID string) error {
	_, errs := images.Remove(p.with(ctx), []string{imageID}, new(images.RemoveOptions).WithIgnore(true))
	if err := errors.Join(errs...); err != nil && !isGone(err) {
		return failed(cause.StorageFailed, "remove image "+short(imageID), err)
	}
	return nil
}

func labelFilter(policyName string) string {
	if policyName == "" {
		return LabelPolicy
	}
	return LabelPolicy + "=" + policyName
}

// failed words an error of the bindings: code when podman answered, otherwise
// PodmanUnavailable; a full disk keeps its own code wherever it shows.
func failed(code cause.Code, doing string, err error) error {
	text := oneLine(err)
	switch {
	case errors.Is(err, context.Canceled):
		return cause.New(cause.Cancelled, "%s: %w", doing, err)
	case errors.Is(err, context.DeadlineExceeded):
		return cause.New(cause.DeadlineExceeded, "%s: %s", doing, text)
	case isDown(err):
		return cause.New(cause.PodmanUnavailable, "%s: podman's service is gone: %s", doing, text)
	case strings.Contains(text, syscall.ENOSPC.Error()):
		return cause.New(cause.StorageFull, "%s: %s", doing, text)
	}
	return cause.New(code, "%s: %s", doing, text)
}

// isDown tells an unanswered request from an answered one.
func isDown(err error) bool {
	var answered *errorhandling.ErrorModel
	if errors.As(err, &answered) {
		return false
	}
	var u *url.Error
	var op *net.OpError
	return errors.As(err, &u) || errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

func isGone(err error) bool {
	var answered *errorhandling.ErrorModel
	return errors.As(err, &answered) && answered.ResponseCode == 404
}

// oneLine bounds an error of podman's to one readable line.
func oneLine(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	if len(text) > 400 {
		text = text[:400] + "…"
	}
	return text
}

func short(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

func quoted(list []string) string { return fmt.Sprintf("%q", list) }
