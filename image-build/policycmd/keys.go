package policycmd

import (
	"bytes"
	"crypto"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/dsse"
	"github.com/cc-runtime/cvm-agent/policy/dsse/signkey"
)

const maxKeyFile = 64 << 10

// passwordVariable is cosign's, so that one environment serves both programs.
const passwordVariable = "COSIGN_PASSWORD"

// LoadSigners reads private keys. The passphrase of an encrypted one comes from
// passwordFile, the environment variable of cosign or the terminal; never from
// an argument, which every process of the machine could read.
func LoadSigners(c *cobra.Command, paths []string, passwordFile string) ([]dsse.Signer, error) {
	var signers []dsse.Signer
	for _, path := range paths {
		pemKey, err := readInput(c, path, maxKeyFile, cause.KeyMalformed)
		if err != nil {
			return nil, err
		}
		var pass []byte
		if signkey.Encrypted(pemKey) {
			if pass, err = passphrase(c, path, passwordFile); err != nil {
				return nil, err
			}
		}
		s, err := signkey.Load(pemKey, pass)
		clear(pass)
		clear(pemKey)
		if err != nil {
			return nil, cause.New(cause.KeyMalformed, "%s: %w", path, err)
		}
		signers = append(signers, s)
	}
	return signers, nil
}

func passphrase(c *cobra.Command, key, file string) ([]byte, error) {
	if file != "" {
		data, err := bounded.ReadNamed(file, 4096)
		if err != nil {
			return nil, cause.Wrap(cause.Usage, err)
		}
		line, _, _ := bytes.Cut(data, []byte("\n"))
		return bytes.TrimSuffix(line, []byte("\r")), nil
	}
	if p, set := os.LookupEnv(passwordVariable); set {
		return []byte(p), nil
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, cause.New(cause.Usage, "%s is encrypted: give its passphrase in %s, --password-file or at a terminal", key, passwordVariable)
	}
	defer tty.Close()
	fmt.Fprintf(tty, "Passphrase of %s: ", key)
	p, err := term.ReadPassword(int(tty.Fd()))
	fmt.Fprintln(tty)
	return p, cause.Wrap(cause.Usage, err)
}

// loadPublicKeys reads files of one or more PEM public keys and returns them
// with their fingerprints and the concatenated PEM.
func loadPublicKeys(c *cobra.Command, paths []string) (keys []crypto.PublicKey, fingerprints []string, pem []byte, err error) {
	for _, path := range paths {
		data, err := readInput(c, path, maxKeyFile, cause.KeyMalformed)
		if err != nil {
			return nil, nil, nil, err
		}
		list, err := dsse.ParsePublicKeysPEM(data)
		if err != nil {
			return nil, nil, nil, cause.New(cause.KeyMalformed, "%s: %w", path, err)
		}
		for _, k := range list {
			id, err := dsse.Fingerprint(k)
			if err != nil {
				return nil, nil, nil, cause.New(cause.KeyMalformed, "%s: %w", path, err)
			}
			text, err := dsse.MarshalPublicKeyPEM(k)
			if err != nil {
				return nil, nil, nil, cause.New(cause.KeyMalformed, "%s: %w", path, err)
			}
			keys, fingerprints, pem = append(keys, k), append(fingerprints, id), append(pem, text...)
		}
	}
	return keys, fingerprints, pem, nil
}

func parseEnvelope(data []byte) (*dsse.Envelope, error) { return dsse.Parse(data) }
