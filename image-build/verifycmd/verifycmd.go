// Package verifycmd is `cvmctl verify`: what a relying party checks on its own
// machine, from files.
//
// It promises: no connection is opened, whatever a file names. The verdict is
// the appraisal package's table, row by row; a row that was not checked says so
// and says what it would have needed. It keeps nothing and needs no key.
package verifycmd

import (
	"crypto/x509"
	"slices"
	"strings"
	"time"

	"github.com/google/go-sev-guest/verify/trust"
	"github.com/spf13/cobra"

	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// Command returns `verify` with its subcommands.
func Command() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify",
		Short: "Verify evidence offline",
		Long:  "Verify checks on this machine, from files alone, what a confidential VM says of itself.",
	}
	c.AddCommand(evidenceCommand())
	return c
}

// The formats of --format.
const (
	formatKBS = "kbs"
	formatSNP = "snp"
	formatTDX = "tdx"
	formatTPM = "tpm"
)

var formats = []string{formatKBS, formatSNP, formatTDX, formatTPM}

// tees are the names of --tee. There is no "sample": it proves nothing.
var tees = []string{"snp", "tdx", "az-snp-vtpm", "az-tdx-vtpm", "tpm"}

// The kinds of collateral that --allow-missing names.
const (
	missingRevocation = "revocation"
	missingTCBInfo    = "tcb-info"
)

// options are the flags of `verify evidence`.
type options struct {
	in, format, tee   string
	certs, collateral string
	rules, resource   string
	rulesKeys         []string
	rulesThreshold    int
	reportData        string
	initdata          string
	eventLog          string
	time              string
	output            string
	akRoots           []string
	trustedAKs        []string
	allowMissing      []string

	// The vendors' roots; nil, which no flag changes: their own.
	amd        map[string][]*trust.AMDRootCerts
	intelRoots *x509.CertPool
}

const evidenceLong = `Evidence appraises one piece of evidence and prints the verdict: every check, what was
expected and what was found. It reads files and opens no connection.

--format says what --in is:
  kbs  the evidence object of the KBS protocol, of the TEE that --tee names; also with its
       additional evidence {"primary_evidence":…,"additional_evidence":…}, or a whole attest
       request: then report_data is computed from its runtime-data, and its init-data is checked.
       Beside the members of an attest request, "cvm-agent" may hold what dialect cvm-agent/1
       sent in the auth request's extra-params: the AK, and its certificate
  snp  a raw SEV-SNP report, 1184 bytes; --certs has VCEK or VLEK and, where there are any, CRLs
  tdx  a raw TDX quote with its PCK certificates inside; --certs or --collateral has the rest
  tpm  as kbs with --tee tpm. A vTPM's key counts when --trusted-ak lists it, or when it has a
       certificate by --ak-roots: the secret that bound it to its EK was the broker's alone

--certs is a file or a directory of DER, PEM, or the JSON of Azure's THIM service; for TDX it
is a collateral directory. --collateral is a directory of what the vendors publish, by their
addresses: HOST/PATH?QUERY. Revocation lists and Intel's TCB info are required. What you
cannot get, --allow-missing lists; the verdict then says that it was not checked.

--rules is a release rule, or reference values: as YAML, or signed and verified by --rules-key.

Without --report-data the evidence may be a replay, and without --rules nothing is said about
what was launched: both rows then say "not-checked".`

func evidenceCommand() *cobra.Command { return (&options{}).command() }

func (o *options) command() *cobra.Command {
	c := &cobra.Command{
		Use:   "evidence --in FILE --format FORMAT",
		Short: "Appraise a confidential VM's evidence and print the verdict, check by check",
		Long:  evidenceLong,
		Example: "  cvmctl verify evidence --in report.bin --format snp --certs certs/ --report-data 01ab… --rules rule.yaml\n" +
			"  cvmctl verify evidence --in evidence.json --format kbs --tee tdx --collateral collateral/\n" +
			"  cvmctl verify evidence --in - --format kbs --tee snp --allow-missing revocation --output json <evidence.json",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c) },
	}
	f := c.Flags()
	f.StringVar(&o.in, "in", "", "evidence `FILE`; - is standard input")
	f.StringVar(&o.format, "format", "", "`FORMAT` of the evidence: "+strings.Join(formats, ", "))
	f.StringVar(&o.tee, "tee", "", "`NAME` of the TEE, for --format kbs: "+strings.Join(tees, ", "))
	f.StringVar(&o.certs, "certs", "", "`FILE` or directory with the vendor's certificates and revocation lists")
	f.StringVar(&o.collateral, "collateral", "", "`DIR` with what vendors publish, by address")
	f.StringSliceVar(&o.allowMissing, "allow-missing", nil, "`KINDS` of collateral that may be missing: "+missingRevocation+", "+missingTCBInfo)
	f.StringVar(&o.rules, "rules", "", "`FILE` with a release rule, or reference values (YAML, or signed), that the facts must satisfy")
	f.StringArrayVar(&o.rulesKeys, "rules-key", nil, "public key `FILE` that signed the reference values of --rules; may be repeated")
	f.IntVar(&o.rulesThreshold, "rules-threshold", 1, "`NUMBER` of distinct --rules-key that must have signed")
	f.StringVar(&o.resource, "resource", "", "`URI` of the resource whose rule is meant, when --rules has several")
	f.StringVar(&o.reportData, "report-data", "", "`HEX` that report_data must hold, zero bytes after it")
	f.StringVar(&o.initdata, "initdata", "", "initdata `FILE` that the launch must be bound to")
	f.StringVar(&o.eventLog, "event-log", "", "event log `FILE` that must replay to the register; for TDX also a CCEL")
	f.StringArrayVar(&o.akRoots, "ak-roots", nil, "`NAME=PATH` of issuers of AK certificates, PEM; may be repeated")
	f.StringArrayVar(&o.trustedAKs, "trusted-ak", nil, "`SHA256` of a vTPM's AK (its SPKI) to trust; may be repeated")
	f.StringVar(&o.time, "time", "", "`RFC3339` time to judge at; default now")
	f.StringVar(&o.output, "output", "text", "`FORMAT` of the output: text or json")
	for name, values := range map[string][]string{
		"format": formats, "tee": tees, "output": {"text", "json"}, "allow-missing": {missingRevocation, missingTCBInfo},
	} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return c
}

