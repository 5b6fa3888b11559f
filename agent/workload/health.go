package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/api/handlers"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	dockerContainer "github.com/docker/docker/api/types/container"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Defaults of a health check (see policy.HealthCheck).
const (
	defaultInterval = time.Second
	firstRetry      = 20 * time.Millisecond // doubles up to the interval
	defaultTimeout  = 5 * time.Second
	DefaultDeadline = 60 * time.Second // until the first success
	DefaultRetries  = 3
	maxBody         = 64 << 10 // of a probe's answer that is read
	maxLogLines     = 5
	maxLogBytes     = 512
)

// WaitHealthy probes the container until the first success and fails with
// cause.WorkloadUnhealthy at the check's deadline, or as soon as the container
// exits. Without a check (nil) a container that runs for a second is healthy.
// onTry (may be nil) hears of every failed probe.
func (p *Podman) WaitHealthy(ctx context.Context, id string, c Container, onTry func(error)) error {
	check := c.Run.HealthCheck
	if check == nil {
		check = &policy.HealthCheck{Interval: policy.Duration(time.Second), Deadline: policy.Duration(10 * time.Second)}
	}
	deadline := check.Deadline.Or(DefaultDeadline)
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	var last error
	// A program is often up a moment after its start: the first tries come
	// quickly, so that nobody waits a whole interval for it.
	interval := check.Interval.Or(defaultInterval)
	wait := interval
	if c.Run.HealthCheck != nil {
		wait = min(firstRetry, interval)
	}
	for first := true; ; first = false {
		if !first || c.Run.HealthCheck == nil {
			select {
			case <-ctx.Done():
				if errors.Is(ctx.Err(), context.Canceled) {
					return cause.New(cause.Cancelled, "waiting for %s to become healthy: %w", c.Workload, ctx.Err())
				}
				return cause.New(cause.WorkloadUnhealthy, "%s did not become healthy within %s: %v", c.Workload, deadline, last)
			case <-time.After(wait):
			}
			wait = min(2*wait, interval)
		}
		err := p.Probe(ctx, id, c)
		if err == nil {
			return nil
		}
		var ended *Ended
		if errors.As(err, &ended) {
			return cause.New(cause.WorkloadUnhealthy, "%s %w", c.Workload, &Ended{ended.Code, p.lastLines(ctx, id, c)})
		}
		if code := cause.Of(err); code == cause.PodmanUnavailable && ctx.Err() == nil {
			return err
		}
		// Our own deadline says less than the probe before it, and a first probe
		// that it cut off is no verdict about the workload.
		switch {
		case ctx.Err() == nil:
			last = err
		case last == nil:
			last = fmt.Errorf("the first check was cut off: %w", err)
		}
		if onTry != nil {
			onTry(err)
		}
	}
}

// Ended says that the container is no longer running. Its text goes to the
// console, which is the host's: the workload's own words are beside it.
type Ended struct {
	Code int32
	Log  string // "" where there is none, or the policy lets none out
}

// LogOf returns the last log lines of the workload that err is about, "" if
// there are none. They are for the journal and the local socket alone, and are
// in no error's text.
func LogOf(err error) string {
	var ended *Ended
	if errors.As(err, &ended) {
		return ended.Log
	}
	return ""
}

func (e *Ended) Error() string { return fmt.Sprintf("exited with status %d", e.Code) }

