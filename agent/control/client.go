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
	"net/url"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/order"
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
	var st Status
	if err := c.get(ctx, "/v1/status", &st); err != nil {
		return nil, err
	}
	return &st, nil
}

func (c *Client) get(ctx context.Context, path string, v any) error {
	resp, err := c.do(ctx, http.MethodGet, path, "", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := bounded.ReadAll(resp.Body, maxStatus)
	if err != nil {
		return cause.New(cause.AgentUnavailable, "the agent's answer to %s: %w", path, err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode the agent's answer to %s: %w", path, err)
	}
	return nil
}

// Events calls each for every recorded event, and with follow for those to
// come, until ctx ends or each returns an error.
func (c *Client) Events(ctx context.Context, follow bool, each func(Event) error) error {
	path := "/v1/events"
	if follow {
		path += "?follow=1"
	}
	resp, err := c.do(ctx, http.MethodGet, path, "", nil)
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
func (c *Client) Upgrade(ctx context.Context, signed []byte, each func(Event)) error {
	if len(signed) > MaxOrder {
		return cause.New(cause.PolicyTooLarge, "the order has %d bytes, more than %d", len(signed), MaxOrder)
	}
	return c.order(ctx, "/v1/upgrade", "", signed, each)
}

// Destroy orders the instance's end.
func (c *Client) Destroy(ctx context.Context, each func(Event)) error {
	return c.order(ctx, "/v1/destroy", "", nil, each)
}

// Challenge asks for what a signed order has to repeat.
func (c *Client) Challenge(ctx context.Context) (*order.Challenge, error) {
	var ch order.Challenge
	return &ch, c.get(ctx, "/v1/challenge", &ch)
}

// Signed sends a signed order (package order) to where it says that it goes.
func (c *Client) Signed(ctx context.Context, document []byte, each func(Event)) error {
	d, err := order.Parse(document)
	if err != nil {
		return err
	}
	o, err := d.Peek()
	if err != nil {
		return err
	}
	return c.order(ctx, "/v1/"+o.Operation, order.PayloadType, document, each)
}

func (c *Client) order(ctx context.Context, path, mediaType string, body []byte, each func(Event)) error {
	resp, err := c.do(ctx, http.MethodPost, path, mediaType, body)
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

func (c *Client) do(ctx context.Context, method, path, mediaType string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://cvm-agent"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		var request *url.Error
		if errors.As(err, &op) {
			err = op
		} else if errors.As(err, &request) { // its URL is nobody's
			err = request.Err
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
