package measurecmd

import (
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/hex"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/image-build/measure"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
)

const maxKeyFile = 64 << 10

// signedBlock is what snp-id-block says.
type signedBlock struct {
	IDBlock         string `json:"idBlock"` // standard base64, as QEMU takes it
	IDAuth          string `json:"idAuth"`
	IDKeyDigest     string `json:"idKeyDigest"`
	AuthorKeyDigest string `json:"authorKeyDigest,omitempty"`
}

func idBlockCommand() *cobra.Command {
	var o out
	var digest, idKey, authorKey, family, image, policy string
	var svn uint32
	c := &cobra.Command{
		Use:   "snp-id-block --launch-digest HEX --id-key FILE [--author-key FILE]",
		Short: "Make and sign an SEV-SNP ID block",
		Long: "Snp-id-block says which launch a guest owner means, and signs it: firmware then refuses any other\n" +
			"launch with this block, and every report names the keys. Keys are ECDSA P-384 in PEM. QEMU takes the\n" +
			"result as id-block=… and id-auth=… of its sev-snp-guest object, with author-key-enabled=on where\n" +
			"there is an author key, and its policy must be the one here.",
		Example: "  openssl ecparam -name secp384r1 -genkey -noout -out id.pem\n" +
			"  cvmctl measure snp-id-block --launch-digest … --id-key id.pem --author-key author.pem",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := require(c, "launch-digest", "id-key"); err != nil {
				return err
			}
			b := measure.IDBlock{GuestSVN: svn}
			if err := bytesOf("launch-digest", digest, b.LaunchDigest[:]); err != nil {
				return err
			}
			for _, f := range []struct {
				name, value string
				to          []byte
			}{{"family-id", family, b.FamilyID[:]}, {"image-id", image, b.ImageID[:]}} {
				if f.value != "" {
					if err := bytesOf(f.name, f.value, f.to); err != nil {
						return err
					}
				}
			}
			var err error
			if b.Policy, err = number("policy", policy); err != nil {
				return err
			}
			id, err := key(idKey)
			if err != nil {
				return err
			}
			var author *ecdsa.PrivateKey
			if authorKey != "" {
				if author, err = key(authorKey); err != nil {
					return err
				}
			}
			s, err := measure.SignIDBlock(b, id, author)
			if err != nil {
				return err
			}
			r := signedBlock{IDBlock: base64.StdEncoding.EncodeToString(s.Block), IDAuth: base64.StdEncoding.EncodeToString(s.Auth), IDKeyDigest: hex.EncodeToString(s.IDKeyDigest[:])}
			text := fmt.Sprintf("id-block=%s\nid-auth=%s\nid key digest %s\n", r.IDBlock, r.IDAuth, r.IDKeyDigest)
			if author != nil {
				r.AuthorKeyDigest = hex.EncodeToString(s.AuthorKeyDigest[:])
				text += fmt.Sprintf("author key digest %s\n", r.AuthorKeyDigest)
			}
			return o.print(c, r, text, release.Launch{Platform: release.PlatformSNP, SNP: &release.SNPLaunch{
				Measurement: hex.EncodeToString(b.LaunchDigest[:]), IDKeyDigest: r.IDKeyDigest, AuthorKeyDigest: r.AuthorKeyDigest,
				FamilyID: hex.EncodeToString(b.FamilyID[:]), ImageID: hex.EncodeToString(b.ImageID[:]), MinimumGuestSVN: svn,
			}})
		},
	}
	f := c.Flags()
	f.StringVar(&digest, "launch-digest", "", "launch digest, `HEX`, what `cvmctl measure snp` prints")
	f.StringVar(&idKey, "id-key", "", "private ID key `FILE`")
	f.StringVar(&authorKey, "author-key", "", "private author key `FILE`, which signs the ID key")
	f.StringVar(&family, "family-id", "", "16 bytes in `HEX`; default zero")
	f.StringVar(&image, "image-id", "", "16 bytes in `HEX`; default zero")
	f.Uint32Var(&svn, "guest-svn", 0, "security version of the guest")
	f.StringVar(&policy, "policy", "0x30000", "guest policy of the launch, `HEX`")
	o.flags(c)
	return c
}

func key(path string) (*ecdsa.PrivateKey, error) {
	data, err := read(path, maxKeyFile)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	k, err := measure.ParseKey(data)
	if err != nil {
		return nil, named(path, err)
	}
	return k, nil
}
