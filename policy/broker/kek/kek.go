// Package kek opens the broker's key-encryption key: a file, a systemd
// credential, or an AES key that never leaves a PKCS #11 token.
//
// It promises that no key and no PIN is taken from the command line, the
// environment or a file that others can read. A token needs cgo: only builds
// with the tag pkcs11 can use one, every other build refuses the configuration
// by name.
package kek

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Size is the size of a data key, in bytes (AES-256).
const Size = 32

// Config names exactly one source.
type Config struct {
	File       string  `json:"file,omitempty"`       // 32 bytes, mode 0600
	Credential string  `json:"credential,omitempty"` // name of a systemd credential of 32 bytes
	PKCS11     *PKCS11 `json:"pkcs11,omitempty"`
}

// PKCS11 names an AES key object in a token. The key wraps a random data key;
// the wrapped form is kept in the storage, so brokers that share one need the
// same token key and nothing else.
type PKCS11 struct {
	Module string `json:"module"` // path of the vendor's library
	Token  string `json:"token"`  // label
	Key    string `json:"key"`    // label of the AES key object, one that encrypts and decrypts
	// PINFile (mode 0600) or PINCredential (name of a systemd credential) holds
	// the user's PIN; a line end at its end does not count.
	PINFile       string `json:"pinFile,omitempty"`
	PINCredential string `json:"pinCredential,omitempty"`
}

// Source gives the data key of a storage.
type Source interface {
	// DataKey returns the key, Size bytes, which the caller clears. kept is what
	// an earlier call returned as keep, nil the first time; keep is nil when
	// there is nothing to be kept. What is kept is no secret.
	DataKey(kept []byte) (key, keep []byte, err error)
}

// Validate checks that one source is named, and whole.
func (c Config) Validate() error {
	n := 0
	for _, set := range []bool{c.File != "", c.Credential != "", c.PKCS11 != nil} {
		if set {
			n++
		}
	}
	if n != 1 {
		return errors.New("set exactly one of kek.file, kek.credential and kek.pkcs11")
	}
	if c.Credential != "" {
		if err := credentialName("kek.credential", c.Credential); err != nil {
			return err
		}
	}
	p := c.PKCS11
	if p == nil {
		return nil
	}
	if p.Module == "" || p.Token == "" || p.Key == "" {
		return errors.New("kek.pkcs11: module, token and key are all needed")
	}
	if (p.PINFile == "") == (p.PINCredential == "") {
		return errors.New("kek.pkcs11: set exactly one of pinFile and pinCredential")
	}
	if p.PINCredential != "" {
		return credentialName("kek.pkcs11.pinCredential", p.PINCredential)
	}
	return nil
}

// Open reads what the source needs; credentials is systemd's credentials
// directory, empty when there is none.
func (c Config) Open(credentials string) (Source, error) {
	if err := c.Validate(); err != nil {
		return nil, cause.Wrap(cause.Config, err)
	}
	if p := c.PKCS11; p != nil {
		pin, err := secret(p.PINFile, p.PINCredential, credentials, 1<<10)
		if err != nil {
			return nil, cause.New(cause.Config, "kek.pkcs11: PIN: %w", err)
		}
		return openToken(*p, strings.TrimRight(string(pin), "\r\n"))
	}
	b, err := secret(c.File, c.Credential, credentials, Size)
	if err != nil {
		return nil, cause.New(cause.Config, "KEK: %w", err)
	}
	if len(b) != Size {
		return nil, cause.New(cause.Config, "KEK: %d bytes, expected %d", len(b), Size)
	}
	return plain(b), nil
}

// plain is the key itself.
type plain []byte

func (p plain) DataKey(kept []byte) (key, keep []byte, err error) {
	if kept != nil {
		return nil, nil, cause.New(cause.Config, "KEK: the storage's data key is wrapped by a PKCS #11 token, and none is configured")
	}
	return p, nil, nil
}

func credentialName(what, name string) error {
	if strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") {
		return fmt.Errorf("%s %q is not a name", what, name)
	}
	return nil
}

func secret(file, credential, credentials string, max int64) ([]byte, error) {
	if credential != "" {
		if credentials == "" {
			return nil, fmt.Errorf("credential %q: systemd passed no credentials directory", credential)
		}
		file = filepath.Join(credentials, credential)
	}
	return bounded.ReadSecret(file, max)
}
