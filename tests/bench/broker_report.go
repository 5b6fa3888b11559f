package main

import (
	"fmt"
	"runtime"
)

// BrokerPart is what the rows about the broker were measured with.
type BrokerPart struct {
	Offered         float64   `json:"offered"`         // sessions a second of the latencies
	SecondsEach     float64   `json:"secondsEach"`     // of load in each round, at that rate
	Guests          int       `json:"guests"`          // at once, for the highest rate
	Sessions        int       `json:"sessions"`        // of the memory
	Held            int       `json:"held"`            // the bound on sessions of the memory's broker
	Agents          int       `json:"agents"`          // launches of the agent's client
	PSS             []float64 `json:"pss"`             // MiB, at equal steps of the sessions
	Storage         []float64 `json:"storage"`         // MiB of it that are the mapped storage file
	AuditPerSession int64     `json:"auditPerSession"` // bytes
	StorePerSession int64     `json:"storePerSession"` // bytes
}

// flat is the most that memory may grow and be called flat: less than garbage
// collections move it.
const flat = 1.1

// addBroker takes the measurements of the broker.
func (r *Report) addBroker(m *brokerRun) {
	r.Broker = &BrokerPart{
		Offered: offered, SecondsEach: m.plan.latency.Seconds(), Guests: busyGuests, Sessions: m.plan.sessions, Held: m.plan.held(), Agents: len(m.agents),
		PSS:             each(m.memory, func(s brokerMemory) float64 { return s.PSS }),
		Storage:         each(m.memory, func(s brokerMemory) float64 { return s.Storage }),
		AuditPerSession: m.audit, StorePerSession: m.stored,
	}
	row := func(what, unit string, samples []float64, bar ...any) { r.row("", what, unit, samples, bar...) }
	rate := func(p peak) float64 { return p.Rate }
	server := func(p peak) float64 { return p.Server }
	alone := func(p peak) float64 { return 1000 * float64(runtime.NumCPU()) / p.Server }
	p := func(percent float64) []float64 {
		return each(m.latency, func(round []float64) float64 { return percentile(round, percent) })
	}
	row("attest and release, highest rate, load generator beside it", "/s", each(m.kept, rate), atLeast, 500.0)
	row("  broker's CPU for each session", "ms", each(m.kept, server))
	row("  load generator's CPU for each session", "ms", each(m.kept, func(p peak) float64 { return p.Load }))
	row("    of that, the made quote", "ms", m.quote)
	// By processor time: what others on the machine take is not in them.
	row(fmt.Sprintf("  derived: both on %d processors that nobody else uses", runtime.NumCPU()), "/s", each(m.kept, func(p peak) float64 { return 1000 * float64(runtime.NumCPU()) / (p.Server + p.Load) }))
	row(fmt.Sprintf("  derived: %d processors for the broker alone", runtime.NumCPU()), "/s", each(m.kept, alone))
	row("the same, a new TLS connection for each session", "/s", each(m.fresh, rate))
	row("  broker's CPU for each session", "ms", each(m.fresh, server))
	row("bare loop: verify a report's signature (ECDSA P-384)", "/s", m.verify)
	row("bare loop: all signatures and key agreements of a session", "/s", m.crypto)
	row("derived rate / bare report verification", "x", ratios(each(m.kept, alone), m.verify))
	row("derived rate / bare cryptography of a session", "x", ratios(each(m.kept, alone), m.crypto))
	at := fmt.Sprintf("latency at %d/s, ", offered)
	row(at+"median", "ms", p(50))
	row(at+"99th percentile", "ms", p(99), atMost, 20.0)
	row(at+"longest", "ms", p(100))
	if len(m.agents) > 0 {
		row("agent: attest and key without the quote, median", "ms", []float64{percentile(m.agents, 50)}, atMost, 20.0)
		row("agent: attest and key without the quote, 99th percentile", "ms", []float64{percentile(m.agents, 99)}, atMost, 20.0)
	}
	row(fmt.Sprintf("broker's memory (PSS) after %d sessions", m.plan.sessions), "MiB", last(r.Broker.PSS, 1))
	row("  of that, mapped storage", "MiB", last(r.Broker.Storage, 1))
	row(fmt.Sprintf("  growth from %d sessions on, without mapped storage", m.plan.held()+m.plan.every), "x", growth(m.memory, m.plan.held()/m.plan.every), atMost, flat)
}

// growth is the last memory over the one at index full, when the broker holds as
// many sessions as it ever does and its collector knows it. Stored data is not
// memory, though the storage file is mapped.
func growth(samples []brokerMemory, full int) []float64 {
	if len(samples) <= full {
		return nil
	}
	own := each(samples, func(s brokerMemory) float64 { return s.PSS - s.Storage })
	return ratios(last(own, 1), own[full:full+1])
}

// last are the last n, or all.
func last(samples []float64, n int) []float64 { return samples[max(0, len(samples)-n):] }
