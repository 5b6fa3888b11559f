package brokercmd

import (
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/broker/kek"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// kekCommand works on the token itself, not on a broker.
func (o *options) kekCommand() *cobra.Command {
	var p kek.PKCS11
	create := &cobra.Command{
		Use:   "create --module FILE --token LABEL --key LABEL --pin-file FILE",
		Short: "Make the AES key in a PKCS #11 token that wraps a broker's data key",
		Long: "Make an AES-256 key in a PKCS #11 token, one that cannot be taken out: what a broker's configuration names as\n" +
			"kek.pkcs11. A label that is taken is left alone. This needs cvmctl-pkcs11: make broker-pkcs11.",
		Example: "  cvmctl-pkcs11 broker kek create --module /usr/lib/softhsm/libsofthsm2.so --token broker --key kek --pin-file pin",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if p.Module == "" || p.Token == "" || p.Key == "" || p.PINFile == "" {
				return cause.New(cause.Usage, "--module, --token, --key and --pin-file are all needed")
			}
			if err := kek.CreateTokenKey(kek.Config{PKCS11: &p}, ""); err != nil {
				return err
			}
			return o.print(cmd, done{"made", p.Key}, "made the key "+p.Key+" in the token "+p.Token)
		},
	}
	f := create.Flags()
	f.StringVar(&p.Module, "module", "", "the vendor's PKCS #11 library, a `FILE`")
	f.StringVar(&p.Token, "token", "", "`LABEL` of the token")
	f.StringVar(&p.Key, "key", "", "`LABEL` of the key to make")
	f.StringVar(&p.PINFile, "pin-file", "", "`FILE` with the user's PIN, readable by its owner alone")
	return group("kek", "Make a broker's key-encryption key in a PKCS #11 token", create)
}
