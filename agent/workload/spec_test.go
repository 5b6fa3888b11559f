package workload

import (
	"strings"
	"testing"

	"github.com/containers/podman/v5/libpod/define"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

func TestSpec(t *testing.T) {
	c := Container{Policy: "p", Version: 2, Workload: "w", ImageID: strings.Repeat("a", 64), SecretDir: "/run/x",
		Run: policy.Run{
			Ports:        []policy.Port{{Container: 80}, {Container: 53, Host: 5353, Protocol: "udp"}},
			Resources:    policy.Resources{Memory: 1 << 20, CPUs: 1.5, PIDs: 10},
			Capabilities: []string{"CAP_NET_BIND_SERVICE"},
			Network:      "none",
		}}
	s := c.spec()
	if s.Name != "cvm-p-w-v2" || s.Image != c.ImageID {
		t.Errorf("name %q, image %q", s.Name, s.Image)
	}
	if *s.Privileged || !*s.NoNewPrivileges || !*s.ReadOnlyFilesystem || *s.ReadWriteTmpfs || *s.HTTPProxy || *s.EnvHost {
		t.Error("an isolation switch is not at its safe value")
	}
	if len(s.CapDrop) != 1 || s.CapDrop[0] != "ALL" || len(s.CapAdd) != 1 {
		t.Errorf("capabilities: drop %v, add %v", s.CapDrop, s.CapAdd)
	}
	if s.SeccompProfilePath != "" || s.OCIRuntime != "" || s.RestartPolicy != "no" || s.ImageVolumeMode != "ignore" {
		t.Errorf("seccomp %q, runtime %q, restart %q, image volumes %q", s.SeccompProfilePath, s.OCIRuntime, s.RestartPolicy, s.ImageVolumeMode)
	}
	if s.HealthConfig == nil || len(s.HealthConfig.Test) != 1 || s.HealthConfig.Test[0] != "NONE" {
		t.Errorf("the image's own health check: %+v", s.HealthConfig)
	}
	if s.NetNS.NSMode != "none" || s.PidNS.NSMode != "private" || s.IpcNS.NSMode != "private" {
		t.Errorf("namespaces: %v %v %v", s.NetNS, s.PidNS, s.IpcNS)
	}
	if len(s.PortMappings) != 2 || s.PortMappings[0].HostPort != 80 || s.PortMappings[1].HostPort != 5353 || s.PortMappings[1].Protocol != "udp" {
		t.Errorf("ports: %+v", s.PortMappings)
	}
	if *s.ResourceLimits.Memory.Limit != 1<<20 || *s.ResourceLimits.CPU.Quota != 150_000 || s.ResourceLimits.Pids.Limit != 10 {
		t.Errorf("limits: %+v", s.ResourceLimits)
	}
	if len(s.Mounts) != 1 || s.Mounts[0].Destination != "/run/secrets" || s.Mounts[0].Options[0] != "ro" {
		t.Errorf("mounts: %+v", s.Mounts)
	}
}

// What runs is the image that was verified, whatever podman made of the
// request.
func TestLesson17_OtherImageRefused(t *testing.T) {
	c := Container{Policy: "p", Version: 1, Workload: "w", ImageID: strings.Repeat("a", 64)}
	good := func() *define.InspectContainerData {
		return &define.InspectContainerData{Image: c.ImageID,
			HostConfig: &define.InspectContainerHostConfig{ReadonlyRootfs: true, SecurityOpt: []string{"no-new-privileges"}}}
	}
	if err := checkInspected(c, good()); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*define.InspectContainerData)
		code   cause.Code
	}{
		"another image":            {func(d *define.InspectContainerData) { d.Image = strings.Repeat("b", 64) }, cause.WorkloadOtherImage},
		"a privileged container":   {func(d *define.InspectContainerData) { d.HostConfig.Privileged = true }, cause.WorkloadStart},
		"a writable root":          {func(d *define.InspectContainerData) { d.HostConfig.ReadonlyRootfs = false }, cause.WorkloadStart},
		"the host's PID namespace": {func(d *define.InspectContainerData) { d.HostConfig.PidMode = "host" }, cause.WorkloadStart},
		"the host's IPC namespace": {func(d *define.InspectContainerData) { d.HostConfig.IpcMode = "host" }, cause.WorkloadStart},
		"new privileges":           {func(d *define.InspectContainerData) { d.HostConfig.SecurityOpt = nil }, cause.WorkloadStart},
		"no seccomp": {func(d *define.InspectContainerData) {
			d.HostConfig.SecurityOpt = append(d.HostConfig.SecurityOpt, "seccomp=unconfined")
		}, cause.WorkloadStart},
		"a capability that is not asked": {func(d *define.InspectContainerData) { d.BoundingCaps = []string{"CAP_SYS_ADMIN"} }, cause.WorkloadStart},
		"no answer about isolation":      {func(d *define.InspectContainerData) { d.HostConfig = nil }, cause.WorkloadStart},
	} {
		t.Run(name, func(t *testing.T) {
			data := good()
			tc.change(data)
			if err := checkInspected(c, data); cause.Of(err) != tc.code {
				t.Errorf("%v, expected %s", err, tc.code)
			}
		})
	}
}

func TestAddress(t *testing.T) {
	data := func(mode, ip string) *define.InspectContainerData {
		d := &define.InspectContainerData{HostConfig: &define.InspectContainerHostConfig{NetworkMode: mode}, NetworkSettings: &define.InspectNetworkSettings{}}
		d.NetworkSettings.IPAddress = ip
		return d
	}
	for name, tc := range map[string]struct {
		data  *define.InspectContainerData
		ports []policy.Port
		want  string
	}{
		"the container's own address":            {data("bridge", "10.88.0.2"), []policy.Port{{Container: 80, Host: 8080}}, "10.88.0.2:80"},
		"a published port":                       {data("slirp4netns", ""), []policy.Port{{Container: 80, Host: 8080}}, "127.0.0.1:8080"},
		"a published port on one address":        {data("slirp4netns", ""), []policy.Port{{Container: 80, HostIP: "192.0.2.1"}}, "192.0.2.1:80"},
		"loopback where the network is shared":   {data("host", ""), nil, "127.0.0.1:80"},
		"no network at all":                      {data("none", ""), nil, ""},
		"neither an address nor published":       {data("bridge", ""), nil, ""},
		"only the UDP port of that number is up": {data("bridge", ""), []policy.Port{{Container: 80, Protocol: "udp"}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := address(tc.data, tc.ports, 80)
			if got != tc.want || (err == nil) != (tc.want != "") {
				t.Errorf("%q, %v; expected %q", got, err, tc.want)
			}
		})
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\x1b[31m\n\tb\xff"); got != "a [31m b?" {
		t.Errorf("%q", got)
	}
	if got := printable(strings.Repeat("x", 10_000)); len(got) > maxLogBytes+4 {
		t.Errorf("%d bytes", len(got))
	}
}
