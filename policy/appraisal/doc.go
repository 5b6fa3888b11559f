// Package appraisal judges evidence: first whether it is genuine and fresh and
// what it proves (a Verifier per TEE), then whether what it proves satisfies a
// release rule (Judge). The broker uses both, and so can anyone offline.
//
// It promises: a verdict is a table of named checks with what was expected and
// what was found; what was not checked is in the table as not checked; a
// verdict without its required checks is a refusal. Time is a parameter, no
// connection is opened. No TEE "sample" is known here, in any build.
package appraisal
