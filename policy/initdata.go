package policy

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/gzip"
	"github.com/pelletier/go-toml/v2"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Sizes of initdata. MaxInitdata is what the agent reads; TransportLimit is
// what common transports of initdata carry (cloud user data and VM
// annotations): `cvmctl initdata pack` warns above it, and gzip helps.
const (
	MaxInitdata      = 2 << 20
	TransportLimit   = 256 << 10
	MaxGzipRatio     = 64 // unpacked : packed, beyond the first MinGzipAllowance bytes
	MinGzipAllowance = 64 << 10
)

// InitdataVersion is the only version of the initdata format that there is.
const InitdataVersion = "0.1.0"

// The keys of our initdata.
const (
	KeyPolicy     = "cvm-agent.policy"    // the DSSE envelope, JSON text
	KeyPolicyGzip = "cvm-agent.policy.gz" // the same, gzip in standard base64; never both
	KeySigners    = "cvm-agent.keys"      // concatenated PEM SPKI; trusted by fingerprint alone
	KeyRotation   = "cvm-agent.rotation"  // JSON array of envelopes: the policies that named the next signers, oldest first
)

// Initdata is a parsed Confidential Containers initdata 0.1.0 document. Its
// digest, over Raw, is what a launch is bound to.
type Initdata struct {
	Algorithm string // sha256, sha384 or sha512
	Data      map[string]string
	Raw       []byte
}

type initdataTOML struct {
	Version   string            `toml:"version"`
	Algorithm string            `toml:"algorithm"`
	Data      map[string]string `toml:"data"`
}

// PackInitdata writes an initdata document. The same input gives the same
// bytes: keys are sorted.
func PackInitdata(algorithm string, data map[string]string) ([]byte, error) {
	if err := checkAlgorithm(algorithm); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "version = %q\nalgorithm = %q\n\n[data]\n", InitdataVersion, algorithm)
	for _, key := range sortedKeys(data) {
		v := data[key]
		if !utf8.ValidString(v) || !utf8.ValidString(key) {
			return nil, cause.New(cause.InitdataMalformed, "initdata: the value of %q is not UTF-8", key)
		}
		// A map of one, so that the library alone decides on quoting.
		line, err := toml.Marshal(map[string]string{key: v})
		if err != nil {
			return nil, cause.New(cause.InitdataMalformed, "initdata: %q: %w", key, err)
		}
		out.Write(line)
	}
	parsed, err := ParseInitdata(out.Bytes())
	if err != nil {
		return nil, err
	}
	for key, v := range data {
		if parsed.Data[key] != v {
			return nil, cause.New(cause.InitdataMalformed, "initdata: the value of %q does not survive TOML", key)
		}
	}
	return out.Bytes(), nil
}

// ParseInitdata reads an initdata document of at most MaxInitdata bytes. What
// [data] holds beside our keys is kept; other members are errors. Every error
// is cause InitdataMalformed.
func ParseInitdata(raw []byte) (*Initdata, error) {
	bad := func(format string, args ...any) error {
		return cause.New(cause.InitdataMalformed, "initdata: "+format, args...)
	}
	if len(raw) > MaxInitdata {
		return nil, bad("%d bytes, at most %d are accepted: %w", len(raw), MaxInitdata, bounded.ErrTooLarge)
	}
	if !utf8.Valid(raw) {
		return nil, bad("not UTF-8")
	}
	if err := checkShape(raw); err != nil {
		return nil, bad("%w", err)
	}
	var doc initdataTOML
	if err := toml.NewDecoder(bytes.NewReader(raw)).DisallowUnknownFields().Decode(&doc); err != nil {
		var at *toml.DecodeError
		var strict *toml.StrictMissingError
		switch {
		case errors.As(err, &strict) && len(strict.Errors) > 0:
			line, col := strict.Errors[0].Position()
			return nil, bad("line %d, column %d: %s: %w", line, col, bounded.OneLine(strings.Join(strict.Errors[0].Key(), ".")), bounded.ErrUnknownField)
		case errors.As(err, &at):
			line, col := at.Position()
			return nil, bad("line %d, column %d: %s", line, col, bounded.OneLine(strings.TrimPrefix(at.Error(), "toml: ")))
		}
		return nil, bad("%w", err)
	}
	// The library matches names without case; the format has these three.
	var names map[string]any
	if err := toml.Unmarshal(raw, &names); err != nil {
		return nil, bad("%w", err)
	}
	for name := range names {
		if name != "version" && name != "algorithm" && name != "data" {
			return nil, bad("%s: %w", bounded.OneLine(name), bounded.ErrUnknownField)
		}
	}
	if doc.Version != InitdataVersion {
		return nil, bad("version is %q, expected %q", doc.Version, InitdataVersion)
	}
	if err := checkAlgorithm(doc.Algorithm); err != nil {
		return nil, err
	}
	if len(doc.Data) > maxInitdataEntries {
		return nil, bad("%d entries in [data], at most %d are accepted", len(doc.Data), maxInitdataEntries)
	}
	if doc.Data == nil {
		doc.Data = map[string]string{}
	}
	return &Initdata{Algorithm: doc.Algorithm, Data: doc.Data, Raw: bytes.Clone(raw)}, nil
}

