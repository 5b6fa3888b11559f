package appraisal

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tdx-guest/pcs"

	"github.com/cc-runtime/cvm-agent/policy/appraisal/collateral"
)

const (
	tcbInfoName    = "tcbInfo"
	qeIdentityName = "enclaveIdentity"
)

// checkTCB holds the platform to Intel's TCB info and QE identity. What status
// is good enough is a rule's business; only Revoked is refused here.
func (v *TDX) checkTCB(t *Verdict, f *TDXFacts, q *tdxQuote, chain *pckChain, root *crl, now time.Time) {
	required := v.policy().TCBInfo.Required()
	if required {
		t.Require(CheckTDXTCBInfo, CheckTDXTCBLevel, CheckTDXQEIdentity, CheckTDXTCBStatus)
	}
	info, err := v.tcbInfo(chain, root, now)
	tcb := fetched(t, CheckTDXTCBInfo, "TCB info of this FMSPC and PCE, signed by Intel, valid at the given time", required, err)
	qeid, err := v.qeIdentity(root, now)
	qe := fetched(t, CheckTDXQEIdentity, "a QE identity signed by Intel, valid at the given time, and a QE that has it", required, err)

	var levels []pcs.TcbLevel
	if tcb {
		t.Pass(CheckTDXTCBInfo, "TCB info of this FMSPC and PCE, signed by Intel, valid at the given time",
			fmt.Sprintf("evaluation %d, valid to %s", info.TcbEvaluationDataNumber, info.NextUpdate.Format(time.RFC3339)))
		found, err := matchTCB(info, q, chain.ext)
		t.Check(err == nil, CheckTDXTCBLevel, "a level that platform and TDX module reach", levelsOr(found, err))
		levels = append(levels, found...)
		for _, l := range found {
			if f.TCBDate == "" || l.TcbDate < f.TCBDate {
				f.TCBDate = l.TcbDate
			}
		}
		tcb = err == nil
	}
	if qe {
		level, err := matchQE(qeid, q.qeReport)
		t.Check(err == nil, CheckTDXQEIdentity, "a QE identity signed by Intel, valid at the given time, and a QE that has it", levelsOr([]pcs.TcbLevel{level}, err))
		if err == nil {
			f.QEStatus = string(level.TcbStatus)
			levels = append(levels, level)
		}
		qe = err == nil
	}
	const expected = "any but Revoked; rules say which"
	if !tcb || !qe {
		t.Skip(CheckTDXTCBStatus, expected, "not both of TCB info and QE identity are there")
		return
	}
	f.TCBStatus = mergeStatus(levels)
	for _, l := range levels {
		f.Advisories = append(f.Advisories, l.AdvisoryIDs...)
	}
	slices.Sort(f.Advisories)
	f.Advisories = slices.Compact(f.Advisories)
	t.Check(f.TCBStatus != string(pcs.TcbComponentStatusRevoked), CheckTDXTCBStatus, expected,
		fmt.Sprintf("%s of %s, QE %s, advisories %s", f.TCBStatus, f.TCBDate, f.QEStatus, orNone(f.Advisories)))
}

// fetched records what kept a document away, and says whether it is there.
func fetched(t *Verdict, name, expected string, required bool, err error) bool {
	switch {
	case err == nil:
		return true
	case errors.Is(err, collateral.ErrMissing) && !required:
		t.Skip(name, expected, err.Error())
	default:
		t.Fail(name, expected, err.Error())
	}
	return false
}

func levelsOr(levels []pcs.TcbLevel, err error) string {
	if err != nil {
		return err.Error()
	}
	var s []string
	for _, l := range levels {
		s = append(s, fmt.Sprintf("%s of %s", l.TcbStatus, l.TcbDate))
	}
	return strings.Join(s, ", ")
}

