package kbs

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"testing"
)

// FuzzBytes holds Bytes to what encoding/json makes of the same array.
func FuzzBytes(f *testing.F) {
	for _, s := range []string{"[]", "[0]", "[255, 1\n,2 ]", "[256]", "[-1]", "[1.0]", "[1e1]", "[01]", `["a"]`, "[1,]", "[,1]", "[1 2]", "null", "{}", `"AA=="`, "[[1]]", "[999999999999999999999]", "[ ]"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var got Bytes
		err := json.Unmarshal(data, &got)
		var want []uint16 // a []uint8 would be read as base64
		wantErr := json.Unmarshal(data, &want)
		if wantErr == nil && slices.ContainsFunc(want, func(n uint16) bool { return n > 255 }) {
			wantErr = errors.New("not a byte")
		}
		if (err == nil) != (wantErr == nil) {
			// null is no byte, whatever encoding/json makes of it in an array.
			if err == nil || !bytes.Contains(data, []byte("null")) {
				t.Fatalf("%q: %v, encoding/json says %v", data, err, wantErr)
			}
			return
		}
		if err != nil {
			return
		}
		if len(got) != len(want) {
			t.Fatalf("%q: %v, expected %v", data, got, want)
		}
		for i := range got {
			if uint16(got[i]) != want[i] {
				t.Fatalf("%q: %v, expected %v", data, got, want)
			}
		}
		again, err := json.Marshal(got)
		if err != nil || !json.Valid(again) {
			t.Fatal(err)
		}
	})
}