func checkAlgorithm(a string) error {
	if a != "sha256" && a != "sha384" && a != "sha512" {
		return cause.New(cause.InitdataMalformed, "initdata: algorithm is %q, expected sha256, sha384 or sha512", a)
	}
	return nil
}

// Digest is that of the exact bytes of the document, by its algorithm: 32, 48
// or 64 bytes.
func (i *Initdata) Digest() []byte {
	switch i.Algorithm {
	case "sha384":
		d := sha512.Sum384(i.Raw)
		return d[:]
	case "sha512":
		d := sha512.Sum512(i.Raw)
		return d[:]
	default:
		d := sha256.Sum256(i.Raw)
		return d[:]
	}
}

// Envelope is the policy's DSSE envelope, from either form. Without one the
// cause is PolicyMissing, above MaxSize it is PolicyTooLarge.
func (i *Initdata) Envelope() ([]byte, error) {
	plain, packed := i.Data[KeyPolicy], i.Data[KeyPolicyGzip]
	switch {
	case plain != "" && packed != "":
		return nil, cause.New(cause.InitdataMalformed, "initdata: both %s and %s, expected one", KeyPolicy, KeyPolicyGzip)
	case packed != "":
		return GunzipText(packed)
	case plain != "":
		if len(plain) > MaxSize {
			return nil, cause.New(cause.PolicyTooLarge, "the policy envelope has %d bytes, at most %d are accepted", len(plain), MaxSize)
		}
		return []byte(plain), nil
	}
	return nil, cause.New(cause.PolicyMissing, "the initdata carries no policy: neither %s nor %s", KeyPolicy, KeyPolicyGzip)
}

// CarriedEnvelope is the DSSE envelope of what an upgrade carries: the envelope
// itself, or initdata with one. Above MaxSize the cause is PolicyTooLarge; it
// verifies nothing.
func CarriedEnvelope(carried []byte) ([]byte, error) {
	if !bytes.HasPrefix(bytes.TrimSpace(carried), []byte("{")) {
		doc, err := ParseInitdata(carried)
		if err != nil {
			return nil, err
		}
		return doc.Envelope()
	}
	if len(carried) > MaxSize {
		return nil, cause.New(cause.PolicyTooLarge, "the policy envelope has %d bytes, at most %d are accepted", len(carried), MaxSize)
	}
	return carried, nil
}

// Rotation is the chain of older envelopes, oldest first, or nil.
func (i *Initdata) Rotation() ([][]byte, error) {
	text := i.Data[KeyRotation]
	if text == "" {
		return nil, nil
	}
	var list []json.RawMessage
	if err := bounded.DecodeJSON([]byte(text), &list, bounded.Limits{Bytes: MaxInitdata}); err != nil {
		return nil, cause.New(cause.PolicyRotation, "initdata: %s: %w", KeyRotation, err)
	}
	var out [][]byte
	for _, e := range list {
		out = append(out, e)
	}
	return out, nil
}

// OpenInitdata opens the policy that initdata carries, by Open.
func OpenInitdata(i *Initdata, t Trust, now time.Time) (*Verified, error) {
	envelope, err := i.Envelope()
	if err != nil {
		return nil, err
	}
	rotation, err := i.Rotation()
	if err != nil {
		return nil, err
	}
	return Open(envelope, []byte(i.Data[KeySigners]), rotation, t, now)
}

