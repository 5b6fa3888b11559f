package workload

import (
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
)

// Lesson 30: nothing in a container leads to evidence: no device, no mount of
// the host but the secrets' own directory, no namespace but its own. The policy
// here asks for all that a policy may.
func TestLesson30_NoContainerReachesEvidence(t *testing.T) {
	c := Container{Policy: "p", Version: 1, Workload: "w", ImageID: strings.Repeat("a", 64), SecretDir: "/run/cvm-agent/secrets/w",
		Run: policy.Run{
			User: "0", WritableRoot: true, Network: "bridge",
			Env:          map[string]string{"DOCKER_HOST": "unix:///run/podman/podman.sock"},
			Capabilities: []string{"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SETUID", "CAP_SYS_CHROOT", "CAP_SYS_NICE"},
			Secrets:      []policy.Secret{{Name: "s", Resource: "kbs:///a/b/c"}},
			Mounts:       []policy.Mount{{Type: "tmpfs", Target: "/scratch"}, {Type: "volume", Name: "data", Target: "/data"}},
		}}
	s := c.spec()
	if len(s.Devices) > 0 || len(s.DeviceCgroupRule) > 0 || len(s.VolumesFrom) > 0 || len(s.OverlayVolumes) > 0 || len(s.ImageVolumes) > 0 {
		t.Errorf("devices or volumes of others: %v %v %v", s.Devices, s.DeviceCgroupRule, s.VolumesFrom)
	}
	if *s.Privileged || s.SeccompProfilePath != "" || len(s.Unmask) > 0 || len(s.CapDrop) != 1 || s.CapDrop[0] != "ALL" {
		t.Errorf("privileged %t, seccomp %q, unmasked %v, dropped %v", *s.Privileged, s.SeccompProfilePath, s.Unmask, s.CapDrop)
	}
	for name, ns := range map[string]string{
		"pid": string(s.PidNS.NSMode), "ipc": string(s.IpcNS.NSMode), "uts": string(s.UtsNS.NSMode), "cgroup": string(s.CgroupNS.NSMode),
	} {
		if ns != "private" {
			t.Errorf("%s namespace: %q", name, ns)
		}
	}
	if s.NetNS.NSMode != "bridge" {
		t.Errorf("network: %v", s.NetNS)
	}
	var binds int
	for _, m := range s.Mounts {
		switch m.Type {
		case "tmpfs":
		case "bind":
			binds++
			if m.Source != c.SecretDir || m.Destination != "/run/secrets" || !strings.Contains(strings.Join(m.Options, ","), "ro,") {
				t.Errorf("a mount of the host: %+v", m)
			}
		default:
			t.Errorf("a mount of type %s", m.Type)
		}
	}
	if binds != 1 {
		t.Errorf("%d mounts of the host, expected the secrets' alone", binds)
	}
	for _, v := range s.Volumes {
		if strings.Contains(v.Name, "/") || v.Name != VolumeName("p", "data") {
			t.Errorf("a volume that is a path: %+v", v)
		}
	}
}
