package launch

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/cc-runtime/cvm-agent/agent/platform"
	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Config is the agent's configuration, a part of the measured image. It is
// read once; nothing else is consulted, and no environment.
type Config struct {
	Initdata string `yaml:"initdata"` // the document that the launch is bound to
	Trust    Trust  `yaml:"trust"`
	TPM      string `yaml:"tpm"` // device:PATH or unix:PATH; "": none is looked for
	// AttestationKey is the key that a bare vTPM quotes with.
	AttestationKey AttestationKey `yaml:"attestationKey"`
	Azure          Azure          `yaml:"azure"`
	StateDir       string         `yaml:"stateDir"` // survives the daemon; holds the destroy latch
	RunDir         string         `yaml:"runDir"`   // on a tmpfs: event log, committed policy, secrets
	Storage        Storage        `yaml:"storage"`
	// Mirrors are those of the policy's that this site uses, by registry host;
	// the early stage adds what the seed chose. Unset: all.
	Mirrors       map[string][]string `yaml:"mirrors"`
	PodmanSocket  string              `yaml:"podmanSocket"`
	ControlSocket string              `yaml:"controlSocket"`
	ControlSerial string              `yaml:"controlSerial"` // virtio-serial port, served only while the policy says so; "": none
	SocketGroup   string              `yaml:"socketGroup"`   // name or number
	SBOMProgram   string              `yaml:"sbomProgram"`
	// RequireBrokerMark says whether a launch needs the broker's signed version
	// mark. Unset: yes when the policy names a broker of dialect cvm-agent/1.
	RequireBrokerMark *bool `yaml:"requireBrokerMark"`
	// PowerOffOnDestroy ends the machine after a destroy. For the image: on a
	// plain host the machine is not the agent's.
	PowerOffOnDestroy bool `yaml:"powerOffOnDestroy"`
	// FailureWait keeps a refused launch answering reads for so long before the
	// daemon ends, which in the image powers the machine off; at most 10m.
	FailureWait time.Duration `yaml:"failureWait"`
}

// Trust says whose policies are accepted.
type Trust struct {
	Signers      []string `yaml:"signers"`      // SHA-256 of the SPKI DER, 64 lowercase hex digits
	Threshold    int      `yaml:"threshold"`    // distinct signers needed; default 1
	VersionFloor uint64   `yaml:"versionFloor"` // lowest policy version; default 1
}

// AttestationKey says of which kind the key is and who vouches for it.
type AttestationKey struct {
	Algorithm   string `yaml:"algorithm"`   // "auto" (default): RSA where the TPM has it; "rsa" or "ecc"
	Certificate string `yaml:"certificate"` // nv:0x01…… or file:/PATH; default: credential activation with the EK
}

// Azure says where evidence gets what only the host has. Nothing is asked that
// is not named here, and the verifier trusts none of it unsigned.
type Azure struct {
	VCEK string `yaml:"vcek"` // file with the chip's certificate, PEM or DER
	THIM string `yaml:"thim"` // base URL of the host's service for VCEK and TD quotes
}

// Storage is podman's image and container storage.
type Storage struct {
	GraphRoot string `yaml:"graphRoot"`
	RunRoot   string `yaml:"runRoot"`
}

const (
	maxConfig      = 64 << 10
	maxFailureWait = 10 * time.Minute
)

var fingerprint = regexp.MustCompile(`^[0-9a-f]{64}$`)

// DefaultConfig has the values of a field that a file leaves out.
func DefaultConfig() Config {
	return Config{
		Initdata:      "/run/cvm-agent/initdata.toml",
		Trust:         Trust{Threshold: 1, VersionFloor: 1},
		TPM:           "device:/dev/tpmrm0",
		StateDir:      "/var/lib/cvm-agent",
		RunDir:        "/run/cvm-agent",
		Storage:       Storage{GraphRoot: "/var/lib/containers/storage", RunRoot: "/run/containers/storage"},
		PodmanSocket:  "/run/podman/podman.sock",
		ControlSocket: "/run/cvm-agent/control.sock",
		ControlSerial: "/dev/virtio-ports/org.cvm-agent.control",
		SocketGroup:   "cvm-operators",
		SBOMProgram:   "/usr/lib/cvm-agent/cvm-sbom",
	}
}

