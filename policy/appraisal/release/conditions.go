package release

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cc-runtime/cvm-agent/policy/bounded"
)

// The platforms that a rule can name: KBS TEE names. There is no sample.
const (
	PlatformSNP       = "snp"
	PlatformTDX       = "tdx"
	PlatformAzSNPvTPM = "az-snp-vtpm"
	PlatformAzTDXvTPM = "az-tdx-vtpm"
	PlatformTPM       = "tpm"
)

// Platforms are all of them.
var Platforms = []string{PlatformSNP, PlatformTDX, PlatformAzSNPvTPM, PlatformAzTDXvTPM, PlatformTPM}

// HasSNP, HasTDX and HasPCRs say what evidence of a platform is made of.
func HasSNP(platform string) bool { return platform == PlatformSNP || platform == PlatformAzSNPvTPM }

// HasTDX is for TDX quotes, see HasSNP.
func HasTDX(platform string) bool { return platform == PlatformTDX || platform == PlatformAzTDXvTPM }

// HasPCRs is for TPM quotes, see HasSNP.
func HasPCRs(platform string) bool {
	return platform == PlatformTPM || platform == PlatformAzSNPvTPM || platform == PlatformAzTDXvTPM
}

// ZeroPCR is the value of a PCR that nothing was measured into.
const ZeroPCR = "0000000000000000000000000000000000000000000000000000000000000000"

// PinnedPCRs are those without which a PCR launch says nothing: 2 holds the
// drivers that ran before the UKI (option ROMs, Driver#### variables), which
// could change it after it was measured, 4 and 11 hold the UKI, 9 what the
// kernel was given as initrds, 12 and 13 what the host slipped in beside it
// (command line, credentials, extensions): always zero.
var PinnedPCRs = []string{"2", "4", "9", "11", "12", "13"}

// Launch is one launch of one platform, measured in every part. Evidence
// matches it entirely or not at all: parts of two launches are no launch.
type Launch struct {
	Label    string     `json:"label" jsonschema:"pattern=^[A-Za-z0-9][A-Za-z0-9._-]*$,maxLength=63"`               // how tables and resources name it; the same on several platforms for one image
	Platform string     `json:"platform" jsonschema:"enum=snp,enum=tdx,enum=az-snp-vtpm,enum=az-tdx-vtpm,enum=tpm"` // KBS TEE name
	SNP      *SNPLaunch `json:"snp,omitempty"`                                                                      // snp: the measured direct boot; az-snp-vtpm: the paravisor
	TDX      *TDXLaunch `json:"tdx,omitempty"`                                                                      // tdx, az-tdx-vtpm
	// PCRs are SHA-256 PCRs by index ("0" to "23"), 64 lowercase hex digits. For
	// tpm and the Azure forms; "2", "4", "9" and "11" are required, "12" and "13"
	// are required and must be zero.
	PCRs map[string]string `json:"pcrs,omitempty"`
}

// SNPLaunch is what an SEV-SNP report says of a launch, lowercase hex.
type SNPLaunch struct {
	Measurement     string `json:"measurement"`               // MEASUREMENT, 48 bytes
	IDKeyDigest     string `json:"idKeyDigest,omitempty"`     // 48 bytes
	AuthorKeyDigest string `json:"authorKeyDigest,omitempty"` // 48 bytes
	FamilyID        string `json:"familyID,omitempty"`        // 16 bytes
	ImageID         string `json:"imageID,omitempty"`         // 16 bytes
	MinimumGuestSVN uint32 `json:"minimumGuestSVN,omitempty"` // lowest GUEST_SVN
}

// TDXLaunch is what a TDX quote says of a launch: 48 bytes each, lowercase hex.
type TDXLaunch struct {
	MRTD          string `json:"mrtd"`
	RTMR0         string `json:"rtmr0"`
	RTMR1         string `json:"rtmr1"`
	RTMR2         string `json:"rtmr2"`
	MROwner       string `json:"mrOwner,omitempty"`
	MROwnerConfig string `json:"mrOwnerConfig,omitempty"`
	MRSEAM        string `json:"mrSEAM,omitempty"`
}

// TCB says which firmware below the guest is good enough. Debug and migration
// are always refused: there is no field to allow them.
type TCB struct {
	SNP *SNPTCB `json:"snp,omitempty"`
	TDX *TDXTCB `json:"tdx,omitempty"`
}

// SNPTCB is about SEV-SNP.
type SNPTCB struct {
	// Minimum is the lowest TCB by product ("Milan", "Genoa", "Turin"). A
	// product that is not listed is refused, unless the whole map is left out.
	Minimum           map[string]SNPMinimum `json:"minimum,omitempty"`
	SigningKeys       []string              `json:"signingKeys,omitempty" jsonschema:"uniqueItems=true,enum=vcek,enum=vlek"` // vcek, vlek; default [vcek]
	VMPL              *VMPL                 `json:"vmpl,omitempty"`                                                          // default exactly 0
	RequireRevocation bool                  `json:"requireRevocation,omitempty"`                                             // a vendor's revocation list, valid at the time, must have been consulted
}

