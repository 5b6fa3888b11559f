package eventlog

import "fmt"

// Image is one measured image of a set.
type Image struct {
	Workload string `json:"workload"`
	Image    string `json:"image"` // repository@sha256:…
}

// Set is a policy and the images that were measured under it.
type Set struct {
	Policy       string   `json:"policy"`
	Version      uint64   `json:"version"`
	PolicyDigest string   `json:"policyDigest"`
	Signers      []string `json:"signers"`
	Images       []Image  `json:"images"`
}

// Has says whether the set measured the image, given as repository@sha256:….
func (s *Set) Has(image string) bool {
	if s == nil {
		return false
	}
	for _, i := range s.Images {
		if i.Image == image {
			return true
		}
	}
	return false
}

func (s *Set) hasEvent(e Event) bool {
	for _, i := range s.Images {
		if i.Image == e.Image && i.Workload == e.Workload {
			return true
		}
	}
	return false
}

// State is what a log says of the guest at its end. Only Running counts as
// running; Staged is good for a key release and nothing else.
type State struct {
	Running   *Set // the last committed set; the launch's own counts as committed
	Previous  *Set // the last good one, while a rollback to it is possible
	Staged    *Set // an upgrade under way
	Destroyed bool
	Debug     bool
}

// next is the state after e, or why e cannot come here. The rules are the
// table "order" of README.md: events that nobody explains fail.
func (s State) next(e Event) (State, error) {
	if err := e.check(); err != nil {
		return s, err
	}
	if s.Destroyed {
		return s, fmt.Errorf("event %q after destroy", e.Kind)
	}
	if s.Running == nil && e.Kind != KindPolicy && e.Kind != KindDestroy && e.Kind != KindDebug {
		return s, fmt.Errorf("event %q before the launch policy", e.Kind)
	}
	switch e.Kind {
	case KindPolicy:
		if s.Running != nil {
			return s, fmt.Errorf("a second launch policy")
		}
		s.Running = newSet(e)
	case KindImage:
		if s.Staged != nil || s.Previous != nil {
			return s, fmt.Errorf("a launch image after an upgrade began")
		}
		if s.Running.hasEvent(e) {
			return s, fmt.Errorf("image of workload %q measured twice", e.Workload)
		}
		s.Running = s.Running.with(e)
	case KindPolicyStaged:
		if e.Policy != s.Running.Policy || e.PolicyVersion <= s.Running.Version {
			return s, fmt.Errorf("staged policy %s version %d does not follow %s version %d", e.Policy, e.PolicyVersion, s.Running.Policy, s.Running.Version)
		}
		s.Staged = newSet(e) // replaces a staging that was given up by a crash
	case KindImageStaged:
		if s.Staged == nil {
			return s, fmt.Errorf("a staged image without a staged policy")
		}
		if s.Staged.hasEvent(e) {
			return s, fmt.Errorf("staged image of workload %q measured twice", e.Workload)
		}
		s.Staged = s.Staged.with(e)
	case KindCommitted:
		if s.Staged == nil || s.Staged.PolicyDigest != e.PolicyDigest || s.Staged.Version != e.PolicyVersion || s.Staged.Policy != e.Policy {
			return s, fmt.Errorf("committed policy is not the staged one")
		}
		s.Previous, s.Running, s.Staged = s.Running, s.Staged, nil
	case KindRolledBack:
		to := s.Running
		if s.Staged == nil {
			to = s.Previous
		}
		if to == nil || to.PolicyDigest != e.PolicyDigest || to.Version != e.PolicyVersion || to.Policy != e.Policy {
			return s, fmt.Errorf("rolled back to a policy that is not the last good one")
		}
		// Previous is dropped when the committed set was given up; giving up a
		// staging leaves nothing older to go back to either.
		s.Running, s.Previous, s.Staged = to, nil, nil
	case KindDestroy:
		s.Destroyed = true
	case KindDebug:
		s.Debug = true
	}
	return s, nil
}

// done says whether e has already been logged and still stands, so that a
// restart or a retry does not repeat it.
func (s State) done(e Event) bool {
	switch e.Kind {
	case KindPolicy:
		return s.Running != nil && s.Running.is(e)
	case KindImage:
		return s.Running != nil && s.Running.hasEvent(e)
	case KindPolicyStaged:
		return s.Staged != nil && s.Staged.is(e)
	case KindImageStaged:
		return s.Staged != nil && s.Staged.hasEvent(e)
	case KindCommitted:
		return s.Staged == nil && s.Previous != nil && s.Running.PolicyDigest == e.PolicyDigest
	case KindRolledBack:
		return s.Staged == nil && s.Previous == nil && s.Running != nil && s.Running.PolicyDigest == e.PolicyDigest
	case KindDestroy:
		return s.Destroyed
	}
	return false
}

func newSet(e Event) *Set {
	return &Set{Policy: e.Policy, Version: e.PolicyVersion, PolicyDigest: e.PolicyDigest, Signers: append([]string(nil), e.Signers...)}
}

func (s *Set) is(e Event) bool {
	return s.Policy == e.Policy && s.Version == e.PolicyVersion && s.PolicyDigest == e.PolicyDigest
}

func (s *Set) with(e Event) *Set {
	c := *s
	c.Images = append(append([]Image(nil), s.Images...), Image{e.Workload, e.Image})
	return &c
}
