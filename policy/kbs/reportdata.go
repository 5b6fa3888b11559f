package kbs

import (
	"bytes"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/gowebpki/jcs"
)

// ReportDataSize is the size of ReportData, in bytes. SNP and TDX zero-pad it
// on the right to 64 bytes, the Azure forms use it as it is, and a TPM quote's
// extraData is its first 32 bytes.
const ReportDataSize = sha512.Size384

// ReportData is SHA-384 over the RFC 8785 form of
// {"additional-evidence":S,"nonce":N,"tee-pubkey":{…}}. The member
// additional-evidence is there even when it is empty.
func ReportData(additional, nonce string, key TEEPubKey) ([ReportDataSize]byte, error) {
	// encoding/json would replace invalid UTF-8, so that two strings had one hash.
	if !utf8.ValidString(additional) || !utf8.ValidString(nonce) {
		return [ReportDataSize]byte{}, errors.New("report data: a string is not UTF-8")
	}
	return jcsSHA384(struct {
		Additional string    `json:"additional-evidence"`
		Nonce      string    `json:"nonce"`
		Key        TEEPubKey `json:"tee-pubkey"`
	}{additional, nonce, key})
}

func jcsSHA384(v any) ([ReportDataSize]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return [ReportDataSize]byte{}, fmt.Errorf("report data: %w", err)
	}
	canonical, err := jcs.Transform(b.Bytes())
	if err != nil {
		return [ReportDataSize]byte{}, fmt.Errorf("report data: %w", err)
	}
	return sha512.Sum384(canonical), nil
}
