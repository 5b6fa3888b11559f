package control

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/order"
)

// Agent is what the interface speaks for. All methods are safe for concurrent
// use.
type Agent interface {
	Status() Status
	// Events returns the recorded events with Seq > after, oldest first, and a
	// channel that is closed when there are newer ones.
	Events(after uint64) ([]Event, <-chan struct{})
	// Rules are those of the policy in force, or the agent's own before it is known.
	Rules() Rules
	// Identity is whom a signed order has to name.
	Identity() Identity
	// Upgrade and Destroy return when the order's outcome is known. An error
	// that carries a code of the order's admission (busy, not-ready, …) means
	// that nothing was begun.
	Upgrade(ctx context.Context, order []byte) error
	Destroy(ctx context.Context) error
}

// Identity names this boot of this instance.
type Identity struct {
	Policy     string // name of the policy in force; "" before it is known
	InstanceID string // the broker's; "" without one
	BootID     string // the kernel's
}

// Bounds of the interface.
const (
	headerTimeout = 5 * time.Second
	bodyTimeout   = 30 * time.Second
	idleTimeout   = 30 * time.Second
	writeTimeout  = 10 * time.Second // of one answer, or one line of a stream
	maxHeader     = 8 << 10
	maxFollowers  = 16 // concurrent event streams of all callers
)

// Server serves the interface.
type Server struct {
	agent      Agent
	log        *slog.Logger
	followers  chan struct{}
	challenges challenges
	http       *http.Server
}

type connKey struct{}

// callerOf says who opened the request's connection.
func callerOf(r *http.Request) (Caller, bool) {
	c, ok := r.Context().Value(connKey{}).(interface{ from() Caller })
	if !ok {
		return Caller{}, false
	}
	return c.from(), true
}

// NewServer returns a server for agent.
func NewServer(agent Agent, log *slog.Logger) *Server {
	s := &Server{agent: agent, log: log, followers: make(chan struct{}, maxFollowers), challenges: challenges{now: time.Now}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", s.read(s.status))
	mux.HandleFunc("GET /v1/events", s.read(s.events))
	mux.HandleFunc("GET /v1/challenge", s.read(s.challenge))
	mux.HandleFunc("POST /v1/upgrade", s.upgrade)
	mux.HandleFunc("POST /v1/destroy", s.destroy)
	s.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       bodyTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	return s
}

// Serve serves until ctx ends; then it closes the listener and all connections.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { _ = s.http.Close() })
	defer stop()
	err := s.http.Serve(listener{UnixListener: l, set: &conns{byUID: map[uint32][]*conn{}}})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (s *Server) read(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		caller, ok := callerOf(r)
		if !ok || !s.agent.Rules().MayRead(caller) {
			s.refuse(w, http.StatusForbidden, cause.New(cause.NotPermitted, "this caller may not read the agent's status"))
			return
		}
		next(w, r)
	}
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	st := s.agent.Status()
	st.Phases = slices.Clone(st.Phases)
	for i := range st.Phases {
		st.Phases[i] = shownTo(r, st.Phases[i])
	}
	s.answer(w, http.StatusOK, st)
}

// shownTo is the phase as the caller may see it: what a workload wrote stays in
// the guest, and only a unix socket's caller is known to be there.
func shownTo(r *http.Request, p Phase) Phase {
	if caller, _ := callerOf(r); caller.Transport != TransportUnix {
		p.Log = ""
	}
	return p
}

// events writes the recorded events, and with ?follow=1 those to come.
func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	follow := false
	for key, values := range r.URL.Query() {
		if key != "follow" || len(values) != 1 || (values[0] != "0" && values[0] != "1") {
			s.refuse(w, http.StatusBadRequest, cause.New(cause.Usage, "unknown parameter %.40q, expected follow=0 or follow=1", key))
			return
		}
		follow = values[0] == "1"
	}
	if follow {
		select {
		case s.followers <- struct{}{}:
			defer func() { <-s.followers }()
		default:
			s.refuse(w, http.StatusServiceUnavailable, cause.New(cause.Busy, "%d event streams are open already", maxFollowers))
			return
		}
	}
	out := newStream(w)
	out.patient()
	var after uint64
	for {
		list, more := s.agent.Events(after)
		for _, e := range list {
			after = e.Seq
			e.Phase = shownTo(r, e.Phase)
			if out.line(e) != nil {
				return
			}
		}
		if !follow || out.flush() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-more:
		}
	}
}

func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) {
	s.order(w, r, order.Upgrade, s.agent.Upgrade)
}

func (s *Server) destroy(w http.ResponseWriter, r *http.Request) {
	s.order(w, r, order.Destroy, func(ctx context.Context, _ []byte) error { return s.agent.Destroy(ctx) })
}

