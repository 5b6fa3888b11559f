package main

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestArrivals(t *testing.T) {
	list := arrivals(250, 40*time.Second, 1)
	if len(list) < 9700 || len(list) > 10300 {
		t.Errorf("%d arrivals in 40 s at 250/s", len(list))
	}
	if !slices.IsSorted(list) || list[0] <= 0 || list[len(list)-1] >= 40*time.Second {
		t.Error("not in order, or outside of their time")
	}
	if !slices.Equal(list, arrivals(250, 40*time.Second, 1)) {
		t.Error("one seed, two schedules")
	}
	if slices.Equal(list, arrivals(250, 40*time.Second, 2)) {
		t.Error("two seeds, one schedule")
	}
	// Exponential gaps: a share of 1-1/e is shorter than the mean.
	short := 0
	for i := 1; i < len(list); i++ {
		if list[i]-list[i-1] < 4*time.Millisecond {
			short++
		}
	}
	if share := float64(short) / float64(len(list)-1); share < 0.61 || share > 0.66 {
		t.Errorf("%.3f of the gaps are below the mean, expected 0.632", share)
	}
}

// every is a schedule of n arrivals, one each d.
func every(d time.Duration, n int) []time.Duration {
	list := make([]time.Duration, n)
	for i := range list {
		list[i] = time.Duration(i) * d
	}
	return list
}

func TestOpenLoopLatencies(t *testing.T) {
	const ms = time.Millisecond
	for name, c := range map[string]struct {
		workers int
		takes   []time.Duration // one after the other
		want    []time.Duration
	}{
		"a server that keeps up shows its own time":    {1, []time.Duration{4 * ms, 4 * ms, 4 * ms}, []time.Duration{4 * ms, 4 * ms, 4 * ms}},
		"a slow server is still asked at the schedule": {1, []time.Duration{15 * ms, 15 * ms, 15 * ms}, []time.Duration{15 * ms, 20 * ms, 25 * ms}},
		"one stall shows in all that waited for it":    {1, []time.Duration{38 * ms, ms, ms, ms}, []time.Duration{38 * ms, 29 * ms, 20 * ms, 11 * ms}},
		"with more workers nobody waits":               {4, []time.Duration{38 * ms, ms, ms, ms}, []time.Duration{38 * ms, ms, ms, ms}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n atomic.Int32
				got, err := openLoop(t.Context(), every(10*ms, len(c.takes)), c.workers, func(context.Context, int) error {
					time.Sleep(c.takes[n.Add(1)-1])
					return nil
				})
				if err != nil || !slices.Equal(got, c.want) {
					t.Errorf("got %v, %v, expected %v", got, err, c.want)
				}
			})
		})
	}
}

func TestLoadsEndWithTheFirstError(t *testing.T) {
	broken := errors.New("broken")
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int32
		third := func(context.Context, int) error {
			time.Sleep(time.Millisecond)
			if n.Add(1) == 3 {
				return broken
			}
			return nil
		}
		began := time.Now()
		if _, err := openLoop(t.Context(), every(10*time.Millisecond, 1000), 2, third); !errors.Is(err, broken) {
			t.Errorf("open loop: %v", err)
		}
		n.Store(0)
		if done, _, err := closedLoop(t.Context(), 1, 1000, 0, third); !errors.Is(err, broken) || done != 2 {
			t.Errorf("closed loop: %d done, %v", done, err)
		}
		if took := time.Since(began); took > 100*time.Millisecond {
			t.Errorf("they went on for %s", took)
		}
	})
}

func TestClosedLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ten := func(context.Context, int) error { time.Sleep(10 * time.Millisecond); return nil }
		if done, took, err := closedLoop(t.Context(), 4, 0, time.Second, ten); done != 400 || took != time.Second || err != nil {
			t.Errorf("for a second: %d in %s, %v", done, took, err)
		}
		if done, took, err := closedLoop(t.Context(), 4, 10, 0, ten); done != 10 || took != 30*time.Millisecond || err != nil {
			t.Errorf("ten: %d in %s, %v", done, took, err)
		}
		if _, _, err := closedLoop(t.Context(), 4, 0, 0, ten); err == nil {
			t.Error("a load without an end began")
		}
	})
}
