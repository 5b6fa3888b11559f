package launch

import (
	"context"
	"time"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/agent/workload"
	"github.com/cc-runtime/cvm-agent/policy"
)

// What the sequences need of the rest of the agent. The real ones are put
// together in wire.go; tests bring their own.

// World is everything outside of this package.
type World interface {
	// Platform opens the TEE or TPM and checks that the launch is bound to the
	// initdata (exact bytes).
	Platform(ctx context.Context, initdata []byte) (Platform, error)
	// Policy verifies the policy in an initdata document. now is the guest's
	// clock: provisional until the broker's time is known.
	Policy(initdata []byte, now time.Time) (*policy.Verified, error)
	// Order verifies an upgrade's policy (an initdata document or a DSSE
	// envelope) against the running one, and returns it with the initdata form
	// that Policy reads again after a restart of the daemon.
	Order(order []byte, running *policy.Verified, runningInitdata []byte, now time.Time) (next *policy.Verified, initdata []byte, err error)
	// Broker returns the client of the policy's broker. initdata is that of the
	// launch, also after an upgrade: the evidence is bound to it.
	Broker(v *policy.Verified, initdata []byte, p Platform, l Log) (Broker, error)
	// Images returns the image client that the policy's registries need. onWait
	// hears while a registry does not answer.
	Images(v *policy.Verified, onWait func(err error, next time.Duration)) (Images, error)
	// Podman connects to podman's service, telling onWait while it does not answer.
	Podman(ctx context.Context, onWait func(err error, next time.Duration)) (Podman, error)
	// Scanner returns an SBOM scanner, which lives until its Compare, Close or
	// the end of ctx. early: it begins to start in its sandbox at once, and if
	// that fails so does Compare.
	Scanner(ctx context.Context, early bool) Scanner
	// Secrets opens the tmpfs directory for the workloads' secrets.
	Secrets() (Secrets, error)
}

// Platform is the opened TEE or TPM.
type Platform interface {
	// Allow returns which platform this is, if it is the one that the policy
	// allows here. Asked again, for the next policy, it is the same platform or
	// an error.
	Allow(ctx context.Context, p *policy.Policy) (policy.Platform, error)
	// Log opens the event log of the platform that Allow returned: it replays
	// to the register, or fails closed.
	Log(ctx context.Context) (Log, error)
	Register() string // name of the register, for status; after Allow
	Close() error
}

// Log is the event log with its register; see package eventlog.
type Log interface {
	// AppendOnce makes the event durable and extends the register, exactly
	// once: an event that has its effect already is left as it is.
	AppendOnce(ctx context.Context, e eventlog.Event) error
	State() eventlog.State
	Events() []eventlog.Event
	Bytes() []byte
	Close() error
}

// Broker opens sessions: each with a new nonce, key pair and quote.
type Broker interface {
	Attest(ctx context.Context, onWait func(err error, next time.Duration)) (Session, error)
}

// Session is one attested session, good for keys until the next extend.
type Session interface {
	Claims() Claims
	Resource(ctx context.Context, uri string) ([]byte, error)
	Close() // zeroises its key material
}

// Claims are what the broker's verified token says of this instance.
type Claims struct {
	HasMark     bool // the broker said something about the policy's version
	PolicyName  string
	VersionMark uint64
	Signers     []string // fingerprints of the current signers, if the broker names them
	InstanceID  string
	Tombstone   bool
	IssuedAt    time.Time // the broker's clock
}

// KeyFunc gets a broker resource by its kbs:/// URI.
type KeyFunc func(ctx context.Context, uri string) ([]byte, error)

// Images resolves and removes images.
type Images interface {
	Resolve(ctx context.Context, rule policy.Workload) (Image, error)
	// Remove removes the image (config digest, 64 hex digits) and the layers
	// that only it uses; one that is gone is no error.
	Remove(ctx context.Context, imageID string) error
	// RemoveAll removes every image that this agent has put into storage.
	RemoveAll(ctx context.Context) error
	// PruneUncommitted removes what a killed fetch left.
	PruneUncommitted(ctx context.Context) error
	Close() error
}

// Image is a manifest that has the digest that the policy names.
type Image interface {
	VerifySignatures(ctx context.Context, keys KeyFunc) error
	// SBOM returns the verified predicate of the signed SBOM attestation.
	SBOM(ctx context.Context, keys KeyFunc) ([]byte, error)
	Encrypted() bool
	CheckEncryption() error
	// Unwrap gets the keys of the encrypted layers.
	Unwrap(ctx context.Context, keys KeyFunc) (LayerKeys, error)
	// Fetch brings the image into podman's storage, every byte checked; a
	// cached one is verified again. keys is nil for a plain image.
	Fetch(ctx context.Context, keys LayerKeys, progress func(string)) (Stored, error)
}

// LayerKeys are unwrapped private options by layer digest.
type LayerKeys map[string][]byte

// Stored is an image in podman's storage.
type Stored interface {
	ImageID() string // 64 hex digits
	Detail() string  // one line for status
	Mount(ctx context.Context) (dir string, unmount func() error, err error)
}

// Scanner makes the SBOM of one image and compares it with the signed one.
type Scanner interface {
	// Expect takes the verified predicate of the SBOM attestation, once.
	Expect(signed []byte)
	// Compare scans the image, mounted at root, and compares. It comes after
	// Expect, once. The detail is one line for status.
	Compare(ctx context.Context, stored Stored, root string, rule policy.SBOM) (detail string, err error)
	Close() // ends what still runs
}

// Podman runs containers; see package workload.
type Podman interface {
	Start(ctx context.Context, c workload.Container) (id string, err error)
	Resume(ctx context.Context, id string, c workload.Container) error
	WaitHealthy(ctx context.Context, id string, c workload.Container, onTry func(error)) error
	Probe(ctx context.Context, id string, c workload.Container) error
	Stop(ctx context.Context, id string, timeout time.Duration) error
	Remove(ctx context.Context, id string) error
	List(ctx context.Context, policyName string) ([]workload.Owned, error)
	RemoveVolumes(ctx context.Context, policyName string) ([]string, error)
	User(ctx context.Context, imageID string) (string, error)
}

// Secrets writes and wipes the workloads' secrets; see package workload.
type Secrets interface {
	Write(container, user string, rules []policy.Secret, values map[string][]byte) (dir string, err error)
	Wipe(container string) error
	WipeAll() error
}
