package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Client asks an agent over its control socket. The zero value is not usable.
type Client struct{ http *http.Client }

const (
	maxStatus = 4 << 20 // bytes of a status answer
	maxLine   = 1 << 20 // bytes of one line of a stream
)

// NewClient returns a client of the socket at path.
func NewClient(path string) *Client {
	return &Client{http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}}
}

// Status returns the agent's status.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	resp, err := c.do(ctx, http.MethodGet, "/v1/status", nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := bounded.ReadAll(resp.Body, maxStatus)
	if err != nil {
		return nil, err
	}
	var st Status
	if err := json.Unmarshal(data, &st); err != nil {
		return nil, fmt.Errorf("decode the agent's status: %w", err)
	}
	return &st, nil
}

// Events calls each for every recorded event, and with follow for those to
// come, until ctx ends or each returns an error.
func (c *Client) Events(ctx context.Context, follow bool, each func(Event) error) error {
	path := "/v1/events"
	if follow {
		path += "?follow=1"
	}
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	err = lines(resp.Body, func(data []byte) error {
		var e Event
		if err := json.Unmarshal(data, &e); err != nil {
			return fmt.Errorf("decode an event: %w", err)
		}
		return each(e)
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Upgrade sends a signed policy (initdata TOML or DSSE envelope) and returns
// the order's outcome as an error with its cause; each (may be nil) hears of
// every event meanwhile.
func (c *Client) Upgrade(ctx context.Context, order []byte, each func(Event)) error {
	if len(order) > MaxOrder {
		return cause.New(cause.PolicyTooLarge, "the order has %d bytes, more than %d", len(order), MaxOrder)
	}
	return c.order(ctx, "/v1/upgrade", order, each)
}

// Destroy orders the instance's end.
func (c *Client) Destroy(ctx context.Context, each func(Event)) error {
	return c.order(ctx, "/v1/destroy", nil, each)
}

func (c *Client) order(ctx context.Context, path string, body []byte, each func(Event)) error {
	resp, err := c.do(ctx, http.MethodPost, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var result *Result
	err = lines(resp.Body, func(data []byte) error {
		var l Line
		if err := json.Unmarshal(data, &l); err != nil {
			return fmt.Errorf("decode an order's progress: %w", err)
		}
		if l.Result != nil {
			result = l.Result
		}
		if l.Event != nil && each != nil {
			each(*l.Event)
		}
		return nil
	})
	switch {
	case result != nil && result.Outcome == OK:
		return nil
	case result != nil:
		return cause.New(cause.Code(result.Cause), "%s", result.Text)
	case err != nil:
		return cause.New(cause.AgentUnavailable, "the agent went away before the order's outcome was known: %w", err)
	}
	return cause.New(cause.AgentUnavailable, "the agent went away before the order's outcome was known")
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://cvm-agent"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil, cause.New(cause.NotPermitted, "the control socket is for root and its group: %w", err)
		}
		return nil, cause.New(cause.AgentUnavailable, "the agent does not answer: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(io.LimitReader(resp.Body, maxLine))
	var e ErrorBody
	if json.Unmarshal(data, &e) == nil && e.Cause != "" {
		return nil, cause.New(cause.Code(e.Cause), "%s", e.Text)
	}
	return nil, cause.New(cause.Internal, "the agent answered %s", resp.Status)
}

func lines(r io.Reader, each func([]byte) error) error {
	scan := bufio.NewScanner(r)
	scan.Buffer(make([]byte, 0, 4096), maxLine)
	for scan.Scan() {
		if err := each(scan.Bytes()); err != nil {
			return err
		}
	}
	return scan.Err()
}
