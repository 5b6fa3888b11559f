// Package launch is the life of the guest: the launch, the upgrade, the
// rollback and the destroy, each as a list of named phases. Start reading at
// the function launch, then upgrade, rollback and destroy.
//
// The launch:
//
//	phase        of        what it settles                                        deadline
//	policy       guest     launch binding, signers, version, expiry, event log    1m
//	attest       guest     evidence, broker session, version mark, broker's time  broker (5m)
//	resolve      workload  the manifest by digest, encrypted as the policy says   registry (5m)
//	signature    workload  who signed the image             } side by side        registry
//	attestation  workload  who signed its SBOM              }                     registry
//	measure      workload  the image is in the event log                          1m
//	key          workload  layer keys and secrets, in a new broker session        broker
//	fetch        workload  layers, decrypted and checked, in podman's storage     fetch (30m)
//	sbom         workload  the regenerated SBOM equals the signed one             sbom (10m)
//	clear        guest     containers of an earlier run are gone                  start (2m)
//	start        workload  a container of the verified image                      start
//	healthy      workload  the workload's own word                                its check's
//	ready        guest     READY=1; orders are accepted from here                 1m
//
// Workloads go through resolve to attestation side by side, and through key to
// sbom side by side. Between the two every image is measured, and no image is
// measured later: so no key is ever asked for in a session that is older than
// the last extend. No container starts before everything is verified; starts
// follow the policy's order.
//
// Each phase has one outcome: ok, skipped (with why) or failed (with a cause
// code). While something outside does not answer, the phase says so and tries
// again until its deadline; a refusal is never repeated. The first failure
// ends the sequence and everything that it began is removed: containers,
// secrets, images.
//
// Which order may interrupt which is the table in orders.go. The package
// verifies, fetches and runs nothing itself: needs.go says what it asks of
// others, wire.go puts the real ones in.
package launch
