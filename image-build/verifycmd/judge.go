package verifycmd

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/appraisal"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
	"github.com/cc-runtime/cvm-agent/policy/appraisal/release"
	"github.com/cc-runtime/cvm-agent/policy/bounded"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// The checks of this package, beside the appraisal's.
const (
	checkFreshness = "freshness"
	checkRules     = "rules"
	checkMark      = "version-mark"
)

// appraise asks the TEE's verifier.
func (o *options) appraise(e *evidence, now time.Time) (*appraisal.Appraisal, error) {
	in := appraisal.Input{
		Dialect: kbs.DialectKBS, Primary: e.primary, Additional: e.add, InitData: e.initdata,
		Nonce: e.nonce, Time: now, Offline: &appraisal.Offline{ReportData: e.reportData},
	}
	if e.recomputed {
		copy(in.ReportData[:], e.reportData)
	}
	if err := o.dialect(e, &in); err != nil {
		return nil, err
	}
	var a *appraisal.Appraisal
	var err error
	switch o.tee {
	case "tpm":
		a, err = o.tpm(e, in)
	case "snp":
		a, err = o.snp(e, in)
	case "az-snp-vtpm":
		var s *collateral.Source
		if s, err = o.source(o.collateral); err != nil {
			return nil, err
		}
		a, err = (&appraisal.AzureSNP{SNP: &appraisal.SNP{Collateral: s, Roots: o.amd}}).Appraise(in)
	case "tdx":
		var v *appraisal.TDX
		if v, err = o.intel(); err != nil {
			return nil, err
		}
		if e.raw != nil {
			a, err = v.AppraiseRaw(e.raw, e.ccel, in)
		} else {
			a, err = v.Appraise(in)
		}
	case "az-tdx-vtpm":
		var v *appraisal.TDX
		if v, err = o.intel(); err != nil {
			return nil, err
		}
		a, err = (&appraisal.AzureTDX{TDX: v}).Appraise(in)
	default:
		err = cause.New(cause.Internal, "no verifier of TEE %s", o.tee)
	}
	if err != nil {
		return nil, cause.Wrap(cause.EvidenceMalformed, err)
	}
	return a, nil
}

// dialect finds which dialect the evidence is of. An event log that only
// report_data covers counts when report_data was recomputed from it, and is
// taken out otherwise: anyone could have put another in its place.
func (o *options) dialect(e *evidence, in *appraisal.Input) error {
	a, _, err := kbs.DecodeAdditional(e.add)
	if err != nil {
		return malformed("%s: %w", o.in, err)
	}
	if len(a.EventLog) == 0 && len(a.Activation) == 0 && a.Instance == "" {
		return nil
	}
	if o.tee != "snp" || e.recomputed {
		if o.eventLog == "" {
			in.Dialect = kbs.Dialect
		}
		return nil
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal([]byte(e.add), &members); err != nil {
		return malformed("%s: additional_evidence: %w", o.in, err)
	}
	for name := range members {
		if strings.HasPrefix(name, "cvm-agent-") {
			delete(members, name)
		}
	}
	rest, err := json.Marshal(members)
	if err != nil {
		return err
	}
	in.Additional = string(rest)
	e.rows = append(e.rows, row{name: appraisal.CheckEventLog, skipped: true,
		found: "only report_data covers a log on plain SNP, and there is no runtime-data to compute it from: give the whole attest request"})
	return nil
}

// source is the collateral of --collateral: a directory, and nothing to ask.
func (o *options) source(dir string) (*collateral.Source, error) {
	s := &collateral.Source{Dir: dir}
	if slices.Contains(o.allowMissing, missingRevocation) {
		s.Policy.Revocation = collateral.IfPresent
	}
	if slices.Contains(o.allowMissing, missingTCBInfo) {
		s.Policy.TCBInfo = collateral.IfPresent
	}
	if dir == "" {
		return s, nil
	}
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return nil, cause.New(cause.Usage, "%s is not a directory of collateral", dir)
	}
	return s, nil
}

// snp judges a raw report or the wire's form of one, with the certificates of
// --certs behind those that came with it.
func (o *options) snp(e *evidence, in appraisal.Input) (*appraisal.Appraisal, error) {
	s, err := o.source(o.collateral)
	if err != nil {
		return nil, err
	}
	certs, err := o.readCerts()
	if err != nil {
		return nil, err
	}
	v := &appraisal.SNP{Collateral: s, Roots: o.amd}
	if e.raw != nil {
		return v.AppraiseRaw(e.raw, certs, in)
	}
	if len(certs) > 0 {
		ev, err := kbs.DecodeSNPEvidence(in.Primary)
		if err != nil {
			return nil, err
		}
		ev.CertChain = append(ev.CertChain, certs...)
		if in.Primary, err = json.Marshal(ev); err != nil {
			return nil, err
		}
	}
	return v.Appraise(in)
}

// intel is the verifier of TDX quotes; all of its collateral has an address.
func (o *options) intel() (*appraisal.TDX, error) {
	s, err := o.source(cmp.Or(o.collateral, o.certs))
	return &appraisal.TDX{Collateral: s, Roots: o.intelRoots}, err
}

