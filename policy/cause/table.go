package cause

// The codes. One line each in Table says what it means.
const (
	Internal  Code = "internal"
	Usage     Code = "usage"
	Config    Code = "config-invalid"
	Cancelled Code = "cancelled"

	// policy
	PolicyMissing          Code = "policy-missing"
	PolicyTooLarge         Code = "policy-too-large"
	PolicyMalformed        Code = "policy-malformed"
	PolicyUnknownField     Code = "policy-unknown-field"
	PolicyInvalid          Code = "policy-invalid"
	PolicyImageNotByDigest Code = "policy-image-not-by-digest"
	PolicyUnsigned         Code = "policy-unsigned"
	PolicySignature        Code = "policy-signature-invalid"
	PolicyExpired          Code = "policy-expired"
	PolicyBelowFloor       Code = "policy-version-below-floor"
	PolicyNotNewer         Code = "policy-version-not-newer"
	PolicyOtherName        Code = "policy-name-differs"
	PolicyRotation         Code = "policy-rotation-invalid"
	InitdataMalformed      Code = "initdata-malformed"
	LaunchBinding          Code = "launch-binding-mismatch"
	LaunchUnbound          Code = "launch-binding-missing"
	PlatformNotAllowed     Code = "platform-not-allowed"

	// early stage
	EarlyFailed     Code = "early-failed"
	CmdlineChanged  Code = "cmdline-changed"
	SMBIOSRefused   Code = "smbios-refused"
	RegisterNotZero Code = "register-not-zero"
	SeedMissing     Code = "seed-missing"
	SeedAmbiguous   Code = "seed-ambiguous"
	SeedMalformed   Code = "seed-malformed"
	SeedRefused     Code = "seed-refused"
	VerityFailed    Code = "verity-failed"
	ScratchFailed   Code = "scratch-failed"

	// event log and register
	EventLogDiverged Code = "eventlog-diverged"
	EventLogWrite    Code = "eventlog-write-failed"

	// platform, broker and keys
	TPMUnavailable     Code = "tpm-unavailable"
	EvidenceFailed     Code = "evidence-failed"
	RTMRUnavailable    Code = "rtmr-unavailable"
	BrokerUnavailable  Code = "broker-unavailable"
	BrokerProtocol     Code = "broker-protocol-error"
	BrokerTLS          Code = "broker-tls-untrusted"
	AttestationRefused Code = "attestation-refused"
	EvidenceRefused    Code = "evidence-refused"
	EvidenceMalformed  Code = "evidence-malformed"
	TokenInvalid       Code = "token-invalid"
	KeyRefused         Code = "key-refused"
	KeyMalformed       Code = "key-malformed"
	BrokerMarkMissing  Code = "broker-mark-missing"

	// registry and image
	RegistryUnavailable Code = "registry-unavailable"
	RegistryRedirect    Code = "registry-redirect-refused"
	RegistryTLS         Code = "registry-tls-untrusted"
	ImageNotFound       Code = "image-not-found"
	ManifestMismatch    Code = "manifest-digest-mismatch"
	ManifestMalformed   Code = "manifest-malformed"
	ImageUnsigned       Code = "image-unsigned"
	SignatureInvalid    Code = "image-signature-invalid"
	SignatureOtherImage Code = "image-signature-of-another-image"
	SBOMMissing         Code = "sbom-attestation-missing"
	SBOMSignature       Code = "sbom-attestation-signature-invalid"
	SBOMOtherImage      Code = "sbom-attestation-of-another-image"
	EncryptionRequired  Code = "image-not-encrypted"
	LayerMismatch       Code = "layer-digest-mismatch"
	LayerTruncated      Code = "layer-truncated"
	LayerTooLarge       Code = "layer-too-large"
	LayerDecrypt        Code = "layer-decryption-failed"
	LayerMalformed      Code = "layer-malformed"
	ImageLimits         Code = "image-limits-exceeded"
	CacheTampered       Code = "image-cache-tampered"
	StorageFull         Code = "storage-full"
	StorageFailed       Code = "storage-failed"

	// SBOM regeneration and comparison
	SandboxUnavailable Code = "sbom-sandbox-unavailable"
	SBOMScanFailed     Code = "sbom-scan-failed"
	SBOMScanLimits     Code = "sbom-scan-limits-exceeded"
	SBOMMalformed      Code = "sbom-malformed"
	SBOMDiffers        Code = "sbom-differs"

	// workload
	PodmanUnavailable  Code = "podman-unavailable"
	WorkloadStart      Code = "workload-start-failed"
	WorkloadUnhealthy  Code = "workload-unhealthy"
	WorkloadOtherImage Code = "workload-other-image"

	// orders
	NotPermitted      Code = "not-permitted"
	NotFound          Code = "not-found"
	NotReady          Code = "not-ready"
	Busy              Code = "busy"
	Destroyed         Code = "destroyed"
	UpgradeRolledBack Code = "upgrade-rolled-back"
	RollbackFailed    Code = "rollback-failed"
	DestroyFailed     Code = "destroy-incomplete"
	DeadlineExceeded  Code = "deadline-exceeded"
	AgentUnavailable  Code = "agent-unavailable"

	// signed orders
	OrderMalformed     Code = "order-malformed"
	OrderUnsigned      Code = "order-unsigned"
	OrderSignature     Code = "order-signature-invalid"
	OrderOperation     Code = "order-other-operation"
	OrderOtherPolicy   Code = "order-of-another-policy"
	OrderOtherInstance Code = "order-of-another-instance"
	OrderOtherBoot     Code = "order-of-another-boot"
	OrderCarries       Code = "order-digest-mismatch"
	OrderExpired       Code = "order-expired"
	OrderTooLong       Code = "order-expiry-too-far"
	OrderChallenge     Code = "order-challenge-unknown"
	OrderReplayed      Code = "order-replayed"

	// the broker's records
	AuditBroken Code = "audit-log-broken"

	// publishing
	PublishFailed      Code = "publish-failed"
	PublishCheckFailed Code = "publish-check-failed"

	// predicting measurements
	MeasureInput Code = "measure-input-malformed"
)

