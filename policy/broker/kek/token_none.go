//go:build !pkcs11

package kek

import "github.com/cc-runtime/cvm-agent/policy/cause"

func openToken(PKCS11, string) (Source, error) {
	return nil, cause.New(cause.Config, "kek.pkcs11: this program was built without PKCS #11, which needs cgo: use cvm-broker-pkcs11 or cvmctl-pkcs11 (make broker-pkcs11)")
}

// CreateTokenKey makes the AES key object that c names, in builds that can.
func CreateTokenKey(Config, string) error {
	_, err := openToken(PKCS11{}, "")
	return err
}
