// Package policy is the launch policy: what may run in a confidential VM and
// who said so. It decodes strictly, signs and verifies (DSSE), binds a policy
// to a launch (initdata 0.1.0) and judges versions, expiry and signer rotation.
//
// It promises: nothing unsigned, unknown, duplicated, aliased or over-long is
// accepted, and every refusal carries a cause code. It does not fetch, measure
// or run anything.
package policy

// PayloadType is the DSSE payload type of a launch policy.
const PayloadType = "application/vnd.cvm-agent.launch-policy.v1+json"

// APIVersion is the only document version that this package reads.
const APIVersion = "cvm-agent.policy/v1"

// MaxSize bounds a policy document and its envelope, in bytes.
const MaxSize = 1 << 20

// Policy is the launch policy document. Written as YAML, signed as JSON
// (RFC 8785). Every field is decoded strictly.
type Policy struct {
	APIVersion     string     `json:"apiVersion" jsonschema:"enum=cvm-agent.policy/v1"`
	Name           string     `json:"name" jsonschema:"pattern=^[a-z0-9]([-a-z0-9]*[a-z0-9])?$,maxLength=63"` // what upgrades must keep; DNS label, ≤ 63 bytes
	Version        uint64     `json:"version" jsonschema:"minimum=1"`                                         // ≥ 1, only ever higher
	MinimumVersion uint64     `json:"minimumVersion,omitempty"`                                               // lowest version that a rollback or an older policy may have
	Expires        string     `json:"expires" jsonschema:"format=date-time"`                                  // RFC 3339, UTC
	NextSigners    *SignerSet `json:"nextSigners,omitempty"`                                                  // rotation: the set that signs the next versions; signed by old and new
	Platforms      []Platform `json:"platforms" jsonschema:"minItems=1,uniqueItems=true"`                     // allowed platforms
	VMPL           uint8      `json:"vmpl,omitempty" jsonschema:"maximum=3"`                                  // SEV-SNP privilege level that evidence is made at, 0 (default) to 3; it needs platform snp
	Broker         *Broker    `json:"broker,omitempty"`
	Registries     []Registry `json:"registries,omitempty"` // how to reach registries; hosts not listed: HTTPS with system roots
	Workloads      []Workload `json:"workloads" jsonschema:"minItems=1"`
	Upgrade        Upgrade    `json:"upgrade,omitzero"`
	Control        Control    `json:"control,omitzero"`
	Log            Log        `json:"log,omitzero"`
}

// SignerSet is a threshold of public keys.
type SignerSet struct {
	Threshold int      `json:"threshold" jsonschema:"minimum=1"` // distinct keys that must sign
	Keys      []string `json:"keys" jsonschema:"minItems=1"`     // PEM SPKI: ECDSA P-256, Ed25519 or RSA ≥ 2048
}

// Platform is a KBS TEE name.
type Platform string

// The platforms of kbs-protocol that a policy can allow. There is no sample.
const (
	PlatformSNP       Platform = "snp"
	PlatformTDX       Platform = "tdx"
	PlatformAzSNPvTPM Platform = "az-snp-vtpm"
	PlatformAzTDXvTPM Platform = "az-tdx-vtpm"
	PlatformTPM       Platform = "tpm"
)

// Broker is the key broker that the agent may talk to, and how it is known.
type Broker struct {
	URL       string   `json:"url" jsonschema:"pattern=^https://"`                                                     // https://host[:port]
	URLs      []string `json:"urls,omitempty" jsonschema:"maxItems=7,uniqueItems=true"`                                // further URLs of the same broker, asked when one does not answer; same roots, same token keys
	TLSRoots  []string `json:"tlsRoots" jsonschema:"minItems=1"`                                                       // PEM certificates; nothing else is trusted
	Dialect   string   `json:"dialect,omitempty" jsonschema:"enum=cvm-agent/1,enum=kbs"`                               // "cvm-agent/1" (default) or "kbs"
	TokenKeys []string `json:"tokenKeys" jsonschema:"minItems=1"`                                                      // PEM SPKI of keys that sign tokens and version marks
	Accept    []string `json:"accept,omitempty" jsonschema:"enum=no-event-log,enum=no-version-mark,enum=no-tombstone"` // promises given up by name under dialect kbs: no-version-mark, no-tombstone, and no-event-log on snp and tpm
}

