// Package cause holds the stable cause codes: every failure that a user can
// meet carries exactly one, and each code maps to one documented exit status.
//
// A cause code never changes its meaning. Adding one means adding a row to
// Table; a test keeps the table, the README and the constants in step.
package cause

import (
	"errors"
	"fmt"
)

// Code is a stable, kebab-case name of the check that failed.
type Code string

// Exit statuses shared by every program of the project.
const (
	ExitOK          = 0  // done
	ExitInternal    = 1  // a defect or an unexpected system error
	ExitUsage       = 2  // bad flags, arguments or configuration file
	ExitRefused     = 10 // a check said no: nothing was run, nothing was released
	ExitUnavailable = 20 // a registry, broker, TPM or podman did not answer before the deadline
	ExitStorage     = 21 // storage full or unusable
	ExitWorkload    = 22 // the verified workload did not start or did not become healthy
	ExitMalformed   = 30 // input that cannot be decoded
)

// ExitHelp is the table of exit statuses for the help text of every program.
const ExitHelp = `Exit status:
  0   done
  1   a defect or an unexpected system error
  2   bad flags, arguments or configuration file
  10  a check said no: nothing was run, nothing was released
  20  something outside did not answer before the deadline
  21  storage full or unusable
  22  the verified workload did not start or did not become healthy
  30  input that cannot be decoded`

// Error couples a failure with its cause code. The text of Err is the one line
// that a person reads; it holds no secret.
type Error struct {
	Code Code
	Err  error
}

func (e *Error) Error() string { return string(e.Code) + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// New returns an error with the code and a formatted one-line text (%w works).
func New(code Code, format string, args ...any) error {
	return &Error{Code: code, Err: fmt.Errorf(format, args...)}
}

// Wrap gives err the code, unless err already carries one: the innermost,
// most precise code wins. Wrap(nil) is nil.
func Wrap(code Code, err error) error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	return &Error{Code: code, Err: err}
}

// Known says whether there is such a code.
func Known(c Code) bool {
	_, ok := byCode[c]
	return ok
}

// Of returns the code that err carries, or Internal if it carries none, or ""
// for nil.
func Of(err error) Code {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return Internal
}

// Exit returns the exit status that belongs to err (ExitOK for nil).
func Exit(err error) int {
	if err == nil {
		return ExitOK
	}
	if row, ok := byCode[Of(err)]; ok {
		return row.Exit
	}
	return ExitInternal
}
