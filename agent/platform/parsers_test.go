package platform

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"math/big"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
	"github.com/google/go-sev-guest/abi"
	"github.com/google/uuid"

	"github.com/cc-runtime/cvm-agent/agent/eventlog"
	"github.com/cc-runtime/cvm-agent/policy/cause"
	"github.com/cc-runtime/cvm-agent/policy/kbs"
)

func rsaModulus() *big.Int { return new(big.Int).Lsh(big.NewInt(1), 2047) }

// table makes a certificate table as a host would.
func table(t testing.TB, entries ...abi.CertTableEntry) []byte {
	t.Helper()
	return (&abi.CertTable{Entries: entries}).Marshal()
}

func entry(guid string, data []byte) abi.CertTableEntry {
	return abi.CertTableEntry{GUID: uuid.MustParse(guid), RawCert: data}
}

// The host's certificate table is read without trust in any length of it.
func TestHostCertificateTable(t *testing.T) {
	vcek, ask := bytes.Repeat([]byte{1}, 50), bytes.Repeat([]byte{2}, 60)
	good := table(t, entry(abi.VcekGUID, vcek), entry(abi.AskGUID, ask), entry(abi.ExtraPlatformInfoGUID, make([]byte, 8)))
	overflow := bytes.Clone(good)
	binary.LittleEndian.PutUint32(overflow[16:], 0xffffffff) // offset + length is 49 in 32 bits
	beyond := bytes.Clone(good)
	binary.LittleEndian.PutUint32(beyond[20:], uint32(len(good)))
	inHeader := bytes.Clone(good)
	binary.LittleEndian.PutUint32(inHeader[16:], 4)
	for name, c := range map[string]struct {
		table []byte
		kinds []kbs.CertType
		bad   bool
	}{
		"two kinds that are known": {good, []kbs.CertType{kbs.CertVCEK, kbs.CertASK}, false},
		"a VLEK":                   {table(t, entry(abi.VlekGUID, vcek)), []kbs.CertType{kbs.CertVLEK}, false},
		"no table":                 {nil, nil, false},
		"a page of zeros":          {make([]byte, 4096), nil, false},
		"a sum beyond 32 bits":     {overflow, nil, true},
		"an end beyond the table":  {beyond, nil, true},
		"an offset into the head":  {inHeader, nil, true},
		"without its end":          {good[:40], nil, true},
		"one kind twice":           {table(t, entry(abi.VcekGUID, vcek), entry(abi.VcekGUID, ask)), nil, true},
		"half a megabyte and more": {bytes.Repeat([]byte{1}, maxCertTable+1), nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			chain, err := certChain(c.table)
			if (cause.Of(err) == cause.EvidenceFailed) != c.bad {
				t.Fatalf("error %v", err)
			}
			if len(chain) != len(c.kinds) {
				t.Fatalf("%d certificates, expected %v", len(chain), c.kinds)
			}
			for i, k := range c.kinds {
				if chain[i].Type != k || len(chain[i].Data) < 50 {
					t.Errorf("certificate %d is %s with %d bytes, expected %s", i, chain[i].Type, len(chain[i].Data), k)
				}
			}
		})
	}
}

func FuzzHostCertificateTable(f *testing.F) {
	f.Add(table(f, entry(abi.VcekGUID, []byte{1}), entry(abi.ArkGUID, []byte{2})))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = certChain(data) })
}