// Registry says how one registry host is reached. It never changes what is
// verified: the signature check is on the original reference.
type Registry struct {
	Host      string   `json:"host"` // host[:port] as in image references
	PlainHTTP bool     `json:"plainHTTP,omitempty"`
	TLSRoots  []string `json:"tlsRoots,omitempty"`
	Mirrors   []string `json:"mirrors,omitempty"`    // host[:port], tried first
	Redirects []string `json:"redirectTo,omitempty"` // hosts that blob requests may be redirected to
}

// Workload is one container.
type Workload struct {
	Name       string      `json:"name" jsonschema:"pattern=^[a-z0-9]([-a-z0-9]*[a-z0-9])?$,maxLength=63"` // DNS label
	Image      string      `json:"image" jsonschema:"pattern=^[^@]+@sha256:[0-9a-f]{64}$"`                 // host/repository@sha256:…; a tag is refused
	Signatures Signatures  `json:"signatures"`
	SBOM       SBOM        `json:"sbom"`
	Encryption string      `json:"encryption" jsonschema:"enum=required,enum=optional,enum=forbidden"` // "required", "optional" or "forbidden"
	Limits     ImageLimits `json:"limits,omitzero"`
	Run        Run         `json:"run,omitzero"`
}

// Signatures says who must have signed the image: all of the entries (each by
// at least one valid signature).
type Signatures struct {
	Required []Signer `json:"required" jsonschema:"minItems=1"` // at least one
}

// Signer is exactly one of: an inline key, a key held by the broker with its
// digest pinned here, or a keyless identity with an embedded trusted root.
type Signer struct {
	Key         string   `json:"key,omitempty"` // PEM SPKI
	KeyResource string   `json:"keyResource,omitempty"`
	KeyDigest   string   `json:"keyDigest,omitempty"` // sha256:… of the SPKI DER
	Keyless     *Keyless `json:"keyless,omitempty"`
}

// Keyless is a Sigstore identity, verified offline.
type Keyless struct {
	Issuer      string `json:"issuer"`
	Identity    string `json:"identity"`
	TrustedRoot string `json:"trustedRoot"` // Sigstore trusted_root.json, embedded
}

// SBOM is the rule on the image's software bill of materials.
type SBOM struct {
	Required bool     `json:"required"`
	Signers  []Signer `json:"signers,omitempty"`                                                // empty: those of Signatures
	Compare  string   `json:"compare,omitempty" jsonschema:"enum=none,enum=normal,enum=strict"` // "none", "normal" (default when required) or "strict" (every regular file covered)
}

// ImageLimits bounds an image; zero means the default of the agent.
type ImageLimits struct {
	MaxLayers int    `json:"maxLayers,omitempty"`
	MaxFiles  int    `json:"maxFiles,omitempty"`
	MaxBytes  uint64 `json:"maxBytes,omitempty"` // unpacked
	MaxRatio  int    `json:"maxRatio,omitempty"` // unpacked : compressed
}

// Run is how podman runs the container. Defaults are the safe ones: read-only
// root, no capabilities, no new privileges, seccomp on.
type Run struct {
	Command      []string          `json:"command,omitempty"` // replaces the image's CMD
	Entrypoint   []string          `json:"entrypoint,omitempty"`
	Env          map[string]string `json:"env,omitempty"`
	Secrets      []Secret          `json:"secrets,omitempty"` // files /run/secrets/NAME on a tmpfs
	User         string            `json:"user,omitempty"`    // uid[:gid] or name
	WorkingDir   string            `json:"workingDir,omitempty"`
	WritableRoot bool              `json:"writableRoot,omitempty"`
	Capabilities []string          `json:"capabilities,omitempty"`                               // CAP_…; all that reach beyond the container, such as CAP_SYS_ADMIN and CAP_SYS_RAWIO, are refused
	Network      string            `json:"network,omitempty" jsonschema:"enum=bridge,enum=none"` // "bridge" (default) or "none"
	Ports        []Port            `json:"ports,omitempty"`
	Mounts       []Mount           `json:"mounts,omitempty"`
	Resources    Resources         `json:"resources,omitzero"`
	Restart      string            `json:"restart,omitempty" jsonschema:"enum=no,enum=on-failure,enum=always"` // "no" (default), "on-failure" or "always"
	StopTimeout  Duration          `json:"stopTimeout,omitempty"`
	HealthCheck  *HealthCheck      `json:"healthCheck,omitempty"`
}

