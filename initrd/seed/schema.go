package seed

import (
	_ "embed"

	"github.com/cc-runtime/cvm-agent/policy"
)

// SchemaID names the schema that Schema writes.
const SchemaID = "https://github.com/cc-runtime/cvm-agent/initrd/seed/seed.schema.json"

//go:embed document.go
var documentSource string

// Schema is the JSON Schema (2020-12) of the whole seed, for editors: derived
// from the types, and looser than Parse.
func Schema() ([]byte, error) {
	return policy.SchemaOf(&Document{}, SchemaID, "Seed of a cvm-agent guest", nil, documentSource)
}
