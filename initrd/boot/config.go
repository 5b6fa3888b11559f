package boot

import (
	"bytes"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Config is /etc/cvm-agent/early.json, a part of the measured initrd.
type Config struct {
	Cmdline      string   `json:"cmdline"` // the kernel's command line, to the byte
	Signers      []string `json:"signers"` // SHA-256 of the SPKI DER of those whose policies are accepted
	Threshold    int      `json:"threshold"`
	VersionFloor uint64   `json:"versionFloor"`
	Debug        bool     `json:"debug"`       // the image is the debug variant
	OnFailure    string   `json:"onFailure"`   // "poweroff" or "wait"
	WaitSeconds  int      `json:"waitSeconds"` // before the power goes off, for "wait"
	Modules      []string `json:"modules"`     // in load order, by name or by path below /usr/lib/modules
	Devices      []Device `json:"devices"`     // modules that only a machine with the device needs
	Scratch      string   `json:"scratch"`     // "tmpfs" or "disk"
}

// Device names the modules of a kind of device.
type Device struct {
	Aliases []string `json:"aliases"` // as modules.alias has them: patterns of a device's modalias
	Modules []string `json:"modules"` // in load order
}

// The values of OnFailure and of Scratch.
const (
	failPoweroff = "poweroff"
	failWait     = "wait"

	scratchTmpfs = "tmpfs"
	scratchDisk  = "disk"
)

const (
	maxConfig  = 64 << 10
	maxWait    = 600 // seconds
	maxModules = 256
)

// rootHashWord finds the root hash on the command line that is already held
// against the image's.
var rootHashWord = regexp.MustCompile(`(?:^| )roothash=([0-9a-f]{64})(?: |$)`)

// DecodeConfig decodes and checks the configuration. Every error is cause.Config.
func DecodeConfig(data []byte) (*Config, error) {
	var c Config
	if err := bounded.DecodeJSON(data, &c, bounded.Limits{Bytes: maxConfig}); err != nil {
		return nil, cause.New(cause.Config, "early.json: %w", err)
	}
	bad := func(format string, args ...any) (*Config, error) {
		return nil, cause.New(cause.Config, "early.json: "+format, args...)
	}
	switch {
	case c.Cmdline == "" || strings.ContainsAny(c.Cmdline, "\n\x00"):
		return bad("cmdline is not one line")
	case strings.Count(c.Cmdline, "roothash=") != 1 || !rootHashWord.MatchString(c.Cmdline):
		return bad("cmdline has no roothash=, or more than one")
	case c.OnFailure != failPoweroff && c.OnFailure != failWait:
		return bad("onFailure is %q, expected %s or %s", c.OnFailure, failPoweroff, failWait)
	case c.WaitSeconds < 0 || c.WaitSeconds > maxWait:
		return bad("waitSeconds is %d, expected 0 to %d", c.WaitSeconds, maxWait)
	case len(c.Modules) > maxModules:
		return bad("%d modules, at most %d are accepted", len(c.Modules), maxModules)
	case len(c.Devices) > maxModules:
		return bad("%d devices, at most %d are accepted", len(c.Devices), maxModules)
	case !patterns(c.Devices):
		return bad("devices has an alias that is no pattern")
	case c.Scratch != scratchTmpfs && c.Scratch != scratchDisk:
		return bad("scratch is %q, expected %s or %s", c.Scratch, scratchTmpfs, scratchDisk)
	}
	return &c, nil
}

func patterns(devices []Device) bool {
	for _, d := range devices {
		for _, a := range d.Aliases {
			if _, err := path.Match(a, ""); err != nil {
				return false
			}
		}
	}
	return true
}

func (c *Config) rootHash() string { return rootHashWord.FindStringSubmatch(c.Cmdline)[1] }

func (c *Config) trust() policy.Trust {
	return policy.Trust{Fingerprints: c.Signers, Threshold: c.Threshold, VersionFloor: c.VersionFloor}
}

// wait is how long a failure stays on the console.
func (c *Config) wait() time.Duration {
	if c == nil || c.OnFailure != failWait {
		return 0
	}
	return time.Duration(c.WaitSeconds) * time.Second
}

// checkCmdline holds /proc/cmdline against the line that the image was built
// with. The kernel ends it with one line feed.
func checkCmdline(expected string, got []byte) error {
	text := strings.TrimSuffix(string(got), "\n")
	if text == expected {
		return nil
	}
	i := 0
	for i < len(text) && i < len(expected) && text[i] == expected[i] {
		i++
	}
	return cause.New(cause.CmdlineChanged, "the command line differs from the image's at byte %d: %.120q, expected %.120q", i, text[i:], expected[i:])
}

// smbiosWords are what a host can say in SMBIOS strings to programs that come
// after us: systemd's credentials, its stub's command line, cloud-init's
// datasource. All are refused, though the command line turns each of them off.
var smbiosWords = []string{"io.systemd.", "ds=nocloud"}

// checkSMBIOS looks for the words in the whole table, in whatever structure
// they are: no parser of ours has to agree with another's.
func checkSMBIOS(table []byte) error {
	low := make([]byte, 0, len(table))
	for _, c := range table { // ASCII alone: offsets stay
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		low = append(low, c)
	}
	for _, w := range smbiosWords {
		if i := bytes.Index(low, []byte(w)); i >= 0 {
			word, _, _ := bytes.Cut(table[i:min(i+80, len(table))], []byte{0})
			return cause.New(cause.SMBIOSRefused, "the SMBIOS tables hold %.80q", word)
		}
	}
	return nil
}