// SNPMinimum is the lowest security version of each part, all of which must be
// written down; fmc for Turin and for nothing before it.
type SNPMinimum struct {
	Bootloader *uint8 `json:"bootloader" jsonschema:"required"`
	TEE        *uint8 `json:"tee" jsonschema:"required"`
	SNP        *uint8 `json:"snp" jsonschema:"required"`
	Microcode  *uint8 `json:"microcode" jsonschema:"required"`
	FMC        *uint8 `json:"fmc,omitempty"`
}

// VMPL is exactly one of a number and a highest number, 0 to 3.
type VMPL struct {
	Exact *uint32 `json:"exact,omitempty"`
	Max   *uint32 `json:"max,omitempty"`
}

// TDXTCB is about TDX.
type TDXTCB struct {
	TCBStatus         []string `json:"tcbStatus,omitempty"`         // Intel's words; default [UpToDate]
	MinimumTCBDate    string   `json:"minimumTCBDate,omitempty"`    // RFC 3339, UTC: no TCB level older than this
	Advisories        []string `json:"advisories,omitempty"`        // those (INTEL-SA-…) that may be open; default none
	RequireRevocation bool     `json:"requireRevocation,omitempty"` // as for SNP
}

var (
	snpProducts = []string{"Milan", "Genoa", "Turin"}
	signingKeys = []string{"vcek", "vlek"}
	// What is revoked or unknown is nothing that a rule can accept.
	tcbStatuses = []string{"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate", "OutOfDateConfigurationNeeded", "TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded"}
)

// Keys are the signing keys that may sign a report.
func (s *SNPTCB) Keys() []string {
	if s == nil || len(s.SigningKeys) == 0 {
		return []string{"vcek"}
	}
	return s.SigningKeys
}

// Statuses are Intel's words on a platform that are good enough.
func (t *TDXTCB) Statuses() []string {
	if t == nil || len(t.TCBStatus) == 0 {
		return []string{"UpToDate"}
	}
	return t.TCBStatus
}

// field is a broken condition: a FieldError without a position, which
// Positions.Locate can fill in.
func field(path, format string, args ...any) error {
	return &bounded.FieldError{Path: path, Msg: fmt.Sprintf(format, args...)}
}

// first returns the first error.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func hexField(path, value string, bytes int, required bool) error {
	if value == "" && !required {
		return nil
	}
	if !isHex(value, bytes) {
		return field(path, "%q is not %d lowercase hex digits", clip(value), 2*bytes)
	}
	// Zero is how an optional field says "not set", and can be pinned as that.
	if required && strings.Trim(value, "0") == "" {
		return field(path, "is zero, which proves nothing")
	}
	return nil
}

func clip(s string) string {
	if len(s) > 120 {
		return s[:120] + "…"
	}
	return s
}

func oneOf(path, got string, want []string) error {
	if !slices.Contains(want, got) {
		return field(path, "%q, expected %s", clip(got), strings.Join(want, " or "))
	}
	return nil
}

// distinct bounds a list and refuses what is in it twice.
func distinct(path string, list []string, most int) error {
	if len(list) > most {
		return field(path, "%d entries, at most %d are accepted", len(list), most)
	}
	seen := map[string]bool{}
	for i, v := range list {
		if seen[v] {
			return field(fmt.Sprintf("%s[%d]", path, i), "%q is there twice", clip(v))
		}
		seen[v] = true
	}
	return nil
}

// Validate checks one launch that stands alone.
func (l Launch) Validate() error { return l.validate("launch") }

// validate checks one launch; path is where it stands.
func (l Launch) validate(path string) error {
	if !labelRE.MatchString(l.Label) {
		return field(path+".label", "%q is not a label (letters, digits and ._-, at most 63 bytes)", clip(l.Label))
	}
	if err := oneOf(path+".platform", l.Platform, Platforms); err != nil {
		return err
	}
	for _, part := range []struct {
		name        string
		there, want bool
	}{
		{"snp", l.SNP != nil, HasSNP(l.Platform)},
		{"tdx", l.TDX != nil, HasTDX(l.Platform)},
		{"pcrs", len(l.PCRs) > 0, HasPCRs(l.Platform)},
	} {
		switch {
		case part.want && !part.there:
			return field(path+"."+part.name, "is missing: platform %s is measured by it", l.Platform)
		case part.there && !part.want:
			return field(path+"."+part.name, "evidence of platform %s has none", l.Platform)
		}
	}
	if s := l.SNP; s != nil {
		if err := first(
			hexField(path+".snp.measurement", s.Measurement, 48, true),
			hexField(path+".snp.idKeyDigest", s.IDKeyDigest, 48, false),
			hexField(path+".snp.authorKeyDigest", s.AuthorKeyDigest, 48, false),
			hexField(path+".snp.familyID", s.FamilyID, 16, false),
			hexField(path+".snp.imageID", s.ImageID, 16, false)); err != nil {
			return err
		}
	}
	if t := l.TDX; t != nil {
		if err := first(
			hexField(path+".tdx.mrtd", t.MRTD, 48, true),
			hexField(path+".tdx.rtmr0", t.RTMR0, 48, true),
			hexField(path+".tdx.rtmr1", t.RTMR1, 48, true),
			hexField(path+".tdx.rtmr2", t.RTMR2, 48, true),
			hexField(path+".tdx.mrOwner", t.MROwner, 48, false),
			hexField(path+".tdx.mrOwnerConfig", t.MROwnerConfig, 48, false),
			hexField(path+".tdx.mrSEAM", t.MRSEAM, 48, false)); err != nil {
			return err
		}
	}
	return l.validatePCRs(path + ".pcrs")
}

