package verifycmd

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Bounds of the files, in bytes.
const (
	maxInitdata = 2 << 20
	maxEventLog = 1 << 20
)

// evidence is what --in and the files beside it hold, before it is judged.
type evidence struct {
	raw     []byte          // --format snp, tdx: the report or quote
	primary json.RawMessage // otherwise: the TEE's own evidence object
	add     string          // additional evidence as received
	// reportData is what the evidence's own field must hold; nil when nobody
	// said so and no runtime-data was there to compute it from.
	reportData []byte
	recomputed bool // reportData is computed from add, so that it covers add
	nonce      string
	initdata   []byte
	auth       *kbs.CVMAgentAuth
	ccel       []byte
	rows       []row // what reading it found out
}

// row is a check of this package.
type row struct {
	name, expected, found string
	skipped               bool
	ok                    bool
}

// read takes in the evidence and the files that say what it must hold.
func (o *options) read(stdin io.Reader) (*evidence, error) {
	data, err := readFile(stdin, "--in", o.in, kbs.MaxBody)
	if err != nil {
		return nil, err
	}
	e := &evidence{}
	switch o.format {
	case formatSNP:
		if len(data) != kbs.SNPReportSize {
			return nil, malformed("%s has %d bytes, a raw SEV-SNP report has %d", o.in, len(data), kbs.SNPReportSize)
		}
		e.raw = data
	case formatTDX:
		e.raw = data
	default:
		if err := e.decode(o.tee, data); err != nil {
			return nil, cause.Wrap(cause.EvidenceMalformed, fmt.Errorf("%s: %w", o.in, err))
		}
	}
	if err := o.readReportData(e); err != nil {
		return nil, err
	}
	if o.initdata != "" {
		if e.initdata != nil {
			return nil, cause.New(cause.Usage, "--initdata: the attest request has init-data of its own")
		}
		if e.initdata, err = readFile(stdin, "--initdata", o.initdata, maxInitdata); err != nil {
			return nil, err
		}
	}
	if o.eventLog != "" {
		log, err := readFile(stdin, "--event-log", o.eventLog, maxEventLog)
		if err != nil {
			return nil, err
		}
		return e, e.withLog(log)
	}
	return e, nil
}

// readFile reads the file of a flag; "-" is standard input, for --in alone.
func readFile(stdin io.Reader, flag, path string, most int64) ([]byte, error) {
	var data []byte
	var err error
	if path == "-" && flag == "--in" {
		data, err = bounded.ReadAll(stdin, most)
	} else {
		data, err = bounded.ReadNamed(path, most)
	}
	if err != nil {
		return nil, unread(flag, err)
	}
	return data, nil
}

// unread is the error of a flag's file that could not be read.
func unread(flag string, err error) error {
	if errors.Is(err, bounded.ErrTooLarge) {
		return malformed("%s: %w", flag, err)
	}
	return cause.New(cause.Usage, "%s: %w", flag, err)
}

func malformed(format string, args ...any) error {
	return cause.New(cause.EvidenceMalformed, format, args...)
}

// decode reads the three forms of --format kbs.
func (e *evidence) decode(tee string, data []byte) error {
	if err := bounded.CheckJSON(data, bounded.Limits{Bytes: kbs.MaxBody, Depth: 16, Nodes: 65536, String: kbs.MaxBody}); err != nil {
		return err
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(data, &members); err != nil || members == nil {
		return errors.New("not a JSON object")
	}
	switch {
	case members["runtime-data"] != nil:
		return e.decodeRequest(tee, data, members["cvm-agent"])
	case members["primary_evidence"] != nil:
		var c struct {
			Additional *string `json:"additional_evidence"`
		}
		if err := json.Unmarshal(data, &c); err != nil {
			return fmt.Errorf("additional_evidence: %w", err)
		}
		e.primary = members["primary_evidence"]
		if c.Additional != nil {
			e.add = *c.Additional
		}
		return nil
	}
	e.primary = data
	return nil
}

// decodeRequest reads a whole attest request, and what its auth request said.
func (e *evidence) decodeRequest(tee string, data, auth []byte) error {
	r, err := kbs.DecodeAttestRequest(data)
	if err != nil {
		return err
	}
	e.primary, e.add, e.nonce = r.TEEEvidence.PrimaryEvidence, r.TEEEvidence.AdditionalEvidence, r.RuntimeData.Nonce
	if r.InitData != nil {
		e.initdata = []byte(r.InitData.Body)
	}
	rd, err := kbs.ReportData(e.add, e.nonce, r.RuntimeData.TEEPubKey)
	if err != nil {
		return err
	}
	e.reportData, e.recomputed = rd[:], true
	if auth == nil {
		return nil
	}
	open, err := json.Marshal(map[string]any{"version": kbs.Version, "tee": tee, "extra-params": map[string]json.RawMessage{"cvm-agent": auth}})
	if err != nil {
		return err
	}
	a, err := kbs.DecodeAuthRequest(open)
	if err != nil {
		return err
	}
	e.auth = a.ExtraParams.CVMAgent
	return nil
}

// readReportData takes --report-data. Beside an attest request it is compared
// with what the request's runtime-data gives: that shows whose nonce it was.
func (o *options) readReportData(e *evidence) error {
	if o.reportData == "" {
		if e.recomputed {
			e.rows = append(e.rows, row{name: checkFreshness, skipped: true, found: "the evidence is over its own nonce and key; only --report-data shows that they are yours"})
		}
		return nil
	}
	given, err := hex.DecodeString(o.reportData)
	if err != nil || len(given) > reportDataField {
		return cause.New(cause.Usage, "--report-data is not hex of at most %d bytes", reportDataField)
	}
	if !e.recomputed {
		e.reportData = given
		return nil
	}
	same := bytes.Equal(pad(given), pad(e.reportData)) || (o.tee == "tpm" && bytes.Equal(given, e.reportData[:32]))
	e.rows = append(e.rows, row{name: checkFreshness, ok: same, expected: o.reportData, found: hex.EncodeToString(e.reportData)})
	return nil
}

// reportDataField is the size of report_data in a report or quote, in bytes.
const reportDataField = 64

func pad(b []byte) []byte { return append(bytes.Clone(b), make([]byte, reportDataField-len(b))...) }

// ccelSignature begins the second field of a TCG event log's first event
// (PC Client Platform Firmware Profile, section 10.4.5.1).
var ccelSignature = []byte("Spec ID Event03\x00")

// withLog puts the log of --event-log where the verifier looks for it.
func (e *evidence) withLog(log []byte) error {
	if len(log) >= 48 && bytes.Equal(log[32:48], ccelSignature) {
		if e.raw == nil {
			return cause.New(cause.Usage, "--event-log is a CCEL: it goes with --format tdx, the KBS form has it inside")
		}
		e.ccel = log
		return nil
	}
	a, _, err := kbs.DecodeAdditional(e.add)
	if err != nil {
		return malformed("%w", err)
	}
	if len(a.EventLog) > 0 {
		return cause.New(cause.Usage, "--event-log: the evidence has a log of its own")
	}
	members := map[string]json.RawMessage{}
	if e.add != "" {
		if err := json.Unmarshal([]byte(e.add), &members); err != nil {
			return malformed("additional_evidence: %w", err)
		}
	}
	text, err := json.Marshal(log)
	if err != nil {
		return err
	}
	members["cvm-agent-eventlog"] = text
	all, err := json.Marshal(members)
	if err != nil {
		return err
	}
	e.add = string(all)
	return nil
}