// A CC event log with the agent's events replays with a public library, to the
// registers that extending one digest after the other gives.
func TestCCELWithEventsReplaysWithAPublicLibrary(t *testing.T) {
	// From an OVMF boot of a TDX guest: see testdata/README.md.
	firmware, err := os.ReadFile("testdata/ccel-ovmf.bin")
	if err != nil {
		t.Fatal(err)
	}
	events := []eventlog.Event{
		{Kind: eventlog.KindPolicy, Policy: "demo", PolicyVersion: 1, PolicyDigest: "sha256:" + strings.Repeat("ab", 32), Signers: []string{strings.Repeat("cd", 32)}},
		{Kind: eventlog.KindImage, Workload: "web", Image: "registry.example/web@sha256:" + strings.Repeat("1", 64)},
	}
	log, rtmrs, err := appendCCEL(firmware, events)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.HasSuffix(log, bytes.Repeat([]byte{0xff}, 8)) {
		t.Error("the padding stayed")
	}
	var want [48]byte
	for _, e := range events {
		b, err := e.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		d := sha512.Sum384(b)
		want = sha512.Sum384(append(want[:], d[:]...))
	}
	if rtmrs[3] != want {
		t.Errorf("RTMR3 replays to %x, expected %x", rtmrs[3], want)
	}
	bank := register.RTMRBank{}
	for i, v := range rtmrs {
		bank.RTMRs = append(bank.RTMRs, register.RTMR{Index: i, Digest: v[:]})
	}
	replayed, err := tcg.ParseAndReplay(log, bank.MRs(), tcg.ParseOpts{})
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, e := range replayed {
		if e.MRIndex() != rtmr3Number {
			continue
		}
		tagged, err := tcg.ParseTaggedEventData(e.RawData())
		if err != nil || e.UntrustedType() != tcg.EventTag || tagged.ID != ourTag {
			t.Fatalf("event %d of RTMR3: %v, %v", found, tagged, err)
		}
		canonical, err := events[found].Canonical()
		if err != nil || !bytes.Equal(tagged.Data, canonical) {
			t.Errorf("event %d is %s, %v", found, tagged.Data, err)
		}
		if sum := sha512.Sum384(tagged.Data); !bytes.Equal(sum[:], e.ReplayedDigest()) {
			t.Errorf("event %d: its digest is not of its content", found)
		}
		found++
	}
	if found != len(events) {
		t.Errorf("%d events of RTMR3, expected %d", found, len(events))
	}

	// Every cut is refused or ends at a record.
	for n := range log {
		if end, err := walkCCEL(log[:n], func(uint32, []byte) {}); err == nil && end != n {
			t.Fatalf("a log cut to %d bytes ends at %d", n, end)
		}
	}
}

func FuzzCCEL(f *testing.F) {
	if firmware, err := os.ReadFile("testdata/ccel-ovmf.bin"); err == nil {
		f.Add(firmware[:2000])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		log, _, err := appendCCEL(data, nil)
		if err == nil && !bytes.HasPrefix(data, log) {
			t.Error("the log is not the firmware's")
		}
	})
}

// The instance key is made once, whoever asks first, and never replaced.
func TestInstanceKeyIsMadeOnce(t *testing.T) {
	dir := t.TempDir()
	keys := make([]string, 8)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			k, err := instanceKey(dir)
			if err != nil {
				t.Error(err)
				return
			}
			b, err := k.PublicKey.Bytes()
			if err != nil {
				t.Error(err)
			}
			keys[i] = string(b)
		})
	}
	wg.Wait()
	for _, k := range keys {
		if k == "" || k != keys[0] {
			t.Fatal("two keys in one boot")
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v, %v: expected the key alone", entries, err)
	}
	path := dir + "/" + InstanceKeyFile
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	for name, spoil := range map[string]func() error{
		"readable by others": func() error { return os.Chmod(path, 0o644) },
		"cut off":            func() error { return os.WriteFile(path, []byte("-----BEGIN PRIVATE KEY-----\n"), 0o600) },
		"a directory":        func() error { return os.Mkdir(path, 0o700) },
	} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if _, err := instanceKey(dir); err != nil {
			t.Fatal(err)
		}
		if name == "cut off" || name == "a directory" {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if _, err := instanceKey(dir); cause.Of(err) != cause.EvidenceFailed {
			t.Errorf("%s gave %v", name, err)
		}
	}
}

// An area of the firmware's may be larger than any log in it; a log may not.
func TestCCELAreaAndLog(t *testing.T) {
	firmware, err := os.ReadFile("testdata/ccel-ovmf.bin")
	if err != nil {
		t.Fatal(err)
	}
	area := append(bytes.Clone(firmware), bytes.Repeat([]byte{0xff}, 2<<20)...)
	log, _, err := appendCCEL(area, nil)
	if err != nil || !bytes.HasPrefix(firmware, log) {
		t.Errorf("%d bytes, %v", len(log), err)
	}
	long := bytes.Clone(log)
	for len(long) <= maxCCEL {
		long = binary.LittleEndian.AppendUint32(long, 1)
		long = binary.LittleEndian.AppendUint32(long, evEventTag)
		long = binary.LittleEndian.AppendUint32(long, 1)
		long = binary.LittleEndian.AppendUint16(long, algSHA384)
		long = append(long, make([]byte, 48)...)
		long = binary.LittleEndian.AppendUint32(long, 1<<16)
		long = append(long, make([]byte, 1<<16)...)
	}
	if _, _, err := appendCCEL(long, nil); err == nil {
		t.Errorf("a log of %d bytes was taken", len(long))
	}
}
