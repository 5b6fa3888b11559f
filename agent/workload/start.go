package workload

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/bindings/images"
	"github.com/containers/podman/v5/pkg/bindings/volumes"
	"github.com/containers/podman/v5/pkg/domain/entities/types"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Start creates and starts the container and returns its ID (64 hex digits).
// A container of the same name, left by an earlier run, is replaced. When
// anything fails, what was created is removed again; volumes stay.
func (p *Podman) Start(ctx context.Context, c Container) (id string, err error) {
	if err := p.removeFormer(ctx, c); err != nil {
		return "", err
	}
	for _, m := range c.Run.Mounts {
		if m.Type != "volume" {
			continue
		}
		opts := types.VolumeCreateOptions{Name: VolumeName(c.Policy, m.Name), IgnoreIfExists: true,
			Labels: map[string]string{LabelPolicy: c.Policy}}
		if exists, err := volumes.Exists(p.with(ctx), opts.Name, nil); err != nil {
			return "", failed(cause.PodmanUnavailable, "look for volume "+opts.Name, err)
		} else if exists {
			continue
		}
		if _, err := volumes.Create(p.with(ctx), opts, nil); err != nil {
			return "", failed(cause.StorageFailed, "create volume "+opts.Name, err)
		}
	}

	created, err := containers.CreateWithSpec(p.with(ctx), c.spec(), nil)
	if err != nil {
		return "", failed(cause.WorkloadStart, "create container "+c.Name(), err)
	}
	defer func() {
		if err != nil {
			// A fresh context: the reason for failing may be that ctx ended.
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
			defer cancel()
			_ = p.Remove(undo, created.ID)
		}
	}()
	if err := p.checkCreated(ctx, c, created.ID); err != nil {
		return "", err
	}
	// The error must be looked at here: waiting on a container whose start
	// failed reports exit code 0.
	if err := containers.Start(p.with(ctx), created.ID, nil); err != nil {
		return "", failed(cause.WorkloadStart, "start container "+c.Name(), err)
	}
	return created.ID, nil
}

// removeFormer removes an earlier container of the same name if it is ours, and
// nobody else's.
func (p *Podman) removeFormer(ctx context.Context, c Container) error {
	former, err := containers.Inspect(p.with(ctx), c.Name(), nil)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return failed(cause.WorkloadStart, "look for container "+c.Name(), err)
	}
	if former.Config == nil || former.Config.Labels[LabelPolicy] != c.Policy {
		return cause.New(cause.WorkloadStart, "the name %s is taken by a container that is not the agent's", c.Name())
	}
	return p.Remove(ctx, former.ID)
}

// User returns the user that the image's configuration names, "" for root.
func (p *Podman) User(ctx context.Context, imageID string) (string, error) {
	report, err := images.GetImage(p.with(ctx), imageID, nil)
	if err != nil {
		return "", failed(cause.WorkloadStart, "inspect image "+short(imageID), err)
	}
	if report.Config == nil {
		return "", nil
	}
	return report.Config.User, nil
}

// checkCreated reads back what podman made of the request.
func (p *Podman) checkCreated(ctx context.Context, c Container, id string) error {
	data, err := containers.Inspect(p.with(ctx), id, nil)
	if err != nil {
		return failed(cause.WorkloadStart, "inspect container "+c.Name(), err)
	}
	return checkInspected(c, data)
}

func checkInspected(c Container, data *define.InspectContainerData) error {
	if data.Image != c.ImageID {
		return cause.New(cause.WorkloadOtherImage, "container %s is of image %s, expected the verified image %s",
			c.Name(), short(data.Image), short(c.ImageID))
	}
	h := data.HostConfig
	if h == nil {
		return cause.New(cause.WorkloadStart, "podman says nothing about the isolation of container %s", c.Name())
	}
	var wrong []string
	if h.Privileged {
		wrong = append(wrong, "privileged")
	}
	if h.ReadonlyRootfs == c.Run.WritableRoot {
		wrong = append(wrong, "root file system not as asked")
	}
	for what, mode := range map[string]string{"PID": h.PidMode, "IPC": h.IpcMode, "UTS": h.UTSMode} {
		if mode == "host" {
			wrong = append(wrong, what+" namespace of the host")
		}
	}
	if !slices.Contains(h.SecurityOpt, "no-new-privileges") {
		wrong = append(wrong, "no-new-privileges not set")
	}
	for _, o := range h.SecurityOpt {
		if strings.EqualFold(o, "seccomp=unconfined") {
			wrong = append(wrong, "seccomp off")
		}
	}
	for _, have := range data.BoundingCaps {
		if !slices.Contains(c.Run.Capabilities, have) {
			wrong = append(wrong, "capability "+have)
		}
	}
	if len(wrong) > 0 {
		slices.Sort(wrong)
		return cause.New(cause.WorkloadStart, "podman created container %s otherwise than asked: %s", c.Name(), strings.Join(wrong, ", "))
	}
	return nil
}

// Resume starts a stopped container again, after the same look at what podman
// says it is.
func (p *Podman) Resume(ctx context.Context, id string, c Container) error {
	if err := p.checkCreated(ctx, c, id); err != nil {
		return err
	}
	if err := containers.Start(p.with(ctx), id, nil); err != nil {
		return failed(cause.WorkloadStart, "start container "+c.Name()+" again", err)
	}
	return nil
}