// Secret is a broker resource delivered as the file /run/secrets/NAME.
type Secret struct {
	Name     string `json:"name"`
	Resource string `json:"resource"`                                                  // kbs:///repository/type/tag
	Mode     string `json:"mode,omitempty" jsonschema:"enum=0400,enum=0440,enum=0444"` // octal and quoted, default "0400"
}

// Port publishes a container port.
type Port struct {
	Container uint16 `json:"container" jsonschema:"minimum=1"`
	Host      uint16 `json:"host,omitempty"`                                    // default: Container
	HostIP    string `json:"hostIP,omitempty"`                                  // default: all addresses
	Protocol  string `json:"protocol,omitempty" jsonschema:"enum=tcp,enum=udp"` // "tcp" (default) or "udp"
}

// Mount is a tmpfs or a named volume. Host paths cannot be mounted.
type Mount struct {
	Type     string `json:"type" jsonschema:"enum=tmpfs,enum=volume"` // "tmpfs" or "volume"
	Target   string `json:"target"`
	Name     string `json:"name,omitempty"` // volume name
	Size     uint64 `json:"size,omitempty"` // bytes, tmpfs
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Resources bounds the container; zero means no limit.
type Resources struct {
	Memory uint64  `json:"memory,omitempty"` // bytes
	CPUs   float64 `json:"cpus,omitempty"`
	PIDs   int64   `json:"pids,omitempty"`
}

// HealthCheck is done by the agent. Exactly one of Exec, HTTP and TCP is set.
type HealthCheck struct {
	Exec     []string   `json:"exec,omitempty"`
	HTTP     *HTTPCheck `json:"http,omitempty"`
	TCP      *TCPCheck  `json:"tcp,omitempty"`
	Interval Duration   `json:"interval,omitempty"` // default 1s
	Timeout  Duration   `json:"timeout,omitempty"`  // of one probe, default 5s
	Deadline Duration   `json:"deadline,omitempty"` // until the first success, default 60s
	Retries  int        `json:"retries,omitempty"`  // failures in a row after the first success that make it unhealthy, default 3
}

// HTTPCheck expects a status of 200–399 from the container's port.
type HTTPCheck struct {
	Port uint16 `json:"port" jsonschema:"minimum=1"` // container port
	Path string `json:"path,omitempty"`
}

// TCPCheck expects the container's port to accept a connection.
type TCPCheck struct {
	Port uint16 `json:"port" jsonschema:"minimum=1"`
}

// Upgrade holds the strategy and the deadlines of phases.
type Upgrade struct {
	Strategy  string    `json:"strategy,omitempty" jsonschema:"enum=replace"` // "replace" (default): stop the old one, start the new one
	Deadlines Deadlines `json:"deadlines,omitzero"`
}

// Deadlines bounds phases; zero means the agent's default.
type Deadlines struct {
	Registry Duration `json:"registry,omitempty"` // resolve, signature, attestation, with retries; default 5m
	Broker   Duration `json:"broker,omitempty"`   // attest and key, with retries; default 5m
	Fetch    Duration `json:"fetch,omitempty"`    // default 30m
	SBOM     Duration `json:"sbom,omitempty"`     // default 10m
	Start    Duration `json:"start,omitempty"`    // default 2m
}

// Control says who may do what on the control socket. Root may always read.
type Control struct {
	ReadUIDs     []uint32   `json:"readUIDs,omitempty"`
	OrderUIDs    []uint32   `json:"orderUIDs,omitempty"` // besides root and the operator group
	OrderKeys    []OrderKey `json:"orderKeys,omitempty"` // signed orders on other transports
	VSOCK        bool       `json:"vsock,omitempty"`
	VirtioSerial bool       `json:"virtioSerial,omitempty"`
}

// OrderKey may sign the named orders.
type OrderKey struct {
	Key    string   `json:"key"`                                                      // PEM SPKI
	Orders []string `json:"orders" jsonschema:"minItems=1,enum=upgrade,enum=destroy"` // "upgrade", "destroy"
}

// Log is what may leave the workload as log.
type Log struct {
	Workload string `json:"workload,omitempty" jsonschema:"enum=journal,enum=none"` // "journal" (default) or "none"
}
