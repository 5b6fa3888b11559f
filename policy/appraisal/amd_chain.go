package appraisal

import (
	"container/list"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/kds"
	"github.com/google/go-sev-guest/verify/trust"

	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

// maxKnown bounds a cache, in entries of a few KiB. Only what was verified
// under a pinned ARK gets in, so that a peer cannot fill it with anything.
const maxKnown = 4096

// lru keeps the entries used last, by the SHA-256 of what they were made from.
// The zero value is empty and ready.
type lru[V any] struct {
	mu    sync.Mutex
	order *list.List // of *lruEntry[V], most recent first
	known map[[sha256.Size]byte]*list.Element
}

type lruEntry[V any] struct {
	key   [sha256.Size]byte
	value V
}

type (
	chainCache = lru[*vendorKey]
	listCache  = lru[*revocationList]
)

func (c *lru[V]) get(key [sha256.Size]byte) (v V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.known[key]
	if !ok {
		return v, false
	}
	c.order.MoveToFront(e)
	return e.Value.(*lruEntry[V]).value, true
}

func (c *lru[V]) put(key [sha256.Size]byte, v V) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil {
		c.order, c.known = list.New(), map[[sha256.Size]byte]*list.Element{}
	}
	if e, ok := c.known[key]; ok {
		e.Value.(*lruEntry[V]).value = v
		c.order.MoveToFront(e)
		return
	}
	c.known[key] = c.order.PushFront(&lruEntry[V]{key, v})
	if c.order.Len() > maxKnown {
		last := c.order.Back()
		delete(c.known, c.order.Remove(last).(*lruEntry[V]).key)
	}
}

// cacheKey is the hash of parts that cannot be mistaken for one another.
func cacheKey(parts ...[]byte) (key [sha256.Size]byte) {
	h := sha256.New()
	var n [8]byte
	for _, p := range parts {
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write(p)
	}
	h.Sum(key[:0])
	return key
}

func (v *SNP) roots() map[string][]*trust.AMDRootCerts {
	if v.Roots != nil {
		return v.Roots
	}
	return amdRoots()
}

// signingKey finds the certificate of the key that key_info names and verifies
// its chain: the evidence's own, else the collateral's. Nil when it cannot.
func (v *SNP) signingKey(t *Verdict, r *snpReport, certs []kbs.SNPCert) *vendorKey {
	const expected = "a VCEK or VLEK, as key_info says, with its key not masked"
	s := r.signer.SigningKey
	if s != abi.VcekReportSigner && s != abi.VlekReportSigner || r.signer.MaskChipKey {
		// With MASK_CHIP_KEY the firmware signs nothing.
		t.Fail(CheckSNPSigningKey, expected, fmt.Sprintf("key_info %#x: %s, masked %t", r.KeyInfo, s, r.signer.MaskChipKey))
		return nil
	}
	if !r.known {
		t.Fail(CheckSNPProduct, "a CPU of Milan, Genoa or Turin", fmt.Sprintf("family %#x, model %#x", *r.CPUIDFamily, *r.CPUIDModel))
		return nil
	}
	given, err := pickCerts(certs, s)
	if err == nil && given.leaf == nil {
		given.leaf, err = v.fetchLeaf(r)
	}
	if err != nil {
		t.Fail(CheckSNPSigningKey, expected, err.Error())
		return nil
	}
	t.Pass(CheckSNPSigningKey, expected, s.String())

	const chain = "signed by the ASK or ASVK of a pinned ARK"
	key, err := v.verifyChain(r.line, s, given)
	if err != nil {
		t.Fail(CheckSNPChain, chain, s.String()+" certificate: "+err.Error())
		return nil
	}
	t.Pass(CheckSNPChain, chain, key.ica.Subject.CommonName+" by "+key.ark.Subject.CommonName)
	return key
}

// givenCerts are those of the evidence that concern the signing key, DER.
type givenCerts struct{ leaf, ica, ark []byte }

// pickCerts takes the evidence's certificates by their declared kinds. A kind
// that is there twice has no meaning.
func pickCerts(certs []kbs.SNPCert, s abi.ReportSigner) (g givenCerts, err error) {
	const most = 16 << 10
	var kinds []string
	for _, c := range certs {
		var to *[]byte
		switch {
		case string(c.Type) == s.String():
			to = &g.leaf
		case c.Type == kbs.CertASK:
			to = &g.ica
		case c.Type == kbs.CertARK:
			to = &g.ark
		default:
			kinds = append(kinds, string(c.Type))
			continue
		}
		if *to != nil || len(c.Data) == 0 || len(c.Data) > most {
			return g, fmt.Errorf("%s certificate twice, empty or of more than %d bytes", c.Type, most)
		}
		*to = c.Data
	}
	other := kbs.CertVCEK
	if s == abi.VcekReportSigner {
		other = kbs.CertVLEK
	}
	if g.leaf == nil && slices.Contains(kinds, other) {
		return g, fmt.Errorf("key_info says %s, the evidence has a %s certificate alone", s, other)
	}
	return g, nil
}

