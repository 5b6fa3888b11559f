package control

import (
	"errors"
	"fmt"
	"mime"
	"net/http"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/order"
)

// challenge answers what an order has to repeat.
func (s *Server) challenge(w http.ResponseWriter, r *http.Request) {
	id := s.agent.Identity()
	if id.Policy == "" {
		s.refuse(w, http.StatusServiceUnavailable, cause.New(cause.NotReady, "no policy is in force yet"))
		return
	}
	caller, _ := callerOf(r)
	value, expires := s.challenges.issue(fmt.Sprint(caller.Transport, caller.UID))
	s.answer(w, http.StatusOK, order.Challenge{Challenge: value, InstanceID: id.InstanceID, BootID: id.BootID,
		Policy: id.Policy, Expires: expires.UTC().Truncate(time.Second)})
}

// admit reads an order of a caller and returns what it carries, or answers why
// not. On the local socket the peer's credentials decide, as the policy allows,
// and a signed order has to hold beside them; elsewhere nothing but a signed
// order counts.
func (s *Server) admit(w http.ResponseWriter, r *http.Request, operation string) (carried []byte, ok bool) {
	caller, known := callerOf(r)
	rules := s.agent.Rules()
	isSigned := signed(r)
	switch {
	case caller.Transport == TransportUnix && rules.MayOrder(caller):
	case known && caller.Transport != TransportUnix && rules.MayRead(caller):
		if !isSigned {
			s.log.Warn("order refused", "order", operation, "transport", caller.Transport, "cause", string(cause.OrderUnsigned))
			s.refuse(w, http.StatusForbidden, cause.New(cause.OrderUnsigned, "on this transport %s takes a signed order, of media type %s", operation, order.PayloadType))
			return nil, false
		}
	default:
		s.log.Warn("order refused", "order", operation, "transport", caller.Transport, "uid", caller.UID, "pid", caller.PID)
		s.refuse(w, http.StatusForbidden, cause.New(cause.NotPermitted, "this user may not order %s: only root, the operator group and the policy's users may", operation))
		return nil, false
	}
	max := map[string]int64{order.Upgrade: MaxOrder}[operation] // destroy: nothing
	if isSigned {
		max = order.MaxDocument
	}
	body, ok := s.body(w, r, operation, max)
	if !ok || !isSigned {
		return body, ok
	}
	carried, err := s.verify(operation, body)
	if err != nil {
		s.log.Warn("order refused", "order", operation, "transport", caller.Transport, "cause", string(cause.Of(err)))
		s.refuse(w, statusOf(err), err)
		return nil, false
	}
	return carried, true
}

func signed(r *http.Request) bool {
	t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return err == nil && t == order.PayloadType
}

// verify checks a signed order and uses its challenge up.
func (s *Server) verify(operation string, document []byte) (carried []byte, err error) {
	d, err := order.Parse(document)
	if err != nil {
		return nil, err
	}
	id := s.agent.Identity()
	o, err := d.Verify(operation, order.Receiver{Policy: id.Policy, InstanceID: id.InstanceID, BootID: id.BootID,
		Keys: s.agent.Rules().Control.OrderKeys}, s.challenges.now())
	if err != nil {
		return nil, err
	}
	return d.Carries, s.challenges.redeem(o.Challenge)
}

// body reads a request's body of at most max bytes, or answers why not.
func (s *Server) body(w http.ResponseWriter, r *http.Request, operation string, max int64) ([]byte, bool) {
	tooLarge := func() {
		if max == 0 {
			s.refuse(w, http.StatusBadRequest, cause.New(cause.Usage, "destroy takes no body but a signed order"))
			return
		}
		s.refuse(w, http.StatusRequestEntityTooLarge, cause.New(cause.PolicyTooLarge, "the order has more than %d bytes", max))
	}
	if r.ContentLength > max {
		tooLarge()
		return nil, false
	}
	body, err := bounded.ReadAll(http.MaxBytesReader(w, r.Body, max+1), max)
	switch {
	case errors.Is(err, bounded.ErrTooLarge) || errors.As(err, new(*http.MaxBytesError)):
		tooLarge()
	case err != nil:
		s.refuse(w, http.StatusBadRequest, cause.New(cause.PolicyMalformed, "the order could not be read"))
	case len(body) == 0 && operation == order.Upgrade:
		s.refuse(w, http.StatusBadRequest, cause.New(cause.PolicyMissing, "the order is empty, expected a signed policy"))
	default:
		return body, true
	}
	return nil, false
}
