package eventlog

import (
	"fmt"
	"slices"
)

// Set is a policy and the images that were measured under it.
type Set struct {
	Policy  string   // name
	Version uint64   // of the policy
	Digest  string   // "sha256:…" of the signed payload
	Signers []string // fingerprints that signed it, ascending
	Images  []Image  // in the order of their events
}

// Image is one workload's image.
type Image struct {
	Workload string
	Image    string // repository@sha256:…
}

// Has says whether the image was measured in this set for any workload.
func (s *Set) Has(image string) bool {
	return s != nil && slices.ContainsFunc(s.Images, func(i Image) bool { return i.Image == image })
}

// State is what a log says, read from its start to its end.
type State struct {
	Set             // what runs: the initial set or the last committed one; Policy is "" before the first event
	Staged     *Set // a set under way: good for key release, never counted as running
	Previous   *Set // what a roll-back of the running set goes back to; nil when there is none
	RolledBack *Set // the set that the last event gave up, until the next one is staged
	Destroyed  bool
	Debug      bool
}

func (s State) clone() State {
	s.Set = *cloneSet(&s.Set)
	s.Staged, s.Previous, s.RolledBack = cloneSet(s.Staged), cloneSet(s.Previous), cloneSet(s.RolledBack)
	return s
}

func cloneSet(s *Set) *Set {
	if s == nil {
		return nil
	}
	c := *s
	c.Signers, c.Images = slices.Clone(s.Signers), slices.Clone(s.Images)
	return &c
}

func newSet(e Event) Set {
	return Set{Policy: e.Policy, Version: e.PolicyVersion, Digest: e.PolicyDigest, Signers: slices.Clone(e.Signers)}
}

func (s *Set) is(e Event) bool {
	return s != nil && s.Policy == e.Policy && s.Version == e.PolicyVersion && s.Digest == e.PolicyDigest
}

// same is is, with the signers.
func (s *Set) same(e Event) bool { return s.is(e) && slices.Equal(s.Signers, e.Signers) }

func (s *Set) hasWorkload(e Event) bool {
	return s != nil && slices.Contains(s.Images, Image{e.Workload, e.Image})
}

func (s *Set) addImage(e Event) error {
	for _, i := range s.Images {
		if i.Workload == e.Workload {
			return fmt.Errorf("second %s event for workload %q", e.Kind, e.Workload)
		}
	}
	// Every event copies its set: unbounded, a log would cost its reader the
	// square of its length.
	if len(s.Images) == maxImages {
		return fmt.Errorf("%s event for workload %q: more than %d images under one policy", e.Kind, e.Workload, maxImages)
	}
	s.Images = append(s.Images, Image{e.Workload, e.Image})
	return nil
}

// upgraded says whether a set was ever staged: the initial set is closed then.
func (s *State) upgraded() bool {
	return s.Staged != nil || s.Previous != nil || s.RolledBack != nil
}

// apply explains one more event or says why it cannot be there.
//
//	                 ┌── image*
//	(empty) ─policy─► running ─policy-staged─► staged ─committed─► running
//	                     ▲                      │ image-staged*      │
//	                     └──────rolled-back─────┴──────rolled-back───┘
//	anywhere: debug; destroy, after which nothing comes
func (s *State) apply(e Event) error {
	if s.Destroyed {
		return fmt.Errorf("%s event after destroy", e.Kind)
	}
	if s.Policy == "" && e.Kind != KindPolicy && e.Kind != KindDebug && e.Kind != KindDestroy {
		return fmt.Errorf("%s event before the policy event", e.Kind)
	}
	switch e.Kind {
	case KindPolicy:
		if s.Policy != "" {
			return fmt.Errorf("second policy event (version %d after %d)", e.PolicyVersion, s.Version)
		}
		s.Set = newSet(e)
	case KindImage:
		if s.upgraded() {
			return fmt.Errorf("image event for workload %q after an upgrade began", e.Workload)
		}
		return s.addImage(e)
	case KindPolicyStaged:
		if s.Staged != nil {
			return fmt.Errorf("policy-staged event for version %d while version %d is staged", e.PolicyVersion, s.Staged.Version)
		}
		if e.Policy != s.Policy || e.PolicyVersion <= s.Version {
			return fmt.Errorf("policy-staged event for %q version %d does not follow %q version %d", e.Policy, e.PolicyVersion, s.Policy, s.Version)
		}
		next := newSet(e)
		// Staging the next set confirms the running one: from here on only
		// the staged set can be rolled back.
		s.Staged, s.Previous, s.RolledBack = &next, nil, nil
	case KindImageStaged:
		if s.Staged == nil {
			return fmt.Errorf("image-staged event for workload %q with nothing staged", e.Workload)
		}
		return s.Staged.addImage(e)
	case KindCommitted:
		if !s.Staged.is(e) {
			return fmt.Errorf("committed event for version %d, which is not staged", e.PolicyVersion)
		}
		s.Previous = cloneSet(&s.Set)
		s.Set, s.Staged = *s.Staged, nil
	case KindRolledBack:
		switch {
		case s.Staged.is(e):
			s.RolledBack, s.Staged = s.Staged, nil
		case s.Staged == nil && s.Previous != nil && s.is(e):
			s.RolledBack = cloneSet(&s.Set)
			s.Set, s.Previous = *s.Previous, nil
		default:
			return fmt.Errorf("rolled-back event for version %d, which is neither staged nor just committed", e.PolicyVersion)
		}
	case KindDestroy:
		s.Destroyed = true
	case KindDebug:
		if s.Debug {
			return fmt.Errorf("second debug event")
		}
		s.Debug = true
	default:
		return fmt.Errorf("unknown event %q", clip(string(e.Kind)))
	}
	return nil
}

// done says whether an upgrade, destroy or debug event has had its effect
// already: appending it again would only repeat it. It is what makes a restart
// or a retry safe.
func (s *State) done(e Event) bool {
	switch e.Kind {
	case KindPolicyStaged:
		return s.Staged.same(e)
	case KindImageStaged:
		return s.Staged.hasWorkload(e)
	case KindCommitted:
		return s.Staged == nil && s.Previous != nil && s.is(e)
	case KindRolledBack:
		return s.Staged == nil && s.RolledBack.is(e)
	case KindDestroy:
		return s.Destroyed
	case KindDebug:
		return s.Debug
	}
	return false
}