// fetchLeaf takes the VCEK from the collateral. A VLEK is the provider's own
// and AMD publishes none.
func (v *SNP) fetchLeaf(r *snpReport) ([]byte, error) {
	if r.signer.SigningKey != abi.VcekReportSigner {
		return nil, errors.New("no VLEK certificate in the evidence")
	}
	if allZero(r.ChipID) {
		return nil, errors.New("no VCEK certificate in the evidence, and the host masks CHIP_ID")
	}
	lines := []string{r.line}
	if r.line == "" {
		lines = []string{"Milan", "Genoa"} // version 2 has no CPU, Turin has no version 2
	}
	var last error
	for _, line := range lines {
		p, err := v.Collateral.Get(context.Background(), vcekAddress(line, r.SNPReport))
		if err == nil {
			return p.Body, nil
		}
		last = err
	}
	return nil, fmt.Errorf("no VCEK certificate in the evidence: %w", last)
}

// verifyChain verifies a leaf's chain, or finds that it did so before.
func (v *SNP) verifyChain(line string, s abi.ReportSigner, given givenCerts) (*vendorKey, error) {
	id := cacheKey([]byte{byte(s)}, []byte(line), given.leaf, given.ica, given.ark)
	if k, ok := v.chains.get(id); ok {
		return k, nil
	}
	named := line
	if named == "" {
		var err error
		if named, err = lineOfLeaf(given.leaf, s); err != nil {
			return nil, err
		}
	}
	roots := v.roots()[named]
	icas, err := v.intermediates(named, s, given, roots)
	if err != nil {
		return nil, err
	}
	k, err := newVendorKey(given.leaf, s, named, roots, icas)
	if err != nil {
		return nil, err
	}
	if given.ark != nil {
		// It proves nothing, but a foreign one says that something is wrong.
		ark, err := x509.ParseCertificate(given.ark)
		if err != nil {
			return nil, fmt.Errorf("the evidence's ARK: %w", err)
		}
		if string(ark.RawSubjectPublicKeyInfo) != string(k.ark.RawSubjectPublicKeyInfo) {
			return nil, fmt.Errorf("the evidence's ARK %q is not the pinned one", ark.Subject.CommonName)
		}
	}
	v.chains.put(id, k)
	return k, nil
}

// lineOfLeaf is the product line that a certificate names.
func lineOfLeaf(der []byte, s abi.ReportSigner) (string, error) {
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return "", err
	}
	k := &vendorKey{leaf: leaf, signer: s}
	if err := k.readExtensions(); err != nil {
		return "", err
	}
	if k.named == "" {
		return "", fmt.Errorf("product %q is not known here", k.product)
	}
	return k.named, nil
}

// intermediates are the candidates for ASK or ASVK: the evidence's, the
// pinned ones, and the collateral's where there is neither.
func (v *SNP) intermediates(line string, s abi.ReportSigner, given givenCerts, roots []*trust.AMDRootCerts) (icas []*x509.Certificate, err error) {
	if given.ica != nil {
		c, err := x509.ParseCertificate(given.ica)
		if err != nil {
			return nil, fmt.Errorf("the evidence's ASK: %w", err)
		}
		icas = append(icas, c)
	}
	for _, r := range roots {
		if r == nil || r.ProductCerts == nil {
			continue
		}
		c := r.ProductCerts.Ask
		if s == abi.VlekReportSigner {
			c = r.ProductCerts.Asvk
		}
		if c != nil {
			icas = append(icas, c)
		}
	}
	if len(icas) > 0 {
		return icas, nil
	}
	p, err := v.Collateral.Get(context.Background(), kds.ProductCertChainURL(s, line))
	if err != nil {
		return nil, fmt.Errorf("no ASK or ASVK: %w", err)
	}
	der, _, err := productChain(p.Body)
	if err != nil {
		return nil, fmt.Errorf("chain from the collateral: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("ASK from the collateral: %w", err)
	}
	return []*x509.Certificate{c}, nil
}