func (v *TDX) tcbInfo(chain *pckChain, root *crl, now time.Time) (*pcs.TcbInfo, error) {
	doc, err := intelSigned[pcs.TcbInfo](v, pcs.TcbInfoURL(strings.ToLower(chain.ext.FMSPC)), pcs.TcbInfoIssuerChainPhrase, tcbInfoName, now)
	if err != nil {
		return nil, err
	}
	i := &doc.value
	switch {
	case root != nil && root.revoked[doc.chain[0].SerialNumber.String()]:
		return nil, fmt.Errorf("its signer, serial %x, is revoked", doc.chain[0].SerialNumber)
	case i.ID != "TDX" || i.Version != 3:
		return nil, fmt.Errorf("TCB info %q version %d, expected TDX version 3", i.ID, i.Version)
	case !strings.EqualFold(i.Fmspc, chain.ext.FMSPC) || !strings.EqualFold(i.PceID, chain.ext.PCEID):
		return nil, fmt.Errorf("it is of FMSPC %s and PCE %s, expected %s and %s", i.Fmspc, i.PceID, chain.ext.FMSPC, chain.ext.PCEID)
	}
	return i, checkIssued(i.IssueDate, i.NextUpdate, now)
}

func (v *TDX) qeIdentity(root *crl, now time.Time) (*pcs.EnclaveIdentity, error) {
	doc, err := intelSigned[pcs.EnclaveIdentity](v, pcs.QeIdentityURL(), pcs.SgxQeIdentityIssuerChainPhrase, qeIdentityName, now)
	if err != nil {
		return nil, err
	}
	i := &doc.value
	switch {
	case root != nil && root.revoked[doc.chain[0].SerialNumber.String()]:
		return nil, fmt.Errorf("its signer, serial %x, is revoked", doc.chain[0].SerialNumber)
	case i.ID != "TD_QE" || i.Version != 2:
		return nil, fmt.Errorf("identity %q version %d, expected TD_QE version 2", i.ID, i.Version)
	}
	return i, checkIssued(i.IssueDate, i.NextUpdate, now)
}

