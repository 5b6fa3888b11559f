package main

import (
	"slices"
	"testing"
)

func TestStat(t *testing.T) {
	for name, c := range map[string]struct {
		samples          []float64
		median, min, max float64
	}{
		"no samples are zero":                          {nil, 0, 0, 0},
		"one sample is all three":                      {[]float64{7}, 7, 7, 7},
		"an odd number has a middle one":               {[]float64{9, 1, 5}, 5, 1, 9},
		"an even number has the mean of the two":       {[]float64{4, 1, 3, 2}, 2.5, 1, 4},
		"one outlier moves the spread, not the middle": {[]float64{2, 2, 2, 2, 90}, 2, 2, 90},
	} {
		t.Run(name, func(t *testing.T) {
			before := slices.Clone(c.samples)
			s := stat(c.samples)
			if s.Median != c.median || s.Min != c.min || s.Max != c.max {
				t.Errorf("%v: median %v, min %v, max %v", c.samples, s.Median, s.Min, s.Max)
			}
			if !slices.Equal(c.samples, before) || !slices.Equal(s.Samples, before) {
				t.Errorf("the order of the runs changed: %v, was %v", c.samples, before)
			}
		})
	}
}

func TestPercentile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[(i*37)%100] = float64(i + 1)
	}
	for name, c := range map[string]struct {
		samples []float64
		percent float64
		want    float64
	}{
		"no samples are zero":                        {nil, 99, 0},
		"one sample is all of them":                  {[]float64{7}, 99, 7},
		"of a hundred, one is above the 99th":        {hundred, 99, 99},
		"half are at or below the 50th":              {hundred, 50, 50},
		"the 100th is the largest":                   {hundred, 100, 100},
		"the 0th is the smallest":                    {hundred, 0, 1},
		"it is a sample, never between two":          {[]float64{1, 10}, 50, 1},
		"few samples make the 99th the largest":      {[]float64{3, 1, 2}, 99, 3},
		"a rank that is not whole is the next above": {[]float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 91, 10},
	} {
		t.Run(name, func(t *testing.T) {
			before := slices.Clone(c.samples)
			if got := percentile(c.samples, c.percent); got != c.want {
				t.Errorf("got %v, expected %v", got, c.want)
			}
			if !slices.Equal(c.samples, before) {
				t.Error("the order of the samples changed")
			}
		})
	}
}

func TestRatios(t *testing.T) {
	for name, c := range map[string]struct{ over, under, want []float64 }{
		"pair by pair, not sorted against sorted": {[]float64{2, 9}, []float64{4, 3}, []float64{0.5, 3}},
		"a pair that lacks a side is left out":    {[]float64{2, 9, 4}, []float64{4, 3}, []float64{0.5, 3}},
		"nothing is divided by zero":              {[]float64{2, 9}, []float64{0, 3}, []float64{3}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := ratios(c.over, c.under); !slices.Equal(got, c.want) {
				t.Errorf("got %v, expected %v", got, c.want)
			}
		})
	}
}

func TestRowsMeetTheirBars(t *testing.T) {
	for name, c := range map[string]struct {
		row Row
		met bool
	}{
		"below an upper bound": {Row{Stat: stat([]float64{0.9}), Bar: 1, Compare: atMost}, true},
		"above an upper bound": {Row{Stat: stat([]float64{1.1}), Bar: 1, Compare: atMost}, false},
		"above a lower bound":  {Row{Stat: stat([]float64{4.2}), Bar: 4, Compare: atLeast}, true},
		"below a lower bound":  {Row{Stat: stat([]float64{3.9}), Bar: 4, Compare: atLeast}, false},
		"nothing measured":     {Row{Stat: stat(nil), Bar: 4, Compare: atMost}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if c.row.judge(); c.row.Met == nil || *c.row.Met != c.met {
				t.Errorf("got %v, expected %v", c.row.Met, c.met)
			}
		})
	}
	free := Row{Stat: stat([]float64{1})}
	if free.judge(); free.Met != nil {
		t.Error("a row without a bar is judged")
	}
}

func TestMappedPSS(t *testing.T) {
	const maps = `00400000-0048a000 r-xp 00000000 fd:03 960637 /usr/bin/program
Size:                552 kB
Pss:                 300 kB
Pss_Dirty:             0 kB
7f0000000000-7f0000800000 r--s 00000000 00:2a 12 /tmp/bench/broker.db
Size:               8192 kB
Pss:                2048 kB
Pss_Dirty:          1024 kB
VmFlags: rd mr mw me ms sd
7f0000800000-7f0000900000 r--s 00800000 00:2a 12 /tmp/bench/broker.db
Pss:                1024 kB
7f0000900000-7f0000a00000 rw-p 00000000 00:00 0
Pss:                4096 kB
7f0000a00000-7f0000b00000 r--s 00000000 00:2a 13 /tmp/bench/broker.db.lock
Pss:                  64 kB
`
	if got := mappedPSS(maps, "/tmp/bench/broker.db"); got != 3 {
		t.Errorf("%v MiB, expected 3", got)
	}
	if got := mappedPSS(maps, "/tmp/bench/other.db"); got != 0 {
		t.Errorf("%v MiB of a file that is not mapped", got)
	}
}

func TestGrowth(t *testing.T) {
	at := func(own ...float64) []brokerMemory {
		var list []brokerMemory
		for i, v := range own { // storage grows, and is not counted
			list = append(list, brokerMemory{PSS: v + float64(i), Storage: float64(i)})
		}
		return list
	}
	for name, c := range map[string]struct {
		samples []brokerMemory
		full    int
		want    []float64
	}{
		"from when it is full to the end":        {at(10, 20, 40, 44), 1, []float64{2.2}},
		"filling up is no growth":                {at(10, 40, 40, 40), 1, []float64{1}},
		"too few sessions to fill it: no number": {at(10, 20), 2, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := growth(c.samples, c.full); !slices.Equal(got, c.want) {
				t.Errorf("got %v, expected %v", got, c.want)
			}
		})
	}
}
