package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/cc-runtime/cvm-agent/tests/rig"
)

// serial asks the agent through the machine's control port, as agent/control's
// README says that anybody can: HTTP/1.1, each request after NUL TAG LF, and
// the answer after the same.
type serial struct {
	machine *rig.Machine
	client  *http.Client
}

func newSerial(m *rig.Machine) *serial {
	return &serial{m, &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, m.Control) },
	}}}
}

func dial(ctx context.Context, path string) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	var tag [8]byte
	_, _ = rand.Read(tag[:]) // never fails
	mark := []byte("\x00" + hex.EncodeToString(tag[:]) + "\n")
	if _, err := c.Write(mark); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return &answer{Conn: c, mark: mark}, nil
}

// answer reads what follows the mark.
type answer struct {
	net.Conn
	mark  []byte
	after io.Reader
}

func (a *answer) Read(p []byte) (int, error) {
	if a.after == nil {
		r, seen := bufio.NewReader(a.Conn), []byte(nil)
		for !bytes.HasSuffix(seen, a.mark) {
			b, err := r.ReadByte()
			if err != nil {
				return 0, err
			}
			seen = append(seen[max(0, len(seen)-len(a.mark)):], b)
		}
		a.after = r
	}
	return a.after.Read(p)
}

// do asks, for up to within, and ends early when the machine goes off.
func (s *serial) do(ctx context.Context, within time.Duration, method, path, mediaType string, body []byte) (status int, answer []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	go func() {
		select {
		case <-s.machine.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	request, err := http.NewRequestWithContext(ctx, method, "http://cvm-agent"+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	if mediaType != "" {
		request.Header.Set("Content-Type", mediaType)
	}
	response, err := s.client.Do(request)
	if err != nil {
		if !s.machine.Running() {
			err = fmt.Errorf("the machine went off: %w", err)
		}
		return 0, nil, err
	}
	defer response.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(response.Body, 16<<20))
	return response.StatusCode, answer, err
}

func (s *serial) get(ctx context.Context, within time.Duration, path string, v any) error {
	status, body, err := s.do(ctx, within, http.MethodGet, path, "", nil)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("GET %s: status %d: %s", path, status, bytes.TrimSpace(body))
	}
	if err == nil && v != nil {
		err = json.Unmarshal(body, v)
	}
	return err
}

// refusal is how the agent says no, of an error's body or a stream's last line.
type refusal struct {
	Cause string `json:"cause"`
	Text  string `json:"text"`
}

func (r refusal) Error() string { return r.Cause + ": " + r.Text }

// order sends an order and waits for its outcome: nil, or a refusal.
func (s *serial) order(ctx context.Context, operation, mediaType string, body []byte) error {
	status, answer, err := s.do(ctx, orderWithin, http.MethodPost, "/v1/"+operation, mediaType, body)
	if status != 0 && status != http.StatusOK {
		var no refusal
		if err := json.Unmarshal(answer, &no); err != nil || no.Cause == "" {
			return fmt.Errorf("%s: status %d: %.200q", operation, status, answer)
		}
		return no
	}
	// The outcome may be out before the connection breaks: destroy ends with that.
	for line := range bytes.Lines(answer) {
		var l struct {
			Result *struct {
				Outcome string `json:"outcome"`
				refusal
			} `json:"result"`
		}
		if json.Unmarshal(line, &l) == nil && l.Result != nil {
			if l.Result.Outcome == "ok" {
				return nil
			}
			return l.Result.refusal
		}
	}
	return errors.Join(fmt.Errorf("%s: the stream ended without an outcome", operation), err)
}

// refusedWith checks that err is a refusal with that cause.
func refusedWith(err error, cause string) error {
	var no refusal
	switch {
	case err == nil:
		return fmt.Errorf("was accepted, expected %s", cause)
	case !errors.As(err, &no) || no.Cause != cause:
		return fmt.Errorf("expected %s: %w", cause, err)
	}
	return nil
}

// event is one change of a phase, as /v1/events says it.
type event struct {
	Sequence string    `json:"sequence"`
	Phase    string    `json:"phase"`
	Outcome  string    `json:"outcome"`
	Start    time.Time `json:"start"`
	Time     time.Time `json:"time"`
}

func (s *serial) events(ctx context.Context) ([]event, error) {
	status, body, err := s.do(ctx, askWithin, http.MethodGet, "/v1/events", "", nil)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("GET /v1/events: status %d", status)
	}
	var events []event
	for line := range bytes.Lines(body) {
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("/v1/events: %w", err)
		}
		events = append(events, e)
	}
	return events, nil
}
