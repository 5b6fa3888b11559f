// Package control is the local control interface: what the agent says of
// itself, who may ask, and who may give orders.
//
// It is HTTP/1.1 with JSON on a unix socket, streams are NDJSON; see README.md.
// It promises: the peer of every connection is known from the kernel
// (SO_PEERCRED) before its request is looked at; every size, count and wait is
// bounded; a slow or hostile client costs the others nothing. It does not
// carry out orders: that is the Agent's.
package control

import "time"

// Outcomes of a phase and of an order.
const (
	Running = "running"
	Waiting = "waiting" // for something outside, said in Text
	OK      = "ok"
	Skipped = "skipped" // why is said in Text
	Failed  = "failed"  // Cause and Text say why
)

// States of the agent.
const (
	StateStarting   = "starting"
	StateReady      = "ready"
	StateUpgrading  = "upgrading"
	StateDestroying = "destroying"
	StateDestroyed  = "destroyed"
	StateFailed     = "failed"
)

// Phase is one step of a sequence.
type Phase struct {
	Sequence   string    `json:"sequence"`           // launch, upgrade, rollback or destroy
	Name       string    `json:"phase"`              // policy, attest, resolve, …
	Workload   string    `json:"workload,omitempty"` // for the phases that are per workload
	Outcome    string    `json:"outcome"`
	Cause      string    `json:"cause,omitempty"` // stable code, see policy/cause
	Text       string    `json:"text,omitempty"`
	Log        string    `json:"log,omitempty"` // a failed workload's last lines; to callers on the unix socket alone
	Start      time.Time `json:"start"`
	DurationMS float64   `json:"durationMs"` // so far, while it runs
}

// Event is one change of a phase, or the start or end of a sequence (then
// Name is empty).
type Event struct {
	Seq uint64 `json:"seq"` // counts up from 1 without gaps
	Phase
	Time time.Time `json:"time"`
}

// Policy is the policy in force.
type Policy struct {
	Name    string   `json:"name"`
	Version uint64   `json:"version"`
	Digest  string   `json:"digest"`
	Expires string   `json:"expires"`
	Signers []string `json:"signers"` // fingerprints
}

// Broker is what the key broker said in this boot.
type Broker struct {
	URL         string    `json:"url"`
	VersionMark uint64    `json:"versionMark,omitempty"`
	InstanceID  string    `json:"instanceId,omitempty"`
	AttestedAt  time.Time `json:"attestedAt"` // the broker's time
}

// Workload is one running container.
type Workload struct {
	Name      string `json:"name"`
	Image     string `json:"image"`   // repository@sha256:… as the policy names it
	ImageID   string `json:"imageId"` // as podman knows it
	Container string `json:"container"`
	Healthy   bool   `json:"healthy"`
	Text      string `json:"text,omitempty"` // why it is not healthy
}

// Log is the event log's state.
type Log struct {
	Register string `json:"register"`
	Events   int    `json:"events"`
}

// Status is the whole picture.
type Status struct {
	State     string     `json:"state"`
	Agent     string     `json:"agent"` // version of the program
	Platform  string     `json:"platform,omitempty"`
	Policy    *Policy    `json:"policy,omitempty"`
	Broker    *Broker    `json:"broker,omitempty"`
	EventLog  *Log       `json:"eventLog,omitempty"`
	Workloads []Workload `json:"workloads"`
	Phases    []Phase    `json:"phases"`
	Cause     string     `json:"cause,omitempty"` // of the state failed, or of the last order's failure
	Text      string     `json:"text,omitempty"`
}

// Result is the last line of an order's stream.
type Result struct {
	Outcome string `json:"outcome"` // ok or failed
	Cause   string `json:"cause,omitempty"`
	Text    string `json:"text,omitempty"`
}

// Line is one line of an order's stream: exactly one of its members is set.
type Line struct {
	Event  *Event  `json:"event,omitempty"`
	Result *Result `json:"result,omitempty"`
}

// ErrorBody is the body of every answer that is not 200.
type ErrorBody struct {
	Cause string `json:"cause"`
	Text  string `json:"text"`
}

// MaxOrder bounds the body of an order, in bytes: a policy of 1 MiB in base64
// in an envelope or an initdata document, with room for keys and rotation.
const MaxOrder = 4 << 20
