package appraisal

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// Registers of a PC Client vTPM that this project gives a meaning.
const (
	pcrLaunch = 8  // extended once with the initdata's digest
	pcrEvents = 14 // the event log
)

// The checks of TPM evidence, in the order of the table.
const (
	CheckQuoteSignature = "quote-signature"
	CheckQuoteMagic     = "quote-tpm-generated"
	CheckReportData     = "report-data"
	CheckPCRSelection   = "pcr-selection"
	CheckPCRDigest      = "pcr-digest"
	CheckAKBound        = "ak-bound"
	CheckAKAttributes   = "ak-attributes"
	CheckAKSame         = "ak-same-key"
	CheckEKChain        = "ek-chain"
	CheckActivation     = "credential-activation"
	CheckEventLog       = "event-log"
	CheckLaunch         = "launch-binding"
)

// TPM judges evidence of TEE "tpm". What it proves is worth as much as whoever
// runs the TPM.
type TPM struct {
	EKRoots    []RootSet
	AKRoots    []RootSet // issuers of AK certificates; names are of one space with EKRoots
	ListedEKs  []string  // SHA-256 of EK SPKIs, lowercase hex: trusted without a chain
	TrustedAKs []string  // SHA-256 of AK SPKIs: trusted without activation; for dialect kbs, which cannot prove an AK
}

// TEE implements Verifier.
func (*TPM) TEE() string { return "tpm" }

// Appraise implements Verifier.
func (v *TPM) Appraise(in Input) (*Appraisal, error) {
	ev, err := kbs.DecodeTPMEvidence(in.Primary)
	if err != nil {
		return nil, err
	}
	q, err := parseQuote(ev)
	if err != nil {
		return nil, err
	}
	add, others, err := kbs.DecodeAdditional(in.Additional)
	if err != nil {
		return nil, err
	}
	t := NewVerdict(CheckQuoteSignature, CheckQuoteMagic, CheckPCRSelection, CheckPCRDigest, CheckAKBound)
	facts := Facts{TEE: v.TEE(), Dialect: in.Dialect}

	q.check(t, in)
	if t.Outcome(CheckPCRDigest) == Passed {
		facts.PCRs = q.covered()
	}
	v.bindAK(t, &facts, in, ev, add.Activation)

	checkLaunch(t, &facts, in.InitData, launchPCR8(&facts))
	if in.Dialect == kbs.Dialect {
		t.Require(CheckEventLog)
	}
	reg := registerPCR14(&facts)
	if facts.Identity == "" && in.Offline == nil {
		reg.value = "" // anybody's key signs any PCRs: see checkLog
	}
	checkLog(t, &facts, add.EventLog, in.Dialect, reg)

	t.Skip("qualified-signer", "", "names the AK's parents, which are not in the evidence; the activation binds the AK")
	t.Skip("clock-and-firmware", "", "no rule pins the TPM's clock, reset count or firmware version")
	for _, name := range others {
		t.Skip("additional-evidence:"+name, "", "not known here")
		facts.Not = append(facts.Not, name)
	}
	return &Appraisal{Verdict: t, Facts: facts}, nil
}