// ReadConfig reads and checks the file. Every error is cause.Config.
func ReadConfig(path string) (Config, error) {
	data, err := bounded.ReadFile(path, maxConfig)
	if err != nil {
		return Config{}, cause.New(cause.Config, "%w", err)
	}
	c, err := DecodeConfig(data)
	if err != nil {
		var e *cause.Error
		if errors.As(err, &e) {
			err = e.Err // its code is said once, before the path
		}
		return Config{}, cause.New(cause.Config, "%s: %w", path, err)
	}
	return c, nil
}

// DecodeConfig decodes strictly: unknown and duplicate keys are errors.
func DecodeConfig(data []byte) (Config, error) {
	c := DefaultConfig()
	dec := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict())
	if err := dec.Decode(&c); err != nil {
		return Config{}, errors.New(oneLine(yaml.FormatError(err, false, false)))
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return Config{}, errors.New("expected one document")
	}
	return c, c.check()
}

func (c Config) check() error {
	for name, path := range map[string]string{
		"initdata": c.Initdata, "stateDir": c.StateDir, "runDir": c.RunDir, "storage.graphRoot": c.Storage.GraphRoot,
		"storage.runRoot": c.Storage.RunRoot, "podmanSocket": c.PodmanSocket, "controlSocket": c.ControlSocket, "sbomProgram": c.SBOMProgram,
	} {
		if !filepath.IsAbs(path) {
			return cause.New(cause.Config, "%s is %q, expected an absolute path", name, path)
		}
	}
	if kind, path, ok := strings.Cut(c.TPM, ":"); c.TPM != "" && (!ok || (kind != "device" && kind != "unix") || !filepath.IsAbs(path)) {
		return cause.New(cause.Config, "tpm is %q, expected device:PATH or unix:PATH", c.TPM)
	}
	if err := platform.AKOptions(c.AttestationKey).Check(); err != nil {
		return cause.New(cause.Config, "attestationKey: %w", err)
	}
	if err := platform.AzureOptions(c.Azure).Check(); err != nil {
		return cause.New(cause.Config, "azure: %w", err)
	}
	if len(c.Trust.Signers) == 0 {
		return cause.New(cause.Config, "trust.signers is empty: no policy could be accepted")
	}
	seen := map[string]bool{}
	for _, s := range c.Trust.Signers {
		if !fingerprint.MatchString(s) {
			return cause.New(cause.Config, "trust.signers has %q, expected 64 lowercase hex digits", s)
		}
		if seen[s] {
			return cause.New(cause.Config, "trust.signers has %s twice", s)
		}
		seen[s] = true
	}
	if c.Trust.Threshold < 1 || c.Trust.Threshold > len(c.Trust.Signers) {
		return cause.New(cause.Config, "trust.threshold is %d, expected 1 to %d", c.Trust.Threshold, len(c.Trust.Signers))
	}
	if c.ControlSerial != "" && !filepath.IsAbs(c.ControlSerial) {
		return cause.New(cause.Config, "controlSerial is %q, expected an absolute path, or nothing", c.ControlSerial)
	}
	if w := c.FailureWait; w < 0 || w > maxFailureWait {
		return cause.New(cause.Config, "failureWait is %s, expected at most %s", w, maxFailureWait)
	}
	if c.SocketGroup == "" {
		return cause.New(cause.Config, "socketGroup is empty")
	}
	return nil
}

// prepare makes the directories that the agent owns.
func prepare(c Config) error {
	for _, dir := range []string{c.StateDir, c.RunDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return cause.New(cause.StorageFailed, "create %s: %w", dir, err)
		}
	}
	return nil
}

// requireMark decides for a policy whether the broker's mark is needed.
func (c Config) requireMark(p *policy.Policy) bool {
	if c.RequireBrokerMark != nil {
		return *c.RequireBrokerMark
	}
	return p.Broker != nil && (p.Broker.Dialect == "" || p.Broker.Dialect == "cvm-agent/1")
}
