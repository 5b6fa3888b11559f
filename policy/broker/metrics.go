package broker

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
)

// metrics are numbers about the broker. Their labels are from short fixed
// lists: no peer can make a new one, and none names a guest or a resource.
type metrics struct {
	registry     *prometheus.Registry
	requests     *prometheus.CounterVec // endpoint, outcome
	duration     *prometheus.HistogramVec
	attestations *prometheus.CounterVec // tee, check
	releases     *prometheus.CounterVec // outcome
	limited      prometheus.Counter
	audit        prometheus.Histogram
	store        *prometheus.HistogramVec // operation
}

func newMetrics(live func() int) *metrics {
	buckets := prometheus.ExponentialBuckets(0.0001, 2, 16) // 0.1 ms to 3 s
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "cvm_broker", Name: name, Help: help}, labels)
	}
	histogram := func(name, help string, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "cvm_broker", Name: name, Help: help, Buckets: buckets}, labels)
	}
	m := &metrics{
		registry:     prometheus.NewRegistry(),
		requests:     counter("requests_total", "Requests by endpoint and outcome: ok, or the variant of the error.", "endpoint", "outcome"),
		duration:     histogram("request_seconds", "Time to answer.", "endpoint"),
		attestations: counter("attestations_total", "Judged evidence by TEE and the first check that refused it; ok when none did.", "tee", "check"),
		releases:     counter("releases_total", "Requests for a resource by attested guests, by outcome.", "outcome"),
		limited:      prometheus.NewCounter(prometheus.CounterOpts{Namespace: "cvm_broker", Name: "rate_limited_total", Help: "Requests answered with 429."}),
		audit:        prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "cvm_broker", Name: "audit_write_seconds", Help: "Time until an audit record is durable.", Buckets: buckets}),
		store:        histogram("store_seconds", "Time of a storage operation.", "operation"),
	}
	sessions := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "cvm_broker", Name: "sessions", Help: "Live sessions; of all brokers where they share a database."}, func() float64 { return float64(live()) })
	m.registry.MustRegister(m.requests, m.duration, m.attestations, m.releases, m.limited, m.audit, m.store, sessions,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// watch times storage and audit log.
func (s *Server) watch() {
	stored := func(operation string, d time.Duration) {
		s.metrics.store.WithLabelValues(operation).Observe(d.Seconds())
	}
	s.store.backend = timedBackend{s.store.backend, stored}
	if _, ok := s.sessions.(*postgresSessions); ok {
		s.sessions = timedSessions{s.sessions, stored}
	}
	s.audit.Wrote = func(d time.Duration) { s.metrics.audit.Observe(d.Seconds()) }
}

// Metrics serves GET /metrics, for whom the operator lets see it.
func (s *Server) Metrics() http.Handler { return s.metrics.handler() }

// handler serves GET /metrics and nothing else.
func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	return mux
}

func (m *metrics) request(endpoint, outcome string, start time.Time) {
	m.requests.WithLabelValues(endpoint, outcome).Inc()
	m.duration.WithLabelValues(endpoint).Observe(time.Since(start).Seconds())
}

// attestation counts a judgement. v is nil when the evidence could not be read.
func (m *metrics) attestation(tee string, v *appraisal.Verdict) {
	check := "malformed"
	if v != nil {
		check = inTheWay(v)
	}
	m.attestations.WithLabelValues(tee, check).Inc()
}

// inTheWay is the first check that refuses, or "ok".
func inTheWay(v *appraisal.Verdict) string {
	if v.Refusal() == nil {
		return "ok"
	}
	for _, c := range v.Checks {
		if c.Outcome == appraisal.Failed {
			return c.Name
		}
	}
	for _, name := range v.Required {
		if v.Outcome(name) == appraisal.NotChecked {
			return name
		}
	}
	return "none"
}
