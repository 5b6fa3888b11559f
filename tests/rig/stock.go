package rig

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// What stock tools do and say. None of them talks to anything but the
// registry: no transparency log, no update check.

// CosignSign signs ref with stock cosign in its legacy form.
func (r *Rig) CosignSign(ctx context.Context, ref string, k *Keys) error {
	_, err := r.Run(ctx, k.Env, r.Tool("cosign"), "sign", "--yes", "--key", k.Private, "--tlog-upload=false", "--allow-insecure-registry", "--allow-http-registry", ref)
	return err
}

// CosignAttest attests predicate, an SPDX JSON file, with stock cosign.
func (r *Rig) CosignAttest(ctx context.Context, ref, predicate string, k *Keys) error {
	_, err := r.Run(ctx, k.Env, r.Tool("cosign"), "attest", "--yes", "--key", k.Private, "--type", "spdxjson", "--predicate", predicate,
		"--tlog-upload=false", "--allow-insecure-registry", "--allow-http-registry", ref)
	return err
}

// Unsign deletes the cosign signatures of an image, repository@sha256:…, from
// the registry; its attestations stay.
func (r *Rig) Unsign(ctx context.Context, digest string) error {
	return r.deleteTag(ctx, digest, ".sig")
}

// Unattest deletes the cosign attestations of an image; its signatures stay.
func (r *Rig) Unattest(ctx context.Context, digest string) error {
	return r.deleteTag(ctx, digest, ".att")
}

func (r *Rig) deleteTag(ctx context.Context, digest, suffix string) error {
	_, err := r.Run(ctx, nil, "skopeo", "delete", "--tls-verify=false", "docker://"+strings.Replace(digest, "@sha256:", ":sha256-", 1)+suffix)
	return err
}

// CosignVerify verifies the image signature of ref with stock cosign.
func (r *Rig) CosignVerify(ctx context.Context, ref string, k *Keys) error {
	return r.cosignVerify(ctx, k, ref, "verify")
}

// CosignVerifySBOM verifies the SPDX attestation of ref with stock cosign.
func (r *Rig) CosignVerifySBOM(ctx context.Context, ref string, k *Keys) error {
	return r.cosignVerify(ctx, k, ref, "verify-attestation", "--type", "spdxjson")
}

// CosignVerifyBundles is CosignVerify of the Sigstore bundles alone.
func (r *Rig) CosignVerifyBundles(ctx context.Context, ref string, k *Keys) error {
	return r.cosignVerify(ctx, k, ref, "verify", "--new-bundle-format")
}

func (r *Rig) cosignVerify(ctx context.Context, k *Keys, ref string, args ...string) error {
	// A key needs no root of trust, but where there are bundles cosign wants
	// one, and goes to the network for it unless it is given one: an empty one.
	root := r.Path("trusted_root.json")
	if err := os.WriteFile(root, []byte(`{"mediaType":"application/vnd.dev.sigstore.trustedroot+json;version=0.1"}`), 0o600); err != nil {
		return err
	}
	argv := append([]string{r.Tool("cosign")}, args...)
	_, err := r.Run(ctx, nil, append(argv, "--key", k.Public, "--trusted-root", root, "--insecure-ignore-tlog=true",
		"--allow-insecure-registry", "--allow-http-registry", ref)...)
	return err
}

// SyftSBOM writes the SPDX JSON that stock syft makes of source, such as
// registry:REF or dir:PATH.
func (r *Rig) SyftSBOM(ctx context.Context, source, file string) error {
	_, err := r.Run(ctx, []string{"SYFT_CHECK_FOR_APP_UPDATE=false", "SYFT_REGISTRY_INSECURE_USE_HTTP=true", "SYFT_FILE_METADATA_SELECTION=all", "SYFT_FILE_METADATA_DIGESTS=sha256"},
		r.Tool("syft"), "scan", "--quiet", source, "--output", "spdx-json="+file)
	return err
}

// Copy copies an image with stock skopeo, keeping its digest. flags are
// further ones, such as --encryption-key.
func (r *Rig) Copy(ctx context.Context, from, to string, flags ...string) error {
	argv := append([]string{"skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"}, flags...)
	_, err := r.Run(ctx, nil, append(argv, transport(from), transport(to))...)
	return err
}

// LayerTypes lists the media types of an image's layers, as stock skopeo reads
// them from the registry.
func (r *Rig) LayerTypes(ctx context.Context, ref string) ([]string, error) {
	out, err := r.Run(ctx, nil, "skopeo", "inspect", "--raw", "--tls-verify=false", transport(ref))
	if err != nil {
		return nil, err
	}
	var manifest struct {
		Layers []struct {
			MediaType string `json:"mediaType"`
		} `json:"layers"`
	}
	if err := json.Unmarshal([]byte(out), &manifest); err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", ref, err)
	}
	if len(manifest.Layers) == 0 {
		return nil, fmt.Errorf("manifest of %s has no layers", ref)
	}
	var types []string
	for _, l := range manifest.Layers {
		types = append(types, l.MediaType)
	}
	return types, nil
}

// transport makes an image reference one for skopeo, unless it names a
// transport already.
func transport(ref string) string {
	if kind, _, ok := strings.Cut(ref, ":"); ok && (kind == "oci" || kind == "dir" || kind == "docker" || kind == "oci-archive" || kind == "containers-storage") {
		return ref
	}
	return "docker://" + ref
}

// Edit copies a text file with replacements; each must occur.
func Edit(from, to string, replace map[string]string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	for old, now := range replace {
		if !bytes.Contains(data, []byte(old)) {
			return fmt.Errorf("%s has no %q", from, old)
		}
		data = bytes.ReplaceAll(data, []byte(old), []byte(now))
	}
	return os.WriteFile(to, data, 0o600)
}

// payloadMember finds a DSSE payload, in an envelope or quoted in a document
// that carries one.
var payloadMember = regexp.MustCompile(`(payload\\?":\s*\\?")([A-Za-z0-9+/=]+)`)

// ChangePayload copies a DSSE envelope, or an initdata document with one, with
// the payload changed and its signatures kept, as an attacker would.
func ChangePayload(from, to, old, now string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	at := payloadMember.FindSubmatchIndex(data)
	if at == nil {
		return errors.New(from + " holds no DSSE payload")
	}
	payload, err := base64.StdEncoding.DecodeString(string(data[at[4]:at[5]]))
	if err != nil {
		return err
	}
	if !bytes.Contains(payload, []byte(old)) {
		return errors.New("the payload has no " + old)
	}
	changed := base64.StdEncoding.EncodeToString(bytes.ReplaceAll(payload, []byte(old), []byte(now)))
	return os.WriteFile(to, slices.Concat(data[:at[4]], []byte(changed), data[at[5]:]), 0o600)
}

// Answers says whether anything accepts connections on a loopback port.
func Answers(ctx context.Context, port uint16) bool {
	c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", ListenOn(port))
	if err != nil {
		return false
	}
	c.Close()
	return true
}
