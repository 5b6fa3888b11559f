package kbs

import (
	"fmt"
	"net/http"
	"strings"
)

// ErrorPrefix precedes the variant in ErrorBody.Type.
const ErrorPrefix = "https://github.com/confidential-containers/kbs/errors/"

// The variants that this project sends or branches on.
const (
	VariantInvalidRequestPath  = "InvalidRequestPath"  // 404
	VariantPluginNotFound      = "PluginNotFound"      // 404
	VariantPluginInternalError = "PluginInternalError" // no such resource
	VariantPolicyDeny          = "PolicyDeny"          // a rule said no; never retried
	VariantAttestationError    = "AttestationError"    // evidence, session or version not accepted
	VariantTokenNotFound       = "TokenNotFound"       // neither cookie nor bearer token of an attested session
	VariantTokenVerifierError  = "TokenVerifierError"  // the bearer token is not by this broker or has expired
	VariantSerdeError          = "SerdeError"          // the body cannot be decoded
	VariantJWEError            = "JweError"            // the resource cannot be encrypted to the TEE key
	VariantRateLimited         = "RateLimited"         // 429 with Retry-After, our broker's: to be tried again
	VariantAdminAuthAccess     = "AdminAuthAccess"     // the admin token is missing or wrong
)

// VersionMismatch is in the detail when the protocol versions differ.
const VersionMismatch = "KBS Client Protocol Version Mismatch"

// ErrorBody is the body of every error.
type ErrorBody struct {
	Type   string `json:"type"`
	Detail string `json:"detail"`
}

// Error is an error answer of a broker.
type Error struct {
	Status int // HTTP status
	Body   ErrorBody
}

// NewError makes the error with the protocol's status: 404 for a path or
// plugin that is not there, 401 for everything else.
func NewError(variant, format string, args ...any) *Error {
	status := http.StatusUnauthorized
	if variant == VariantInvalidRequestPath || variant == VariantPluginNotFound {
		status = http.StatusNotFound
	}
	return &Error{Status: status, Body: ErrorBody{Type: ErrorPrefix + variant, Detail: fmt.Sprintf(format, args...)}}
}

// DecodeError reads an error answer. A body that is no error body still gives
// an Error, with the status and no variant: the caller refuses all the same.
func DecodeError(status int, body []byte) *Error {
	e := &Error{Status: status}
	if err := decode(body, &e.Body, "error body"); err != nil {
		e.Body = ErrorBody{Detail: "the answer has no error body"}
	}
	e.Body.Type, e.Body.Detail = clip(e.Body.Type), clip(e.Body.Detail)
	return e
}

// Variant is the suffix of the type, or "" when the type is not the
// protocol's. Branch on this, not on the status.
func (e *Error) Variant() string {
	v, ok := strings.CutPrefix(e.Body.Type, ErrorPrefix)
	if !ok {
		return ""
	}
	return v
}

func (e *Error) Error() string {
	if v := e.Variant(); v != "" {
		return fmt.Sprintf("broker answered %d %s: %s", e.Status, v, e.Body.Detail)
	}
	return fmt.Sprintf("broker answered %d: %s", e.Status, e.Body.Detail)
}