// bindAK checks that the key which signed the quote lives in a TPM whose EK is
// trusted, or is listed itself.
func (v *TPM) bindAK(t *Verdict, facts *Facts, in Input, ev *kbs.TPMEvidence, activation []byte) {
	quoteKey := spkiFingerprint(ev.AKPublic)
	if in.Dialect != kbs.Dialect || in.Pending == nil {
		listed := slices.Contains(v.TrustedAKs, quoteKey)
		t.Check(listed, CheckAKBound, "an AK listed by this broker (the dialect has no credential activation)", quoteKey)
		if listed {
			facts.Identity = "tpm-ak:" + quoteKey
		}
		t.Skip(CheckActivation, "", "not in dialect "+in.Dialect)
		t.Skip(CheckEKChain, "", "not in dialect "+in.Dialect)
		return
	}
	t.Require(CheckAKSame, CheckAKAttributes)

	a, err := parseAK(in.Pending.AKPublic)
	if err != nil {
		t.Fail(CheckAKAttributes, "a usable TPMT_PUBLIC", err.Error())
		return
	}
	t.Check(bytes.Equal(a.spki, ev.AKPublic), CheckAKSame, spkiFingerprint(a.spki), quoteKey)
	wrong := a.attributes()
	t.Check(len(wrong) == 0, CheckAKAttributes, "restricted, sign, fixedTPM, fixedParent, sensitiveDataOrigin, not decrypt", "wrong: "+orNone(wrong))

	var vouched bool
	if len(in.Pending.AKCert) > 0 {
		vouched = v.checkAKCert(t, facts, in, a)
		t.Skip(CheckEKChain, "", "the AK has a certificate of its own")
		t.Skip(CheckActivation, "", "the AK has a certificate of its own")
	} else {
		vouched = v.activated(t, facts, in, activation)
	}
	bound := vouched && len(wrong) == 0 && bytes.Equal(a.spki, ev.AKPublic)
	t.Check(bound, CheckAKBound, "the quote's key in the TPM of a trusted EK, or certified", "AK "+a.Name())
	switch {
	case bound && len(in.Pending.AKCert) > 0:
		// A certificate names the key alone. The rest of TPMT_PUBLIC is the peer's
		// word, and by a Name of it one key would be any number of instances.
		facts.Identity = "tpm-ak:" + quoteKey
	case bound:
		facts.Identity = "tpm:" + a.Name()
	}
}

// activated says whether the AK lives in the TPM of a trusted EK.
func (v *TPM) activated(t *Verdict, facts *Facts, in Input, activation []byte) bool {
	t.Require(CheckEKChain, CheckActivation)
	chained := v.checkEK(t, facts, in)
	// Constant time: the peer may try as often as it opens sessions.
	ok := len(in.Pending.Secret) == secretSize && subtle.ConstantTimeCompare(in.Pending.Secret, activation) == 1
	t.Check(ok, CheckActivation, "this session's activated secret", fmt.Sprintf("%d bytes that %s", len(activation), map[bool]string{true: "agree", false: "differ"}[ok]))
	return ok && chained
}

func (v *TPM) checkEK(t *Verdict, facts *Facts, in Input) bool {
	const expected = "an EK certificate by a configured root, or a listed EK"
	cert, err := parseEKCert(in.Pending.EKCert)
	if err != nil {
		t.Fail(CheckEKChain, expected, err.Error())
		return false
	}
	if fp := spkiFingerprint(cert.RawSubjectPublicKeyInfo); slices.Contains(v.ListedEKs, fp) {
		t.Pass(CheckEKChain, expected, "listed EK "+fp)
		return true
	}
	sets, err := verifyEK(cert, v.EKRoots, in.Time)
	if err != nil {
		t.Fail(CheckEKChain, expected, err.Error())
		return false
	}
	facts.EKRoots = sets
	t.Pass(CheckEKChain, expected, "issued by "+cert.Issuer.String()+", root set "+strings.Join(sets, ", "))
	return true
}

// quote is a decoded TPM quote.
type quote struct {
	attest    *tpm2.TPMSAttest
	info      *tpm2.TPMSQuoteInfo // nil when the structure attests something else
	message   []byte
	signature *tpm2.TPMTSignature
	key       crypto.PublicKey
	pcrs      *[kbs.PCRCount][32]byte
}

func parseQuote(ev *kbs.TPMEvidence) (*quote, error) {
	key, err := x509.ParsePKIXPublicKey(ev.AKPublic)
	if err != nil {
		return nil, fmt.Errorf("ak_public: %w", err)
	}
	if err := strongKey(key); err != nil {
		return nil, fmt.Errorf("ak_public: %w", err)
	}
	pcrs, err := ev.Quote.Values()
	if err != nil {
		return nil, err
	}
	sig, err := unmarshal[tpm2.TPMTSignature](ev.Quote.Signature, "tpm_quote.signature")
	if err != nil {
		return nil, err
	}
	attest, err := unmarshal[tpm2.TPMSAttest](ev.Quote.Message, "tpm_quote.message")
	if err != nil {
		return nil, err
	}
	q := &quote{attest: attest, message: ev.Quote.Message, signature: sig, key: key, pcrs: pcrs}
	if attest.Type == tpm2.TPMSTAttestQuote {
		if q.info, err = attest.Attested.Quote(); err != nil {
			return nil, fmt.Errorf("tpm_quote.message: %w", err)
		}
	}
	return q, nil
}

