package platform

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy/cause"
)

// PCRCount is the number of PCRs in the SHA-256 bank.
const PCRCount = 24

// PCRs with a meaning of ours.
const (
	PCRLaunch = 8 // the digest of the initdata, extended once by the early stage
	PCREvents = eventlog.IndexPCR14
)

// TPM is a TPM 2.0. One command sequence runs at a time: a quote is never
// taken between the two halves of anything else.
type TPM struct {
	mu   sync.Mutex
	spec string
	t    transport.TPMCloser // nil once closed

	options AKOptions
	ak      *attestationKey // made at first use, gone with Close
}

// OpenTPM opens "device:PATH", a resource-managed TPM device, or "unix:PATH",
// the command socket of a TPM in another process (swtpm). Whether a TPM is
// trusted is decided by the broker's EK roots, not by how it is reached.
func OpenTPM(spec string) (*TPM, error) {
	kind, path, ok := strings.Cut(spec, ":")
	if !ok || path == "" {
		return nil, cause.New(cause.Config, "tpm %q is not device:PATH or unix:PATH", spec)
	}
	var (
		t   transport.TPMCloser
		err error
	)
	switch kind {
	case "device":
		t, err = linuxtpm.Open(path)
	case "unix":
		t, err = linuxudstpm.Open(path)
	default:
		return nil, cause.New(cause.Config, "tpm %q is not device:PATH or unix:PATH", spec)
	}
	if err != nil {
		return nil, cause.New(cause.TPMUnavailable, "open %s: %w", spec, err)
	}
	return &TPM{spec: spec, t: t}, nil
}

// Close flushes the attestation key and closes the TPM.
func (p *TPM) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.t == nil {
		return nil
	}
	if p.ak != nil {
		_ = p.flush(p.ak.handle)
		p.ak = nil
	}
	err := p.t.Close()
	p.t = nil
	return err
}

// ReadPCRs returns the values of PCRs in the SHA-256 bank, 32 bytes each.
func (p *TPM) ReadPCRs(ctx context.Context, index ...int) (map[int][]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.readPCRs(ctx, index...)
}

// readPCRs reads eight PCRs a command, the most that TPMs answer at once.
func (p *TPM) readPCRs(ctx context.Context, index ...int) (map[int][]byte, error) {
	values := make(map[int][]byte, len(index))
	for len(index) > 0 {
		if err := p.usable(ctx); err != nil {
			return nil, err
		}
		n := min(len(index), 8)
		part := index[:n]
		index = index[n:]
		for _, i := range part {
			if i < 0 || i >= PCRCount {
				return nil, fmt.Errorf("there is no PCR %d", i)
			}
		}
		answer, err := tpm2.PCRRead{PCRSelectionIn: selection(part...)}.Execute(p.t)
		if err != nil {
			return nil, p.failed("read PCRs", err)
		}
		if len(answer.PCRValues.Digests) != len(part) {
			return nil, cause.New(cause.TPMUnavailable, "the TPM answered %d of %d PCRs: its SHA-256 bank is not active", len(answer.PCRValues.Digests), len(part))
		}
		for n, i := range ascending(part) {
			values[i] = answer.PCRValues.Digests[n].Buffer
		}
	}
	return values, nil
}

// ExtendPCR extends a PCR's SHA-256 bank by a digest of 32 bytes.
func (p *TPM) ExtendPCR(ctx context.Context, index int, digest []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.usable(ctx); err != nil {
		return err
	}
	if len(digest) != crypto.SHA256.Size() {
		return fmt.Errorf("digest of %d bytes, expected %d", len(digest), crypto.SHA256.Size())
	}
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(index), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
			{HashAlg: tpm2.TPMAlgSHA256, Digest: digest},
		}},
	}.Execute(p.t)
	if err != nil {
		return p.failed(fmt.Sprintf("extend PCR %d", index), err)
	}
	return nil
}

// PCR14 is the register of the event log. Only the SHA-256 bank is extended:
// it is the one that is quoted, and rules name no other.
func (p *TPM) PCR14() eventlog.Register { return pcr14{p} }

type pcr14 struct{ p *TPM }

func (r pcr14) Name() string { return "pcr14" }
func (r pcr14) Index() int   { return PCREvents }

func (r pcr14) Extend(ctx context.Context, digests map[crypto.Hash][]byte) error {
	return r.p.ExtendPCR(ctx, PCREvents, digests[crypto.SHA256])
}

func (r pcr14) Read(ctx context.Context) ([]byte, error) {
	values, err := r.p.ReadPCRs(ctx, PCREvents)
	return values[PCREvents], err
}

// usable says whether commands may be sent. mu is held.
func (p *TPM) usable(ctx context.Context) error {
	if p.t == nil {
		return cause.New(cause.TPMUnavailable, "%s is closed", p.spec)
	}
	return ctx.Err()
}

func (p *TPM) flush(h tpm2.TPMHandle) error {
	_, err := tpm2.FlushContext{FlushHandle: h}.Execute(p.t)
	return err
}

// failed sorts an error of a TPM command: an answer with a TPM return code is
// the TPM's refusal, anything else means that it does not answer.
func (p *TPM) failed(what string, err error) error {
	var code tpm2.TPMRC
	if errors.As(err, &code) {
		return cause.New(cause.EvidenceFailed, "%s: the TPM refused: %w", what, err)
	}
	return cause.New(cause.TPMUnavailable, "%s: %s: %w", what, p.spec, err)
}

func selection(index ...int) tpm2.TPMLPCRSelection {
	n := make([]uint, len(index))
	for i, v := range index {
		n[i] = uint(v)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash:      tpm2.TPMAlgSHA256,
		PCRSelect: tpm2.PCClientCompatible.PCRs(n...),
	}}}
}

// ascending is the order in which a TPM answers a selection.
func ascending(index []int) []int {
	var out []int
	for i := range PCRCount {
		for _, v := range index {
			if v == i {
				out = append(out, i)
				break
			}
		}
	}
	return out
}
