package launch

import "github.com/cc-runtime/cvm-agent/policy"

type Verified struct {
	Policy  *policy.Policy
	Digest  string
	Signers []string
}
type Kind string

const (
	KindPolicy       Kind = "policy"
	KindImage        Kind = "image"
	KindPolicyStaged Kind = "policy-staged"
	KindImageStaged  Kind = "image-staged"
	KindCommitted    Kind = "committed"
	KindRolledBack   Kind = "rolled-back"
	KindDestroy      Kind = "destroy"
)

type Event struct {
	Kind                 Kind
	Policy, PolicyDigest string
	PolicyVersion        uint64
	Signers              []string
	Workload, Image      string
	Reason               string
}
