package main

import (
	"math"
	"slices"
)

// Stat summarises samples of one quantity. A median and the whole spread, not
// a mean and a deviation: a handful of runs on a shared machine is not normally
// distributed.
type Stat struct {
	Median  float64   `json:"median"`
	Min     float64   `json:"min"`
	Max     float64   `json:"max"`
	Samples []float64 `json:"samples"` // in the order of the runs
}

// stat of no samples is zero.
func stat(samples []float64) Stat {
	if len(samples) == 0 {
		return Stat{Samples: []float64{}}
	}
	return Stat{Median: median(samples), Min: slices.Min(samples), Max: slices.Max(samples), Samples: slices.Clone(samples)}
}

// median is the middle sample, or the mean of the middle two; 0 of none.
func median(samples []float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(samples))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// ratios divides pair by pair: what disturbs the machine for a minute disturbs
// both of a pair, and cancels. Pairs that one side lacks are left out.
func ratios(over, under []float64) []float64 {
	n := min(len(over), len(under))
	out := make([]float64, 0, n)
	for i := range n {
		if under[i] > 0 {
			out = append(out, over[i]/under[i])
		}
	}
	return out
}

// percentile is the smallest sample that at least so many percent of the
// samples do not exceed (nearest rank); 0 of none. It is always a sample, never
// between two: an interpolated 99th percentile is of a request that nobody made.
func percentile(samples []float64, percent float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(samples))
	rank := int(math.Ceil(percent / 100 * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}
