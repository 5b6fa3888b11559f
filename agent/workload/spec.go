package workload

import (
	"strconv"
	"time"

	"github.com/containers/podman/v5/pkg/specgen"
	"github.com/opencontainers/runtime-spec/specs-go"
	nettypes "go.podman.io/common/libnetwork/types"
	"go.podman.io/image/v5/manifest"

	"github.com/cc-runtime/cvm-agent/policy"
)

// Container is one workload, ready to be started.
type Container struct {
	Policy    string // name of the policy
	Version   uint64 // version of the policy
	Workload  string // name in the policy
	ImageID   string // 64 hex digits: the verified image's config digest
	ImageRef  string // repository@sha256:… as the policy names it
	Run       policy.Run
	SecretDir string // directory on a tmpfs, shown read-only at /run/secrets; "" for none
	LogRule   string // policy.Log.Workload: "none" keeps no log of the workload
}

// Name is the container's name: one per policy, version and workload, so that
// the old and the new container of an upgrade can exist side by side.
func (c Container) Name() string {
	return "cvm-" + c.Policy + "-" + c.Workload + "-v" + strconv.FormatUint(c.Version, 10)
}

// VolumeName is the name of a data volume. It is keyed by the policy's name,
// not by its digest or version, so that an upgrade finds its data again.
func VolumeName(policyName, volume string) string { return "cvm-" + policyName + "-" + volume }

func (c Container) labels() map[string]string {
	return map[string]string{
		LabelPolicy:   c.Policy,
		LabelVersion:  strconv.FormatUint(c.Version, 10),
		LabelWorkload: c.Workload,
		LabelImage:    c.ImageRef,
	}
}

const (
	secretsTarget      = "/run/secrets"
	defaultStopTimeout = 10 * time.Second
	cpuPeriod          = 100_000 // microseconds
)

// spec translates the policy's run options. Everything that containers.conf
// could loosen and that the policy rules is stated explicitly.
func (c Container) spec() *specgen.SpecGenerator {
	yes, no := true, false
	s := specgen.NewSpecGenerator(c.ImageID, false)

	s.Name = c.Name()
	s.Labels = c.labels()
	s.Command = c.Run.Command
	s.Entrypoint = c.Run.Entrypoint
	s.Env = c.Run.Env
	s.WorkDir = c.Run.WorkingDir
	s.Terminal, s.Stdin = &no, &no
	s.EnvHost, s.HTTPProxy = &no, &no // nothing of the host's environment gets in
	s.SdNotifyMode = "ignore"
	s.Systemd = "false"
	// An image's own HEALTHCHECK would be a timer that podman sets up outside of
	// the container; the policy's is the agent's to run.
	s.HealthConfig = &manifest.Schema2HealthConfig{Test: []string{"NONE"}}
	s.RestartPolicy = c.Run.Restart
	if s.RestartPolicy == "" {
		s.RestartPolicy = "no"
	}
	stop := uint(c.Run.StopTimeout.Or(defaultStopTimeout) / time.Second)
	s.StopTimeout = &stop
	if c.LogRule == "none" {
		s.LogConfiguration = &specgen.LogConfig{Driver: "none"}
	}

	// Isolation: the safe values, whatever podman's defaults are.
	s.Privileged = &no
	s.User = c.Run.User
	s.CapDrop = []string{"ALL"}
	s.CapAdd = c.Run.Capabilities
	s.NoNewPrivileges = &yes
	readOnly := !c.Run.WritableRoot
	s.ReadOnlyFilesystem = &readOnly
	// No implicit tmpfs on /tmp, /run or /var/tmp and no anonymous volume for
	// an image's VOLUME: what a workload can write to is what the policy names.
	s.ReadWriteTmpfs = &no
	s.ImageVolumeMode = "ignore"
	s.PidNS = specgen.Namespace{NSMode: specgen.Private}
	s.IpcNS = specgen.Namespace{NSMode: specgen.Private}
	s.UtsNS = specgen.Namespace{NSMode: specgen.Private}
	s.CgroupNS = specgen.Namespace{NSMode: specgen.Private}

	// An unset network leaves podman's configured default, which the measured
	// image owns; "bridge" and "none" force it.
	switch c.Run.Network {
	case "none":
		s.NetNS = specgen.Namespace{NSMode: specgen.NoNetwork}
	case "bridge":
		s.NetNS = specgen.Namespace{NSMode: specgen.Bridge}
	}
	for _, p := range c.Run.Ports {
		s.PortMappings = append(s.PortMappings, portMapping(p))
	}

	s.Mounts, s.Volumes = c.mounts()
	s.ResourceLimits = limits(c.Run.Resources)
	return s
}

func portMapping(p policy.Port) nettypes.PortMapping {
	m := nettypes.PortMapping{HostIP: p.HostIP, ContainerPort: p.Container, HostPort: p.Host, Protocol: p.Protocol}
	if m.HostPort == 0 {
		m.HostPort = p.Container
	}
	if m.Protocol == "" {
		m.Protocol = "tcp"
	}
	return m
}

func (c Container) mounts() ([]specs.Mount, []*specgen.NamedVolume) {
	var mounts []specs.Mount
	var named []*specgen.NamedVolume
	for _, m := range c.Run.Mounts {
		access := "rw"
		if m.ReadOnly {
			access = "ro"
		}
		switch m.Type {
		case "tmpfs":
			options := []string{access, "nosuid", "nodev", "noexec", "mode=1777"}
			if m.Size > 0 {
				options = append(options, "size="+strconv.FormatUint(m.Size, 10))
			}
			mounts = append(mounts, specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: m.Target, Options: options})
		case "volume":
			named = append(named, &specgen.NamedVolume{Name: VolumeName(c.Policy, m.Name), Dest: m.Target, Options: []string{access, "nosuid", "nodev"}})
		}
	}
	if c.SecretDir != "" {
		mounts = append(mounts, specs.Mount{Type: "bind", Source: c.SecretDir, Destination: secretsTarget,
			Options: []string{"ro", "rbind", "rprivate", "nosuid", "nodev", "noexec"}})
	}
	return mounts, named
}

// limits returns nil when nothing is limited: an empty structure would make
// podman set up controllers that a small guest kernel may not have.
func limits(r policy.Resources) *specs.LinuxResources {
	if r == (policy.Resources{}) {
		return nil
	}
	out := &specs.LinuxResources{}
	if r.Memory > 0 {
		limit := int64(r.Memory)
		out.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit} // swap equal to memory: none
	}
	if r.CPUs > 0 {
		period, quota := uint64(cpuPeriod), int64(r.CPUs*cpuPeriod)
		out.CPU = &specs.LinuxCPU{Period: &period, Quota: &quota}
	}
	if r.PIDs > 0 {
		pids := r.PIDs
		out.Pids = &specs.LinuxPids{Limit: pids}
	}
	return out
}
