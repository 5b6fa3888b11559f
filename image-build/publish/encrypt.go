package publish

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"strings"

	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// The key provider that Confidential Containers guests unwrap with, and the
// annotation that carries its packets.
const (
	provider           = "provider.attestation-agent"
	providerAnnotation = "org.opencontainers.image.enc.keys." + provider
)

// kekSize is the key encryption key's length in bytes (A256GCM).
const kekSize = 32

// packet is the attestation-agent's annotation packet, version 1. Byte fields
// are standard base64 in JSON.
type packet struct {
	KID         string `json:"kid"`          // kbs:///repository/type/tag
	WrappedData []byte `json:"wrapped_data"` // ciphertext ‖ 16-byte tag, no AAD
	IV          []byte `json:"iv"`           // 12 bytes
	WrapType    string `json:"wrap_type"`    // A256GCM
}

// wrapper wraps layer keys in-process, so the KEK crosses no pipe, argv or
// environment. It holds no state: ocicrypt's registry is global, and the key
// of one run travels in that run's EncryptConfig.
type wrapper struct{}

func init() { ocicrypt.RegisterKeyWrapper(provider, wrapper{}) }

// WrapKeys implements keywrap.KeyWrapper. No parameters for this provider: no
// packet, as ocicrypt asks every registered wrapper.
func (wrapper) WrapKeys(ec *config.EncryptConfig, optsData []byte) ([]byte, error) {
	params, ok := ec.Parameters[provider]
	if !ok {
		return nil, nil
	}
	if len(params) != 2 || len(params[0]) != kekSize {
		return nil, errors.New("attestation-agent: expected a 32-byte key and its identifier")
	}
	block, err := aes.NewCipher(params[0])
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	iv := make([]byte, gcm.NonceSize())
	if _, err := rand.Read(iv); err != nil {
		return nil, err
	}
	return json.Marshal(packet{string(params[1]), gcm.Seal(nil, iv, optsData, nil), iv, "A256GCM"})
}

// UnwrapKey implements keywrap.KeyWrapper: a publisher only wraps.
func (wrapper) UnwrapKey(*config.DecryptConfig, []byte) ([]byte, error) {
	return nil, errors.New("attestation-agent: this program only wraps keys")
}

func (wrapper) GetAnnotationID() string                      { return providerAnnotation }
func (wrapper) NoPossibleKeys(map[string][][]byte) bool      { return true }
func (wrapper) GetPrivateKeys(map[string][][]byte) [][]byte  { return nil }
func (wrapper) GetKeyIdsFromPacket(string) ([]uint64, error) { return nil, nil }
func (wrapper) GetRecipients(string) ([]string, error)       { return []string{"[attestation-agent]"}, nil }

// encryption is what the copy needs to encrypt, nil for a plain image.
type encryption struct {
	config   *config.EncryptConfig
	kek      []byte // nil with JWE recipients alone
	resource string
}

// newEncryption draws the KEK and reads the recipients' public keys.
func newEncryption(o *Options) (*encryption, error) {
	if !o.Encrypt && len(o.Recipients) == 0 {
		return nil, nil
	}
	e := &encryption{}
	var configs []config.CryptoConfig
	var jwe [][]byte
	for _, r := range o.Recipients {
		pem, err := bounded.ReadNamed(strings.TrimPrefix(r, "jwe:"), 64<<10)
		if err != nil {
			return nil, cause.New(cause.Usage, "--recipient %s: %w", r, err)
		}
		jwe = append(jwe, pem)
	}
	if len(jwe) > 0 {
		c, err := config.EncryptWithJwe(jwe)
		if err != nil {
			return nil, cause.New(cause.Usage, "recipients: %w", err)
		}
		configs = append(configs, c)
	}
	if o.Encrypt {
		e.kek = make([]byte, kekSize)
		if _, err := rand.Read(e.kek); err != nil {
			return nil, cause.New(cause.Internal, "random key: %w", err)
		}
		e.resource = o.Resource
		if e.resource == "" {
			e.resource = "kbs:///default/key/" + o.Workload + "-" + strings.ToLower(rand.Text()[:12])
		}
		configs = append(configs, config.CryptoConfig{EncryptConfig: &config.EncryptConfig{
			Parameters: map[string][][]byte{provider: {e.kek, []byte(e.resource)}},
		}})
	}
	e.config = config.CombineCryptoConfigs(configs).EncryptConfig
	return e, nil
}

// erase zeroises the KEK.
func (e *encryption) erase() {
	if e != nil {
		clear(e.kek)
	}
}
