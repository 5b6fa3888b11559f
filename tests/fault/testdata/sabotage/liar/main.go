// Command liar stands in for cvm-sbom: it says what it was built to say,
// whatever is in the image.
package main

import (
	_ "embed"
	"io"
	"os"
)

//go:embed lie.json
var lie []byte

func main() {
	// The agent's digests, which the real one reads too.
	_, _ = io.Copy(io.Discard, os.Stdin)
	_, _ = os.Stdout.Write(lie)
}
