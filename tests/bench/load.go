package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// arrivals is the schedule of an open-loop load: when, from its beginning, the
// guests of so many seconds come. Gaps are exponential, as those of guests that
// do not know of each other, and the same for the same seed.
func arrivals(perSecond float64, during time.Duration, seed uint64) []time.Duration {
	random := rand.New(rand.NewPCG(seed, 0))
	var list []time.Duration
	for at := 0.0; ; {
		at += random.ExpFloat64() / perSecond
		when := time.Duration(at * float64(time.Second))
		if when >= during {
			return list
		}
		list = append(list, when)
	}
}

// openLoop starts do at the scheduled times, whether or not the ones before
// have ended, on at most workers at once; do is told which of them it is. A
// latency counts from the scheduled arrival, so what waited for a worker, or
// for this program, waited for its answer: a server that stalls is not asked
// less meanwhile and does not look better for it. The first error ends it.
func openLoop(ctx context.Context, schedule []time.Duration, workers int, do func(ctx context.Context, worker int) error) ([]time.Duration, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	due := make(chan int, len(schedule))
	took := make([]time.Duration, len(schedule))
	began := time.Now()
	var working sync.WaitGroup
	for worker := range workers {
		working.Go(func() {
			for n := range due {
				if ctx.Err() != nil {
					return
				}
				if err := do(ctx, worker); err != nil {
					stop(err)
					return
				}
				took[n] = time.Since(began) - schedule[n]
			}
		})
	}
	for n, at := range schedule {
		if !sleep(ctx, at-time.Since(began)) {
			break
		}
		due <- n
	}
	close(due)
	working.Wait()
	return took, context.Cause(ctx)
}

// sleep says whether the time passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// closedLoop has so many workers do one after the other, as fast as they can,
// until the time is over or most are done; zero is no bound. It returns how
// many were done in what time. The first error ends it.
func closedLoop(ctx context.Context, workers, most int, during time.Duration, do func(ctx context.Context, worker int) error) (int, time.Duration, error) {
	if most == 0 && during == 0 {
		return 0, 0, errors.New("a load without an end")
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var begun, done atomic.Int64
	var working sync.WaitGroup
	began := time.Now()
	for worker := range workers {
		working.Go(func() {
			for ctx.Err() == nil && (during == 0 || time.Since(began) < during) && (most == 0 || begun.Add(1) <= int64(most)) {
				if err := do(ctx, worker); err != nil {
					stop(err)
					return
				}
				done.Add(1)
			}
		})
	}
	working.Wait()
	return int(done.Load()), time.Since(began), context.Cause(ctx)
}
