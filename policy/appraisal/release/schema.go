package release

import (
	_ "embed"

	"github.com/cc-runtime/cvm-agent/policy"
)

// ReferenceSchemaID names the schema that ReferenceSchema writes.
const ReferenceSchemaID = "https://github.com/cc-runtime/cvm-agent/policy/examples/reference/reference.schema.json"

// The descriptions in the schema are the comments in these files.
var (
	//go:embed reference.go
	referenceSource string
	//go:embed conditions.go
	conditionsSource string
	//go:embed rule.go
	ruleSource string
)

// ReferenceSchema is the JSON Schema (2020-12) of the reference document. It is
// looser than Validate.
func ReferenceSchema() ([]byte, error) {
	return policy.SchemaOf(&Reference{}, ReferenceSchemaID, "Reference values and release rules of cvm-agent", nil,
		referenceSource, conditionsSource, ruleSource)
}