// Row documents one code.
type Row struct {
	Code    Code
	Exit    int
	Meaning string // one line, for README and `--help`
}

// Table is the contract: every code, its exit status and its meaning.
var Table = []Row{
	{Internal, ExitInternal, "a defect or an unexpected system error"},
	{Usage, ExitUsage, "bad flags or arguments"},
	{Config, ExitUsage, "the configuration file cannot be used"},
	{Cancelled, ExitInternal, "stopped by a signal before the end"},

	{PolicyMissing, ExitRefused, "no signed policy in the initdata"},
	{PolicyTooLarge, ExitMalformed, "the policy is larger than 1 MiB"},
	{PolicyMalformed, ExitMalformed, "the policy, or its envelope, cannot be decoded"},
	{PolicyUnknownField, ExitMalformed, "the policy has a field that this version does not know"},
	{PolicyInvalid, ExitRefused, "the policy decodes but breaks a rule"},
	{PolicyImageNotByDigest, ExitRefused, "a workload names its image by tag, not by digest"},
	{PolicyUnsigned, ExitRefused, "the policy carries no signature"},
	{PolicySignature, ExitRefused, "too few valid signatures by trusted signers"},
	{PolicyExpired, ExitRefused, "the policy's expiry has passed"},
	{PolicyBelowFloor, ExitRefused, "the policy's version is below the floor"},
	{PolicyNotNewer, ExitRefused, "an upgrade's version is not higher than the running one"},
	{PolicyOtherName, ExitRefused, "an upgrade's policy has another name"},
	{PolicyRotation, ExitRefused, "the signer rotation is not signed by both old and new keys"},
	{InitdataMalformed, ExitMalformed, "the initdata cannot be decoded"},
	{LaunchBinding, ExitRefused, "the launch-bound register does not match the initdata"},
	{LaunchUnbound, ExitRefused, "the launch-bound register is zero"},
	{PlatformNotAllowed, ExitRefused, "this platform is not in the policy's list"},

	{EarlyFailed, ExitInternal, "the early stage cannot mount, load a module or hand over"},
	{CmdlineChanged, ExitRefused, "the kernel's command line is not the one that the image was built with"},
	{SMBIOSRefused, ExitRefused, "the host's SMBIOS tables name a seed, a credential or a command line"},
	{RegisterNotZero, ExitRefused, "something measured into a register before the early stage"},
	{SeedMissing, ExitRefused, "there is no seed disk"},
	{SeedAmbiguous, ExitRefused, "there is more than one seed disk"},
	{SeedMalformed, ExitMalformed, "the seed disk, or a file of it, cannot be decoded"},
	{SeedRefused, ExitRefused, "the seed has a key or a value that is not on the allow-list"},
	{VerityFailed, ExitRefused, "the root's partitions are not there, or not what the root hash says"},
	{ScratchFailed, ExitStorage, "the scratch storage cannot be made"},

	{EventLogDiverged, ExitRefused, "the event log does not replay to the register"},
	{EventLogWrite, ExitStorage, "the event log cannot be written"},

	{TPMUnavailable, ExitUnavailable, "the TPM does not answer"},
	{EvidenceFailed, ExitRefused, "evidence cannot be made"},
	{RTMRUnavailable, ExitRefused, "the kernel offers no RTMR3 to extend: Linux 6.16 or newer has it"},
	{BrokerUnavailable, ExitUnavailable, "the key broker did not answer before the deadline"},
	{BrokerProtocol, ExitRefused, "the key broker answered outside its protocol"},
	{BrokerTLS, ExitRefused, "the key broker's certificate does not chain to the policy's roots"},
	{AttestationRefused, ExitRefused, "the key broker refused the evidence"},
	{EvidenceRefused, ExitRefused, "a check of the evidence, or of the rule that it must satisfy, failed"},
	{EvidenceMalformed, ExitMalformed, "the evidence, or a certificate or log beside it, cannot be decoded"},
	{TokenInvalid, ExitRefused, "the broker's token is not by a key that the policy pins, or not over this session"},
	{KeyRefused, ExitRefused, "the key broker refused the key"},
	{KeyMalformed, ExitRefused, "the released key, its envelope or its wrapping is not usable"},
	{BrokerMarkMissing, ExitRefused, "the broker gave no signed version mark and the measured image requires one"},

	{RegistryUnavailable, ExitUnavailable, "the registry did not answer before the deadline"},
	{RegistryRedirect, ExitRefused, "the registry redirected to a host that the policy does not name"},
	{RegistryTLS, ExitRefused, "the registry's certificate does not chain to the policy's roots"},
	{ImageNotFound, ExitRefused, "the registry does not have the image"},
	{ManifestMismatch, ExitRefused, "the manifest does not have the digest that the policy names"},
	{ManifestMalformed, ExitMalformed, "the manifest or image configuration cannot be decoded or exceeds its limits"},
	{ImageUnsigned, ExitRefused, "the image has no signature"},
	{SignatureInvalid, ExitRefused, "no signature by a key that the policy requires"},
	{SignatureOtherImage, ExitRefused, "a signature verifies but is of another image or repository"},
	{SBOMMissing, ExitRefused, "the image has no SBOM attestation"},
	{SBOMSignature, ExitRefused, "no SBOM attestation by a key that the policy requires"},
	{SBOMOtherImage, ExitRefused, "the SBOM attestation is of another image"},
	{EncryptionRequired, ExitRefused, "the policy requires encryption and a layer is plain"},
	{LayerMismatch, ExitRefused, "a layer's bytes do not have the digest, HMAC or diff ID that was signed"},
	{LayerTruncated, ExitRefused, "a layer ended before its signed size"},
	{LayerTooLarge, ExitRefused, "a layer is longer than its signed size"},
	{LayerDecrypt, ExitRefused, "a layer cannot be decrypted with the released key"},
	{LayerMalformed, ExitMalformed, "a layer is not a usable tar stream"},
	{ImageLimits, ExitRefused, "the image exceeds the limits on layers, files, bytes or ratio"},
	{CacheTampered, ExitRefused, "a layer in storage is no longer what was verified"},
	{StorageFull, ExitStorage, "no space left on the storage"},
	{StorageFailed, ExitStorage, "the container storage cannot be used"},

	{SandboxUnavailable, ExitRefused, "a part of the scanner's sandbox cannot be set"},
	{SBOMScanFailed, ExitRefused, "the SBOM could not be regenerated"},
	{SBOMScanLimits, ExitRefused, "the scanner exceeded its memory, time or output limit"},
	{SBOMMalformed, ExitMalformed, "an SBOM cannot be decoded"},
	{SBOMDiffers, ExitRefused, "the regenerated SBOM differs from the signed one"},

	{PodmanUnavailable, ExitUnavailable, "podman's service did not answer before the deadline"},
	{WorkloadStart, ExitWorkload, "podman could not start the container"},
	{WorkloadUnhealthy, ExitWorkload, "the container did not become healthy before its deadline"},
	{WorkloadOtherImage, ExitRefused, "podman's container is not of the verified image"},

	{NotPermitted, ExitRefused, "the caller may not do this"},
	{NotFound, ExitRefused, "the key broker holds nothing of that name"},
	{NotReady, ExitUnavailable, "orders are accepted only once the launch is ready"},
	{Busy, ExitUnavailable, "another order is under way"},
	{Destroyed, ExitRefused, "this instance is destroyed"},
	{UpgradeRolledBack, ExitWorkload, "the upgrade failed and the last good version runs again"},
	{RollbackFailed, ExitWorkload, "the upgrade failed and the last good version could not be restored"},
	{DestroyFailed, ExitStorage, "destroy could not remove everything; what remains is named"},
	{DeadlineExceeded, ExitUnavailable, "a phase did not finish before its deadline"},
	{AgentUnavailable, ExitUnavailable, "the agent's control socket does not answer"},

	{OrderMalformed, ExitMalformed, "the order, or its envelope, cannot be decoded"},
	{OrderUnsigned, ExitRefused, "an order without a signature, where one is needed"},
	{OrderSignature, ExitRefused, "no signature by a key that the policy names for this order"},
	{OrderOperation, ExitRefused, "the order is for another operation"},
	{OrderOtherPolicy, ExitRefused, "the order is for another policy"},
	{OrderOtherInstance, ExitRefused, "the order is for another instance"},
	{OrderOtherBoot, ExitRefused, "the order is for another boot of this instance"},
	{OrderCarries, ExitRefused, "the order carries something else than what was signed"},
	{OrderExpired, ExitRefused, "the order's expiry has passed"},
	{OrderTooLong, ExitRefused, "the order's expiry is further ahead than is accepted"},
	{OrderChallenge, ExitRefused, "the challenge is none that this agent gave out and still waits for"},
	{OrderReplayed, ExitRefused, "the challenge has been used: the order was given before"},

	{AuditBroken, ExitRefused, "the audit log's hash chain is broken, or it is no audit log"},
	{PublishFailed, ExitInternal, "an image could not be built, encrypted, signed or pushed"},
	{PublishCheckFailed, ExitRefused, "what was pushed is not what was asked for"},
	{MeasureInput, ExitMalformed, "a firmware, image, table or key cannot be measured as it is"},
}

var byCode = func() map[Code]Row {
	m := make(map[Code]Row, len(Table))
	for _, r := range Table {
		m[r.Code] = r
	}
	return m
}()
