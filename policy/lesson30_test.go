package policy_test

import (
	"strings"
	"testing"

	"github.com/cc-runtime/cvm-agent/policy"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Lesson 30: a workload that could make evidence over data of its own choosing
// would pass for the agent. No policy, however signed, gives a container a way
// to a TPM, a TEE's device, configfs/tsm, the agent's or podman's sockets, or out
// of its namespaces.
func TestLesson30_NoPolicyGivesAWayToEvidence(t *testing.T) {
	minimal := string(example(t, "minimal.yaml"))
	with := func(run string) string { return minimal + "    run:\n      " + run + "\n" }
	if _, err := policy.DecodeYAML([]byte(with("mounts: [{type: tmpfs, target: /scratch}]"))); err != nil {
		t.Fatalf("the test's policy is not one: %v", err)
	}
	for what, c := range map[string]struct {
		run  string
		code cause.Code
	}{
		"the TPM's device":              {"devices: [/dev/tpmrm0]", cause.PolicyUnknownField},
		"a TEE's device, mounted":       {"mounts: [{type: bind, source: /dev/sev-guest, target: /x}]", cause.PolicyUnknownField},
		"a bind mount":                  {"mounts: [{type: bind, target: /x}]", cause.PolicyInvalid},
		"a volume named by a path":      {"mounts: [{type: volume, name: /sys/kernel/config/tsm, target: /x}]", cause.PolicyInvalid},
		"a volume named by a way up":    {"mounts: [{type: volume, name: .., target: /x}]", cause.PolicyInvalid},
		"devtmpfs":                      {"mounts: [{type: devtmpfs, target: /x}]", cause.PolicyInvalid},
		"a mount over /dev":             {"mounts: [{type: tmpfs, target: /dev}]", cause.PolicyInvalid},
		"a mount below /sys":            {"mounts: [{type: tmpfs, target: /sys/kernel/config}]", cause.PolicyInvalid},
		"the agent's directory":         {"mounts: [{type: volume, name: v, target: /run/cvm-agent}]", cause.PolicyInvalid},
		"the agent's directory, around": {"mounts: [{type: volume, name: v, target: /var/run/cvm-agent}]", cause.PolicyInvalid},
		"the host's network":            {"network: host", cause.PolicyInvalid},
		"another container's network":   {"network: 'container:agent'", cause.PolicyInvalid},
		"the host's processes":          {"pid: host", cause.PolicyUnknownField},
		"privileges":                    {"privileged: true", cause.PolicyUnknownField},
		"no seccomp":                    {"securityOpt: [seccomp=unconfined]", cause.PolicyUnknownField},
		"CAP_SYS_ADMIN":                 {"capabilities: [CAP_SYS_ADMIN]", cause.PolicyInvalid},
		"CAP_SYS_RAWIO":                 {"capabilities: [CAP_SYS_RAWIO]", cause.PolicyInvalid},
		"CAP_MKNOD":                     {"capabilities: [CAP_MKNOD]", cause.PolicyInvalid},
		"CAP_SYS_PTRACE":                {"capabilities: [CAP_SYS_PTRACE]", cause.PolicyInvalid},
		"all capabilities":              {"capabilities: [ALL]", cause.PolicyInvalid},
	} {
		if _, err := policy.DecodeYAML([]byte(with(c.run))); cause.Of(err) != c.code || !strings.Contains(err.Error(), "run") {
			t.Errorf("%s: %v, expected %s", what, err, c.code)
		}
	}
}