func (s *Server) order(w http.ResponseWriter, r *http.Request, operation string, do func(context.Context, []byte) error) {
	carried, ok := s.admit(w, r, operation)
	if !ok {
		return
	}
	caller, _ := callerOf(r)
	s.log.Info("order received", "order", operation, "transport", caller.Transport, "uid", caller.UID, "pid", caller.PID, "signed", signed(r))
	if c, ok := r.Context().Value(connKey{}).(*conn); ok {
		c.setOrder(true)
		defer c.setOrder(false)
	}
	s.carryOut(w, r, func(ctx context.Context) error { return do(ctx, carried) })
}

// carryOut runs the order to its end, whether the caller stays or not, and
// streams what happens meanwhile.
func (s *Server) carryOut(w http.ResponseWriter, r *http.Request, order func(context.Context) error) {
	var after uint64
	if list, _ := s.agent.Events(0); len(list) > 0 {
		after = list[len(list)-1].Seq
	}
	done := make(chan error, 1)
	go func() { done <- order(context.WithoutCancel(r.Context())) }()

	// A caller that left a transport without connections must not keep the next
	// one waiting for the order's end.
	var left <-chan struct{}
	if caller, _ := callerOf(r); caller.Transport != TransportUnix {
		left = r.Context().Done()
	}
	out := newStream(w)
	out.patient()
	gone := false // the caller; the order goes on
	for {
		list, more := s.agent.Events(after)
		for _, e := range list {
			after = e.Seq
			e.Phase = shownTo(r, e.Phase)
			gone = gone || out.line(Line{Event: &e}) != nil
		}
		gone = gone || out.flush() != nil
		select {
		case <-more:
		case <-left:
			return
		case err := <-done:
			if admission(err) && !out.begun {
				s.refuse(w, statusOf(err), err)
				return
			}
			list, _ := s.agent.Events(after)
			for _, e := range list {
				e.Phase = shownTo(r, e.Phase)
				gone = gone || out.line(Line{Event: &e}) != nil
			}
			if !gone {
				_ = out.line(Line{Result: resultOf(err)})
				_ = out.flush()
			}
			return
		}
	}
}

func resultOf(err error) *Result {
	if err == nil {
		return &Result{Outcome: OK}
	}
	return &Result{Outcome: Failed, Cause: string(cause.Of(err)), Text: textOf(err)}
}

// textOf is the error without its code, which travels beside it.
func textOf(err error) string {
	var e *cause.Error
	if errors.As(err, &e) {
		return e.Err.Error()
	}
	return err.Error()
}

// admission tells the errors of an order that was not begun.
func admission(err error) bool {
	switch cause.Of(err) {
	case cause.Busy, cause.NotReady, cause.Destroyed, cause.NotPermitted:
		return true
	}
	return false
}

func statusOf(err error) int {
	switch cause.Of(err) {
	case cause.NotPermitted:
		return http.StatusForbidden
	case cause.Busy, cause.Destroyed:
		return http.StatusConflict
	case cause.NotReady:
		return http.StatusServiceUnavailable
	case cause.OrderMalformed:
		return http.StatusBadRequest
	case cause.OrderUnsigned, cause.OrderSignature, cause.OrderOperation, cause.OrderOtherPolicy, cause.OrderOtherInstance,
		cause.OrderOtherBoot, cause.OrderCarries, cause.OrderExpired, cause.OrderTooLong, cause.OrderChallenge, cause.OrderReplayed:
		return http.StatusForbidden
	}
	return http.StatusUnprocessableEntity
}

func (s *Server) refuse(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Connection", "close") // what is left of the request is not read
	s.answer(w, status, ErrorBody{Cause: string(cause.Of(err)), Text: textOf(err)})
}

func (s *Server) answer(w http.ResponseWriter, status int, v any) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

// stream writes NDJSON, each line with its own deadline.
type stream struct {
	w     http.ResponseWriter
	rc    *http.ResponseController
	enc   *json.Encoder
	begun bool
}

func newStream(w http.ResponseWriter) *stream {
	return &stream{w: w, rc: http.NewResponseController(w), enc: json.NewEncoder(w)}
}

// patient lifts the bound on reading, once the request has been read: the
// server would otherwise take its passing for a caller that left.
func (s *stream) patient() { _ = s.rc.SetReadDeadline(time.Time{}) }

func (s *stream) line(v any) error {
	if !s.begun {
		s.begun = true
		s.w.Header().Set("Content-Type", "application/x-ndjson")
	}
	_ = s.rc.SetWriteDeadline(time.Now().Add(writeTimeout))
	return s.enc.Encode(v)
}

func (s *stream) flush() error {
	if !s.begun {
		return nil
	}
	_ = s.rc.SetWriteDeadline(time.Now().Add(writeTimeout))
	return s.rc.Flush()
}
