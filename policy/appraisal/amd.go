package appraisal

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/kds"
	"github.com/google/go-sev-guest/verify/trust"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// amdRoots are AMD's own, with the ASVK of each line beside its ASK.
var amdRoots = sync.OnceValue(func() map[string][]*trust.AMDRootCerts {
	roots := map[string][]*trust.AMDRootCerts{}
	for line, bundles := range map[string][2][]byte{
		"Milan": {trust.AskArkMilanVcekBytes, trust.AskArkMilanVlekBytes},
		"Genoa": {trust.AskArkGenoaVcekBytes, trust.AskArkGenoaVlekBytes},
		"Turin": {trust.AskArkTurinVcekBytes, trust.AskArkTurinVlekBytes},
	} {
		r := trust.AMDRootCertsProduct(line)
		r.ProductCerts = &trust.ProductCerts{}
		for _, b := range bundles { // the second adds the ASVK to the first's ASK
			ask, ark, err := productChain(b)
			if err == nil {
				err = r.ProductCerts.Decode(ask, ark)
			}
			if err != nil {
				panic(err)
			}
		}
		roots[line] = []*trust.AMDRootCerts{r}
	}
	return roots
})

// productChain is the ASK or ASVK and the ARK, DER, of AMD's PEM bundle. Some
// of them end with an empty line, which go-sev-guest refuses.
func productChain(b []byte) (ask, ark []byte, err error) {
	return kds.ParseProductCertChain(append(bytes.Clone(bytes.TrimSpace(b)), '\n'))
}

// productLine names the product whose chain signs for a CPU (AMD 57230,
// "Determining the Product Name"); Bergamo and Siena are of Genoa's.
func productLine(family, model uint8) string {
	switch {
	case family == 0x19 && model <= 0x0f:
		return "Milan"
	case family == 0x19 && (model >= 0x10 && model <= 0x1f || model >= 0xa0 && model <= 0xaf):
		return "Genoa"
	case family == 0x1a && model <= 0x1f:
		return "Turin"
	}
	return ""
}

// lineOfName is the product line of a certificate's productName, which may
// end in a stepping: "Milan-B0", "Genoa".
func lineOfName(name string) string {
	line, _, _ := strings.Cut(name, "-")
	switch line {
	case "Milan", "Genoa", "Turin":
		return line
	case "Bergamo", "Siena":
		return "Genoa"
	}
	return ""
}

// vendorKey is a VCEK or VLEK whose chain to a pinned ARK was verified, with
// what its certificate says. Dates are compared at each use.
type vendorKey struct {
	leaf, ica, ark *x509.Certificate
	signer         abi.ReportSigner
	line           string // of the ARK and ASK that signed
	named          string // line of the certificate's productName, "" when not known here
	product        string // productName as it is
	chipID         []byte // 64 bytes; nil in a VLEK
	tcb            SNPTCB
	from, until    time.Time // when all three certificates are valid
}

func (k *vendorKey) kind() string { return k.signer.String() }

// newVendorKey reads a leaf certificate and verifies its chain. icas are
// candidates for the ASK or ASVK; none is trusted but by a root's ARK.
func newVendorKey(der []byte, signer abi.ReportSigner, line string, roots []*trust.AMDRootCerts, icas []*x509.Certificate) (*vendorKey, error) {
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if cn := "SEV-" + signer.String(); leaf.Subject.CommonName != cn || leaf.IsCA {
		return nil, fmt.Errorf("subject %q, expected %q and no CA", leaf.Subject.CommonName, cn)
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P384() {
		return nil, errors.New("the key is not ECDSA on P-384")
	}
	k := &vendorKey{leaf: leaf, signer: signer, line: line}
	if err := k.readExtensions(); err != nil {
		return nil, err
	}
	err = errors.New("no root for product line " + line)
	for _, root := range roots {
		if root == nil || root.ProductCerts == nil || root.ProductCerts.Ark == nil {
			continue
		}
		for _, ica := range icas {
			if err = k.chain(ica, root.ProductCerts.Ark); err == nil {
				return k, nil
			}
		}
	}
	return nil, err
}

// chain verifies leaf, ASK or ASVK, and ARK, at a time when all are valid.
func (k *vendorKey) chain(ica, ark *x509.Certificate) error {
	cn := "SEV-" + k.line
	if k.signer == abi.VlekReportSigner {
		cn = "SEV-VLEK-" + k.line
	}
	if ica.Subject.CommonName != cn {
		return fmt.Errorf("intermediate is %q, expected %q", ica.Subject.CommonName, cn)
	}
	k.from, k.until = ark.NotBefore, ark.NotAfter
	for _, c := range []*x509.Certificate{k.leaf, ica, ark} {
		if c.SignatureAlgorithm != x509.SHA384WithRSAPSS {
			return fmt.Errorf("%q is signed with %s, expected RSASSA-PSS with SHA-384", c.Subject.CommonName, c.SignatureAlgorithm)
		}
		if c.NotBefore.After(k.from) {
			k.from = c.NotBefore
		}
		if c.NotAfter.Before(k.until) {
			k.until = c.NotAfter
		}
	}
	if k.until.Before(k.from) || k.from.IsZero() {
		return errors.New("the certificates are never valid together")
	}
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: k.from, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	o.Roots.AddCert(ark)
	o.Intermediates.AddCert(ica)
	if _, err := k.leaf.Verify(o); err != nil {
		return err
	}
	k.ica, k.ark = ica, ark
	return nil
}

var (
	oidFMC   = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1, 3, 9}
	oidsSPL4 = []asn1.ObjectIdentifier{kds.OidSpl4, kds.OidSpl5, kds.OidSpl6, kds.OidSpl7}
)