// Probe runs the check once, bounded by its timeout. A container that does not
// run fails whatever the check says.
func (p *Podman) Probe(ctx context.Context, id string, c Container) error {
	data, err := containers.Inspect(p.with(ctx), id, nil)
	if err != nil {
		return failed(cause.WorkloadUnhealthy, "inspect container "+c.Name(), err)
	}
	if data.State == nil || !data.State.Running {
		// Podman's restart policy brings it back; until then it is only unhealthy.
		if c.Run.Restart == "always" || (c.Run.Restart == "on-failure" && data.State != nil && data.State.ExitCode != 0) {
			return fmt.Errorf("not running, waiting for its restart")
		}
		ended := &Ended{}
		if data.State != nil {
			ended.Code = data.State.ExitCode
		}
		return ended
	}
	check := c.Run.HealthCheck
	if check == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, check.Timeout.Or(defaultTimeout))
	defer cancel()
	switch {
	case len(check.Exec) > 0:
		return p.probeExec(ctx, id, check.Exec)
	case check.HTTP != nil:
		addr, err := address(data, c.Run.Ports, check.HTTP.Port)
		if err != nil {
			return err
		}
		return probeHTTP(ctx, addr, check.HTTP.Path)
	case check.TCP != nil:
		addr, err := address(data, c.Run.Ports, check.TCP.Port)
		if err != nil {
			return err
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	return nil
}

// probeExec runs argv in the container and waits for its exit status. The
// session is attached, since podman learns the status of a detached one only
// through a helper program that the service's own configuration may not reach;
// and it has a connection to itself, since the bindings change the client's
// transport when they attach.
func (p *Podman) probeExec(ctx context.Context, id string, argv []string) error {
	own, err := dial(ctx, p.socket)
	if err != nil {
		return failed(cause.WorkloadUnhealthy, "connect for a health check", err)
	}
	config := &handlers.ExecCreateConfig{ExecOptions: dockerContainer.ExecOptions{Cmd: argv, AttachStdout: true, AttachStderr: true}}
	session, err := containers.ExecCreate(p.with(ctx), id, config)
	if err != nil {
		return failed(cause.WorkloadUnhealthy, "create health check", err)
	}
	ended := make(chan error, 1)
	go func() {
		opts := new(containers.ExecStartAndAttachOptions).WithAttachOutput(true).WithOutputStream(io.Discard).
			WithAttachError(true).WithErrorStream(io.Discard)
		ended <- containers.ExecStartAndAttach(own.with(ctx), session, opts)
	}()
	select {
	case err = <-ended:
	case <-ctx.Done():
		err = ctx.Err()
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	defer func() {
		_ = containers.ExecRemove(p.with(undo), session, new(containers.ExecRemoveOptions).WithForce(true))
	}()
	if err != nil {
		return fmt.Errorf("health check %s: %s", quoted(argv), oneLine(err))
	}
	state, err := containers.ExecInspect(p.with(undo), session, nil)
	if err != nil {
		return failed(cause.WorkloadUnhealthy, "inspect health check", err)
	}
	if state.ExitCode != 0 {
		return fmt.Errorf("health check %s exited with status %d", quoted(argv), state.ExitCode)
	}
	return nil
}

// probeClient follows no redirect and no proxy: the answer of the container's
// own port counts.
var probeClient = &http.Client{
	Transport:     &http.Transport{Proxy: nil, DisableKeepAlives: true, MaxResponseHeaderBytes: maxBody},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func probeHTTP(ctx context.Context, addr, path string) error {
	if path == "" {
		path = "/"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return err
	}
	resp, err := probeClient.Do(req)
	var op *net.OpError
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return fmt.Errorf("GET %s: %w", path, ctx.Err())
	case errors.As(err, &op):
		return fmt.Errorf("GET %s: %w", path, op)
	default: // net/http quotes what it could not read, and that is the workload's
		return fmt.Errorf("GET %s: no answer in HTTP", path)
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, maxBody)
	if resp.StatusCode < 200 || resp.StatusCode > 399 {
		return fmt.Errorf("GET %s answered %d, expected 200–399", path, resp.StatusCode) // the phrase is the workload's
	}
	return nil
}

// address finds where the agent reaches a container's TCP port: on the
// container's own address, else on a published port, else, where podman's
// configured network is the guest's own, on loopback.
func address(data *define.InspectContainerData, ports []policy.Port, port uint16) (string, error) {
	join := func(ip string, p uint16) string { return net.JoinHostPort(ip, strconv.Itoa(int(p))) }
	mode := ""
	if data.HostConfig != nil {
		mode = data.HostConfig.NetworkMode
	}
	switch mode {
	case "host":
		return join("127.0.0.1", port), nil
	case "none":
		return "", fmt.Errorf("port %d cannot be probed: the container has no network", port)
	}
	if n := data.NetworkSettings; n != nil {
		if n.IPAddress != "" {
			return join(n.IPAddress, port), nil
		}
		for _, network := range n.Networks {
			if network.IPAddress != "" {
				return join(network.IPAddress, port), nil
			}
		}
	}
	for _, p := range ports {
		if p.Container == port && (p.Protocol == "" || p.Protocol == "tcp") {
			m := portMapping(p)
			if m.HostIP == "" || m.HostIP == "0.0.0.0" || m.HostIP == "::" {
				m.HostIP = "127.0.0.1"
			}
			return join(m.HostIP, m.HostPort), nil
		}
	}
	return "", fmt.Errorf("port %d cannot be probed: the container has no address and does not publish it", port)
}

// lastLines returns the end of the container's log, where the policy lets logs
// out: one line, bounded.
func (p *Podman) lastLines(ctx context.Context, id string, c Container) string {
	if c.LogRule == "none" {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	lines := make(chan string, 64)
	done := make(chan struct{})
	var tail []string
	go func() {
		defer close(done)
		for line := range lines {
			if tail = append(tail, line); len(tail) > maxLogLines {
				tail = tail[1:]
			}
		}
	}()
	opts := new(containers.LogOptions).WithTail(strconv.Itoa(maxLogLines)).WithStdout(true).WithStderr(true)
	err := containers.Logs(p.with(ctx), id, opts, lines, lines)
	close(lines)
	<-done
	if err != nil {
		return ""
	}
	return printable(strings.Join(tail, " | "))
}

// printable bounds hostile text to one line without control characters.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxLogBytes {
		s = strings.ToValidUTF8(s[:maxLogBytes], "") + "…"
	}
	return s
}