// GzipText packs an envelope for KeyPolicyGzip, always to the same bytes.
func GzipText(envelope []byte) (string, error) {
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return "", err
	}
	if _, err := z.Write(envelope); err != nil {
		return "", err
	}
	if err := z.Close(); err != nil {
		return "", err
	}
	text := base64.StdEncoding.EncodeToString(out.Bytes())
	if _, err := GunzipText(text); err != nil {
		return "", err // what we would refuse to read, we do not write
	}
	return text, nil
}

// GunzipText reads KeyPolicyGzip: one gzip member of at most MaxSize bytes
// unpacked and a ratio of at most MaxGzipRatio.
func GunzipText(text string) ([]byte, error) {
	bad := func(format string, args ...any) error {
		return cause.New(cause.InitdataMalformed, "initdata: "+KeyPolicyGzip+": "+format, args...)
	}
	packed, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, bad("not standard base64")
	}
	limit := int64(min(MaxSize, max(len(packed)*MaxGzipRatio, MinGzipAllowance)))
	in := bytes.NewReader(packed)
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, bad("%w", err)
	}
	z.Multistream(false)
	out, err := bounded.ReadAll(z, limit)
	if errors.Is(err, bounded.ErrTooLarge) {
		return nil, cause.New(cause.PolicyTooLarge, "initdata: %s: %d bytes unpack to more than %d: %w", KeyPolicyGzip, len(packed), limit, err)
	}
	if err != nil {
		return nil, bad("%w", err)
	}
	if _, err := in.ReadByte(); err != io.EOF {
		return nil, bad("data after the gzip member")
	}
	return out, nil
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// PCR8 is what PCR 8 (SHA-256 bank) holds after its one extension with the
// digest of the initdata: SHA-256(0³² ‖ digest), 32 bytes. Only initdata by
// sha256 can be bound so.
func (i *Initdata) PCR8() ([]byte, error) {
	if i.Algorithm != "sha256" {
		return nil, cause.New(cause.LaunchBinding, "the initdata's algorithm is %s, PCR 8 takes sha256 only", i.Algorithm)
	}
	h := sha256.New()
	h.Write(make([]byte, sha256.Size))
	h.Write(i.Digest())
	return h.Sum(nil), nil
}

// HostData is the digest as SNP's HOST_DATA, 32 bytes: truncated or padded with
// zeros on the right.
func (i *Initdata) HostData() []byte { return fitWidth(i.Digest(), 32) }

// MRConfigID is the digest as TDX's MRCONFIGID, 48 bytes.
func (i *Initdata) MRConfigID() []byte { return fitWidth(i.Digest(), 48) }

func fitWidth(d []byte, n int) []byte {
	out := make([]byte, n)
	copy(out, d)
	return out
}

// CheckBindingPCR8 requires PCR 8 to be exactly the initdata's. A zero PCR is
// LaunchUnbound (nothing was ever bound), another value LaunchBinding.
func CheckBindingPCR8(i *Initdata, pcr8 []byte) error {
	want, err := i.PCR8()
	if err != nil {
		return err
	}
	return checkBinding("PCR 8", pcr8, want)
}

// CheckBindingHostData is the same for SNP's HOST_DATA.
func CheckBindingHostData(i *Initdata, hostData []byte) error {
	return checkBinding("HOST_DATA", hostData, i.HostData())
}

// CheckBindingMRConfigID is the same for TDX's MRCONFIGID.
func CheckBindingMRConfigID(i *Initdata, mrConfigID []byte) error {
	return checkBinding("MRCONFIGID", mrConfigID, i.MRConfigID())
}

func checkBinding(name string, got, want []byte) error {
	if len(got) != len(want) {
		return cause.New(cause.LaunchBinding, "%s has %d bytes, expected %d", name, len(got), len(want))
	}
	// All zero is what a launch without initdata has: never "unset, go on".
	if subtle.ConstantTimeCompare(got, make([]byte, len(got))) == 1 {
		return cause.New(cause.LaunchUnbound, "%s is zero, expected %x: the launch is not bound to this initdata", name, want)
	}
	if subtle.ConstantTimeCompare(got, want) != 1 {
		return cause.New(cause.LaunchBinding, "%s is %x, expected %x: the launch is bound to other initdata", name, got, want)
	}
	return nil
}