// check finds what is wrong on the command line before anything is read.
func (o *options) check() error {
	switch {
	case o.in == "":
		return cause.New(cause.Usage, "--in is missing")
	case o.format == "":
		return cause.New(cause.Usage, "--format is missing: %s", strings.Join(formats, ", "))
	case !slices.Contains(formats, o.format):
		return cause.New(cause.Usage, "--format is %q, expected %s", o.format, strings.Join(formats, ", "))
	case o.format == formatKBS && o.tee == "":
		return cause.New(cause.Usage, "--format kbs needs --tee: %s", strings.Join(tees, ", "))
	case o.format != formatKBS && o.tee != "" && o.tee != o.format:
		return cause.New(cause.Usage, "--tee %s does not go with --format %s", o.tee, o.format)
	case o.tee != "" && !slices.Contains(tees, o.tee):
		return cause.New(cause.Usage, "--tee is %q, expected %s", o.tee, strings.Join(tees, ", "))
	case o.output != "text" && o.output != "json":
		return cause.New(cause.Usage, "--output is %q, expected text or json", o.output)
	}
	if o.format != formatKBS {
		o.tee = o.format
	}
	for _, m := range o.allowMissing {
		if m != missingRevocation && m != missingTCBInfo {
			return cause.New(cause.Usage, "--allow-missing has %q, expected %s or %s", m, missingRevocation, missingTCBInfo)
		}
	}
	return o.checkFit()
}

// checkFit refuses flags that the TEE has no use for: a flag that is silently
// ignored looks like a check that passed.
func (o *options) checkFit() error {
	tpm := strings.HasSuffix(o.tee, "tpm")
	for _, f := range []struct {
		set  bool
		name string
		fits bool
	}{
		{o.certs != "", "--certs", o.tee != "tpm"},
		{o.collateral != "", "--collateral", o.tee != "tpm"},
		{len(o.akRoots) > 0, "--ak-roots", o.tee == "tpm"},
		{len(o.trustedAKs) > 0, "--trusted-ak", o.tee == "tpm"},
		{len(o.allowMissing) > 0, "--allow-missing", o.tee != "tpm"},
		{slices.Contains(o.allowMissing, missingTCBInfo), "--allow-missing " + missingTCBInfo, strings.HasSuffix(o.tee, "tdx") || o.tee == "az-tdx-vtpm"},
		{o.certs != "" && o.collateral != "", "--certs beside --collateral", !o.tdx()},
		{o.certs != "", "--certs", o.tee != "az-snp-vtpm"}, // the evidence has its VCEK
	} {
		if f.set && !f.fits {
			return cause.New(cause.Usage, "%s means nothing for TEE %s", f.name, o.tee)
		}
	}
	if o.eventLog != "" && !tpm && o.tee != "tdx" {
		// Whoever writes the log could write any: only report_data covers it.
		return cause.New(cause.Usage, "--event-log: TEE %s has no register that a log replays to; give the whole attest request, whose report_data covers the log", o.tee)
	}
	return nil
}

// tdx says whether the TEE's vendor is Intel.
func (o *options) tdx() bool { return o.tee == "tdx" || o.tee == "az-tdx-vtpm" }

// when is the time to judge at.
func (o *options) when() (time.Time, error) {
	if o.time == "" {
		return time.Now(), nil
	}
	t, err := time.Parse(time.RFC3339, o.time)
	if err != nil {
		return time.Time{}, cause.New(cause.Usage, "--time is %q, expected a time such as 2026-01-31T12:00:00Z", o.time)
	}
	return t, nil
}

// run is `verify evidence`.
func (o *options) run(c *cobra.Command) error {
	if err := o.check(); err != nil {
		return err
	}
	now, err := o.when()
	if err != nil {
		return err
	}
	rule, err := o.rule(now)
	if err != nil {
		return err
	}
	e, err := o.read(c.InOrStdin())
	if err != nil {
		return err
	}
	a, err := o.appraise(e, now)
	if err != nil {
		return err
	}
	r := o.judge(e, a, rule, now)
	if err := r.print(c.OutOrStdout(), o.output); err != nil {
		return err
	}
	return r.err
}