// turinHWID is the size of a Turin chip's id, in bytes. The report pads it
// with zeros to 64.
const turinHWID = 8

// readExtensions reads AMD's extensions (57230, table 11). go-sev-guest reads
// those of Milan and Genoa; Turin's short chip id and FMC are first brought
// into that form.
func (k *vendorKey) readExtensions() error {
	c := *k.leaf
	c.Extensions = slices.Clone(c.Extensions)
	fmc := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidFMC) })
	if fmc >= 0 {
		var n int
		if rest, err := asn1.Unmarshal(c.Extensions[fmc].Value, &n); err != nil || len(rest) > 0 || n < 0 || n > 255 {
			return errors.New("the FMC extension is not a number of 0 to 255")
		}
		k.tcb.FMC = uint8(n)
		c.Extensions = slices.Delete(c.Extensions, fmc, fmc+1)
		for _, oid := range oidsSPL4 {
			if !slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oid) }) {
				c.Extensions = append(c.Extensions, pkix.Extension{Id: oid, Value: []byte{asn1.TagInteger, 1, 0}})
			}
		}
		for i, e := range c.Extensions {
			if !e.Id.Equal(kds.OidHwid) {
				continue
			}
			id := e.Value
			if len(id) == turinHWID+2 && id[0] == asn1.TagOctetString && id[1] == turinHWID {
				id = id[2:]
			}
			if len(id) != turinHWID {
				return fmt.Errorf("the chip id beside an FMC has %d bytes, expected %d", len(id), turinHWID)
			}
			c.Extensions[i].Value = zeroPadded(id, abi.ChipIDSize)
		}
	}
	e, err := kds.CertificateExtensions(&c, k.signer)
	if err != nil {
		return err
	}
	p := kds.DecomposeTCBVersion(e.TCBVersion)
	k.tcb.Bootloader, k.tcb.TEE, k.tcb.SNP, k.tcb.Microcode = p.BlSpl, p.TeeSpl, p.SnpSpl, p.UcodeSpl
	k.chipID, k.product, k.named = e.HWID, e.ProductName, lineOfName(e.ProductName)
	if k.line == "" {
		k.line = k.named
	}
	if (fmc >= 0) != (k.named == "Turin") {
		return fmt.Errorf("an FMC extension (%t) in a certificate for %q", fmc >= 0, e.ProductName)
	}
	return nil
}

// checkDates compares with the verifier's clock.
func (k *vendorKey) checkDates(t *Verdict, now time.Time) {
	t.Check(!now.Before(k.from) && !now.After(k.until), CheckSNPDates, "valid at "+now.UTC().Format(time.RFC3339),
		"valid from "+k.from.UTC().Format(time.RFC3339)+" until "+k.until.UTC().Format(time.RFC3339))
}

// checkAgainst compares what the certificate says with what the report says.
func (k *vendorKey) checkAgainst(t *Verdict, r *snpReport) {
	found := fmt.Sprintf("%s certificate for %q by the chain of %s", k.kind(), k.product, k.line)
	if r.line == "" {
		t.Check(k.named == k.line, CheckSNPProduct, "certificate and chain of one product (report version 2 names no CPU)", found)
	} else {
		t.Check(k.line == r.line && k.named == r.line, CheckSNPProduct, fmt.Sprintf("%s (CPU family %#x, model %#x)", r.line, *r.CPUIDFamily, *r.CPUIDModel), found)
	}
	reported := snpTCB(r.ReportedTCB)
	t.Check(k.tcb == reported, CheckSNPCertTCB, reported.String()+": the reported TCB", k.tcb.String()+" in the "+k.kind()+" certificate")
	switch {
	case k.signer == abi.VlekReportSigner:
		t.Skip(CheckSNPChip, "", "a VLEK is not of one chip")
	case allZero(r.ChipID):
		t.Skip(CheckSNPChip, "", "the host masks CHIP_ID; the signing certificate is of chip "+hex.EncodeToString(k.chipID))
	default:
		t.Check(bytes.Equal(k.chipID, r.ChipID), CheckSNPChip, hex.EncodeToString(r.ChipID)+", CHIP_ID", hex.EncodeToString(k.chipID)+" in the VCEK certificate")
	}
}

// vcekAddress is where AMD publishes the VCEK of a chip at a TCB.
func vcekAddress(line string, r *kbs.SNPReport) string {
	tcb := r.ReportedTCB
	parts := kds.TCBParts{BlSpl: tcb.Bootloader, TeeSpl: tcb.TEE, SnpSpl: tcb.SNP, UcodeSpl: tcb.Microcode}
	version, err := kds.ComposeTCBParts(parts)
	if err != nil {
		return ""
	}
	if tcb.FMC == nil {
		return kds.VCEKCertURL(line, r.ChipID, version)
	}
	return kds.VCEKCertURL(line, r.ChipID[:turinHWID], version) + fmt.Sprintf("&fmcSPL=%d", *tcb.FMC)
}