// check fills the rows that concern the quote alone.
func (q *quote) check(t *Verdict, in Input) {
	q.checkSignature(t)
	checkExtraData(t, in, q.attest.ExtraData.Buffer)
	q.checkPCRs(t)
}

func (q *quote) checkSignature(t *Verdict) {
	err := q.verify()
	found := "valid"
	if err != nil {
		found = err.Error()
	}
	t.Check(err == nil, CheckQuoteSignature, "RSASSA or ECDSA with SHA-256 under ak_public", found)
	t.Check(q.attest.Magic.Check() == nil && q.info != nil, CheckQuoteMagic, "TPM_GENERATED and TPM_ST_ATTEST_QUOTE",
		fmt.Sprintf("%#x and %#x", uint32(q.attest.Magic), uint16(q.attest.Type)))
}

func (q *quote) checkPCRs(t *Verdict) {
	if q.info == nil {
		return
	}
	sel, err := q.selection()
	if err != nil {
		t.Fail(CheckPCRSelection, "one selection, SHA-256 bank, PCRs 0 to 23", err.Error())
		return
	}
	t.Pass(CheckPCRSelection, "one selection, SHA-256 bank, PCRs 0 to 23", fmt.Sprint(sel))
	h := sha256.New()
	for _, i := range sel {
		h.Write(q.pcrs[i][:])
	}
	sum := h.Sum(nil)
	t.Check(bytes.Equal(sum, q.info.PCRDigest.Buffer), CheckPCRDigest, hex.EncodeToString(q.info.PCRDigest.Buffer), hex.EncodeToString(sum))
}

// verify checks the signature over the exact message.
func (q *quote) verify() error {
	digest := sha256.Sum256(q.message)
	switch k := q.key.(type) {
	case *rsa.PublicKey:
		s, err := q.signature.Signature.RSASSA()
		if q.signature.SigAlg != tpm2.TPMAlgRSASSA || err != nil {
			return fmt.Errorf("signature algorithm %#04x, expected RSASSA for an RSA key", uint16(q.signature.SigAlg))
		}
		if s.Hash != tpm2.TPMAlgSHA256 {
			return fmt.Errorf("signature hash %#04x, expected SHA-256", uint16(s.Hash))
		}
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, digest[:], s.Sig.Buffer)
	case *ecdsa.PublicKey:
		s, err := q.signature.Signature.ECDSA()
		if q.signature.SigAlg != tpm2.TPMAlgECDSA || err != nil {
			return fmt.Errorf("signature algorithm %#04x, expected ECDSA for an ECC key", uint16(q.signature.SigAlg))
		}
		if s.Hash != tpm2.TPMAlgSHA256 {
			return fmt.Errorf("signature hash %#04x, expected SHA-256", uint16(s.Hash))
		}
		r, w := new(big.Int).SetBytes(s.SignatureR.Buffer), new(big.Int).SetBytes(s.SignatureS.Buffer)
		if !ecdsa.Verify(k, digest[:], r, w) {
			return fmt.Errorf("ECDSA verification failed")
		}
		return nil
	}
	return fmt.Errorf("key %T", q.key)
}

// selection lists the quoted PCRs in ascending order. Another bank, or the
// same one twice, has no values in the evidence and is refused.
func (q *quote) selection() ([]int, error) {
	s := q.info.PCRSelect.PCRSelections
	if len(s) != 1 || s[0].Hash != tpm2.TPMAlgSHA256 {
		return nil, fmt.Errorf("%d selections or another bank", len(s))
	}
	var list []int
	for i, b := range s[0].PCRSelect {
		for bit := range 8 {
			if b&(1<<bit) == 0 {
				continue
			}
			if n := i*8 + bit; n < kbs.PCRCount {
				list = append(list, n)
			} else {
				return nil, fmt.Errorf("PCR %d", n)
			}
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("no PCR selected")
	}
	return list, nil
}

// covered returns the values of the quoted PCRs, to be used only after the
// digest was found to agree.
func (q *quote) covered() map[int]string {
	sel, err := q.selection()
	if err != nil {
		return nil
	}
	m := make(map[int]string, len(sel))
	for _, i := range sel {
		m[i] = hex.EncodeToString(q.pcrs[i][:])
	}
	return m
}
