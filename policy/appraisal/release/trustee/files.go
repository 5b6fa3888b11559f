package trustee

import (
	"bytes"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"text/template"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

//go:embed resource-policy.rego.tmpl
var resourceTemplate string

//go:embed attestation-policy.rego.tmpl
var attestationTemplate string

//go:embed claims.rego.tmpl
var claimsTemplate string

// The names of reference values.
const (
	refLaunches   = "cvm_agent_launches"
	refSNPMinimum = "cvm_agent_snp_minimum"
	refTDX        = "cvm_agent_tdx"
)

// referenceValue is one entry as the reference value provider keeps it.
type referenceValue struct {
	Name       string `json:"name"`
	Expiration string `json:"expiration,omitempty"`
	Value      any    `json:"value"`
}

func (e *Export) write(d *release.Reference, o Options, rules map[string]rule) error {
	header := fmt.Sprintf("%s version %d", d.Name, d.Version)
	if o.Digest != "" {
		header += " " + o.Digest
	}
	text, err := json.MarshalIndent(rules, "", "\t")
	if err != nil {
		return cause.Wrap(cause.Internal, err)
	}
	expires := "null"
	if d.Expires != "" {
		expires = fmt.Sprintf("%q", d.Expires)
	}
	data := map[string]any{
		"Header": header, "GivenUp": e.GivenUp, "Rules": string(text), "Expires": expires,
		"Launches": refLaunches, "SNPMinimum": refSNPMinimum, "TDX": refTDX,
	}
	if e.ResourcePolicy, err = render(resourceTemplate, data); err != nil {
		return err
	}
	if e.AttestationPolicy, err = render(attestationTemplate, data); err != nil {
		return err
	}
	return e.references(d, rules)
}

func render(text string, data any) ([]byte, error) {
	t, err := template.New("rego").Option("missingkey=error").Parse(text)
	if err == nil {
		t, err = t.New("claims").Parse(claimsTemplate)
	}
	var out bytes.Buffer
	if err == nil {
		err = t.ExecuteTemplate(&out, "rego", data)
	}
	if err != nil {
		return nil, cause.Wrap(cause.Internal, err)
	}
	return out.Bytes(), nil
}

// references writes the values: only launches that some resource is given to.
func (e *Export) references(d *release.Reference, rules map[string]rule) error {
	launches := []launch{}
	for _, path := range slices.Sorted(maps.Keys(rules)) {
		for _, l := range rules[path].Launch {
			if !slices.ContainsFunc(launches, func(have launch) bool { return have.Platform == l.Platform && have.Label == l.Label }) {
				launches = append(launches, l)
			}
		}
	}
	list := []referenceValue{{refLaunches, d.Expires, launches}}
	if s := d.TCB.SNP; s != nil && len(s.Minimum) > 0 {
		list = append(list, referenceValue{refSNPMinimum, d.Expires, highest(s.Minimum)})
	}
	t := d.TCB.TDX
	if t == nil {
		t = &release.TDXTCB{}
	}
	advisories := slices.Clone(t.Advisories)
	if advisories == nil {
		advisories = []string{}
	}
	tdx := map[string]any{"tcb_status": t.Statuses(), "advisory_ids": advisories}
	if t.MinimumTCBDate != "" {
		tdx["tcb_date"] = t.MinimumTCBDate
	}
	list = append(list, referenceValue{refTDX, d.Expires, tdx})

	payload := map[string]any{} // what the provider's sample extractor reads
	for _, r := range list {
		payload[r.Name] = r.Value
	}
	inner, err := json.Marshal(payload)
	if err != nil {
		return cause.Wrap(cause.Internal, err)
	}
	message := map[string]string{"version": "0.1.0", "type": "sample", "payload": base64.StdEncoding.EncodeToString(inner)}
	if e.ReferenceValues, err = indented(list); err == nil {
		e.Message, err = indented(message)
	}
	return err
}

func indented(v any) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	return append(b, '\n'), cause.Wrap(cause.Internal, err)
}

// highest is the highest minimum of all products in each part: what Trustee
// does not tell apart has to satisfy them all.
func highest(minimum map[string]release.SNPMinimum) map[string]uint8 {
	out := map[string]uint8{"bootloader": 0, "tee": 0, "snp": 0, "microcode": 0}
	for _, m := range minimum {
		for name, v := range map[string]*uint8{"bootloader": m.Bootloader, "tee": m.TEE, "snp": m.SNP, "microcode": m.Microcode} {
			if v != nil {
				out[name] = max(out[name], *v)
			}
		}
	}
	return out
}