func (o *options) tpm(e *evidence, in appraisal.Input) (*appraisal.Appraisal, error) {
	v := &appraisal.TPM{TrustedAKs: o.trustedAKs}
	for _, fp := range o.trustedAKs {
		if d, err := hex.DecodeString(fp); err != nil || len(d) != 32 || strings.ToLower(fp) != fp {
			return nil, cause.New(cause.Usage, "--trusted-ak %q is not 64 lowercase hex digits", fp)
		}
	}
	for _, r := range o.akRoots {
		set, err := rootSet(r)
		if err != nil {
			return nil, err
		}
		v.AKRoots = append(v.AKRoots, set)
	}
	// Without a certificate the AK was bound by a secret that only its broker
	// knew: then it counts when it is listed.
	if e.auth != nil && len(e.auth.AKCert) > 0 {
		in.Dialect = kbs.Dialect
		in.Pending = &appraisal.Pending{AKPublic: e.auth.AKPublic, AKCert: e.auth.AKCert}
	}
	return v.Appraise(in)
}

// rootSet reads NAME=PATH, a file or a directory of *.pem and *.crt.
func rootSet(arg string) (appraisal.RootSet, error) {
	const max = 1 << 20
	name, path, ok := strings.Cut(arg, "=")
	if !ok || name == "" || path == "" {
		return appraisal.RootSet{}, cause.New(cause.Usage, "--ak-roots is %q, expected NAME=PATH", arg)
	}
	files, read, err := listed(path, ".pem", ".crt")
	if err != nil {
		return appraisal.RootSet{}, cause.New(cause.Usage, "--ak-roots: %w", err)
	}
	var all []byte
	for _, f := range files {
		b, err := read(f, max)
		if err != nil {
			return appraisal.RootSet{}, cause.New(cause.Usage, "--ak-roots: %w", err)
		}
		all = append(append(all, b...), '\n')
	}
	set, err := appraisal.ParseRoots(name, all)
	return set, cause.Wrap(cause.Usage, err)
}

// listed is path itself, or the regular files in it whose extension is one of
// those given (all when none is given), by name; and what reads them. Nobody
// named the files of a directory, so one that has become a link since is refused.
func listed(path string, extensions ...string) ([]string, reader, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if !st.IsDir() {
		return []string{path}, bounded.ReadNamed, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, nil, err
	}
	var files []string
	for _, e := range entries {
		if e.Type().IsRegular() && (len(extensions) == 0 || slices.Contains(extensions, filepath.Ext(e.Name()))) {
			files = append(files, filepath.Join(path, e.Name()))
		}
	}
	if len(files) == 0 {
		return nil, nil, errors.New(path + " has no usable file")
	}
	return files, bounded.ReadFile, nil
}

// reader reads a file of at most max bytes.
type reader func(path string, max int64) ([]byte, error)

// judge completes the verdict: the rows of this package, and the rule's.
func (o *options) judge(e *evidence, a *appraisal.Appraisal, rule *release.Rule, now time.Time) *report {
	r := &report{verdict: a.Verdict}
	for _, row := range e.rows {
		if row.skipped {
			r.verdict.Skip(row.name, row.expected, row.found)
		} else {
			r.verdict.Check(row.ok, row.name, row.expected, row.found)
		}
	}
	err := a.Verdict.Refusal()
	if err == nil {
		r.facts = &a.Facts
	}
	switch {
	case rule == nil:
		r.verdict.Skip(checkRules, "", "no --rules: nothing is said about what was launched")
	case err != nil:
		r.verdict.Skip(checkRules, "", "evidence that is refused proves nothing to a rule")
	default:
		v := appraisal.Judge(a.Facts, *rule, func(string) uint64 { return 0 }, now)
		r.verdict.Checks = append(r.verdict.Checks, v.Checks...)
		r.verdict.Require(v.Required...)
		r.verdict.Skip(checkMark, "", "a policy's version mark is the broker's to know")
	}
	if err := r.verdict.Refusal(); err != nil {
		r.err = cause.New(cause.EvidenceRefused, "%s%s", missing(r.verdict), reason(err))
	}
	return r
}

// reason is the text of a refusal without its code.
func reason(err error) string {
	var e *cause.Error
	if errors.As(err, &e) {
		return e.Err.Error()
	}
	return err.Error()
}

// missing says which flags would give, or do without, the collateral that a
// refusal is about; empty when it is about something else.
func missing(v *appraisal.Verdict) string {
	var kinds []string
	for _, c := range v.Checks {
		if c.Outcome != appraisal.Failed || !strings.Contains(c.Found, collateral.ErrMissing.Error()) {
			continue
		}
		kind := missingTCBInfo
		switch {
		case c.Name == appraisal.CheckSNPSigningKey:
			return "the report's certificate is missing (give it with --certs or --collateral): "
		case strings.HasSuffix(c.Name, "revocation"):
			kind = missingRevocation
		}
		if !slices.Contains(kinds, kind) {
			kinds = append(kinds, kind)
		}
	}
	if len(kinds) == 0 {
		return ""
	}
	return "collateral is missing (give it with --collateral, or accept that with --allow-missing " + strings.Join(kinds, ",") + "): "
}