func (l Launch) validatePCRs(path string) error {
	if !HasPCRs(l.Platform) {
		return nil
	}
	for _, i := range PinnedPCRs {
		if _, ok := l.PCRs[i]; !ok {
			return field(path, "PCR %s is not pinned: without it other software could have written the rest", i)
		}
	}
	for i, v := range l.PCRs {
		at := path + "." + i
		if n, err := strconv.Atoi(i); err != nil || n < 0 || n > 23 || strconv.Itoa(n) != i {
			return field(at, "is not an index of 0 to 23")
		}
		if !isHex(v, 32) {
			return field(at, "%q is not 64 lowercase hex digits", clip(v))
		}
		switch i {
		case "2", "4", "9", "11":
			if v == ZeroPCR {
				return field(at, "is zero: nothing would be measured")
			}
		case "12", "13":
			if v != ZeroPCR {
				return field(at, "is not zero: what the host slips in beside the image is measured there")
			}
		}
	}
	return nil
}

// validateLaunches checks a list, whose labels are unique for each platform.
func validateLaunches(path string, list []Launch) error {
	if len(list) > maxList {
		return field(path, "%d entries, at most %d are accepted", len(list), maxList)
	}
	seen := map[[2]string]bool{}
	for i, l := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		if err := l.validate(at); err != nil {
			return err
		}
		if seen[[2]string{l.Platform, l.Label}] {
			return field(at+".label", "%q is there twice for platform %s", l.Label, l.Platform)
		}
		seen[[2]string{l.Platform, l.Label}] = true
	}
	return nil
}

func (t *TCB) validate(path string) error {
	if t == nil {
		return nil
	}
	return first(t.SNP.validate(path+".snp"), t.TDX.validate(path+".tdx"))
}

func (s *SNPTCB) validate(path string) error {
	if s == nil {
		return nil
	}
	for product, m := range s.Minimum {
		at := path + ".minimum." + product
		if !slices.Contains(snpProducts, product) {
			return field(at, "is none of %s", strings.Join(snpProducts, ", "))
		}
		for _, part := range []struct {
			name  string
			value *uint8
		}{{"bootloader", m.Bootloader}, {"tee", m.TEE}, {"snp", m.SNP}, {"microcode", m.Microcode}} {
			if part.value == nil {
				return field(at+"."+part.name, "is missing: write down the lowest version, 0 if any will do")
			}
		}
		if (m.FMC != nil) != (product == "Turin") {
			return field(at+".fmc", "is for Turin, which needs it, and for no other product")
		}
	}
	if err := distinct(path+".signingKeys", s.SigningKeys, len(signingKeys)); err != nil {
		return err
	}
	for i, k := range s.SigningKeys {
		if err := oneOf(fmt.Sprintf("%s.signingKeys[%d]", path, i), k, signingKeys); err != nil {
			return err
		}
	}
	if v := s.VMPL; v != nil {
		if (v.Exact == nil) == (v.Max == nil) {
			return field(path+".vmpl", "set exactly one of exact and max")
		}
		if (v.Exact != nil && *v.Exact > 3) || (v.Max != nil && *v.Max > 3) {
			return field(path+".vmpl", "is above 3")
		}
	}
	return nil
}

func (t *TDXTCB) validate(path string) error {
	if t == nil {
		return nil
	}
	if err := first(distinct(path+".tcbStatus", t.TCBStatus, len(tcbStatuses)), distinct(path+".advisories", t.Advisories, maxList)); err != nil {
		return err
	}
	for i, s := range t.TCBStatus {
		if err := oneOf(fmt.Sprintf("%s.tcbStatus[%d]", path, i), s, tcbStatuses); err != nil {
			return err
		}
	}
	for i, a := range t.Advisories {
		if !advisoryRE.MatchString(a) {
			return field(fmt.Sprintf("%s.advisories[%d]", path, i), "%q is not like INTEL-SA-00837", clip(a))
		}
	}
	if t.MinimumTCBDate != "" {
		if _, err := utc(t.MinimumTCBDate); err != nil {
			return field(path+".minimumTCBDate", "%s", err)
		}
	}
	return nil
}

// utc reads a time as documents write it.
func utc(s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil || !strings.HasSuffix(s, "Z") {
		return time.Time{}, fmt.Errorf("%q is not a time like 2027-01-31T00:00:00Z (RFC 3339, UTC)", clip(s))
	}
	return t, nil
}