func checkIssued(from, to, now time.Time) error {
	if now.Before(from) || now.After(to) {
		return fmt.Errorf("it is valid from %s to %s, the time is %s", from.Format(time.RFC3339), to.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

// matchTCB finds the highest level that the platform reaches and, for a module
// of version 1 or later, the module's own (PCS API v4, "Get TDX TCB Info").
// Both count: a new module on old microcode is not up to date.
func matchTCB(info *pcs.TcbInfo, q *tdxQuote, ext *pcs.PckExtensions) ([]pcs.TcbLevel, error) {
	svn := q.teeTCBSVN()
	// Components 0 and 1 are the module's, and from version 1 on stand in its
	// own identity instead.
	from := 0
	if svn[1] > 0 {
		from = 2
	}
	i := slices.IndexFunc(info.TcbLevels, func(l pcs.TcbLevel) bool {
		return reaches(ext.TCB.CPUSvnComponents, l.Tcb.SgxTcbcomponents, 0) && ext.TCB.PCESvn >= l.Tcb.Pcesvn &&
			reaches(svn, l.Tcb.TdxTcbcomponents, from)
	})
	if i < 0 {
		return nil, fmt.Errorf("none of %d levels: CPU %x, PCE %d, TEE %x", len(info.TcbLevels), ext.TCB.CPUSvnComponents, ext.TCB.PCESvn, svn)
	}
	levels := []pcs.TcbLevel{info.TcbLevels[i]}
	if svn[1] == 0 {
		m := info.TdxModule
		return levels, matchModule(q, m.Mrsigner.Bytes, m.Attributes.Bytes, m.AttributesMask.Bytes)
	}
	id := fmt.Sprintf("TDX_%02x", svn[1])
	i = slices.IndexFunc(info.TdxModuleIdentities, func(m pcs.TdxModuleIdentity) bool { return strings.EqualFold(m.ID, id) })
	if i < 0 {
		return nil, fmt.Errorf("no module identity %s", id)
	}
	m := info.TdxModuleIdentities[i]
	if err := matchModule(q, m.Mrsigner.Bytes, m.Attributes.Bytes, m.AttributesMask.Bytes); err != nil {
		return nil, err
	}
	level, err := matchISVSVN(m.TcbLevels, uint16(svn[0]))
	if err != nil {
		return nil, fmt.Errorf("module identity %s: %w", id, err)
	}
	return append(levels, level), nil
}

func reaches(have []byte, want []pcs.TcbComponent, from int) bool {
	if len(have) != len(want) {
		return false
	}
	for i := from; i < len(have); i++ {
		if have[i] < want[i].Svn {
			return false
		}
	}
	return true
}

func matchModule(q *tdxQuote, signer, attributes, mask []byte) error {
	if !bytes.Equal(q.mrSignerSEAM(), signer) {
		return fmt.Errorf("MRSIGNERSEAM is %x, expected %x", q.mrSignerSEAM(), signer)
	}
	return masked("SEAMATTRIBUTES", q.seamAttributes(), attributes, mask)
}

func masked(name string, have, want, mask []byte) error {
	if len(have) != len(want) || len(have) != len(mask) {
		return fmt.Errorf("%s has %d bytes, the document %d and a mask of %d", name, len(have), len(want), len(mask))
	}
	for i := range have {
		if have[i]&mask[i] != want[i] {
			return fmt.Errorf("%s is %x, expected %s under mask %x", name, have, hex.EncodeToString(want), mask)
		}
	}
	return nil
}

func matchISVSVN(levels []pcs.TcbLevel, svn uint16) (pcs.TcbLevel, error) {
	i := slices.IndexFunc(levels, func(l pcs.TcbLevel) bool { return uint32(svn) >= l.Tcb.Isvsvn })
	if i < 0 {
		return pcs.TcbLevel{}, fmt.Errorf("none of %d levels for ISVSVN %d", len(levels), svn)
	}
	return levels[i], nil
}

// matchQE compares the quoting enclave's report with Intel's identity of it
// (PCS API v4, "Get TDX QE Identity"; report layout: SGX REPORTBODY).
func matchQE(id *pcs.EnclaveIdentity, report []byte) (pcs.TcbLevel, error) {
	if err := masked("MISCSELECT", report[16:20], id.Miscselect.Bytes, id.MiscselectMask.Bytes); err != nil {
		return pcs.TcbLevel{}, err
	}
	if err := masked("QE ATTRIBUTES", report[48:64], id.Attributes.Bytes, id.AttributesMask.Bytes); err != nil {
		return pcs.TcbLevel{}, err
	}
	if signer := report[128:160]; !bytes.Equal(signer, id.Mrsigner.Bytes) {
		return pcs.TcbLevel{}, fmt.Errorf("QE MRSIGNER is %x, expected %x", signer, id.Mrsigner.Bytes)
	}
	if product := binary.LittleEndian.Uint16(report[256:]); product != id.IsvProdID {
		return pcs.TcbLevel{}, fmt.Errorf("QE ISVPRODID is %d, expected %d", product, id.IsvProdID)
	}
	return matchISVSVN(id.TcbLevels, binary.LittleEndian.Uint16(report[258:]))
}

// mergeStatus is the worst of all: what any level lacks, the whole lacks.
func mergeStatus(levels []pcs.TcbLevel) string {
	var old, config, hardening bool
	for _, l := range levels {
		switch l.TcbStatus {
		case pcs.TcbComponentStatusUpToDate:
		case pcs.TcbComponentStatusSwHardeningNeeded:
			hardening = true
		case pcs.TcbComponentStatusConfigurationNeeded:
			config = true
		case pcs.TcbComponentStatusConfigurationAndSWHardeningNeeded:
			config, hardening = true, true
		case pcs.TcbComponentStatusOutOfDate:
			old = true
		case pcs.TcbComponentStatusOutOfDateConfigurationNeeded:
			old, config = true, true
		default:
			return string(pcs.TcbComponentStatusRevoked)
		}
	}
	out := pcs.TcbComponentStatusUpToDate
	switch {
	case old && config:
		out = pcs.TcbComponentStatusOutOfDateConfigurationNeeded
	case old:
		out = pcs.TcbComponentStatusOutOfDate
	case config && hardening:
		out = pcs.TcbComponentStatusConfigurationAndSWHardeningNeeded
	case config:
		out = pcs.TcbComponentStatusConfigurationNeeded
	case hardening:
		out = pcs.TcbComponentStatusSwHardeningNeeded
	}
	return string(out)
}
