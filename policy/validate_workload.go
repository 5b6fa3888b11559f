package policy

import (
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// allowedCapabilities is what a container may be given: all of these act within
// its own namespaces. Everything else is refused, above all what reaches the
// host's memory, devices, modules, clock, file handles or kernel log.
var allowedCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_IPC_LOCK", "CAP_KILL",
	"CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID",
	"CAP_SYS_CHROOT", "CAP_SYS_NICE",
}

// protectedTargets belong to the kernel, the engine or the agent inside every
// container: nothing is mounted at, below or (but for /run) above them.
var protectedTargets = []string{"/proc", "/sys", "/dev", "/run/secrets", "/run/cvm-agent", "/run/.containerenv", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"}

func (p *Policy) validateWorkloads() error {
	if len(p.Workloads) == 0 {
		return rule("workloads", "is missing, expected at least one")
	}
	names, ports := unique{}, unique{}
	return each("workloads", p.Workloads, maxWorkloads, func(at string, w Workload) error {
		if !dnsLabel.MatchString(w.Name) {
			return rule(at+".name", "%q is not a DNS label (a-z, 0-9 and -, at most 63 bytes)", clip(w.Name))
		}
		if err := names.add(at+".name", w.Name); err != nil {
			return err
		}
		if err := checkImage(at+".image", w.Image); err != nil {
			return err
		}
		if err := p.checkSigners(at+".signatures.required", w.Signatures.Required, true); err != nil {
			return err
		}
		if err := p.checkSBOM(at+".sbom", w.SBOM); err != nil {
			return err
		}
		if err := oneOf(at+".encryption", w.Encryption, "required", "optional", "forbidden"); err != nil {
			return err
		}
		if w.Encryption == "required" && p.Broker == nil {
			return rule(at+".encryption", "encryption is required, but there is no broker to release a key")
		}
		if l := w.Limits; l.MaxLayers < 0 || l.MaxFiles < 0 || l.MaxRatio < 0 || l.MaxBytes > maxInteger {
			return rule(at+".limits", "is negative or above 2^53-1")
		}
		return p.checkRun(at+".run", w.Run, ports)
	})
}

func checkImage(at, ref string) error {
	if !strings.Contains(ref, "@") {
		return ruleAs(cause.PolicyImageNotByDigest, at, "%q names no digest, expected host/repository@sha256:…", clip(ref))
	}
	m := imageParts.FindStringSubmatch(ref)
	repo, _, _ := strings.Cut(ref, "@")
	switch {
	case m == nil && imageTag.MatchString(repo[strings.LastIndex(repo, "/")+1:]):
		return ruleAs(cause.PolicyImageNotByDigest, at, "%q names a tag beside the digest: leave the tag out", clip(ref))
	case m == nil || len(ref) > 512:
		return rule(at, "%q is not host/repository@sha256: and 64 hexadecimal digits", clip(ref))
	case !hostPort.MatchString(m[1]) || (!strings.ContainsAny(m[1], ".:") && m[1] != "localhost"):
		return rule(at, "%q does not begin with a registry host", clip(ref))
	}
	return nil
}

func (p *Policy) checkSigners(at string, list []Signer, required bool) error {
	if required && len(list) == 0 {
		return rule(at, "is missing, expected at least one signer")
	}
	seen := unique{}
	return each(at, list, maxSigners, func(at string, s Signer) error {
		forms := 0
		for _, set := range []bool{s.Key != "", s.KeyResource != "", s.Keyless != nil} {
			if set {
				forms++
			}
		}
		if forms != 1 {
			return rule(at, "has %d of key, keyResource and keyless, expected exactly one", forms)
		}
		if (s.KeyResource != "") != (s.KeyDigest != "") {
			return rule(at+".keyDigest", "keyResource and keyDigest go together: a key from the broker is pinned by its digest")
		}
		switch {
		case s.Key != "":
			return addKey(seen, at+".key", s.Key)
		case s.Keyless != nil:
			return s.Keyless.validate(at + ".keyless")
		case p.Broker == nil:
			return rule(at+".keyResource", "a key resource, but there is no broker")
		}
		return first(checkResource(at+".keyResource", s.KeyResource), checkDigest(at+".keyDigest", s.KeyDigest), seen.add(at+".keyDigest", s.KeyDigest))
	})
}

func (k *Keyless) validate(at string) error {
	if u, err := url.Parse(k.Issuer); err != nil || u.Scheme != "https" || u.Host == "" {
		return rule(at+".issuer", "%q is not an https URL", clip(k.Issuer))
	}
	if k.Identity == "" || len(k.Identity) > 2048 {
		return rule(at+".identity", "%d bytes, expected 1 to 2048", len(k.Identity))
	}
	if len(k.TrustedRoot) > maxRoot {
		return rule(at+".trustedRoot", "%d bytes, at most %d are accepted", len(k.TrustedRoot), maxRoot)
	}
	if err := bounded.CheckJSON([]byte(k.TrustedRoot), bounded.Limits{Bytes: maxRoot}); err != nil {
		return rule(at+".trustedRoot", "is not a Sigstore trusted_root.json: %v", err)
	}
	var root struct {
		MediaType string `json:"mediaType"`
	}
	if err := json.Unmarshal([]byte(k.TrustedRoot), &root); err != nil || !strings.HasPrefix(root.MediaType, "application/vnd.dev.sigstore.trustedroot") {
		return rule(at+".trustedRoot", "media type %q is not that of a Sigstore trusted root", clip(root.MediaType))
	}
	return nil
}

func (p *Policy) checkSBOM(at string, s SBOM) error {
	if err := oneOf(at+".compare", s.Compare, "", "none", "normal", "strict"); err != nil {
		return err
	}
	if !s.Required && (len(s.Signers) > 0 || s.Compare == "normal" || s.Compare == "strict") {
		return rule(at+".required", "is false, but there are rules on an SBOM: set it, or leave them out")
	}
	return p.checkSigners(at+".signers", s.Signers, false)
}

func (p *Policy) checkRun(at string, r Run, ports unique) error {
	argument := func(at, s string) error { return checkText(at, s) }
	if err := first(each(at+".command", r.Command, maxList, argument), each(at+".entrypoint", r.Entrypoint, maxList, argument)); err != nil {
		return err
	}
	if len(r.Env) > maxList {
		return rule(at+".env", "%d entries, at most %d are accepted", len(r.Env), maxList)
	}
	for _, name := range sortedKeys(r.Env) {
		if !envName.MatchString(name) {
			return rule(at+".env", "%q is not the name of an environment variable", clip(name))
		}
		if err := checkText(at+".env."+name, r.Env[name]); err != nil {
			return err
		}
	}
	if err := p.checkSecrets(at+".secrets", r.Secrets); err != nil {
		return err
	}
	if r.User != "" && !userSpec.MatchString(r.User) {
		return rule(at+".user", "%q is not uid[:gid] or name[:group]", clip(r.User))
	}
	if r.WorkingDir != "" && !cleanPath(r.WorkingDir) {
		return rule(at+".workingDir", "%q is not a clean absolute path", clip(r.WorkingDir))
	}
	caps := unique{}
	if err := each(at+".capabilities", r.Capabilities, maxList, func(at, c string) error {
		if !slices.Contains(allowedCapabilities, c) {
			return rule(at, "%q may not be given to a container; those that may: %s", clip(c), strings.Join(allowedCapabilities, ", "))
		}
		return caps.add(at, c)
	}); err != nil {
		return err
	}
	if err := oneOf(at+".network", r.Network, "", "bridge", "none"); err != nil {
		return err
	}
	if err := checkPorts(at+".ports", r, ports); err != nil {
		return err
	}
	if err := checkMounts(at+".mounts", r.Mounts); err != nil {
		return err
	}
	if q := r.Resources; q.Memory > maxInteger || q.PIDs < 0 || q.CPUs < 0 || q.CPUs > 4096 || math.IsNaN(q.CPUs) {
		return rule(at+".resources", "memory above 2^53-1, or pids or cpus negative or above 4096")
	}
	if m := r.Resources.Memory; m != 0 && m < 1<<20 {
		return rule(at+".resources.memory", "%d bytes, expected at least 1 MiB", m)
	}
	if r.StopTimeout < 0 {
		return rule(at+".stopTimeout", "is negative")
	}
	return first(oneOf(at+".restart", r.Restart, "", "no", "on-failure", "always"), r.HealthCheck.validate(at+".healthCheck", r.Network))
}

func checkText(at, s string) error {
	if len(s) > maxString {
		return rule(at, "%d bytes, at most %d are accepted", len(s), maxString)
	}
	if strings.ContainsRune(s, 0) {
		return rule(at, "has a NUL byte")
	}
	return nil
}

func cleanPath(p string) bool {
	return len(p) <= 1024 && strings.HasPrefix(p, "/") && path.Clean(p) == p && !strings.ContainsAny(p, "\x00\n:")
}

func (p *Policy) checkSecrets(at string, list []Secret) error {
	if len(list) > 0 && p.Broker == nil {
		return rule(at, "there are secrets, but no broker to release them")
	}
	names := unique{}
	return each(at, list, maxList, func(at string, s Secret) error {
		if !fileName.MatchString(s.Name) {
			return rule(at+".name", "%q is not a plain file name", clip(s.Name))
		}
		return first(names.add(at+".name", s.Name), checkResource(at+".resource", s.Resource),
			oneOf(at+".mode", s.Mode, "", "0400", "0440", "0444"))
	})
}

func checkPorts(at string, r Run, taken unique) error {
	if r.Network == "none" && len(r.Ports) > 0 {
		return rule(at, "ports are published, but the network is none")
	}
	return each(at, r.Ports, maxList, func(at string, p Port) error {
		if p.Container == 0 {
			return rule(at+".container", "is missing, expected 1 to 65535")
		}
		if err := first(oneOf(at+".protocol", p.Protocol, "", "tcp", "udp"), checkAddr(at+".hostIP", p.HostIP)); err != nil {
			return err
		}
		host, proto := p.Host, p.Protocol
		if host == 0 {
			host = p.Container
		}
		if proto == "" {
			proto = "tcp"
		}
		return taken.add(at, fmt.Sprintf("%s %d/%s", p.HostIP, host, proto))
	})
}

func checkMounts(at string, list []Mount) error {
	targets, volumes := unique{}, unique{}
	return each(at, list, maxList, func(at string, m Mount) error {
		if err := oneOf(at+".type", m.Type, "tmpfs", "volume"); err != nil {
			return err
		}
		if !cleanPath(m.Target) || m.Target == "/" {
			return rule(at+".target", "%q is not a clean absolute path below /", clip(m.Target))
		}
		// Images link /var/run to /run: a target may not take that detour.
		real := m.Target
		if rest, ok := strings.CutPrefix(real, "/var/run"); ok && (rest == "" || rest[0] == '/') {
			real = "/run" + rest
		}
		for _, t := range protectedTargets {
			if real == t || strings.HasPrefix(real, t+"/") || (strings.HasPrefix(t, real+"/") && real != "/run") {
				return rule(at+".target", "%q would cover or enter %s", clip(m.Target), t)
			}
		}
		if err := targets.add(at+".target", real); err != nil {
			return err
		}
		switch {
		case m.Type == "volume" && !fileName.MatchString(m.Name):
			return rule(at+".name", "%q is not the name of a volume; host paths cannot be mounted", clip(m.Name))
		case m.Type == "volume" && m.Size != 0:
			return rule(at+".size", "is for tmpfs only")
		case m.Type == "tmpfs" && m.Name != "":
			return rule(at+".name", "is for volumes only")
		case m.Size > maxInteger:
			return rule(at+".size", "is above 2^53-1")
		case m.Type == "volume":
			return volumes.add(at+".name", m.Name)
		}
		return nil
	})
}

func (h *HealthCheck) validate(at, network string) error {
	if h == nil {
		return nil
	}
	forms := 0
	for _, set := range []bool{len(h.Exec) > 0, h.HTTP != nil, h.TCP != nil} {
		if set {
			forms++
		}
	}
	switch {
	case forms != 1:
		return rule(at, "has %d of exec, http and tcp, expected exactly one", forms)
	case len(h.Exec) == 0 && network == "none":
		return rule(at, "the network is none: only exec can check this container")
	case h.HTTP != nil && (h.HTTP.Port == 0 || (h.HTTP.Path != "" && !strings.HasPrefix(h.HTTP.Path, "/")) || strings.ContainsAny(h.HTTP.Path, " \r\n\x00") || len(h.HTTP.Path) > 2048):
		return rule(at+".http", "port %d and path %q, expected a port and a path that begins with /", h.HTTP.Port, clip(h.HTTP.Path))
	case h.TCP != nil && h.TCP.Port == 0:
		return rule(at+".tcp.port", "is missing, expected 1 to 65535")
	case h.Interval < 0 || h.Timeout < 0 || h.Deadline < 0:
		return rule(at, "a negative duration")
	case h.Retries < 0 || h.Retries > 1000:
		return rule(at+".retries", "%d, expected 0 to 1000", h.Retries)
	}
	return each(at+".exec", h.Exec, maxList, checkText)
}
