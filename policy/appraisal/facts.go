package appraisal

// SNPFacts are what a verified SEV-SNP report says. Byte fields are lowercase
// hex, in the report's order (SEV-SNP ABI 1.58, table 23).
type SNPFacts struct {
	Version         uint32 `json:"version"`
	Measurement     string `json:"measurement"` // 48 bytes
	HostData        string `json:"hostData"`    // 32 bytes
	ReportID        string `json:"reportID"`    // 32 bytes, random for each launched guest
	IDKeyDigest     string `json:"idKeyDigest"`
	AuthorKeyDigest string `json:"authorKeyDigest"`
	FamilyID        string `json:"familyID"`
	ImageID         string `json:"imageID"`
	ChipID          string `json:"chipID"` // zero when the host masks it
	VMPL            uint32 `json:"vmpl"`
	GuestSVN        uint32 `json:"guestSVN"`
	Policy          uint64 `json:"policy"` // guest policy, ABI table 10; debug and migration are never set here
	PlatformInfo    uint64 `json:"platformInfo"`
	Product         string `json:"product"`    // "Milan", "Genoa", "Turin", …: the vendor chain that the signing key is of
	SigningKey      string `json:"signingKey"` // "vcek" or "vlek"
	ReportedTCB     SNPTCB `json:"reportedTCB"`
	CommittedTCB    SNPTCB `json:"committedTCB"`
	LaunchTCB       SNPTCB `json:"launchTCB"`
	// NotRevoked says that a revocation list of the vendor, valid at the time
	// of the appraisal, was consulted.
	NotRevoked bool `json:"notRevoked"`
}

// SNPTCB is a TCB version by its security version numbers; FMC is 0 before Turin.
type SNPTCB struct {
	FMC        uint8 `json:"fmc,omitempty"`
	Bootloader uint8 `json:"bootloader"`
	TEE        uint8 `json:"tee"`
	SNP        uint8 `json:"snp"`
	Microcode  uint8 `json:"microcode"`
}

// AtLeast says that no part of t is lower than in min.
func (t SNPTCB) AtLeast(min SNPTCB) bool {
	return t.FMC >= min.FMC && t.Bootloader >= min.Bootloader && t.TEE >= min.TEE && t.SNP >= min.SNP && t.Microcode >= min.Microcode
}

// TDXFacts are what a verified TDX quote says. Byte fields are lowercase hex
// (Intel TDX DCAP quote, TD report 1.0 and 1.5).
type TDXFacts struct {
	QuoteVersion  uint16   `json:"quoteVersion"`
	MRTD          string   `json:"mrtd"` // 48 bytes, as all that follow up to RTMRs
	MRConfigID    string   `json:"mrConfigID"`
	MROwner       string   `json:"mrOwner"`
	MROwnerConfig string   `json:"mrOwnerConfig"`
	MRSEAM        string   `json:"mrSEAM"`
	RTMRs         []string `json:"rtmrs"`        // 4
	TDAttributes  string   `json:"tdAttributes"` // 8 bytes; debug is never set here
	XFAM          string   `json:"xfam"`         // 8 bytes
	TEETCBSVN     string   `json:"teeTCBSVN"`    // 16 bytes
	// TCBStatus is Intel's word on the platform, of TCB info that was signed and
	// valid at the time of the appraisal: "UpToDate", "SWHardeningNeeded", …;
	// empty when no TCB info was there and the collateral policy allows that.
	TCBStatus  string   `json:"tcbStatus"`
	TCBDate    string   `json:"tcbDate,omitempty"` // RFC 3339, of the matching level; the earlier of platform and module
	Advisories []string `json:"advisories,omitempty"`
	FMSPC      string   `json:"fmspc"` // 6 bytes
	QEStatus   string   `json:"qeStatus"`
	NotRevoked bool     `json:"notRevoked"` // as in SNPFacts
}
